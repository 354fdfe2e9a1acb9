"""Storage formats of synthetic sets, and their sizes in bytes (methods.md 9).

A quantised value is x̂ = low + q·(high − low) / (2^b − 1). q is an integer of b bits; low and high are fp16 numbers of
each stored frame. The quantiser is part of the set's forward pass, with a straight-through gradient (Bengio et al.
2013, arXiv 1308.3432). So matching and evaluation see exactly what is stored.
"""
import math

import torch

from distill_utils.clips import denormalize, normalize

FORMATS = ("fp32", "fp16", "uint8", "uint4")
PIXELS = "pixels"  # real clips, unchanged: 8-bit RGB pixels, without scales
BITS = {"uint8": 8, "uint4": 4}
LARGEST = torch.finfo(torch.float16).max


class StraightThrough(torch.autograd.Function):
    """Return the values as they are stored; the gradient passes unchanged."""

    @staticmethod
    def forward(context, values, storage):
        return decode(encode(values, storage)).to(values.dtype)

    @staticmethod
    def backward(context, gradient):
        return gradient, None


def as_stored(values, storage) -> torch.Tensor:
    """Return frames (..., C, H, W) as a file will give them back; a second call changes nothing more."""
    return values if storage == "fp32" else StraightThrough.apply(values, storage)


def encode(values, storage) -> torch.Tensor | dict:
    """Return frames (..., C, H, W) as a file stores them: a tensor, or a dict of tensors and plain values."""
    values = values.detach()
    if storage == "fp32":
        return values
    if storage == "fp16":
        return values.clamp(-LARGEST, LARGEST).half()
    if storage == PIXELS:
        return {"storage": PIXELS, "pixels": denormalize(values)}
    least, most = values.amin((-3, -2, -1)), values.amax((-3, -2, -1))     # (...,), of each frame
    levels = 2 ** BITS[storage] - 1
    span = (most - least)[..., None, None, None]
    share = (values - least[..., None, None, None]) / torch.where(span > 0, span, 1)
    # The minimum and the maximum are always levels, so that encoding a second time finds the same scale.
    numbers = (share * levels).round_().to(torch.uint8)
    low, high = (end.clamp(-LARGEST, LARGEST).half() for end in (least, most))
    content = {"storage": storage, "numbers": numbers, "low": low, "high": high}
    if storage == "uint4":
        content |= {"numbers": pack_pairs(numbers), "shape": list(values.shape)}
    return content


def decode(content) -> torch.Tensor:
    """Return frames (..., C, H, W) in float32 from the output of `encode`."""
    if isinstance(content, torch.Tensor):
        return content.float()
    storage = content["storage"]
    if storage == PIXELS:
        return normalize(content["pixels"])
    numbers = content["numbers"] if storage == "uint8" else unpack_pairs(content["numbers"], content["shape"])
    low, high = (content[name].float()[..., None, None, None] for name in ("low", "high"))
    if numbers.dim() != low.dim() or numbers.shape[:-3] != low.shape[:-3] or low.shape != high.shape:
        raise ValueError(f"frames of shape {tuple(numbers.shape)} need one minimum and one maximum per frame")
    return torch.lerp(low, high, numbers / (2 ** BITS[storage] - 1))


def pack_pairs(numbers):
    """Return 4-bit integers packed two to a byte, flat."""
    numbers = torch.nn.functional.pad(numbers.flatten(), (0, numbers.numel() % 2)).view(-1, 2)
    return numbers[:, 0] | numbers[:, 1] << 4


def unpack_pairs(packed, shape):
    numbers = torch.stack((packed & 15, packed >> 4), 1).flatten()
    if len(numbers) - math.prod(shape) not in (0, 1):
        raise ValueError(f"{len(packed)} bytes do not hold {shape} values of 4 bits")
    return numbers[:math.prod(shape)].view(shape)


def stored_bytes(shape, storage) -> int:
    """Return the bytes of frames of this shape (..., C, H, W) in a file."""
    count, frames = math.prod(shape), math.prod(shape[:-3])
    if storage in BITS:
        return math.ceil(count * BITS[storage] / 8) + 2 * 2 * frames       # low and high of each
    return count * {"fp32": 4, "fp16": 2, PIXELS: 1}[storage]
