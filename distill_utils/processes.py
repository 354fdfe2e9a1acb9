"""Several processes (torchrun), and how a script starts and ends in one or many of them."""
import codecs
import contextlib
import datetime
import errno
import io
import os
import re
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from distill_utils.machine import limit_threads
from utils import TEXT, find_device, save_json

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


# ---------------------------------------------------------------- a script

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
