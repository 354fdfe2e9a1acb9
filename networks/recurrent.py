"""A frame network followed by a layer over time (methods.md 2), for tables across architectures."""
import torch
from torch import nn

from .convnet import ConvNet
from .standardize import standardize

OVER_TIME = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
HIDDEN = 256  # features of the recurrent layer


class FrameNetwork(nn.Module):
    """The blocks of ConvNet on each frame, then `over_time`: the features' mean, or a recurrent layer's last output.

    Maps clips (B, T, 3, H, W) to logits (B, K).
    """

    def __init__(self, num_classes, frames, size, over_time="mean"):
        super().__init__()
        convnet = ConvNet(num_classes, size)
        self.blocks, features = convnet.blocks, convnet.logits.in_features
        self.recurrent = None if over_time == "mean" else OVER_TIME[over_time](features, HIDDEN, batch_first=True)
        self.logits = nn.Linear(HIDDEN if self.recurrent else features, num_classes)

    def forward(self, clips):
        frames = standardize(clips).flatten(0, 1)                          # (B·T, 3, H, W)
        features = self.blocks(frames).flatten(1).unflatten(0, clips.shape[:2])   # (B, T, F)
        if self.recurrent is None:
            return self.logits(features.mean(1))
        with torch.autocast(clips.device.type, enabled=False):  # on a GPU it would compute this layer in float16
            last = self.recurrent(features.float())[0][:, -1]
        return self.logits(last)
