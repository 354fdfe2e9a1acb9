"""Expert trajectories on disk: `replay_buffer_<n>.pt` holds a list of experts, each a list of epochs, each a list of parameter tensors in
the order of `net.parameters()`, as mtt-distillation writes them (METHOD 5). Where buffer.py was told to `--keep` some epochs only, None stands for
each of the others.
"""
import re

import torch

from utils import finite, load, stream_seed


def snapshot(net, dtype):
    """The parameters as they are now. A copy: on a CPU `.detach().cpu()` would be a view of living weights."""
    return [parameter.detach().to("cpu", dtype, copy=True) for parameter in net.parameters()]


def expert_bytes(net, snapshots, dtype):
    """Bytes of one expert of so many snapshots on disk."""
    return snapshots * sum(parameter.numel() for parameter in net.parameters()) * dtype.itemsize


def check_epoch(before, after):
    """ValueError for two snapshots between which nothing can be matched."""
    if not finite(after):
        raise ValueError("an expert's weights are not finite after an epoch: lower --lr_teacher")
    if all(torch.equal(*pair) for pair in zip(before, after)):
        raise ValueError("an epoch left an expert's snapshot as it was: raise --lr_teacher, or give --buffer_dtype float32")


def buffer_files(folder):
    """The files of a buffer, by their number."""
    found = {int(match[1]): path for path in folder.glob("replay_buffer_*.pt") if (match := re.fullmatch(r"replay_buffer_(\d+)", path.stem))}
    if not found:
        raise ValueError(f"{folder} holds no replay_buffer_<n>.pt: make the experts by sh/baseline/buffer.sh")
    return [found[number] for number in sorted(found)]


class Experts:
    """The experts of all `files`: networks with parameters of `shapes`, at least `epochs` snapshots each, of which those before `first` are not drawn.

    Of a file only the snapshots that are drawn are read, and none stays in memory. ValueError for files that hold anything else.
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
        """All experts, shuffled, each once: those of the turn-th pass."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(stream_seed("experts", self.seed, turn)))

    def draw(self, visit, epochs):
        """Parameter vectors (P,) float32, on the CPU, of the visit-th expert after each of `epochs`."""
        turn, place = divmod(visit, len(self))
        path, number = self.experts[self.order(turn)[place]]
        expert = load(path, on_disk=True)[number]
        vectors = [torch.cat([tensor.detach().flatten() for tensor in expert[epoch]]).float() for epoch in epochs]
        if not finite(vectors):
            raise ValueError(f"{path}: expert {number} is not finite within epochs {epochs}: train it with a lower learning rate")
        if torch.equal(vectors[0], vectors[-1]):
            raise ValueError(f"{path}: expert {number} is the same after epochs {epochs}: its snapshots are not copies, or it was not trained")
        return vectors


def check_experts(path, experts, shapes, epochs, first=0):
    if not (isinstance(experts, list) and experts and all(isinstance(expert, list) for expert in experts)):
        raise ValueError(f"{path} is no list of experts")
    for number, expert in enumerate(experts):
        if len(expert) < epochs:
            raise ValueError(f"{path}: expert {number} has {len(expert)} snapshots, but --max_start_epoch and --expert_epochs need {epochs}: "
                             "lower them, or train the experts longer")
        for epoch, snapshot in enumerate(expert):
            if snapshot is None:
                if first <= epoch < epochs:
                    raise ValueError(f"{path} does not keep epoch {epoch}, which --min_start_epoch, --max_start_epoch and --expert_epochs need: "
                                     "make the experts with another --keep")
                continue
            found = [tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__ for tensor in snapshot] \
                if isinstance(snapshot, list) else type(snapshot).__name__
            if found == shapes:
                continue
            if found[:-2] == shapes[:-2] and len(found) == len(shapes) and len(found[-1]) == 1:
                raise ValueError(f"{path} was trained on {found[-1][0]} classes, the data have {shapes[-1][0]}")
            if [len(shape) for shape in found] == [5, 1, 5, 1, 5, 1, 5, 1] and found[-1] == shapes[-1]:
                raise ValueError(f"{path} was trained with --width {found[2][0]}, this run has --width {shapes[2][0]}")
            raise ValueError(f"{path} is not of ConvNet3D: its parameters are of shapes {found}, not {shapes}")
