"""The hallucinator, which makes a video from a still frame and a dynamic memory (methods.md 2)."""
import torch
import torch.nn.functional as F
from torch import nn


class Hallucinator(nn.Module):
    """H: maps static frames (B, 3, H, W) and dynamic memories (B, T, 1, H, W) to videos (B, T, 3, H, W).

    It has 327 parameters. `init="identity"` starts it as static plus dynamic memory on all three channels, `"random"`
    with PyTorch's default.
    """

    def __init__(self, init="random"):
        super().__init__()
        self.convolution = nn.Conv3d(4, 3, 3, padding=1)
        if init not in ("random", "identity"):
            raise ValueError(f"unknown initialisation {init!r} of the hallucinator: choose random or identity")
        if init == "identity":
            with torch.no_grad():
                self.convolution.bias.zero_()
                self.convolution.weight.zero_()
                self.convolution.weight[:, :3, 1, 1, 1] = torch.eye(3)
                self.convolution.weight[:, 3, 1, 1, 1] = 1

    def forward(self, static, dynamic):
        """Compute the 3-D convolution as a 2-D one whose channels are the T times: the same, much faster on a CPU.

        At time t, tap k of the three in time sees the dynamic memory of time t + k − 1, and the static frame if that
        time exists (docs/performance.md).
        """
        T, weight = dynamic.shape[1], self.convolution.weight                            # (3, 4, 3 times, 3, 3)
        seen = torch.eye(T + 2, dtype=weight.dtype, device=weight.device).unfold(0, 3, 1)[:, 1:-1]
        weight = torch.cat([torch.einsum("tuk,ockyx->tocyx", seen, weight[:, :3]),       # (T, 3, 3, 3, 3): of static
                            torch.einsum("tuk,okyx->touyx", seen, weight[:, 3])], 2)     # (T, 3, T, 3, 3): of dynamic
        joined = torch.cat([static, dynamic.squeeze(2)], 1).contiguous(memory_format=torch.channels_last)
        videos = F.conv2d(joined, weight.flatten(0, 1), self.convolution.bias.repeat(T), padding=1)
        return videos.unflatten(1, (T, 3))
