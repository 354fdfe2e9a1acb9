"""The hallucinator, which makes a video from a still frame and a dynamic memory (METHOD 2)."""
import torch
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
        T = dynamic.shape[1]
        joined = torch.cat([static.unsqueeze(1).expand(-1, T, -1, -1, -1), dynamic], dim=2)   # (B, T, 4, H, W)
        return self.convolution(joined.transpose(1, 2)).transpose(1, 2)
