"""Stretch videos to more frames, and enlarge frames (methods.md 7 and 10)."""
import torch
import torch.nn.functional as F
from torch import nn

INTERPOLATIONS = ("duplicate", "linear", "parametric")


class Interpolation(nn.Module):
    """Stretch videos (B, n, C, H, W) of n frames to (B, T, C, H, W) by one matrix (T, n).

    kind: `duplicate` shows each frame T/n times (nearest frame). `linear` mixes the two nearest frames. `parametric`
    learns the matrix, starting from linear. The fixed matrices are not part of the state: they need no storage.
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
    """Enlarge frames (..., h, h) bilinearly to (..., H, H) by one matrix (H, h) for rows and columns.

    Unlike F.interpolate's, its gradient is deterministic on every device. It needs no storage.
    """

    def __init__(self, h, H):
        super().__init__()
        if not 1 <= h <= H:
            raise ValueError(f"frames of {h} pixels cannot be enlarged to {H}")
        self.register_buffer("matrix", weights(h, H, "linear"), persistent=False)

    def forward(self, frames):
        return self.matrix @ frames @ self.matrix.T


def weights(n, T, mode):
    """Return the interpolation matrix (T, n): row t has the weights of the n values in output t."""
    options = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(torch.eye(n)[None], T, mode=mode, **options)[0].T.contiguous()
