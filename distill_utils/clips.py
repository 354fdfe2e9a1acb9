"""Real clips as uint8: decoded once into a packed array on disk, or decoded from their JPEGs on demand.

Letters: B batch, T frames, H = W = size pixels, K classes. Clips are (B, T, 3, H, W).
"""
import concurrent.futures
import copy
import dataclasses
import functools
import hashlib
import os
import pathlib

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from distill_utils.compute import stays_on_device
from distill_utils.datasets import DATA_PATH, LIST, DataSet, clip_frames, clip_positions, find_dataset, read_videos
from distill_utils.frames import as_rgb, content_digest, find_folders, frame_names
from distill_utils.machine import cores
from distill_utils.packs import open_pack, pack_counts
from distill_utils.temporal import repeated_frames
from distill_utils.workers import mapped
from utils import has_own_memory, json_digest, read_json

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
PACK_FORMAT = 2  # a new number invalidates all packs


@functools.cache
def mean_and_std(device):
    """Return ImageNet's mean and std on the device; each copy to a GPU would wait for all of its work."""
    return MEAN.to(device), STD.to(device)


def normalize(pixels) -> torch.Tensor:
    """Convert uint8 (..., 3, H, W) to float32: pixels / 255, minus ImageNet's mean, divided by its std."""
    mean, std = mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


def denormalize(values) -> torch.Tensor:
    """Invert normalize; round and clamp to uint8."""
    mean, std = mean_and_std(values.device)
    pixels = (values.detach().float() * std + mean) * 255
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


class Clips:
    """All clips of a `split`. labels, videos: (n,) int64 on the CPU, the class and the video number of each clip.

    mirror: probability with which training and matching mirror a clip left-right, by `draw(index,
        flip=draw_flips(len(index), clips.mirror))`; `draw(index)` alone, as in evaluation, does not.
    """

    def __init__(self, take, resident, labels, videos, class_names, dataset, T, size, device,
                 split="test", origin=None, mirror=0.5):
        self.take, self.resident = take, resident
        self.labels, self.videos, self.class_names, self.K = labels, videos, class_names, len(class_names)
        self.origin = origin  # path of the pack, and a digest of which clips of the pack these are
        self.dataset, self.T, self.size, self.device, self.split, self.shown = (
            dataset, T, size, device, split, slice(None))
        self.mirror = mirror
        starts = self.counts().cumsum(0) - self.counts()
        self.rank_in_class = torch.arange(len(labels)) - starts[labels.sort().values]  # of clips sorted by class

    def __len__(self):
        return len(self.labels)

    def counts(self):
        """Return the number of clips per class, (K,) int64."""
        return torch.bincount(self.labels, minlength=self.K)

    def gather(self, index):
        """Return clips by index, an int64 CPU tensor (B,), as uint8 (B, T, 3, H, W) on the device."""
        if self.resident is not None:
            return self.resident.index_select(0, index.to(self.device))
        shape = (len(index), self.T, 3, self.size, self.size)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=has_own_memory(self.device))
        self.take(index, batch)
        return batch.to(self.device, non_blocking=batch.is_pinned())

    def draw(self, index, flip=None):
        """Return clips in normalised pixels, float32 (B, T, 3, H, W), mirrored left-right where `flip` (B,) is true."""
        clips = self.gather(index)[:, self.shown]
        if flip is not None:
            chosen = torch.arange(len(index), device=self.device) + len(index) * flip.to(self.device)
            # This copies whole clips: 8 times faster than torch.where.
            clips = torch.cat((clips, clips.flip(-1))).index_select(0, chosen)
        return normalize(clips)

    def reduced(self, n):
        """Return the same clips with only n frames kept, each repeated (methods.md 7); with n None, all frames."""
        clips = copy.copy(self)
        if n not in (None, self.T):
            clips.shown = repeated_frames(self.T, n).to(self.device)
        return clips

    def class_batch(self, per_class):
        """Return indices of random clips without replacement, sorted by class: min(per_class, class size) each."""
        shuffled_in_class = (self.labels + torch.rand(len(self), dtype=torch.float64)).argsort()
        return shuffled_in_class[self.rank_in_class < per_class]


