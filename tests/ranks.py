"""What several processes compute together, for test_ranks.py: a script for tests/server.py, `ranks FOLDER` writes FOLDER/<rank>.pt.

`results()` in one process is what they must agree with. `ranks FOLDER --part` lets their states part instead.
"""
import argparse
import pathlib
import sys

import torch

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent), str(pathlib.Path(__file__).resolve().parent)]
from fakes import TinyNet, random_clips

import distill_DC
import networks
from distill_DM import DistributionMatching
from distill_FRePo import FeatureRegression
from distill_MTT import TrajectoryMatching
from distill_utils import clips as clips_module
from distill_utils.augment import NONE, OPERATORS
from distill_utils.processes import broadcast, rank, sum_gradients
from distill_utils.protocol import evaluate
from distill_utils.run import Run
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet
from networks import ConvNet, FlatNetwork, Hallucinator

K, T, SIZE = 3, 4, 8
ALL = "_".join(OPERATORS)
LABELS = [2, 0, 1, 0, 2, 2, 1, 0, 1, 2, 2]


class Expert:
    """Another one at each visit."""

    def __init__(self, net):
        self.start = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    def draw(self, visit, epochs):
        return self.start * (1 + 0.01 * visit), self.start * (1.02 + 0.01 * visit)


def static_dynamic():
    return StaticDynamicSet(torch.randn(K, 4, 3, SIZE, SIZE), torch.randn(K, 6, T, 1, SIZE, SIZE), Hallucinator(), 2).double()


def pixels():
    return PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE).double(), K)


def steps(matching, synset, count=2):
    """Losses and gradients of some steps down, and where they lead to."""
    learned = [value for value in (*synset.parameters(), *getattr(matching, "parameters", list)()) if value.requires_grad]
    optimizer, found = torch.optim.SGD(learned, lr=0.1), []
    for _ in range(count):
        optimizer.zero_grad()
        if isinstance(matching, distill_DC.GradientMatching):
            losses = []
            matching.iterate(synset, optimizer, losses.append)
            loss = losses[-1]
        else:
            loss = matching(synset)
            loss.backward()
            sum_gradients(optimizer)
            optimizer.step()
        found.append({"loss": float(torch.as_tensor(loss).detach()), "gradients": [value.grad.clone() for value in learned]})
    return found, [value.detach().clone() for value in learned], torch.rand(1)


def results(folder):
    """All that is to agree, in float64 but for the evaluation; the processes share the `folder`."""
    torch.set_num_threads(1)
    normalize = clips_module.normalize
    clips_module.normalize = lambda pixels: normalize(pixels).double()
    convnet3d = networks.NETWORKS["ConvNet3D"]
    networks.NETWORKS["ConvNet3D"] = lambda *settings, width: TinyNet(*settings).double()
    distill_DC.ConvNet = lambda *settings: ConvNet(*settings).double()
    torch.manual_seed(0)
    try:
        clips, found = random_clips(LABELS, K, T=T, size=SIZE), {}
        clips.origin = folder / "pack.npy", "all"
        if rank() == 0:
            clips.origin[0].touch()  # once: the time of its change is in the pool's name
        broadcast(None)
        for name, make in (("pixels", pixels), ("static and dynamic", static_dynamic)):
            found[f"DM of {name}"] = steps(DistributionMatching(clips, 3), make())
            found[f"DM with a pool of {name}"] = steps(DistributionMatching(clips, 3, pool=5), make())
            found[f"augmented DM of {name}"] = steps(DistributionMatching(clips, 3, dsa=ALL), make(), 6)
            found[f"augmented DM with a pool of {name}"] = steps(DistributionMatching(clips, 3, pool=5, dsa=ALL), make())
            labelled = make()
            labelled.soft_labels = torch.nn.Parameter(labelled.scores().double())
            found[f"FRePo of {name}"] = steps(FeatureRegression(clips, 7, pool=2, steps=3, dsa=ALL), labelled, 5)
            net = TinyNet(K, T, SIZE).double()
            for trajectories, dsa in ((1, NONE), (3, NONE), (3, ALL)):
                matching = TrajectoryMatching(Expert(net), FlatNetwork(net), clips, syn_steps=3, expert_epochs=1, max_start_epoch=4, step_size=0.05,
                                              learn_step_size=True, batch_syn=4, trajectories=trajectories, dsa=dsa).double()
                found[f"MTT of {name}, {trajectories}, {dsa}"] = steps(matching, make())
        stills = StillSet(torch.randn(K, 2, 3, SIZE, SIZE).double(), 2, T)
        single = random_clips(LABELS, K, T=1, size=SIZE)
        found["DC"] = steps(distill_DC.GradientMatching(single, 3, 2, 1, 0.01, 4, "fp32"), stills)
        found["augmented DC"] = steps(distill_DC.GradientMatching(single, 3, 2, 1, 0.01, 4, "fp32", ALL), stills, 3)
    finally:
        clips_module.normalize, distill_DC.ConvNet = normalize, ConvNet
        networks.NETWORKS["ConvNet3D"] = TinyNet
    try:
        found["evaluation"] = evaluate(PixelSet(torch.randn(K, T, 3, SIZE, SIZE), K), clips, num_eval=3, epochs=4, dsa=ALL)
        del found["evaluation"]["seconds"]
    finally:
        networks.NETWORKS["ConvNet3D"] = convnet3d
    return found


def part(folder):
    """What is learned differs between the processes in its order, as it never should; it is compared at each evaluation."""
    run, layer = Run.__new__(Run), torch.nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]).roll(rank(), 1), "bias": torch.zeros(1)})
    run.stateful, run.iteration, run.folder = {"set": layer}, 7, folder
    run.check_same()


def main(args):
    if args.part:
        part(args.folder)
    torch.save(results(args.folder), args.folder / f"{rank()}.pt")


def parser():
    parser = argparse.ArgumentParser(prog="ranks")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--part", action="store_true")
    return parser
