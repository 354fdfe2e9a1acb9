"""Chunk sizes, number formats, and memory budgets of the computation."""
import math
import os
import pathlib
import re
import tempfile

import torch

from distill_utils.machine import memory_limits
from networks import WIDTH
from utils import TEXT, accelerator_memory, has_own_memory

PRECISIONS = ("fp32", "tf32", "bf16")


def set_precision(device, precision):
    """Set the precision of convolutions in this process, and return the precision to use.

    `tf32` allows tf32 convolutions; all other float32 products are exact. `auto` becomes bf16 on a CPU or a CUDA GPU
    that supports it in hardware, if cuDNN computes it well; else fp32. ValueError for tf32, or bf16 on a GPU, without
    hardware support.
    """
    if precision == "bf16" and device.type == "cuda" and not is_ampere(device):  # its convolutions would not use cuDNN
        raise ValueError("--precision bf16 needs an NVIDIA GPU of the Ampere generation or later: give fp32")
    if precision == "bf16" and device.type == "cpu" and cpu_only_infers_in_bf16():
        raise ValueError("--precision bf16: PyTorch cannot train in bf16 on this CPU: give fp32")
    if precision == "tf32" and not has_tf32(device):
        raise ValueError("--precision tf32 needs an NVIDIA GPU of the Ampere generation or later: give fp32 or bf16")
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = precision == "tf32", False
    if precision == "auto":
        fast = cpu_has_bf16() if device.type == "cpu" else is_ampere(device) and not has_faulty_bf16()
        return "bf16" if fast else "fp32"
    return precision


def is_ampere(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_faulty_bf16():
    """Return whether bf16 convolutions over time may be wrong or slow, as in cuDNN 9.8 to 9.14 (PyTorch 2.9, for one).

    See PyTorch's issues 163539 and 166122.
    """
    return not torch.version.hip and 90800 <= (torch.backends.cudnn.version() or 0) < 91500


def has_tf32(device):
    return is_ampere(device) and not torch.version.hip  # PyTorch calls AMD's GPUs cuda too


CPU_INFO = pathlib.Path("/proc/cpuinfo")


def cpu_has_bf16(path=CPU_INFO):
    """Return whether the CPU has fast bfloat16 products in backward passes too: AVX-512 or AMX.

    Else bf16 is several times slower than fp32. Arm CPUs have such products, but PyTorch's backward pass of
    convolutions does not use them there (oneDNN has reference kernels only).
    """
    return path.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", path.read_text(**TEXT)))


def cpu_only_infers_in_bf16(path=CPU_INFO):
    """Return whether the CPU has bfloat16 without AVX-512 (AVX-VNNI-2), where PyTorch refuses backward passes."""
    return path.exists() and not cpu_has_bf16(path) and bool(re.search(r"\bavx_ne_convert\b", path.read_text(**TEXT)))


def autocast(device, precision):
    """Return a context in which `bf16` computes convolutions in bfloat16; weights, sums and updates stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def apply_network(function, clips, precision):
    """Return function(clips) in the dtype of the clips; its convolutions are in `precision`, see autocast."""
    with autocast(clips.device, precision):
        return function(clips).to(clips.dtype)


def total_memory(device):
    """Return the total memory in bytes of a GPU, or of the machine or its container (the smaller), used or free."""
    if device.type != "cpu":
        return accelerator_memory(device)[1]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *memory_limits()])


def stays_on_device(size, device):
    """Return whether clips of `size` bytes are kept on a GPU.

    They must leave five eighths of the memory free, which clips_at_once and count_kept_steps use. Where the GPU has no
    memory of its own, nothing would be gained.
    """
    if not has_own_memory(device):
        return False
    free, total = accelerator_memory(device)
    return size <= free - 5 / 8 * total


def channel_bytes(frames, size):
    """Return the bytes of one channel of a clip in ConvNet3D's first block, T·(size/2)² float32."""
    return 4 * frames * (size / 2) ** 2


def memory_budget(device):
    """Return the bytes for the activations of one forward pass: 0.5 GB on a CPU, an eighth of a GPU's memory.

    It is of the total, not the free memory: the chunk size affects rounding, and a resumed run must chunk identically.
    """
    return 2 ** 29 if device.type == "cpu" else total_memory(device) / 8


def clips_at_once(frames, size, device, width=WIDTH):
    """Return how many clips of T frames go through ConvNet3D of this width together, within the memory budget.

    A clip's activations are mostly the width/2 channels of the first block, kept about four times. The clip itself and
    tensors derived from it weigh as much as 16 channels.
    """
    return max(1, min(1024, int(memory_budget(device) / (4 * max(width // 2, 16) * channel_bytes(frames, size)))))


def parameter_bytes(net):
    return sum(parameter.nbytes for parameter in net.parameters())


def kept_step_bytes(videos, at_once, frames, size, width, parameters, augmented=False):
    """Return an upper bound of the bytes of one inner step's graph in trajectory matching, until its backward pass.

    Activations weigh as much as three times the width/2 channels of the first block, plus 90 channels (the clip and
    tensors derived from it), or 162 if videos are `augmented` (six more copies of the clip). Each piece of at most
    `at_once` videos adds two parameter vectors, and the step adds three.

    This is 1.2 to 1.6 times the measured growth in peak memory of a CPU process per kept step. Measured with pixels,
    interpolated pixels, static and dynamic memory; widths 32 and 128; 8 × 64², 9 × 43² and 16 × 112² pixels; fp32 and
    bf16; 1 to 4 pieces. Not measured on a GPU.
    """
    vectors = 3 + 2 * math.ceil(videos / at_once)
    return (videos * (3 * (width // 2) + (162 if augmented else 90)) * channel_bytes(frames, size)
            + vectors * 4 * parameters)


def count_kept_steps(videos, at_once, frames, size, width, parameters, device, augmented=False):
    """Return how many inner steps of trajectory matching keep their graphs within the memory budget.

    Each step has a batch of `videos`. The budget is a quarter of the memory of the machine or its container, shared by
    its processes (torchrun's LOCAL_WORLD_SIZE), or half of a GPU's memory. Use total, not free, memory: the number
    affects rounding, and a resumed run must keep as many. The bytes of one step stay free for the step that the
    backward pass works on.
    """
    budget = total_memory(device) / (
        4 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 2)
    return max(0, int(budget / kept_step_bytes(videos, at_once, frames, size, width, parameters, augmented)) - 1)


class KnownGradient(torch.autograd.Function):
    """A loss whose gradients with respect to `tensors` are known; `loss.backward()` passes them on to the tensors.

    With it a matching computes its gradient piece by piece, frees the graph of each piece before the next, and still
    returns a loss.
    """

    @staticmethod
    def forward(context, loss, gradients, *tensors):
        context.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(context, outer):
        gradients = context.saved_tensors
        # For outer = 1 (the usual case) return the same tensors: no second copy of a large set.
        return None, None, *(gradients if outer == 1 else (outer * gradient for gradient in gradients))


class DiskStack:
    """A stack of vectors of one length in a temporary file, so that memory does not grow with their number.

    The file is kept for reuse: overwriting it takes a thirtieth of the time of writing a new one.
    """

    def __init__(self):
        self.file, self.length = tempfile.TemporaryFile(), 0

    def __deepcopy__(self, memo):
        return DiskStack()  # a copy needs its own file

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
