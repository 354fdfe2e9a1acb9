"""Several processes (torchrun), and the start and end of a script in one or several of them."""
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

# All ranks run the same program with the same random numbers, and each takes a share of the work. Sums over ranks are
# bitwise equal on all ranks, so that their sets stay equal. Only rank 0 writes the run's files,
# except the scores of networks in an evaluation, which the rank that trained them writes.

PEER_ENDED = 3  # exit code of a process that ended because of another one, as far as it knows
OUTPUT_CLOSED = 141  # exit code of a program whose output nobody reads, as the shell gives it for SIGPIPE


class PeerError(Exception):
    """Communication between ranks failed, usually because another process ended."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device):
    """Join torchrun's processes: NCCL on GPUs, gloo on CPUs. A single process does nothing."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    device = find_device(device)
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    # A rank may wait for days, for example for the experts of another. On one machine torchrun, not this timeout, ends
    # all processes when one ends.
    limit = datetime.timedelta(days=30) if os.environ["GROUP_WORLD_SIZE"] == "1" else datetime.timedelta(hours=12)
    with convert_peer_errors():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    yield
    if device.type == "cpu":
        # Until PyTorch 2.8 gloo's shutdown may deadlock: it holds Python's lock, for which its threads wait.
        exit_now(0)
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


def exit_with_parent(parent):
    """End this process when the torchrun process is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(PEER_ENDED)


@contextlib.contextmanager
def silence_other_ranks():
    """Silence all ranks but 0."""
    if os.environ.get("RANK", "0") == "0" or not dist.is_torchelastic_launched():
        yield
    else:
        with (open(os.devnull, "w", **TEXT) as nowhere, contextlib.redirect_stdout(nowhere),
              contextlib.redirect_stderr(nowhere)):
            yield


def exit_with_message(code, text):
    """End the process with a last message: on stderr, or to torchrun, which reports the first process that failed."""
    if not dist.is_torchelastic_launched():
        print(text, file=sys.stderr)
        sys.exit(code)
    save_json({"message": text, "timestamp": int(time.time())}, os.environ["TORCHELASTIC_ERROR_FILE"])
    exit_now(code)


def exit_now(code):
    """Exit without Python's cleanup, which would wait for the threads of the process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def convert_peer_errors():
    try:
        yield
    except RuntimeError as error:
        raise PeerError(str(error)) from error


def rank_share(count) -> range:
    """Return this rank's range of `count` pieces of work; rank 0, which reports, has as many as any other rank."""
    start, stop = (-(-count * number // world_size()) for number in (rank(), rank() + 1))
    return range(start, stop)


def gather(mine) -> list:
    """Return the results of all pieces of work, in order; `mine`: this rank's results, for its share from `rank_share`."""
    everyone = [mine]
    if world_size() > 1:
        everyone = [None] * world_size()
        with convert_peer_errors():
            dist.all_gather_object(everyone, mine)
    return [result for results in everyone for result in results]


def broadcast(value):
    """Return rank 0's value on all ranks: a nest of plain values and tensors; received tensors are on the CPU."""
    if world_size() == 1:
        return value
    outline = [tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, value)
               if rank() == 0 else None]
    with convert_peer_errors():
        dist.broadcast_object_list(outline)
    values, device = iter(tree_leaves(value)), "cuda" if dist.get_backend() == "nccl" else "cpu"

    def received(leaf):  # one tensor at a time: a state may be as large as the memory
        sent = next(values) if rank() == 0 else None
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensor = (sent.to(device).contiguous() if rank() == 0
                  else torch.empty(leaf.shape, dtype=leaf.dtype, device=device))
        with convert_peer_errors():
            dist.broadcast(tensor, 0)
        return sent if rank() == 0 else tensor.cpu()
    return tree_map(received, outline[0])


@contextlib.contextmanager
def rank_zero_first():
    """Run the block on rank 0 before the other ranks, so that they find what it made."""
    if rank() > 0:
        broadcast(None)
    yield
    if rank() == 0:
        broadcast(None)


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks in place, and return it."""
    if world_size() > 1:
        with convert_peer_errors():
            dist.all_reduce(tensor)
    return tensor


def sum_gradients(optimizer):
    """Sum each parameter's gradient over all ranks."""
    if world_size() > 1:
        for group in optimizer.param_groups:
            for value in group["params"]:
                if value.requires_grad:
                    value.grad = sum_over_ranks(
                        torch.zeros_like(value) if value.grad is None else value.grad.contiguous())


# ---------------------------------------------------------------- a script

def progress(iterable=None, **options):
    """Return a progress bar with a rate; it prints every 0.2 s on a terminal and every 30 s in a log file."""
    if rank() > 0:
        options["disable"] = True  # else TQDM_DISABLE decides
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30, **options)


