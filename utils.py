"""Plumbing that knows nothing of videos: atomic files, the machine, random state, devices, several processes, and the run folder."""
import codecs
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import zipfile

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

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


# ---------------------------------------------------------------- the machine

CONTROL_GROUPS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")  # of Linux: those of this process, and where they are mounted


def cores():
    """How many cores this process may use: those that it may run on, or its container's quota where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    figures = *control_group_figures("cpu", "cpu.max"), *control_group_figures("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    return min([allowed, *(math.ceil(quota / period) for quota, period in figures if 0 < quota < math.inf)])


def memory_limits():
    """Bytes of memory that containers grant this process, one limit or several; a machine's own memory may be less."""
    figures = *control_group_figures("memory", "memory.max"), *control_group_figures("memory", "memory.limit_in_bytes")
    return [int(limit) for limit, in figures if limit < math.inf]


def control_group_figures(controller, *names):
    """The numbers in the files `names` of this process's control groups, and of those above them, that have these files; "max" is infinite."""
    mine, mounted = CONTROL_GROUPS
    for line in mine.read_text().splitlines() if mine.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):        # none: version 2
            continue
        top = mounted / controller if controllers else mounted
        group = top / group.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):              # not all have the files
                    yield [float(word.replace("max", "inf")) for name in names for word in (folder / name).read_text().split()]


def limit_threads():
    """PyTorch counts the machine's cores: no more threads than a container grants, here and in processes of ours, where nobody said how many."""
    if not os.environ.get("OMP_NUM_THREADS") and cores() < torch.get_num_threads():
        os.environ["OMP_NUM_THREADS"] = str(cores())
        torch.set_num_threads(cores())


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


# ---------------------------------------------------------------- the command line

def progress(iterable=None, **options):
    """A progress bar with a rate; in a log file a line every half minute instead of ten a second."""
    if rank() > 0:
        options["disable"] = True  # else TQDM_DISABLE decides
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30, **options)


def run_script(main, parser, arguments=None):
    """Call main with the parsed flags, in each of torchrun's processes where it was started so.

    What is the user's to mend ends in one sentence and exit code 2 (TRACEBACK=1 shows where).
    """
    speak_plainly()
    limit_threads()
    args = parsed(parser, arguments)
    try:
        with process_group(getattr(args, "device", "cpu")), only_the_first_speaks():
            main(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        leave(2, f"{parser.prog}: error: {sentence(error)}")
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("TRACEBACK") or not (refused := refused_memory(error)):
            raise
        leave(2, f"{parser.prog}: error: out of memory: {refused}")
    except PeerEnded as error:
        if os.environ.get("TRACEBACK"):
            raise
        leave(PEER_ENDED, f"{parser.prog}: error: the work with the other processes failed: {sentence(error)}")
    except KeyboardInterrupt:
        leave(130, f"{parser.prog}: stopped; the same command goes on from the last checkpoint")


def parsed(parser, arguments):
    said = io.StringIO()
    try:
        with only_the_first_speaks(), contextlib.redirect_stderr(said):
            return parser.parse_args(arguments)
    except SystemExit:
        if said.getvalue():
            leave(2, said.getvalue().rstrip())
        raise


def refused_memory(error):
    """How much memory there was not, of an error that says so, else None. PyTorch has no class of such errors for the CPU."""
    words = re.search(r"(unable|tried) to allocate [\d.,]+ ?\w+|Storage size calculation overflowed.*", sentence(error), re.IGNORECASE)
    if words or isinstance(error, MemoryError):
        return words[0] if words else sentence(error) or "nothing says how much was missing"


PLAIN = str.maketrans({"±": "+-", "×": "x", "·": "*", "−": "-", "…": "...", "²": "^2", "‖": "|", "α": "alpha", "θ": "theta", "∇": "grad ",
                       "Σ": "sum", "∂": "d"})


def speak_plainly():
    """What a screen cannot show, as one of plain ASCII (an inherited PYTHONIOENCODING, the C locale), is spelt out instead of ending the run."""
    codecs.register_error("plain", lambda error: (error.object[error.start:error.end].translate(PLAIN).encode("ascii", "backslashreplace").decode(),
                                                  error.end))
    for screen in (sys.stdout, sys.stderr):
        if hasattr(screen, "reconfigure"):
            screen.reconfigure(errors="plain")


def sentence(error):
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk for {error.filename or 'temporary files: set TMPDIR'}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory does not suffice: end what else uses it, or lower the sizes ({' '.join(str(error).split())})"
    return " ".join(str(error).split())


# ---------------------------------------------------------------- several processes (torchrun)
#
# Every process runs the same program on the same random numbers and takes a share of the work; what they sum is the same bits in all
# of them, so that their sets never part. Only the first writes the run's files.

PEER_ENDED = 3  # exit code of a process whose own work is in order, as far as it knows


class PeerEnded(Exception):
    """Working together failed, mostly because another process ended while this one waited for it."""


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device):
    """Joins torchrun's processes, by NCCL on GPUs and by gloo on CPUs; nothing to do where there is one."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    device = find_device(device)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # A process may wait for days, as for another's experts: on one machine torchrun, not a time limit, ends all when one ends.
    limit = datetime.timedelta(days=30) if os.environ["GROUP_WORLD_SIZE"] == "1" else datetime.timedelta(hours=12)
    with waiting_for_others():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    yield
    if device.type == "cpu":
        end_at_once(0)  # until PyTorch 2.8 gloo's end may wait for ever: for its threads, which wait for Python's lock, which it holds
    dist.destroy_process_group()  # not after an error: it would wait for the others


def end_with(parent):
    """Ends this process when torchrun's is gone, even where that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(PEER_ENDED)


