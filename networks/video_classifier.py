"""torchvision's video classifiers with random weights (methods.md 2), for tables across architectures."""
from torch import nn

from .standardize import standardize

LEAST_SIZE = 17  # pixels; with smaller clips only one value is left to normalise over


class VideoClassifier(nn.Module):
    """`r3d_18`, `mc3_18` or `r2plus1d_18` by name; maps clips (B, T, 3, H, W) to logits (B, K)."""

    def __init__(self, num_classes, frames, size, name):
        super().__init__()
        if size < LEAST_SIZE:
            raise ValueError(f"{name} needs at least {LEAST_SIZE} pixels, not {size}: raise --size")
        from torchvision.models import video  # the import takes 1.5 seconds, and few runs need it

        self.net = getattr(video, name)(weights=None, num_classes=num_classes)

    def forward(self, clips):
        return self.net(standardize(clips).transpose(1, 2))
