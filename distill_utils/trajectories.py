"""Expert trajectories on disk (methods.md 5).

`replay_buffer_<n>.pt` holds a list of experts. An expert is a list of epochs, and an epoch is a list of parameter
tensors in the order of `net.parameters()`. It is the format of mtt-distillation. With `--keep`, None replaces the
epochs that buffer.py does not keep.
"""
import pathlib
import re

import torch

from utils import finite, load, stream_seed


def snapshot(net, dtype) -> list[torch.Tensor]:
    """Return a copy of the current parameters; on a CPU, `.detach().cpu()` would be a view that training changes."""
    return [parameter.detach().to("cpu", dtype, copy=True) for parameter in net.parameters()]


def expert_bytes(net, snapshots, dtype) -> int:
    """Return the bytes on disk of one expert with this many snapshots."""
    return snapshots * sum(parameter.numel() for parameter in net.parameters()) * dtype.itemsize


def check_epoch(before, after):
    """Check two successive snapshots; ValueError if they are not finite or equal, so that nothing can be matched."""
    if not finite(after):
        raise ValueError("an expert's weights are not finite after an epoch: lower --lr_teacher")
    if all(torch.equal(*pair) for pair in zip(before, after)):
        raise ValueError("an epoch did not change an expert's snapshot: raise --lr_teacher, or give --buffer_dtype "
                         "float32")


def buffer_files(folder) -> list[pathlib.Path]:
    """Return the files of a buffer, ordered by number."""
    found = {int(match[1]): path for path in folder.glob("replay_buffer_*.pt")
             if (match := re.fullmatch(r"replay_buffer_(\d+)", path.stem))}
    if not found:
        raise ValueError(f"{folder} has no replay_buffer_<n>.pt: make the experts with sh/baseline/buffer.sh")
    return [found[number] for number in sorted(found)]


def check_complete(folder, count):
    """ValueError if a run of `count` experts lacks one of their files."""
    missing = [number for number in range(count) if not (folder / f"replay_buffer_{number}.pt").exists()]
    if missing:
        raise ValueError(f"{folder} lacks replay_buffer_{missing[0]}.pt ({len(missing)} of {count} experts are "
                         "missing): copy it again, or delete the folder and make the experts again with "
                         "sh/baseline/buffer.sh")


class Experts:
    """The experts of all `files`: networks with parameters of `shapes`, and at least `epochs` snapshots each.

    Snapshots before `first` are not drawn. Only the drawn snapshots are read from a file, and none stays in memory.
    ValueError for files with other content.
    """

    def __init__(self, files, shapes, epochs, seed=0, first=0):
        self.experts, self.seed = [], seed
        for path in files:
            experts = load(path, on_disk=True)
            check_experts(path, experts, [tuple(shape) for shape in shapes], epochs, first)
            self.experts += [(path, number) for number in range(len(experts))]

    def __len__(self):
        return len(self.experts)

    def order(self, turn):
        """Return the numbers of all experts, shuffled, for pass number `turn`."""
        return torch.randperm(
            len(self), generator=torch.Generator().manual_seed(stream_seed("experts", self.seed, turn)))

    def draw(self, visit, epochs):
        """Return parameter vectors (P,), float32 on the CPU, of the expert of this visit after each of `epochs`."""
        turn, place = divmod(visit, len(self))
        path, number = self.experts[self.order(turn)[place]]
        expert = load(path, on_disk=True)[number]
        vectors = [torch.cat([tensor.detach().flatten() for tensor in expert[epoch]]).float() for epoch in epochs]
        if not finite(vectors):
            raise ValueError(f"{path}: expert {number} is not finite after epochs {epochs}: train it with a lower "
                             "learning rate")
        if torch.equal(vectors[0], vectors[-1]):
            raise ValueError(f"{path}: expert {number} is the same after epochs {epochs}, so its snapshots are not "
                             "copies, or it was not trained: make the experts again with sh/baseline/buffer.sh")
        return vectors


def check_experts(path, experts, shapes, epochs, first=0):
    if not (isinstance(experts, list) and experts and all(isinstance(expert, list) for expert in experts)):
        raise ValueError(f"{path} is not a list of experts: make the experts with sh/baseline/buffer.sh")
    for number, expert in enumerate(experts):
        if len(expert) < epochs:
            raise ValueError(f"{path}: expert {number} has {len(expert)} snapshots, but --max_start_epoch and "
                             f"--expert_epochs need {epochs}: lower them, or train the experts longer")
        for epoch, snapshot in enumerate(expert):
            if snapshot is None:
                if first <= epoch < epochs:
                    raise ValueError(f"{path} does not have epoch {epoch}, which --min_start_epoch, --max_start_epoch "
                                     "and --expert_epochs need: make the experts with another --keep")
                continue
            found = ([tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                      for tensor in snapshot]
                     if isinstance(snapshot, list) else type(snapshot).__name__)
            if found == shapes:
                continue
            if found[:-2] == shapes[:-2] and len(found) == len(shapes) and len(found[-1]) == 1:
                raise ValueError(f"{path} was trained on {found[-1][0]} classes, but the data have {shapes[-1][0]}: "
                                 "give the experts of these data")
            if [len(shape) for shape in found] == [5, 1, 5, 1, 5, 1, 5, 1] and found[-1] == shapes[-1]:
                raise ValueError(f"{path} was trained with --width {found[2][0]}, but this run has --width "
                                 f"{shapes[2][0]}: give the same --width")
            raise ValueError(f"{path} is not of ConvNet3D: its parameters have shapes {found} instead of {shapes}")
