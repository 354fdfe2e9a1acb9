"""From few frames to as many as a network sees (METHOD 7)."""
import torch
import torch.nn.functional as F
from torch import nn

INTERPOLATIONS = ("duplicate", "linear", "parametric")


class Interpolation(nn.Module):
    """Videos (B, n, C, H, W) of n frames stretched to (B, T, C, H, W) by one matrix (T, n).

    kind: `duplicate` shows each frame T/n times (the nearest one), `linear` mixes the two frames next to each moment, `parametric` learns the
    matrix, from linear's. The fixed matrices are not part of the state: they cost no storage.
    """

    def __init__(self, kind, n, T):
        super().__init__()
        if kind not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {kind!r}: choose one of {', '.join(INTERPOLATIONS)}")
        if not 1 <= n <= T:
            raise ValueError(f"{n} frames cannot be stretched to {T}")
        self.kind = kind
        modes = {"mode": "nearest"} if kind == "duplicate" else {"mode": "linear", "align_corners": False}
        matrix = F.interpolate(torch.eye(n)[None], T, **modes)[0].T.contiguous()   # (T, n): row t holds the shares of frame t
        if kind == "parametric":
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, videos):
        return torch.einsum("tn,bnchw->btchw", self.matrix, videos)
