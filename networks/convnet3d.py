"""ConvNet3D, the network of all main results (methods.md 2)."""
import torch
import torch.nn.functional as F
from torch import nn

from .standardize import standardize

WIDTH = 128  # the paper's: 3,647,666 parameters at K = 50
LEAST_FRAMES = 8  # minimum that the pooling layers reduce to at least one; `embed` alone needs half as many


class ConvNet3D(nn.Module):
    """Three blocks of convolution, ReLU and max-pool, a linear classifier per remaining time step, then the maximum.

    Maps clips (B, T, 3, H, W) in normalised pixels to logits (B, K). There is no normalisation layer: each clip is
    standardised independently at the input, so that its logits do not depend on the batch. The blocks have width/2,
    width and width channels; the paper's width is 128.
    """

    def __init__(self, num_classes, frames, size, dropout=0.5, width=WIDTH):
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"the width {width} of ConvNet3D is not an even number of at least 2: give an even "
                             "--width, because the first block has half as many channels")
        self.blocks = nn.Sequential(
            convolution(3, width // 2), nn.ReLU(inplace=True), nn.MaxPool3d((1, 2, 2)),
            convolution(width // 2, width), nn.ReLU(inplace=True), nn.MaxPool3d(2),
            convolution(width, width), nn.ReLU(inplace=True), nn.MaxPool3d(2))
        side = map_side(size)
        if frames < LEAST_FRAMES or side < 1:
            raise ValueError(f"ConvNet3D needs at least {LEAST_FRAMES} frames of 43 pixels, not {frames} of {size}: "
                             "raise --frames or --size")
        # (2, 2, 2) at 112 pixels; (2, 1, 1) at 64, where only one position is left to average over.
        self.head = nn.Sequential(nn.AvgPool3d((2, min(side, 2), min(side, 2)), stride=1), nn.Dropout(dropout))
        self.logits = nn.Conv3d(width, num_classes, 1)

    def features(self, clips):
        """Return the output of the three blocks, (B, width, t, h, w)."""
        clips = standardize(clips).transpose(1, 2)                         # (B, 3, T, H, W)
        if clips.requires_grad and clips.device.type == "cpu":
            return self.blocks[1:](convolve_blocks(self.blocks[0], clips))
        return self.blocks(clips.contiguous(memory_format=torch.channels_last_3d))

    def embed(self, clips):
        """Return the flattened output of the blocks, (B, width·t·h·w): the feature space of distribution matching."""
        return self.features(clips).flatten(1)

    def forward(self, clips):
        logits = self.logits(self.head(self.features(clips)))              # (B, K, t, h, w)
        return logits.mean((3, 4)).amax(2)                                 # (h, w) is (1, 1) at 64 and 112 pixels


def map_side(size):
    """Return the side of the last feature map: each block halves twice, convolutions round up and pools round down."""
    for _ in range(3):
        size = (size + 1) // 2 // 2
    return size


def convolution(inputs, outputs):
    return nn.Conv3d(inputs, outputs, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3))


def convolve_blocks(first, clips):
    """Apply the `first` convolution, of stride 1×2×2, as one of stride 1 whose channels are the pixels of 2×2 blocks.

    The result is the same, and on a CPU the gradient with respect to clips of 3 channels takes less than half the time
    (docs/performance.md).
    """
    o, c, k = first.weight.shape[:3]
    weight = F.pad(first.weight, (1, 0, 1, 0)).view(o, c, k, 4, 2, 4, 2)              # 8×8 places: 4×4 blocks
    height, width = clips.shape[3:]
    clips = F.pad(clips, (4, 2 + width % 2, 4, 2 + height % 2))                       # two blocks before, one behind
    blocks = clips.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)
    return F.conv3d(blocks.contiguous(memory_format=torch.channels_last_3d),
                    weight.permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3), first.bias, padding=(1, 0, 0))
