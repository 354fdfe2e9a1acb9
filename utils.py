"""Helpers that know nothing of videos: files, locks, devices, random state."""
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import resource
import secrets
import shutil
import sys
import zipfile

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

ROOT = pathlib.Path(__file__).resolve().parent


# ---------------------------------------------------------------- files

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # in any locale; file names may hold bytes that are not text


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that appears under `path` complete or not at all: write a temporary file, fsync, rename."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # process ids repeat on other machines
    try:
        with open(temporary, mode, **({} if "b" in mode else TEXT)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise with_path(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def append(path, line):
    try:
        with open(path, "a", **TEXT) as file:
            file.write(line + "\n")
    except OSError as error:
        raise with_path(error, path) from error


def with_path(error, path):
    """Return the same OSError with a file name: errors from write() have none."""
    return OSError(error.errno, error.strerror or str(error), error.filename or str(path))


def save(content, path):
    # Serialise in memory first: on a full disk torch.save to a file hides the reason; a plain write gives it.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load(path, on_disk=False):
    """Load tensors and plain values of a file written by torch.save; ValueError for anything else.

    Pickled objects and wrong checksums are refused. With `on_disk`, files in the current format are memory-mapped: a
    tensor is read when it is used. Checksums are then not checked, because that would read the whole file.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        archive = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk and archive)
        damaged = zipfile.ZipFile(path).testzip() if archive and not on_disk else None  # PyTorch ignores checksums
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of tensors ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} is wrong")
    if not all(map(is_plain, tree_leaves(content))):
        raise ValueError(f"{path} holds tensors that are sparse, quantised, complex, or larger than their stored data")
    return content


def is_plain(value):
    """Return whether a value is no tensor, or a dense real CPU tensor whose elements are all stored."""
    return not isinstance(value, torch.Tensor) or (
        value.layout is torch.strided and value.device.type == "cpu"
        and not value.is_quantized and not value.is_complex()
        and math.prod(value.shape) * value.itemsize <= value.untyped_storage().nbytes())  # value.nbytes can overflow


def check_space(folder, size, what, remedy):
    """ValueError if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free and {what} needs {size / 1e9:.1f} GB: {remedy}")


def save_json(content, path):
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)


def read_json(path):
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as json ({error})") from error


def lock(file, wait=True):
    """Lock an open file until it is closed or its process ends; BlockingIOError if it is locked and `wait` is false.

    On a file system without locks (some NFS and Lustre mounts), print a warning instead.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK):
            raise
        warn_of_no_locks()


@functools.cache
def warn_of_no_locks():
    print("warning: this file system has no locks: do not run two commands with the same data or settings at the same "
          "time", file=sys.stderr, flush=True)


def lock_folder(folder, name="lock", what="runs the same settings"):
    """Lock a folder against other processes while the returned file is open; ValueError if it is locked."""
    file = open(folder / name, "w")
    try:
        lock(file, wait=False)
    except BlockingIOError:
        raise ValueError(f"another process {what} in {folder}: wait for it to end") from None
    return file  # the lock is released when the process ends in any way


# ---------------------------------------------------------------- devices
#
# A process has one type of accelerator besides the CPU: torch.accelerator. Only this section depends on the type:
#
#                     CPU           CUDA (also AMD's), XPU     MPS
# own memory          no            yes                        no, the CPU's; Metal recommends a limit
# pinned memory       no            yes                        no
# peak memory         resident      allocated by PyTorch       resident (PyTorch does not count)
# random state        torch's       one more                   one more

def find_device(name) -> torch.device:
    """Return `cpu`, `cuda`, `cuda:1`, `mps` or `xpu` as a torch.device, and make an accelerator the current device.

    ValueError if the device does not exist or does not work. Under torchrun, `cuda` is a different GPU on each rank.
    """
    if dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1" and name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is a single device, but there are several processes: give cuda or cpu")
    here = ["cpu", *(f"{torch.accelerator.current_accelerator().type}:{number}"
                     for number in range(torch.accelerator.device_count()))]
    try:
        device = torch.device(
            f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and dist.is_torchelastic_launched() else name)
    except RuntimeError:
        device = None
    if device is None or device.type != "cpu" and f"{device.type}:{device.index or 0}" not in here:
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} finds no such device here: "
                         f"give one of {', '.join(here)} (to a launcher as its first argument: cpu, a GPU's number, "
                         "mps or xpu)")
    if device.type != "cpu":
        try:
            torch.accelerator.set_device_index(device.index or 0)
            torch.zeros((), device=device)
        except RuntimeError as error:  # driver or card too old for this PyTorch, or the card is in use
            raise ValueError(f"--device {name} does not work here: {error}") from error
    return device


def accelerators_in_use():
    """Return PyTorch's module of the accelerator, e.g. {"cuda": torch.cuda}; empty until this process has used it."""
    if not torch.accelerator.is_available():
        return {}
    kind = torch.accelerator.current_accelerator().type
    module = torch.get_device_module(kind)
    return {kind: module} if getattr(module, "is_initialized", lambda: True)() else {}


def has_own_memory(device):
    return device.type not in ("cpu", "mps")


def accelerator_memory(device) -> tuple[int, int]:
    """Return free and total bytes of an accelerator's memory."""
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    module = torch.get_device_module(device)
    try:
        return module.mem_get_info(device)
    except RuntimeError:
        if device.type != "xpu":
            raise
        return 0, module.get_device_properties(device).total_memory  # Intel's integrated GPUs do not tell what is free


def peak_memory(device) -> int:
    """Return this process's peak bytes: allocated, on a device with its own memory; else resident."""
    if has_own_memory(device):
        return torch.get_device_module(device).max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronize():
    """Wait until the accelerator has finished its queued work."""
    for module in accelerators_in_use().values():
        module.synchronize()


# ---------------------------------------------------------------- random state

def seed_everything(seed):
    torch.manual_seed(seed)  # seeds all devices; this project does not use the global generators of Python and numpy


def random_state():
    """Return the random state of the CPU and of this process's accelerator."""
    return {"cpu": torch.get_rng_state(),
            "accelerator": {kind: module.get_rng_state() for kind, module in accelerators_in_use().items()}}


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    for kind, module in accelerators_in_use().items():
        if kind in state.get("accelerator", {}):  # missing if another type of device wrote the checkpoint
            module.set_rng_state(state["accelerator"][kind])


@contextlib.contextmanager
def random_stream(seed):
    """Use a separate random stream within the block; restore the random state after it."""
    before = random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)


def stream_seed(*names) -> int:
    """Return a seed for random_stream: a function of `names` (words and numbers) only."""
    return int(json_digest(names)[:15], 16)


def code_digest(*patterns) -> str:
    """Return a digest of this project's files that match these patterns, relative to its root."""
    files = sorted({file for pattern in patterns for file in ROOT.glob(pattern) if not file.name.startswith(".")})
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def json_digest(values) -> str:
    """Return the SHA-256 of a nest of plain values as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


# ---------------------------------------------------------------- tensors

def tensor_digest(tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def tensors(values):
    """Return all floating-point tensors of a nested state."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def finite(tensors) -> bool:
    """Return whether all values are finite; by the maximum, which keeps nan: 10 times as fast on a CPU as isfinite."""
    return all(tensor.abs().amax().isfinite() for tensor in tensors)
