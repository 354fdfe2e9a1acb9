"""ConvNet, the two-dimensional network of static learning (methods.md 2)."""
from torch import nn

from .standardize import standardize


class ConvNet(nn.Module):
    """Blocks of 3×3 convolution, instance norm, ReLU and average pool, then one linear layer.

    Maps frames (B, 3, H, W) to logits (B, K). Three blocks up to 64 pixels, four above.
    """

    def __init__(self, num_classes, size, width=128):
        super().__init__()
        depth = 3 if size <= 64 else 4
        if size < 2 ** depth:
            raise ValueError(f"ConvNet needs at least {2 ** depth} pixels, not {size}")
        blocks = [block(3 if i == 0 else width, width) for i in range(depth)]
        self.blocks = nn.Sequential(*[module for layers in blocks for module in layers])
        self.logits = nn.Linear(width * (size // 2 ** depth) ** 2, num_classes)

    def embed(self, frames):
        """Return the flattened output of the blocks, (B, width·h·w)."""
        return self.blocks(standardize(frames)).flatten(1)

    def forward(self, frames):
        return self.logits(self.embed(frames))


def block(inputs, outputs):
    return (nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(outputs, outputs),  # one channel per group: instance norm
            nn.ReLU(inplace=True), nn.AvgPool2d(2))