@contextlib.contextmanager
def only_the_first_speaks():
    """What the processes but the first print is dropped; it would be the same again."""
    if os.environ.get("RANK", "0") == "0" or not dist.is_torchelastic_launched():
        yield
    else:
        with open(os.devnull, "w", **TEXT) as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def leave(code, text):
    """Ends the process with a last sentence: to torchrun, which reports that of the process that failed first, else on the screen."""
    if not dist.is_torchelastic_launched():
        print(text, file=sys.stderr)
        sys.exit(code)
    save_json({"message": text, "timestamp": int(time.time())}, os.environ["TORCHELASTIC_ERROR_FILE"])
    end_at_once(code)


def end_at_once(code):
    """Python's own way out would wait for the threads of the group of processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def waiting_for_others():
    try:
        yield
    except RuntimeError as error:
        raise PeerEnded(str(error)) from error


def own(count):
    """Which of `count` pieces of work are this process's: a range of their numbers. The first ones, which report, have as many as any."""
    start, stop = (-(-count * number // world_size()) for number in (rank(), rank() + 1))
    return range(start, stop)


def gather(mine):
    """The results of all pieces of work, in order, from each process's list of those of its `own`."""
    everyone = [mine]
    if world_size() > 1:
        everyone = [None] * world_size()
        with waiting_for_others():
            dist.all_gather_object(everyone, mine)
    return [result for results in everyone for result in results]


def broadcast(value):
    """The first process's value in all of them: tensors, on the CPU then, and plain values."""
    if world_size() == 1:
        return value
    outline = [tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, value) if rank() == 0 else None]
    with waiting_for_others():
        dist.broadcast_object_list(outline)
    values, device = iter(tree_leaves(value)), "cuda" if dist.get_backend() == "nccl" else "cpu"

    def received(leaf):  # one tensor at a time, since a state may be as large as the memory
        sent = next(values) if rank() == 0 else None
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensor = sent.to(device).contiguous() if rank() == 0 else torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
        with waiting_for_others():
            dist.broadcast(tensor, 0)
        return sent if rank() == 0 else tensor.cpu()
    return tree_map(received, outline[0])


@contextlib.contextmanager
def first_goes_ahead():
    """The first process runs the block before the others do, so that these find what it made."""
    if rank() > 0:
        broadcast(None)
    yield
    if rank() == 0:
        broadcast(None)


def sum_over_ranks(tensor):
    """The tensor, summed over all processes in place."""
    if world_size() > 1:
        with waiting_for_others():
            dist.all_reduce(tensor)
    return tensor


def sum_gradients(optimizer):
    """Makes each process's share of the gradients all of them."""
    if world_size() > 1:
        for group in optimizer.param_groups:
            for value in group["params"]:
                if value.requires_grad:
                    value.grad = sum_over_ranks(torch.zeros_like(value) if value.grad is None else value.grad.contiguous())


# ---------------------------------------------------------------- the run folder

class Run:
    """One run's folder, a function of its settings: config.json, metrics.jsonl, log.txt, checkpoint.pt and results.

    The same settings lead to the same folder and go on from its checkpoint, bitwise as if never stopped. `settings` are all flags;
    those named in `without_effect` (paths, device, logging) do not choose the folder. Of several processes the first one reads and writes.
    """

    COUNTERS = ("iteration", "seconds", "steps", "refused", "logged", "loss", "evaluated", "start", "best", "result")

    def __init__(self, settings, save_path, name, without_effect=(), wandb_mode="disabled", checkpoint_seconds=60):
        chosen = {key: value for key, value in sorted(settings.items()) if key not in without_effect}
        self.id = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:8]
        self.folder = pathlib.Path(save_path).absolute() / f"{name}_{self.id}"
        self.metrics, self.wandb = self.folder / "metrics.jsonl", None
        self.iteration, self.seconds, self.steps, self.refused, self.logged, self.loss = 0, 0.0, 0, 0, 0, None
        self.evaluated = None                                    # iteration of the last evaluation
        self.start, self.best, self.result = None, None, None    # value of the evaluation at iteration 0, the best one, the last one
        self.checkpoint_seconds, self.saved_at = checkpoint_seconds, time.monotonic()
        self.stateful = {}
        if rank() == 0:
            self.claim_folder()
            self.write_config(settings, chosen)
            self.start_wandb(wandb_mode, settings, f"{name}_{self.id}")
        processes = f", {world_size()} processes" if world_size() > 1 else ""
        self.say(f"run folder: {self.folder}{processes}")

    def claim_folder(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.folder)
        for leftover in self.folder.glob(".*.tmp"):  # of a write that was killed
            leftover.unlink()

    def write_config(self, settings, chosen):
        path = self.folder / "config.json"
        if path.exists():
            if read_config(path)["chosen"] != json.loads(json.dumps(chosen)):
                raise ValueError(f"{path} has other settings than this command: delete its folder, or give another --save_path")
            return
        versions = {package: importlib.metadata.version(package) for package in ("torch", "torchvision", "numpy")}
        save_json({"command": sys.argv, "settings": settings, "chosen": chosen, "python": sys.version.split()[0], "versions": versions,
                   "git": git_commit(), "created": time.strftime("%Y-%m-%dT%H:%M:%S")}, path)

    def start_wandb(self, mode, settings, name):
        if mode == "disabled":
            return
        import wandb  # slow to import, and not needed when disabled
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise ValueError("--wandb online needs an account: run `wandb login` first, or give --wandb offline")
            self.wandb = wandb.init(project="video-distillation", name=name, id=self.id, resume="allow", dir=self.folder, mode=mode,
                                    config=settings, settings=wandb.Settings(silent=True, console="off"))
            self.wandb.define_metric("*", step_metric="iteration")
        except wandb.Error as error:
            raise ValueError(f"--wandb {mode} does not work here: give --wandb offline or disabled ({error})") from error

    def say(self, text):
        if rank() > 0:
            return
        tqdm.write(text)
        append(self.folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def log(self, **values):
        """One line of metrics.jsonl, and the same to wandb."""
        if rank() > 0:
            return
        line = {"iteration": self.iteration, **values}
        append(self.metrics, json.dumps(line))
        self.logged += 1
        if self.wandb:
            self.wandb.log(line, step=self.logged)  # wandb drops a number that it has seen: what is computed again after a kill

    def resume(self, **stateful):
        """Take up the checkpoint, if there is one; `stateful` are the things with a state_dict that make up the run's state.

        All processes start from the first one's bits, and from its checkpoint, however many wrote it.
        """
        self.stateful = stateful
        path = self.folder / "checkpoint.pt"
        if rank() == 0 and path.exists():
            self.resume_from(path)
        elif rank() == 0:
            self.metrics.write_bytes(b"")
        state = broadcast(self.state())
        if rank() > 0:
            self.set_state(state)

    def resume_from(self, path):
        try:
            state = load(path)
            self.set_state(state)
            metrics_bytes = state["metrics_bytes"]
            if self.metrics.stat().st_size < metrics_bytes:
                raise ValueError(f"{self.metrics.name} lacks lines that were logged before")
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: delete its folder to start anew ({error})") from error
        with open(self.metrics, "ab") as file:
            file.truncate(metrics_bytes)  # what was logged after the checkpoint is computed and logged again
        self.say(f"resumed at iteration {self.iteration}")

    def state(self):
        """All that the rest of the run depends on: what is learned, random state, counters."""
        return {name: thing.state_dict() for name, thing in self.stateful.items()} | {name: getattr(self, name) for name in self.COUNTERS} | {
            "random": random_state()}

    def set_state(self, state):
        for name, thing in self.stateful.items():
            thing.load_state_dict(state[name])
        set_random_state(state["random"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])

    def iterations(self, total, desc="distilling", unit="it", at_once=1):
        """Yield iteration numbers up to and including `total`: the last is for the final evaluation, no step follows it.

        Those between are `at_once` apart.
        """
        with progress(total=total, initial=self.iteration, desc=desc, unit=unit) as self.bar:
            while self.iteration < total:
                yield self.iteration
                following = min(self.iteration + at_once, total)
                self.bar.update(following - self.iteration)
                if time.monotonic() - self.saved_at > self.checkpoint_seconds:
                    self.checkpoint(following)
                self.iteration = following
            yield total

    def due(self, every, total):
        """Whether this iteration is to be evaluated: the first and every so many (none of these where `every` exceeds `total`), and the last."""
        due = (every <= total and self.iteration % every == 0 or self.iteration == total) and self.evaluated != self.iteration
        if due:
            self.check_finite()
            self.check_same()
        return due

    def checkpoint(self, iteration=None):
        """Write the state before the step of `iteration` (by default this one)."""
        self.check_finite()
        if rank() == 0:
            with open(self.metrics, "ab") as metrics:
                os.fsync(metrics.fileno())  # not to be behind the checkpoint, even where the machine stops
                size = metrics.tell()
            save({**self.state(), "iteration": self.iteration if iteration is None else iteration, "metrics_bytes": size}, self.folder / "checkpoint.pt")
        self.saved_at = time.monotonic()

    def check_finite(self):
        """ValueError when anything that is learned is not finite, before it is written anywhere."""
        for name, thing in self.stateful.items():
            if not finite(tensors(thing.state_dict())):
                raise ValueError(f"the {name} is not finite at iteration {self.iteration}: lower the learning rate "
                                 f"(the last good checkpoint stays in {self.folder})")

    def check_same(self):
        """ValueError when what is learned is not the same, to the bit, in all processes."""
        if world_size() == 1:
            return
        found = [tensor for thing in self.stateful.values() for tensor in tensors(thing.state_dict())]
        sums = gather([[int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for tensor in found]])
        if any(each != sums[0] for each in sums):
            raise ValueError(f"the processes do not have the same state at iteration {self.iteration}: start again from the checkpoint in {self.folder}")

    @contextlib.contextmanager
    def timed_step(self, steps=1):
        """Counts the seconds of a step, or of several that are taken side by side, evaluation and checkpoints apart."""
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds, self.steps = self.seconds + time.perf_counter() - start, self.steps + steps

    def step(self, loss_of, optimizer, last_good=None):
        """One step down the gradient of loss_of(): a loss of all processes, the same in each, whose gradients are their shares.

        With a LastGood, a step that leads to a loss that is not finite is taken back and counted.
        """
        with self.timed_step():
            optimizer.zero_grad()
            loss = loss_of()
            if last_good is None:
                self.check_loss(loss)
            if loss.isfinite():
                loss.backward()
                sum_gradients(optimizer)
            if last_good is None:
                optimizer.step()
            elif last_good.step(loss):
                self.check_loss(loss)
            else:
                self.refused += 1
                self.bar.set_postfix(loss=loss.item(), refused=self.refused, refresh=False)

    def check_loss(self, loss):
        """Remember the loss, a tensor or a number; ValueError when it is not finite."""
        self.loss = torch.as_tensor(loss).item()
        if not math.isfinite(self.loss):
            raise ValueError(f"the loss is {self.loss} at iteration {self.iteration}: lower the learning rate "
                             f"(the last good checkpoint stays in {self.folder})")
        self.bar.set_postfix(loss=f"{self.loss:.4g}", refresh=False)

    def keep_best(self, value, **result):
        """Remember the best evaluation along the way, and the first; returns the best."""
        if self.iteration == 0:
            self.start = value
        if self.best is None or value > self.best["value"]:
            self.best = {"value": value, "iteration": self.iteration, **result}
        return self.best

    def finish(self, **result):
        path = self.folder / "result.json"
        if rank() == 0 and not path.exists():  # a finished run that is started again changes nothing
            save_json({"iteration": self.iteration, **result, "steps": self.steps, "refused": self.refused,
                       "seconds_per_iteration": self.seconds / self.steps if self.steps else None}, path)
        if self.wandb:
            self.wandb.finish()


def read_config(path):
    """The config.json of a run: the command, its settings, and the chosen ones, those that have an effect."""
    try:
        config = read_json(path)
        return {name: dict(config[name]) for name in ("settings", "chosen")}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged: delete its folder, or give another --save_path") from None


def tensors(values):
    """All floating-point tensors of a nested state."""
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors(item)]


def finite(tensors):
    """Whether all values are finite; by the largest, which is nan where one is: ten times as fast on a CPU as isfinite of each."""
    return all(tensor.abs().amax().isfinite() for tensor in tensors)


def lock_folder(folder, name="lock", what="runs the same settings"):
    """Refuses a second process; the lock lasts as long as the returned file is open."""
    file = open(folder / name, "w")
    try:
        lock(file, wait=False)
    except BlockingIOError:
        raise ValueError(f"another process {what} in {folder}") from None
    return file  # goes with the process however it ends


def git_commit():
    """The commit of this code; None where there is no git, or none that knows it."""
    ours = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}  # of a hook: another's
    try:
        answer = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"], env=ours, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None
