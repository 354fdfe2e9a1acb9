"""How much is computed at once, in which number format, and what is kept of it where."""
import pathlib
import re
import tempfile

import torch

from networks import WIDTH

PRECISIONS = ("fp32", "tf32", "bf16")


def set_precision(device, precision):
    """Makes this process's float32 products exact, or those of tf32; returns the precision, which for `auto` is bf16 where the device has it in
    hardware and fp32 elsewhere. ValueError for tf32 where there is none."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not ampere:
        raise ValueError("--precision tf32 needs an NVIDIA GPU of the Ampere generation or later: give fp32 or bf16")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if precision == "auto":
        return "bf16" if ampere or device.type == "cpu" and cpu_has_bf16() else "fp32"
    return precision


def cpu_has_bf16(path=pathlib.Path("/proc/cpuinfo")):
    """Whether the CPU has products of bfloat16 (AVX-512, AMX or Arm's); without them they take several times as long as float32's."""
    return path.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", path.read_text()))


def autocast(device, precision):
    """Convolutions in bfloat16 under `bf16`; weights, sums and updates stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def clips_at_once(frames, size, device, width=WIDTH):
    """How many clips of T frames go through ConvNet3D of that width together within the memory budget: 0.5 GB on a CPU, an eighth of a GPU's memory.

    Of all its memory, not of what is free: the split decides how sums are rounded, and a resumed run must split as before.

    A clip's activations are mostly those of the first block, width/2·T·(size/2)² numbers, kept about four times; the clip itself and what is made
    of it weigh as much as 16 channels do.
    """
    budget = torch.cuda.mem_get_info(device)[1] / 8 if device.type == "cuda" else 2 ** 29
    return max(1, min(1024, int(budget / (4 * 4 * max(width // 2, 16) * frames * (size / 2) ** 2))))


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
