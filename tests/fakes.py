"""Stand-ins for the slow parts: clips that need no files, and a network small enough to be checked by plain loops."""
import pytest
import torch
from torch import nn

from distill_utils.clips import Clips
from distill_utils.compute import cpu_has_bf16

torch.set_num_threads(1)  # small tensors: threads cost more than they bring

# Without bfloat16 in hardware a convolution in it takes a hundred times as long. What it does in a matching is shown on any CPU by test_matching's
# test_dm_in_bfloat16_is_near_and_keeps_float32_sums, in a tiny network.
PRECISIONS = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="no bfloat16 in hardware: test_dm_in_bfloat16_is_near_and_keeps_float32_sums is for any CPU")


def random_clips(labels, num_classes, *, T=4, size=8, videos=None, seed=0):
    """Real Clips of random pixels; labels: the class of each clip, videos: the video of each (its own)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(labels), T, 3, size, size), dtype=torch.uint8, generator=generator)
    videos = torch.arange(len(labels)) if videos is None else torch.tensor(videos)
    names = [f"class{label}" for label in range(num_classes)]
    return Clips(None, pixels, torch.tensor(labels), videos, names, "toy", T, size, torch.device("cpu"))


class TinyNet(nn.Module):
    """A classifier with the interface of ConvNet3D, no dropout, smooth: gradients agree to rounding."""

    def __init__(self, num_classes, frames, size, width=None):
        super().__init__()
        self.convolution = nn.Conv3d(3, 5, 3, stride=2)
        self.logits = nn.Linear(5 * ((frames - 3) // 2 + 1) * ((size - 3) // 2 + 1) ** 2, num_classes)

    def embed(self, clips):
        return self.convolution(clips.transpose(1, 2)).tanh().flatten(1)

    def forward(self, clips):
        return self.logits(self.embed(clips))
