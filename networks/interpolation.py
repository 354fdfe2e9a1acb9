"""From few frames to as many as a network sees, and from small frames to large ones (METHOD 7 and 10)."""
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
        matrix = weights(n, T, "nearest" if kind == "duplicate" else "linear")
        if kind == "parametric":
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, videos):
        return torch.einsum("tn,bnchw->btchw", self.matrix, videos)


class Enlargement(nn.Module):
    """Frames (..., h, h) enlarged bilinearly to (..., H, H), by one matrix (H, h) for rows and columns: unlike F.interpolate's, its gradient is
    deterministic on every device. It costs no storage."""

    def __init__(self, h, H):
        super().__init__()
        if not 1 <= h <= H:
            raise ValueError(f"frames of {h} pixels cannot be enlarged to {H}")
        self.register_buffer("matrix", weights(h, H, "linear"), persistent=False)

    def forward(self, frames):
        return self.matrix @ frames @ self.matrix.T


def weights(n, T, mode):
    """Matrix (T, n): row t holds the shares that n values have in value t of T."""
    options = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(torch.eye(n)[None], T, mode=mode, **options)[0].T.contiguous()