def load_clips(dataset, *, split, pack=True, pack_path=None, device="cpu", workers=None, mirror=0.5,
               **settings) -> "Clips":
    """Return the clips of a split ("train", "validation" or "test"); `settings` are those of `select`.

    With `pack` the clips are decoded once into a file under `pack_path`. Later calls read only a sample of the frame
    folders, to identify the pack. ValueError if the list, a folder, a frame or a flag is wrong.
    """
    check_positive(workers=workers)
    selection = select(dataset, split=split, **settings)
    device, row = torch.device(device), selection.row
    take = resident = path = None
    used = selection.used
    if pack:
        path = selection.pack(pack_path)
        packed = open_pack(path, selection.shape, lambda: FrameFolders(selection, workers))
        stretched, repeated = pack_counts(path)
        if stays_on_device(packed.clips[0].numel() * int(used.sum()), device):
            resident = copy_to(device, packed, used.nonzero().flatten())
        else:
            take = packed.take
    else:
        folders = FrameFolders(selection, workers)
        take, stretched, repeated = folders.take, folders.stretched, folders.repeated
    report(selection, stretched, repeated)
    if take and not used.all():
        take = taking(take, used.nonzero().flatten())
    origin = (path, hashlib.sha256(used.numpy().tobytes()).hexdigest()[:16]) if path else None
    codes = pd.Categorical(selection.videos.label, categories=selection.class_names).codes
    per_video = selection.positions.shape[1]
    labels = torch.from_numpy(codes.astype(np.int64)).repeat_interleave(per_video)[used]
    videos = torch.arange(len(labels) // per_video).repeat_interleave(per_video)
    return Clips(take, resident, labels, videos, selection.class_names, dataset, row.T, row.size, device, split, origin,
                 mirror)


def copy_to(device, packed, numbers, at_once=256):
    """Return the clips `numbers` of a Pack on the device, copied in pieces: all of them may not fit into the RAM."""
    clips = torch.empty(len(numbers), *packed.clips.shape[1:], dtype=torch.uint8, device=device)
    for part, target in zip(numbers.split(at_once), clips.split(at_once)):
        batch = torch.empty_like(target, device="cpu")
        packed.take(part, batch)
        target.copy_(batch)
    return clips


def report(selection, stretched, repeated):
    """Print how many videos are stretched, and how many training clips repeat another clip of their video."""
    held_out = "" if selection.used.all() else " (with those held out)"
    if stretched:
        print(f"{selection.split}{held_out}: {stretched} of {len(selection.videos)} videos have fewer than "
              f"{selection.row.T} frames and are stretched")
    if repeated and selection.split == "train":  # test clips of short videos repeat by design
        print(f"train{held_out}: {repeated} of {selection.positions.size} clips repeat another clip of the same video")


def taking(take, numbers):
    """Restrict `take` to the clips `numbers`, counted from 0."""
    return lambda index, batch: take(numbers[index], batch)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The clips of a split, before any frame is read. positions: (videos, clips), the start of each clip in its video.

    For "train" this holds all training videos, so that one pack serves any share held out for validation.
    """
    row: DataSet
    split: str
    videos: pd.DataFrame
    class_names: list
    positions: np.ndarray
    seed: int

    @property
    def used(self):
        """Return which clips belong to the split, (n,) bool: held-out videos do not."""
        return torch.from_numpy((self.videos.split == self.split).to_numpy().repeat(self.positions.shape[1]))

    @property
    def shape(self):
        return self.positions.size, self.row.T, 3, self.row.size, self.row.size

    @property
    def listed(self):
        """Digest of the list's rows for these videos, independent of where their folders are."""
        return json_digest([self.class_names, relative(self.videos.folder), self.videos.label.tolist()])[:16]

    def pack(self, folder=None):
        """Return the path of the pack, built or not: a function of the list, the clip rule and the frames' content."""
        row = self.row
        seed = self.seed if self.split == "train" and row.rule == "stride" else None  # other clips do not depend on it
        key = json_digest([PACK_FORMAT, row.T, row.size, row.stride, row.rule, row.frame_names,
                           self.positions.shape[1], seed, self.listed])[:16]
        return pack_folder(folder) / f"{row.name}_{self.split}_T{row.T}_{row.size}px_{key}_{self.content(folder)}.npy"

    def content(self, folder=None):
        """Return a digest of the frames. If they are deleted: that of a pack in `folder` made from this location."""
        folders = self.videos.folder.tolist()
        if found := content_digest(folders, self.row.elsewhere, self.row.frame_names):
            return found
        made = (read_json(path) for path in sorted(pack_folder(folder).glob(f"{self.row.name}_{self.split}_*.json")))
        same = {"listed": self.listed, "place": folders[0], "frame_names": self.row.frame_names}
        contents = sorted({each["content"] for each in made if isinstance(each, dict) and "content" in each
                           and {"frame_names": self.row.frame_names, **each}.items() >= same.items()})
        if len(contents) > 1:
            raise ValueError(f"the frames of {folders[0]} are deleted, and the packs in {pack_folder(folder)} are of "
                             f"several versions of them, *_{'.npy, *_'.join(contents)}.npy: delete all but one")
        return contents[0] if contents else "absent"


def pack_folder(folder):
    return pathlib.Path(folder or DATA_PATH / "packs").absolute()


def relative(folders):
    """Return the paths relative to the last directory that all share."""
    above = os.path.commonprefix([folders.min(), folders.max()]).rpartition("/")[0]
    return folders.str.removeprefix(above).tolist()


def select(dataset, *, split, data_path=None, list_path=None, frames_path=None, T=None, size=None, stride=None,
           train_clips=1, test_clips=3, seed=0, validation=0.0, names=None):
    """Return the Selection of a data set; T, size and stride default to the data set's own.

    validation: the share of training videos to hold out, or "list" for the list's own validation videos; their clips
    are chosen like test clips. names: a glob that selects the frames among images.
    """
    check_positive(frames=T, size=size, stride=stride, train_clips=train_clips, test_clips=test_clips)
    if seed < 0:
        raise ValueError(f"--seed {seed} must be at least 0")
    row = find_dataset(dataset)
    row = dataclasses.replace(row, T=T or row.T, size=size or row.size, stride=stride or row.stride, frame_names=names)
    if row.T == 1:
        row = dataclasses.replace(row, rule="stride")  # static learning: a random frame instead of the first
    videos, class_names = read_videos(dataset, data_path, list_path, frames_path, validation)
    held_out = ["validation"] if split == "train" and validation not in (0, LIST) else []
    videos = videos[videos.split.isin([split, *held_out])]
    if videos.empty:
        raise ValueError(f"the list of {dataset} has no {split} videos: give another list by --list_path")
    clips = 1 if row.rule == "all" else train_clips if split == "train" else test_clips
    return Selection(row, split, videos, class_names, clip_positions(split, len(videos), clips, seed), seed)


def check_positive(**flags):
    for name, value in flags.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")


def draw_flips(count, probability=0.5):
    """Draw for each of `count` clips whether it is mirrored left-right."""
    return torch.rand(count) < probability


# ---------------------------------------------------------------- frames

class FrameFolders:
    """Decoder of a Selection's clips from their frame folders."""

    def __init__(self, selection, workers):
        self.selection, self.positions, self.row = selection, selection.positions, selection.row
        self.folders = folders = find_folders(selection.videos.folder.tolist(), self.row.elsewhere)
        self.workers = workers or cores()
        self.pool = concurrent.futures.ThreadPoolExecutor(self.workers)  # PIL decodes without the GIL
        lengths = list(mapped(self.pool, lambda folder: len(frame_names(folder, self.row.frame_names)), folders))
        self.stretched = sum(length < self.row.T for length in lengths)
        self.repeated = sum(self.count_repeats(*each) for each in enumerate(lengths))

    def decode(self, video, clips=slice(None)):
        """Return all or some clips of a video, uint8 (n, T, 3, H, W); decode a shared frame only once."""
        row, folder = self.row, self.folders[video]
        names = frame_names(folder, row.frame_names)
        numbers = self.frame_numbers(video, len(names), clips)
        needed, where = np.unique(numbers, return_inverse=True)
        frames = np.stack([read_frame(os.path.join(folder, names[number]), row.size) for number in needed])
        return frames[where.reshape(numbers.shape)]

    def count_repeats(self, video, length):
        first = self.frame_numbers(video, length)[:, 0]
        return len(first) - len(np.unique(first))

    def frame_numbers(self, video, length, clips=slice(None)):
        """Return the frame numbers (n, T) of all or some clips of a video of `length` frames."""
        row = self.row
        return clip_frames(length, row.T, row.stride, row.rule, self.positions[video, clips])

    def take(self, index, batch):
        """Decode the clips `index` (B,) into batch (B, T, 3, H, W)."""
        videos, clips = np.divmod(index.numpy(), self.positions.shape[1])
        decoded = self.pool.map(lambda video, clip: self.decode(video, [clip])[0], videos, clips)
        for place, clip in zip(batch.numpy(), decoded):
            place[:] = clip


def read_frame(path, size):
    """Read an image as uint8 RGB (3, size, size): resize the shorter side, crop the middle of the longer side."""
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(as_rgb(image), (size, size), method=Image.Resampling.BICUBIC)
    except Exception as error:  # PIL's decoders raise many kinds of errors
        raise ValueError(f"{path} cannot be read as an image ({error})") from error
    return np.asarray(image).transpose(2, 0, 1)
