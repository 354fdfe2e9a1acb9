"""Network modules: tensors in, tensors out. `build` makes one by name."""
import functools

from .convnet import ConvNet
from .convnet3d import ConvNet3D
from .flat import FlatNetwork
from .hallucinator import Hallucinator
from .interpolation import INTERPOLATIONS, Interpolation
from .recurrent import FrameNetwork
from .standardize import standardize
from .video_classifier import VideoClassifier

NETWORKS = {  # video classifiers, by the name that flags take
    "ConvNet3D": ConvNet3D,
    **{f"CNN+{layer}": functools.partial(FrameNetwork, over_time=layer) for layer in ("mean", "RNN", "GRU", "LSTM")},
    **{name: functools.partial(VideoClassifier, name=name) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
}


def build(name, num_classes, frames, size):
    """A fresh video classifier for K classes and clips of `frames` frames of `size` pixels; its weights come from torch's generator."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes, frames, size)
