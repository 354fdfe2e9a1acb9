"""Synthetic sets (methods.md 3): the learned data, N synthetic videos for each of K classes.

A call takes video numbers 0 … K·N−1 and returns videos (B, T, 3, H, W) in normalised pixels and their labels (B,). The
videos are differentiable with respect to the learned parameters. Video n is the (n % N)-th video of class n // N.
With `part`, a slice, it returns only that part of the videos, but draws the random numbers of all. So several ranks can
share the videos that a single process would draw.
"""
import copy
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from distill_utils.storage import FORMATS, PIXELS, as_stored, decode, encode, stored_bytes
from networks import Enlargement, Hallucinator, Interpolation
from utils import load as load_file
from utils import random_stream


class SyntheticSet(nn.Module):
    """Base class of the sets: K classes of N = `ipc` videos, with frames in a storage format and a decoder to videos.

    The parameters in MEMORIES are learned in float32 and shown as they are stored in the format `storage`
    (distill_utils/storage.py). If a matching adds learnable `soft_labels` (K·N, K) to the set (methods.md 14), they are
    stored in fp16, and a call returns their softmax (B, K) as labels.
    """

    MEMORIES = ()

    def __init__(self, num_classes, ipc, storage="fp32"):
        super().__init__()
        self.K, self.N, self.storage = num_classes, ipc, storage
        self.soft_labels = None

    def __len__(self):
        return self.K * self.N

    @property
    def labels(self):
        return torch.arange(self.K).repeat_interleave(self.N)

    def targets(self, index, device):
        """Return the labels of videos `index`: their classes (B,), or the softmax of learned labels (B, K)."""
        if self.soft_labels is None:
            return (index // self.N).to(device)
        return self.scores()[index].softmax(1).to(device)

    def scores(self):
        """Return the labels for regression, (K·N, K): the learned ones, or their start values (methods.md 14).

        The start values are one-hot minus 1/K, divided by √(K/10).
        """
        if self.soft_labels is None:
            return regression_labels(self.labels, self.K)
        return as_stored(self.soft_labels, "fp16")

    def of_class(self, label):
        """Return the videos of one class, (N, T, 3, H, W)."""
        return self(torch.arange(label * self.N, (label + 1) * self.N))[0]

    def frozen(self):
        """Return a copy for training networks: the same draws, but no gradients."""
        return copy.deepcopy(self).requires_grad_(False)

    def every(self, classes=slice(None)):
        """Return all videos that the set can show of `classes`, each pair of memories once, and their labels (n,)."""
        index = torch.arange(len(self)).view(self.K, self.N)[classes].flatten()
        return self(index)[0], self.labels[index]

    def bytes(self):
        """Return the bytes that must be kept to use the set, in its storage format."""
        formats = dict.fromkeys(self.MEMORIES, self.storage) | {"soft_labels": "fp16"}
        return sum(stored_bytes(tensor.shape, formats.get(name, "fp32")) for name, tensor in self.state_dict().items())

    def bytes_fp32(self):
        """Return the bytes of the stored values at 32 bits each, the convention of the papers' tables."""
        return sum(4 * tensor.numel() for tensor in self.state_dict().values())

    def encoded(self, name):
        """Return a memory as a file stores it."""
        return encode(getattr(self, name).detach().cpu(), self.storage)

    def learned_labels(self):
        """Return the learned labels as a file stores them; empty without learned labels."""
        return {} if self.soft_labels is None else {"soft_labels": encode(self.soft_labels.cpu(), "fp16")}


def regression_labels(labels, num_classes) -> torch.Tensor:
    """Return one-hot labels minus 1/K, divided by √(K/10), (B, K)."""
    return (F.one_hot(labels, num_classes) - 1 / num_classes) / math.sqrt(num_classes / 10)


class PixelSet(SyntheticSet):
    """The baselines' set: videos (K·N, n, 3, H, W), learned directly.

    An Interpolation stretches the n frames to T; None if n = T.
    """

    MEMORIES = ("videos",)

    def __init__(self, videos, num_classes, interpolation=None, storage="fp32"):
        super().__init__(num_classes, len(videos) // num_classes, storage)
        self.videos, self.interpolation = nn.Parameter(videos), interpolation

    def forward(self, index, part=slice(None)):
        index = index[part]
        videos = self.videos.index_select(0, index.to(self.videos.device))  # backward is 8 times faster than indexing's
        videos = as_stored(videos, self.storage)
        if self.interpolation:
            videos = self.interpolation(videos)                            # (B, T, 3, H, W)
        return videos, self.targets(index, videos.device)

    def param_groups(self, lr_img, lr_interpolation=0.0):
        learned = list(self.interpolation.parameters()) if self.interpolation else []
        return [{"params": [self.videos], "lr": lr_img}] + (
            [{"params": learned, "lr": lr_interpolation}] if learned else [])

    def content(self):
        """Return the content of the set's file."""
        content = {"videos": self.encoded("videos"), "labels": self.labels, **self.learned_labels()}
        if self.interpolation:
            content |= {"interpolation": self.interpolation.kind, "matrix": self.interpolation.matrix.detach().cpu()}
        return content


class StillSet(SyntheticSet):
    """Static memory alone (K, spc, 3, h, h), enlarged to `size` pixels.

    Each of the N slots of a class owns spc/N frames; each draw repeats one of them T times.
    """

    MEMORIES = ("static",)

    def __init__(self, static, ipc, frames, size=None, storage="fp32"):
        super().__init__(len(static), ipc, storage)
        check_divides(ipc, spc=static.shape[1])
        self.static, self.T = nn.Parameter(static), frames
        self.enlarge = enlargement(static, size)

    def forward(self, index, part=slice(None)):
        still = self.decode(draw_memory(self.static, index, self.N, part))
        return still.unsqueeze(1).expand(-1, self.T, -1, -1, -1), self.targets(index[part], still.device)

    def decode(self, static):
        """Return the frames (B, 3, H, W) of static memories (B, 3, h, h)."""
        return self.enlarge(as_stored(static, self.storage))

    def every(self, classes=slice(None)):
        static = self.static[classes]                                      # (classes, spc, 3, h, h)
        return (self.decode(static.flatten(0, 1)).unsqueeze(1).expand(-1, self.T, -1, -1, -1),
                torch.arange(self.K)[classes].repeat_interleave(static.shape[1]))

    def content(self):
        """Return the content of a static memory file: "image" (K·spc, 3, h, h) and "label" (K·spc,)."""
        return {"image": encode(self.static.detach().flatten(0, 1).cpu(), self.storage),
                "label": torch.arange(self.K, dtype=torch.int16).repeat_interleave(self.static.shape[1]),
                **self.learned_labels()}


class StaticDynamicSet(SyntheticSet):
    """Static memory S (K, spc, 3, h, h), dynamic memory D (K, dpc, n, 1, h', h') and the hallucinator H.

    Slot (c, i) owns spc/N static and dpc/N dynamic memories. Each draw pairs one of each at random: x = H(S[c, s],
    D[c, d]). Before H, both are enlarged bilinearly to `size` pixels, and D is stretched linearly to T = `frames`
    (methods.md 10). By default, size and frames are those of the memories.
    """

    MEMORIES = ("static", "dynamic")

    def __init__(self, static, dynamic, hallucinator, ipc, frames=None, size=None, storage="fp32"):
        super().__init__(len(static), ipc, storage)
        check_divides(ipc, spc=static.shape[1], dpc=dynamic.shape[1])
        self.static, self.dynamic, self.hallucinator = nn.Parameter(static), nn.Parameter(dynamic), hallucinator
        n, size = dynamic.shape[2], size or max(static.shape[-1], dynamic.shape[-1])
        self.enlarge_static, self.enlarge_dynamic = enlargement(static, size), enlargement(dynamic, size)
        self.stretch = Interpolation("linear", n, frames) if frames not in (None, n) else nn.Identity()

    def forward(self, index, part=slice(None)):
        pairs = (draw_memory(memory, index, self.N, part) for memory in (self.static, self.dynamic))
        videos = self.decode(*pairs)
        return videos, self.targets(index[part], videos.device)

    def decode(self, static, dynamic):
        """Return the videos (B, T, 3, H, W) of static memories (B, 3, h, h) and dynamic memories (B, n, 1, h', h')."""
        return self.hallucinator(self.decode_static(static), self.decode_dynamic(dynamic))

    def decode_static(self, static):
        return self.enlarge_static(as_stored(static, self.storage))

    def decode_dynamic(self, dynamic):
        return self.stretch(self.enlarge_dynamic(as_stored(dynamic, self.storage)))

    def every(self, classes=slice(None)):
        """Return videos (K·N·spc/N·dpc/N, T, 3, H, W), ordered by slot, then static memory, then dynamic memory."""
        static, dynamic = (memory[classes].unflatten(1, (self.N, -1))      # (K, N, group, …)
                           for memory in (self.static, self.dynamic))
        s, d = static.shape[2], dynamic.shape[2]
        pairs = static.repeat_interleave(d, 2).flatten(0, 2), dynamic.repeat(1, 1, s, 1, 1, 1, 1).flatten(0, 2)
        return self.decode(*pairs), torch.arange(self.K)[classes].repeat_interleave(self.N * s * d)

    def param_groups(self, lr_dynamic, lr_hal, lr_static=0.0):
        """Return the optimizer's parameter groups, and freeze S unless `lr_static` is positive."""
        self.static.requires_grad_(lr_static > 0)
        groups = [{"params": [self.dynamic], "lr": lr_dynamic},
                  {"params": list(self.hallucinator.parameters()), "lr": lr_hal}]
        return groups + ([{"params": [self.static], "lr": lr_static}] if lr_static > 0 else [])

    def content(self):
        return {"static": self.encoded("static"), "dynamic": self.encoded("dynamic"), **self.learned_labels(),
                "hallucinator": {name: tensor.cpu() for name, tensor in self.hallucinator.state_dict().items()}}


def enlargement(memory, size):
    """Return a module that enlarges the frames of a memory (..., h, h) to `size` pixels."""
    return Enlargement(memory.shape[-1], size) if size not in (None, memory.shape[-1]) else nn.Identity()


def draw_memory(memory, index, ipc, part=slice(None)):
    """Draw for each video number a random memory of its slot: (K, M, ...) to (B, ...); return only `part` of them."""
    group = memory.shape[1] // ipc
    member, index = torch.randint(group, (len(index),))[part], index[part]
    return memory[index // ipc, index % ipc * group + member]


def check_divides(ipc, **counts):
    for name, count in counts.items():
        if count % ipc or not count:
            raise ValueError(f"--{name} {count} is not a multiple of --ipc {ipc}: each of a class's {ipc} videos needs "
                             "the same number of memories")


# ---------------------------------------------------------------- sets in files

class Distilled(torch.utils.data.Dataset):
    """A distilled set for any training loop.

    Item i is (video (T, 3, H, W) float32 in normalised pixels, label). The label is the number of the class, or, if the
    labels were learned, their softmax (K,): torch's cross-entropy takes both. class_names: names of the classes. A
    static-dynamic set pairs its memories again at each access, so that each epoch sees other videos.
    """

    def __init__(self, synset, class_names):
        self.synset, self.class_names = synset.requires_grad_(False), class_names

    def __len__(self):
        return len(self.synset)

    def __getitem__(self, number):
        videos, labels = self.synset(torch.tensor([range(len(self))[number]]))
        return videos[0], labels[0] if labels.dim() > 1 else int(labels[0])


def load(path) -> Distilled:
    """Return the distilled set of a run folder, or of its file distilled.pt, as a torch Dataset."""
    synset, content = load_set(path)
    return Distilled(synset, content["class_names"])


MOST_PIXELS = 2 ** 24  # upper limit per video: 16 frames of 1024 × 1024 pixels
OLDER = {"lr": 0.01, "size": None, "storage": "fp32"}  # values that files of older versions do not contain


def load_set(path) -> tuple[SyntheticSet, dict]:
    """Return a synthetic set and the content of its file; ValueError if the file is damaged or not of a set."""
    path = pathlib.Path(path)
    path = path / "distilled.pt" if path.is_dir() else path
    content = load_file(path)
    try:
        content = {**OLDER, **content}
        if content["storage"] not in (*FORMATS, PIXELS):
            raise ValueError(f"unknown storage {content['storage']!r}")
        if not 0 < content["frames"] * (content["size"] or 1) ** 2 <= MOST_PIXELS:  # a small file can name a large size
            raise ValueError(f"impossible videos of {content['frames']} frames of {content['size']} pixels")
        synset, names = KINDS[content["kind"]](content), content["class_names"]
        if "soft_labels" in content:
            synset.soft_labels = nn.Parameter(decode(content["soft_labels"]).view(len(synset), synset.K))
        if len(names) != synset.K or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{synset.K} classes need the same number of class names")
        with torch.no_grad(), random_stream(0):
            shape = synset.of_class(synset.K - 1).shape
        if len(shape) != 5 or shape[2] != 3 or shape[3] != shape[4] or not float(content["lr"]) >= 0:
            raise ValueError(f"videos of shape {tuple(shape)} instead of (N, T, 3, H, H), or no valid learning rate")
        return synset, content
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} is not a distilled set of these scripts ({type(error).__name__}: {error})") from error


def pixel_set(content):
    interpolation = None
    if "interpolation" in content:
        matrix = content["matrix"]
        interpolation = Interpolation(content["interpolation"], matrix.shape[1], matrix.shape[0])
        interpolation.matrix.data.copy_(matrix)
    videos, ipc = decode(content["videos"]), content["ipc"]
    if len(videos) % ipc:
        raise ValueError(f"the number of videos, {len(videos)}, is not a multiple of ipc, {ipc}")
    return PixelSet(videos, len(videos) // ipc, interpolation, content["storage"])


def still_set(content):
    spc = content["label"].unique(return_counts=True)[1].unique().item()
    static = decode(content["image"]).unflatten(0, (-1, spc))
    return StillSet(static, content["ipc"], content["frames"], content["size"], content["storage"])


def static_dynamic_set(content):
    hallucinator = Hallucinator()
    hallucinator.load_state_dict(content["hallucinator"])
    return StaticDynamicSet(decode(content["static"]), decode(content["dynamic"]), hallucinator, content["ipc"],
                            content["frames"], content["size"], content["storage"])


KINDS = {"PixelSet": pixel_set, "StillSet": still_set, "StaticDynamicSet": static_dynamic_set}


def load_static(path, num_classes, spc, size) -> torch.Tensor:
    """Return the static memory (K, spc, 3, size, size) from a file of distill_DC.py or of the paper's authors.

    The file has "image" (K·spc, 3, size, size). ValueError if it does not fit.
    """
    content = load_file(path)
    image = content.get("image") if isinstance(content, dict) else None
    if not isinstance(image, (torch.Tensor, dict)):
        raise ValueError(f'{path} is not a static memory: it has no tensor "image"')
    try:
        image = decode(image)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a static memory ({type(error).__name__}: {error})") from error
    if image.shape != (num_classes * spc, 3, size, size):
        raise ValueError(f"{path} has frames of shape {tuple(image.shape)}, but {num_classes} classes with --spc {spc} "
                         f"at {size} pixels need {(num_classes * spc, 3, size, size)}")
    labels = torch.arange(num_classes).repeat_interleave(spc).tolist()
    label = content.get("label", labels)
    if (label.tolist() if isinstance(label, torch.Tensor) else label) != labels:
        raise ValueError(f"{path} does not have {spc} frames of each class in class order")
    if not image.isfinite().all():
        raise ValueError(f"{path} has frames that are not finite: run distill_DC.py again with a lower learning rate")
    return image.detach().reshape(num_classes, spc, 3, size, size)
