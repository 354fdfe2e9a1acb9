"""How much is computed at once, in which number format, and what is kept of it where."""
import math
import os
import pathlib
import re
import tempfile

import torch

from distill_utils.machine import memory_limits
from networks import WIDTH
from utils import TEXT, accelerator_memory

PRECISIONS = ("fp32", "tf32", "bf16")


def set_precision(device, precision):
    """Makes this process's float32 products exact, or those of tf32; returns the precision, which for `auto` is bf16 where a CPU or a GPU of CUDA has it
    in hardware and fp32 elsewhere. ValueError for tf32 where there is none."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and (not ampere or torch.version.hip):  # AMD's GPUs are cuda to PyTorch
        raise ValueError("--precision tf32 needs an NVIDIA GPU of the Ampere generation or later: give fp32 or bf16")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if precision == "auto":
        return "bf16" if ampere or device.type == "cpu" and cpu_has_bf16() else "fp32"
    return precision


def cpu_has_bf16(path=pathlib.Path("/proc/cpuinfo")):
    """Whether the CPU has products of bfloat16 (AVX-512, AMX or Arm's); without them they take several times as long as float32's."""
    return path.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", path.read_text(**TEXT)))


def autocast(device, precision):
    """Convolutions in bfloat16 under `bf16`; weights, sums and updates stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def total_memory(device):
    """Bytes of memory of a GPU, or of the machine, or of the container where that grants less: all of it, whatever is free."""
    if device.type != "cpu":
        return accelerator_memory(device)[1]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *memory_limits()])


def stays_on_device(size, device):
    """Whether clips of `size` bytes are kept on a GPU: where they leave free the five eighths that clips_at_once and count_kept_steps share out."""
    if device.type == "cpu":
        return False
    free, total = accelerator_memory(device)
    return size <= free - 5 / 8 * total


def channel_bytes(frames, size):
    """Bytes of one channel of a clip in ConvNet3D's first block, T·(size/2)² float32."""
    return 4 * frames * (size / 2) ** 2


def clips_at_once(frames, size, device, width=WIDTH):
    """How many clips of T frames go through ConvNet3D of that width together within the memory budget: 0.5 GB on a CPU, an eighth of a GPU's memory.

    Of all its memory, not of what is free: the split decides how sums are rounded, and a resumed run must split as before.

    A clip's activations are mostly the width/2 channels of the first block, kept about four times; the clip itself and what is made of it weigh as
    much as 16 channels do.
    """
    budget = 2 ** 29 if device.type == "cpu" else total_memory(device) / 8
    return max(1, min(1024, int(budget / (4 * max(width // 2, 16) * channel_bytes(frames, size)))))


def kept_step_bytes(videos, at_once, frames, size, width, parameters, augmented=False):
    """Bytes that the graph of one inner step of trajectory matching takes until the way back has used it, never less than what was measured.

    Activations weigh as much as three times the width/2 channels of the first block and 90 more (the clip and what is made of it), or 162 where videos
    are `augmented` (six more of the clip). Each piece of at most `at_once` videos adds two vectors of parameters, and the step three. That is 1.2 to 1.6 times what the peak memory of a CPU process was
    measured to grow by with each kept step: pixels, interpolated pixels, static and dynamic memory; widths 32 and 128; 8 × 64², 9 × 43² and 16 × 112²
    pixels; fp32 and bf16; 1 to 4 pieces. It was not measured on a GPU.
    """
    vectors = 3 + 2 * math.ceil(videos / at_once)
    return videos * (3 * (width // 2) + (162 if augmented else 90)) * channel_bytes(frames, size) + vectors * 4 * parameters


def count_kept_steps(videos, at_once, frames, size, width, parameters, device, augmented=False):
    """How many inner steps, each of a batch of `videos`, trajectory matching keeps the graphs of within the memory budget.

    The budget is a quarter of the machine's memory, or its container's, shared by its processes (torchrun's LOCAL_WORLD_SIZE), or half of a GPU's. It is
    a share of the total, not of the free memory: the number affects rounding, and a resumed run must keep as many. One step's bytes stay free for the
    step that the way back is at.
    """
    budget = total_memory(device) / (4 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 2)
    return max(0, int(budget / kept_step_bytes(videos, at_once, frames, size, width, parameters, augmented)) - 1)


class KnownGradient(torch.autograd.Function):
    """A loss whose gradients with respect to `tensors` are already there: `loss.backward()` hands them on to whatever made the tensors.

    With it a matching computes its gradient piece by piece, each piece's graph freed before the next, and still returns a loss.
    """

    @staticmethod
    def forward(context, loss, gradients, *tensors):
        context.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(context, outer):
        gradients = context.saved_tensors
        return None, None, *(gradients if outer == 1 else (outer * gradient for gradient in gradients))  # no second copy of a large set


class DiskStack:
    """Vectors of one length, appended and popped like a list's, in a temporary file: the process's memory does not grow with their number.

    The file stays for the next ones: writing over it costs a thirtieth of writing anew.
    """

    def __init__(self):
        self.file, self.length = tempfile.TemporaryFile(), 0

    def __deepcopy__(self, memo):
        return DiskStack()  # a copy of what uses it has a file of its own

    def clear(self):
        self.length = 0

    def append(self, vector):
        self.file.seek(self.length * vector.nbytes)
        self.file.write(vector.numpy().data)
        self.length, self.like = self.length + 1, vector

    def pop(self):
        self.length -= 1
        vector = torch.empty_like(self.like)
        self.file.seek(self.length * vector.nbytes)
        self.file.readinto(vector.numpy().data)
        return vector
