"""Network modules: tensors in, tensors out. `build` makes one by name."""
from .convnet import ConvNet
from .convnet3d import ConvNet3D
from .flat import FlatNetwork
from .hallucinator import Hallucinator
from .interpolation import INTERPOLATIONS, Interpolation
from .standardize import standardize

NETWORKS = {  # video classifiers, by the name that flags take
    "ConvNet3D": ConvNet3D,
}


def build(name, num_classes, frames, size):
    """A fresh video classifier for K classes and clips of `frames` frames of `size` pixels; its weights come from torch's generator."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes, frames, size)