def run_script(main, parser, arguments=None):
    """Call main with the parsed flags, in each of torchrun's processes if there are several.

    Report user errors (ValueError, OSError) as one line and exit with code 2; TRACEBACK=1 shows the traceback.
    """
    set_ascii_fallback()
    limit_threads()
    args = parsed(parser, arguments)
    try:
        with process_group(getattr(args, "device", "cpu")), silence_other_ranks():
            main(args)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has ended, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        (exit_now if dist.is_torchelastic_launched() else sys.exit)(OUTPUT_CLOSED)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        exit_with_message(2, f"{parser.prog}: error: {error_line(error)}")
    except (MemoryError, RuntimeError) as error:
        sentence = missing_operation(error) or missing_memory(error)
        if os.environ.get("TRACEBACK") or not sentence:
            raise
        exit_with_message(2, f"{parser.prog}: error: {sentence}")
    except PeerError as error:
        if os.environ.get("TRACEBACK"):
            raise
        exit_with_message(PEER_ENDED, f"{parser.prog}: error: communication with the other processes failed: "
                          f"{error_line(error)}")
    except KeyboardInterrupt:
        advice = (": run the same command to resume from the last checkpoint" if hasattr(args, "checkpoint_seconds")
                  else ": run the same command to continue" if parser.prog in ("prepare", "tune") else "")
        exit_with_message(130, f"{parser.prog}: stopped{advice}")


def parsed(parser, arguments):
    said = io.StringIO()
    try:
        with silence_other_ranks(), contextlib.redirect_stderr(said):
            return parser.parse_args(arguments)
    except SystemExit:
        if said.getvalue():
            exit_with_message(2, said.getvalue().rstrip())
        raise


def missing_memory(error):
    """Return a sentence if the error says that memory was refused, else None; PyTorch has no such class on CPUs."""
    words = re.search(r"(unable|tried) to allocate [\d.,]+ ?\w+|Storage size calculation overflowed.*",
                      error_line(error), re.IGNORECASE)
    if words or isinstance(error, MemoryError):
        return f"out of memory: {words[0] if words else error_line(error) or 'the missing amount is unknown'}"


def missing_operation(error):
    """Return a sentence if this PyTorch lacks an operation on Apple's GPUs, such as max_pool3d before 2.9."""
    if isinstance(error, NotImplementedError) and "MPS device" in str(error):
        return "this PyTorch cannot run these networks on Apple GPUs: install PyTorch 2.9 or later, or give cpu"


PLAIN = str.maketrans({"±": "+-", "×": "x", "·": "*", "−": "-", "…": "...", "²": "^2", "‖": "|", "α": "alpha",
                       "θ": "theta", "∇": "grad ", "Σ": "sum", "∂": "d"})


def set_ascii_fallback():
    """Spell out characters that the terminal cannot encode (PYTHONIOENCODING, the C locale), instead of failing."""
    codecs.register_error("plain", lambda error: (
        error.object[error.start:error.end].translate(PLAIN).encode("ascii", "backslashreplace").decode(), error.end))
    for screen in (sys.stdout, sys.stderr):
        if hasattr(screen, "reconfigure"):
            screen.reconfigure(errors="plain")


def error_line(error):
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk for {error.filename or 'temporary files (set TMPDIR) or for the output'}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, torch.OutOfMemoryError):
        return (f"the GPU's memory is full: end other programs that use it, or lower the sizes "
                f"({' '.join(str(error).split())})")
    return " ".join(str(error).split())
