"""Network modules: tensors in, tensors out. `build` makes a network by name."""
import functools

import torch

from .convnet import ConvNet
from .convnet3d import WIDTH, ConvNet3D
from .flat import FlatNetwork
from .hallucinator import Hallucinator
from .interpolation import INTERPOLATIONS, Enlargement, Interpolation
from .recurrent import FrameNetwork
from .standardize import standardize
from .video_classifier import VideoClassifier

NETWORKS = {  # video classifiers, by the names that flags use
    "ConvNet3D": ConvNet3D,
    **{f"CNN+{layer}": functools.partial(FrameNetwork, over_time=layer) for layer in ("mean", "RNN", "GRU", "LSTM")},
    **{name: functools.partial(VideoClassifier, name=name) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
}


BATCH_NORM = ("r3d_18", "mc3_18", "r2plus1d_18")  # their result depends on how many clips go through them together


def clips_together(name, budget):
    """Return how many clips go through the network together, for a memory budget of `budget` clips of ConvNet3D.

    Networks with batch normalisation always take 16, whatever the budget: their result depends on this number.
    """
    if name in BATCH_NORM:
        return 16
    return budget if name == "ConvNet3D" else max(1, budget // 6)  # measured: CNN+mean keeps 6 times as much per clip


def build(name, num_classes, frames, size, width=WIDTH, compile=False) -> torch.nn.Module:
    """Return a fresh video classifier for K classes and clips of `frames` frames of `size` pixels.

    The weights come from torch's generator.

    width: channels of ConvNet3D's last block; the other networks have a fixed width.
    compile: use torch.compile, which compiles once for all fresh networks; the result cannot be differentiated twice.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    net = NETWORKS[name](num_classes, frames, size, **({"width": width} if name == "ConvNet3D" else {}))
    if compile:
        net.compile(dynamic=False)
        if hasattr(net, "embed"):
            net.embed = torch.compile(net.embed, dynamic=False)
    return net
