"""Plumbing that knows nothing of videos: files, devices, random state."""
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import resource
import shutil
import sys
import zipfile

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

ROOT = pathlib.Path(__file__).resolve().parent


# ---------------------------------------------------------------- files

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # whatever the locale; a file's name may hold bytes that are no text


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """A file that appears under `path` whole or not at all: a temporary name beside it, fsync, rename."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """The same OSError with a file name: one from a write has none."""
    return OSError(error.errno, error.strerror or str(error), error.filename or str(path))


def save(content, path):
    # Through memory: on a full disk torch.save into a file hides the reason, a plain write gives it.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load(path, on_disk=False):
    """Tensors and plain values of a file that torch.save wrote; ValueError for anything else, pickled objects included, and for a wrong checksum.

    `on_disk` leaves the tensors there until they are used, in files of today's format, and their checksums, which would take reading it all.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        archive = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk and archive)
        damaged = zipfile.ZipFile(path).testzip() if archive and not on_disk else None  # PyTorch does not look at checksums
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of tensors ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} is wrong")
    if not all(map(is_plain, tree_leaves(content))):
        raise ValueError(f"{path} holds tensors that are sparse, quantised, complex or larger than what is stored of them")
    return content


def is_plain(value):
    """Whether this is a tensor of numbers that all are in memory or on the disk, one by one, or no tensor."""
    return not isinstance(value, torch.Tensor) or (
        value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized and not value.is_complex()
        and value.nbytes <= value.untyped_storage().nbytes())


def check_space(folder, size, what, remedy):
    """ValueError when the disk of `folder` has less than `size` bytes free."""
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
    """Locks an open file for as long as it is open and its process lives; BlockingIOError where another process has the lock and this is not to wait.

    A file system without locks (NFS, Lustre, as some are mounted) gets a warning instead.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK):
            raise
        warn_of_no_locks()


@functools.cache
def warn_of_no_locks():
    print("warning: this file system has no locks: start no two commands of the same data or settings at a time", file=sys.stderr, flush=True)


def lock_folder(folder, name="lock", what="runs the same settings"):
    """Refuses a second process; the lock lasts as long as the returned file is open."""
    file = open(folder / name, "w")
    try:
        lock(file, wait=False)
    except BlockingIOError:
        raise ValueError(f"another process {what} in {folder}") from None
    return file  # goes with the process however it ends


# ---------------------------------------------------------------- devices
#
# Besides the CPU PyTorch knows one accelerator in a process, that of torch.accelerator. What the kinds differ in is asked for here only:
#
#                     CPU           CUDA (also AMD's), XPU     MPS
# memory of its own   no            yes                        no, the CPU's; Metal recommends how much of it to use
# pinned memory       no            yes                        no
# peak of memory      resident      allocated by PyTorch       resident: PyTorch counts none
# random state        torch's       one more                   one more

def find_device(name):
    """`cpu`, `cuda`, `cuda:1`, `mps` or `xpu` as a torch.device, an accelerator as the current one from now on; ValueError when there is none such, or
    when it does not work.

    Of torchrun's processes each has a `cuda` of its own.
    """
    if dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1" and name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is one device, and there are several processes: give cuda or cpu")
    here = ["cpu", *(f"{torch.accelerator.current_accelerator().type}:{number}" for number in range(torch.accelerator.device_count()))]
    try:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and dist.is_torchelastic_launched() else name)
    except RuntimeError:
        device = None
    if device is None or device.type != "cpu" and f"{device.type}:{device.index or 0}" not in here:
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no such device here, only {', '.join(here)}")
    if device.type != "cpu":
        try:
            torch.accelerator.set_device_index(device.index or 0)
            torch.zeros((), device=device)
        except RuntimeError as error:  # of a driver or a card that is too old for this PyTorch, or a card that is not free
            raise ValueError(f"--device {name} does not work here: {error}") from error
    return device


def accelerators_in_use():
    """PyTorch's module of the accelerator, such as {"cuda": torch.cuda}; empty until this process has used it."""
    if not torch.accelerator.is_available():
        return {}
    kind = torch.accelerator.current_accelerator().type
    module = torch.get_device_module(kind)
    return {kind: module} if getattr(module, "is_initialized", lambda: True)() else {}


def has_own_memory(device):
    return device.type not in ("cpu", "mps")


def accelerator_memory(device):
    """Free and total bytes of an accelerator's memory."""
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return torch.get_device_module(device).mem_get_info(device)


def peak_memory(device):
    """Peak bytes of this process: allocated on a device with memory of its own, else resident."""
    if has_own_memory(device):
        return torch.get_device_module(device).max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronize():
    """Wait until the accelerator has done what it was given."""
    for module in accelerators_in_use().values():
        module.synchronize()


# ---------------------------------------------------------------- random state

def seed_everything(seed):
    torch.manual_seed(seed)  # every device's generator; nothing of ours draws from Python's or numpy's global ones


def random_state():
    """Of the CPU and of this process's accelerator."""
    return {"cpu": torch.get_rng_state(), "accelerator": {kind: module.get_rng_state() for kind, module in accelerators_in_use().items()}}


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    for kind, module in accelerators_in_use().items():
        if kind in state.get("accelerator", {}):  # not where another kind of device, or none, wrote the checkpoint
            module.set_rng_state(state["accelerator"][kind])


@contextlib.contextmanager
def random_stream(seed):
    """A stream of random numbers of its own: the state before is the state after."""
    before = random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)


def stream_seed(*names):
    """A seed for random_stream that is a function of `names`, words and numbers, and of nothing else."""
    return int(hashlib.sha256(json.dumps(names).encode()).hexdigest()[:15], 16)


# ---------------------------------------------------------------- tensors

def tensors(values):
    """All floating-point tensors of a nested state."""
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors(item)]


def finite(tensors):
    """Whether all values are finite; by the largest, which is nan where one is: ten times as fast on a CPU as isfinite of each."""
    return all(tensor.abs().amax().isfinite() for tensor in tensors)
