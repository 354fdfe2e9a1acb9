"""Trajectory matching: gradients of kept and replayed steps against the unrolled graph in float64, experts on disk, and steps that are taken back."""
import copy
import functools
import json
import os
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from fakes import TinyNet, needs_bf16, random_clips

import buffer
import distill_MTT
import distill_s2d
import networks
from distill_MTT import LEAST_STEP_SIZE, TrajectoryMatching
from distill_utils.augment import NONE, OPERATORS, augment_each
from distill_utils.compute import count_kept_steps, kept_step_bytes
from distill_utils.last_good import LastGood
from distill_utils.processes import run_script
from distill_utils.synset import PixelSet, StaticDynamicSet
from distill_utils.temporal import random_segment
from distill_utils.trajectories import Experts, buffer_files, check_epoch, snapshot
from distill_utils.workers import alone
from measure import memory_apart
from networks import FlatNetwork, Hallucinator, Interpolation
from networks.convnet3d import LEAST_FRAMES
from utils import load, random_stream, stream_seed

K = 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------- the gradient

class OneExpert:
    """An expert of two snapshots, in the precision of its vectors."""

    def __init__(self, net, distance=0.01):
        start = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        self.vectors = start, start + distance * torch.randn_like(start)

    def draw(self, visit, epochs):
        return [vector.clone() for vector in self.vectors]


def matching_of(net, clips, alpha=0.05, learn=True, kept=None, **settings):
    """A matching of one expert, of three steps; `kept` is of how many steps the graphs are kept (what --replay auto makes of the memory)."""
    settings = {"syn_steps": 3} | settings
    matching = TrajectoryMatching(OneExpert(net), FlatNetwork(net), clips, expert_epochs=1, max_start_epoch=1, step_size=alpha, learn_step_size=learn,
                                  **settings)
    matching.step_size.data = torch.tensor(alpha, dtype=next(net.parameters()).dtype)
    if kept is not None:
        matching.count_kept = lambda videos, parameters: kept
    return matching


def unrolled(matching, synset):
    """The loss with the graph of all steps alive, as its definition says: the same videos and random numbers as the matching's."""
    torch.randint(*matching.start_epochs, ())
    start, target = matching.experts.vectors
    theta = start.clone().requires_grad_()
    for index, seed in matching.plan(len(synset)):
        with random_stream(seed):
            videos, labels = synset(index)
            videos = augment_each(videos[:, random_segment(videos.shape[1], matching.segments, LEAST_FRAMES)], matching.dsa)
            logits = torch.cat([matching.student(theta, piece) for piece in videos.split(matching.at_once)])
        gradient, = torch.autograd.grad(F.cross_entropy(logits, labels), theta, create_graph=True)
        theta = theta - matching.step_size * gradient
    return (theta - target).square().sum() / (start - target).square().sum()


@pytest.mark.parametrize("first, last", ((0, 3), (2, 5), (4, 5)))
def test_starts_lie_between_the_first_and_the_last_epoch(first, last):
    """Each epoch from min_start_epoch to below max_start_epoch is drawn, and no other; the target lies expert_epochs after it."""
    clips, net, drawn = random_clips([0, 1], 2), TinyNet(2, 4, 8), []

    class Recording(OneExpert):
        def draw(self, visit, epochs):
            drawn.append(epochs)
            return super().draw(visit, epochs)
    matching = TrajectoryMatching(Recording(net), FlatNetwork(net), clips, syn_steps=1, expert_epochs=2, min_start_epoch=first, max_start_epoch=last,
                                  step_size=0.01, learn_step_size=False)
    synset = PixelSet(torch.randn(2, 4, 3, 8, 8), 2)
    for _ in range(20):
        matching(synset)
    assert set(drawn) == {(start, start + 2) for start in range(first, last)}


def test_the_range_of_starts_moves_on():
    """With expand = 2 the students of steps 0 and 1 start at epoch 1, of 2 and 3 at 1 or 2, and so on up to max_start_epoch."""
    net, synset = TinyNet(2, 4, 8), PixelSet(torch.randn(2, 4, 3, 8, 8), 2)
    for first, ranges in ((None, [(1, 2), (1, 2), (1, 3), (1, 3), (1, 4), (1, 4), (1, 4)]), (3, [(1, 3), (1, 3), (1, 4), (1, 4)])):
        matching = TrajectoryMatching(OneExpert(net), FlatNetwork(net), random_clips([0, 1], 2), syn_steps=1, expert_epochs=1, min_start_epoch=1,
                                      max_start_epoch=4, expand=2, current_max_start_epoch=first, trajectories=3, step_size=0.01, learn_step_size=False)
        for expected in ranges:
            assert matching.start_range() == expected
            matching(synset)
    resumed = copy.deepcopy(matching)
    resumed.load_state_dict(matching.state_dict())
    assert resumed.start_range() == matching.start_range()


def test_experts_that_know_no_more_than_the_set_are_named():
    net = TinyNet(2, 4, 8)
    matching = matching_of(net, random_clips([0, 1], 2), experts_top1=50.0)
    assert matching.warning({"top1": 49.9}) is None
    assert "reach 50.0 % top1, the experts 50.0 %" in matching.warning({"top1": 50.0})
    assert matching_of(net, random_clips([0, 1], 2)).warning({"top1": 99.0}) is None  # a buffer that does not tell


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def static_dynamic(T, size, ipc=2, spc=4, dpc=2):
    static, dynamic = torch.randn(K, spc, 3, size, size), torch.randn(K, dpc, T, 1, size, size)
    return StaticDynamicSet(static, dynamic, Hallucinator(), ipc).double()


def differentiate(loss_of, matching, synset):
    """The loss, gradients of the set and of the matching, and the number that the run's stream gives next."""
    for module in matching, synset:
        module.zero_grad()
    torch.manual_seed(5)
    loss = loss_of(synset)
    (2 * loss).backward()
    return loss.item(), gradients(synset), gradients(matching), torch.rand(1).item()


def assert_same_gradients(matching, synset, splits=None):
    """For each number of kept steps: loss and gradients are those of the unrolled graph; returns the unrolled graph's gradients."""
    expected, of_set, of_matching, after = differentiate(functools.partial(unrolled, matching), matching, synset)
    losses = set()
    for kept in splits or range(matching.syn_steps + 1):
        matching.count_kept = lambda videos, parameters, kept=kept: kept
        loss, *found, next_number = differentiate(matching, matching, synset)
        assert next_number == after  # neither has drawn more from the run's stream
        losses.add(loss)
        for mine, plain in zip(found, (of_set, of_matching)):
            assert mine.keys() == plain.keys()
            for name in plain:
                assert plain[name].norm() > 0
                assert (mine[name] - plain[name]).norm() < 1e-9 * plain[name].norm(), (kept, name)
    assert len(losses) == 1 and abs(losses.pop() - expected) < 1e-12 * expected  # to the bit, however many are kept
    return of_set, of_matching


@pytest.mark.parametrize("at_once", [1, 2, 1000])
@pytest.mark.parametrize("syn_steps, batch_syn", [(1, None), (3, None), (5, 2), (2, 100)])
def test_gradients_of_pixels_are_the_unrolled_graphs(at_once, syn_steps, batch_syn):
    net, clips = TinyNet(K, 4, 8).double(), random_clips([0, 1, 2], K)
    matching = matching_of(net, clips, syn_steps=syn_steps, batch_syn=batch_syn)
    matching.at_once = at_once
    of_set, of_matching = assert_same_gradients(matching, PixelSet(torch.randn(K * 2, 4, 3, 8, 8).double(), K))
    assert set(of_set) == {"videos"} and set(of_matching) == {"step_size"}


@pytest.mark.parametrize("lr_static", [0, 1])
@pytest.mark.parametrize("syn_steps, batch_syn, at_once", [(1, None, 2), (3, None, 1000), (3, 4, 1), (5, 4, 2)])
def test_gradients_of_static_and_dynamic_memory_are_the_unrolled_graphs(lr_static, syn_steps, batch_syn, at_once):
    net, clips, synset = TinyNet(K, 4, 8).double(), random_clips([0, 1, 2], K), static_dynamic(4, 8)
    synset.param_groups(1, 1, lr_static)
    matching = matching_of(net, clips, syn_steps=syn_steps, batch_syn=batch_syn)
    matching.at_once = at_once
    of_set, _ = assert_same_gradients(matching, synset)
    assert set(of_set) == {"dynamic", "hallucinator.convolution.weight", "hallucinator.convolution.bias"} | ({"static"} if lr_static else set())


@pytest.mark.parametrize("storage", ["fp16", "uint8", "uint4"])
def test_gradients_of_compact_quantised_memories_are_the_unrolled_graphs(storage):
    net, clips = TinyNet(K, 4, 8).double(), random_clips([0, 1, 2], K)
    static, dynamic = torch.randn(K, 2, 3, 4, 4), torch.randn(K, 2, 2, 1, 3, 3)
    synset = StaticDynamicSet(static, dynamic, Hallucinator(), 1, 4, 8, storage).double()
    synset.param_groups(1, 1, 1)
    of_set, _ = assert_same_gradients(matching_of(net, clips, batch_syn=2), synset)
    assert {"static", "dynamic"} < set(of_set)


@pytest.mark.parametrize("at_once", [2, 6])
def test_gradients_of_segments_and_interpolated_videos_are_the_unrolled_graphs(at_once):
    """Two frames stretched to four, of which a random half, shown as eight frames, goes through the network."""
    net, synset = TinyNet(K, 8, 8).double(), PixelSet(torch.randn(K * 2, 2, 3, 8, 8), K, Interpolation("parametric", 2, 4)).double()
    matching = matching_of(net, random_clips([0, 1, 2], K), segments=2, batch_syn=4)
    matching.at_once = at_once
    assert set(assert_same_gradients(matching, synset)[0]) == {"videos", "interpolation.matrix"}


@pytest.mark.parametrize("at_once, kept", [(2, 1), (6, 2)])
def test_gradients_through_the_papers_network_with_its_dropout(at_once, kept):
    net, clips, synset = networks.ConvNet3D(K, 8, 43, width=8).double(), random_clips([0, 1, 2], K, T=8, size=43), static_dynamic(8, 43)
    synset.param_groups(1, 1)
    matching = matching_of(net, clips)
    matching.at_once = at_once
    assert_same_gradients(matching, synset, splits=[kept])


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_no_batch_shows_has_a_gradient_of_zeros(kept):
    net, synset = TinyNet(K, 4, 8), PixelSet(torch.randn(K, 4, 3, 8, 8), K)
    synset.unused = torch.nn.Parameter(torch.ones(2))
    matching_of(net, random_clips([0, 1, 2], K), kept=kept)(synset).backward()
    assert synset.unused.grad.tolist() == [0, 0] and synset.videos.grad.norm() > 0


@pytest.mark.parametrize("kept", [0, 2, 3])
def test_a_loss_that_is_not_finite_leaves_nothing_behind(kept):
    """Its gradients are zeros, and the next call's are those of a matching that never had such a loss."""
    net, synset = TinyNet(K, 4, 8), PixelSet(torch.randn(K, 4, 3, 8, 8), K)
    matching, fresh = (matching_of(net, random_clips([0, 1, 2], K), kept=kept) for _ in range(2))
    start, target = matching.experts.vectors
    matching.experts.vectors = start, target * float("inf")
    loss, of_set, _, _ = differentiate(matching, matching, synset)
    assert not torch.tensor(loss).isfinite() and not of_set["videos"].any()
    matching.experts.vectors = fresh.experts.vectors = start, target
    found, expected = differentiate(matching, matching, synset), differentiate(fresh, fresh, synset)
    assert found[0] == expected[0] and torch.equal(found[1]["videos"], expected[1]["videos"]) and found[1]["videos"].any()


def test_a_fixed_step_size_has_no_gradient():
    net, synset = TinyNet(K, 4, 8).double(), PixelSet(torch.randn(K, 4, 3, 8, 8).double(), K)
    matching = matching_of(net, random_clips([0, 1, 2], K), learn=False)
    matching(synset).backward()
    assert matching.step_size.grad is None and synset.videos.grad.norm() > 0 and not net.logits.weight.requires_grad


def most_alive(syn_steps, loss_of=None, **settings):
    """Bytes that graphs keep alive at once, at most, in a step of the matching, or of loss_of(matching, synset)."""
    alive, most = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal alive, most
            self.tensor = tensor
            alive += tensor.nbytes
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.nbytes

    matching = matching_of(TinyNet(K, 4, 8), random_clips([0, 1, 2], K), syn_steps=syn_steps, **settings)
    synset = PixelSet(torch.randn(K, 4, 3, 8, 8), K)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        (loss_of or TrajectoryMatching.__call__)(matching, synset).backward()
    return most


def test_memory_grows_with_the_kept_steps_only():
    """Where all are kept it grows as the unrolled graph does."""
    assert most_alive(2, replay="all") == most_alive(12, replay="all") > 0
    assert most_alive(2, unrolled) * 4 < most_alive(12, unrolled)
    assert most_alive(2, replay="none") * 4 < most_alive(12, replay="none") <= most_alive(12, unrolled)
    alive = [most_alive(12, kept=kept) for kept in (1, 3, 6)]
    assert alive == sorted(set(alive)) and most_alive(40, kept=3) == alive[1]


# ---------------------------------------------------------------- how many steps are kept

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
PAPERS = 50, 5, 16, 112, 128, 3_647_666  # videos of a step, at once, T, size, width, parameters


@pytest.fixture
def machine(monkeypatch):
    """set_memory(total, free, processes): the memory that the machine and its GPU have, in bytes, and torchrun's processes on it."""
    def set_memory(total, free=0, processes=None):
        pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(total) // 4096, "SC_AVPHYS_PAGES": int(free) // 4096}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(total)))
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    return set_memory


@pytest.mark.parametrize("device, share", ((CPU, 1 / 4), (GPU, 1 / 2)))
def test_the_number_of_kept_steps_is_of_the_total_memory(machine, device, share):
    """As many as its share holds, less one, whatever is free."""
    step, numbers = kept_step_bytes(*PAPERS), []
    for total in (0, 2.5 * step / share, 200.5 * step / share):
        for free in (0, total / 2, total):
            machine(total, free)
            numbers.append(count_kept_steps(*PAPERS, device))
    assert numbers == [0, 0, 0, 1, 1, 1, 199, 199, 199]


def test_processes_of_a_machine_share_its_memory(machine):
    total = 41.5 * 4 * kept_step_bytes(*PAPERS)
    machine(total)
    alone_here = count_kept_steps(*PAPERS, CPU)
    machine(total, processes=4)
    assert (alone_here, count_kept_steps(*PAPERS, CPU)) == (40, 9)
    machine(total, processes=8)
    assert count_kept_steps(*PAPERS, GPU) == 82  # each process has a GPU of its own


@pytest.mark.parametrize("syn_steps", [1, 4, 1000])
def test_auto_keeps_no_more_than_the_budget_holds(machine, syn_steps):
    """And never more steps than there are; a step has no more videos than the set."""
    net = TinyNet(K, 4, 8)
    step = functools.partial(kept_step_bytes, at_once=1024, frames=4, size=8, width=128, parameters=sum(parameter.numel() for parameter in net.parameters()))
    for videos, batch_syn, batch in ((6, None, 6), (6, 2, 2), (6, 100, 6)):
        machine(4 * 6.5 * step(batch))
        matching = matching_of(net, random_clips([0, 1, 2], K), syn_steps=syn_steps, batch_syn=batch_syn)
        assert matching.count_kept(videos, sum(matching.student.sizes)) == min(5, syn_steps)
        assert {"all": 0, "none": syn_steps} == {replay: matching_of(net, random_clips([0, 1, 2], K), syn_steps=syn_steps, replay=replay).count_kept(6, 9)
                                                 for replay in ("all", "none")}


def test_auto_keeps_graphs_within_its_budget(machine):
    net = TinyNet(K, 4, 8)
    step = kept_step_bytes(K, 1024, 4, 8, 128, sum(parameter.numel() for parameter in net.parameters()))
    machine(4 * 4.5 * step)
    assert most_alive(2) < most_alive(12) == most_alive(40) == most_alive(12, kept=3) < 4.5 * step


def replayed_step(kept, width, dsa):
    """A step of ConvNet3D on static and dynamic memory, which keeps more than pixels do."""
    torch.set_num_threads(1)
    synset = StaticDynamicSet(torch.randn(4, 2, 3, 64, 64), torch.randn(4, 2, 8, 1, 64, 64), Hallucinator(), 1)
    synset.param_groups(1, 1)
    net = networks.ConvNet3D(4, 8, 64, width=width)
    matching = matching_of(net, random_clips([0, 1, 2, 3], 4, T=8, size=64), syn_steps=max(kept, 1), kept=kept, width=width, dsa=dsa)
    return lambda: matching(synset).backward()


@pytest.mark.slow
@pytest.mark.parametrize("width, dsa", ((32, NONE), (128, NONE), (32, "+".join(OPERATORS))))
def test_a_kept_step_takes_no_more_than_is_estimated(width, dsa):
    """In peak resident memory, each number of kept steps in a process of its own; and not so much less that memory is left idle."""
    few, many = (alone(memory_apart, (functools.partial(replayed_step, kept, width, dsa), CPU))[0] for kept in (2, 8))
    parameters = sum(parameter.numel() for parameter in networks.ConvNet3D(4, 8, 64, width=width).parameters())
    assert (many - few) / 6 < kept_step_bytes(4, 4, 8, 64, width, parameters, dsa != NONE) < 2.5 * (many - few) / 6


@pytest.mark.parametrize("script, flags", ((distill_MTT, ()), (distill_s2d, ("--method", "MTT"))))
def test_replay_is_a_choice_of_three(script, flags, capsys):
    def parse(*more):
        return script.parser().parse_args(["--dataset", "toy", *flags, *more]).replay
    assert parse() == "auto" and [parse("--replay", name) for name in ("auto", "all", "none")] == ["auto", "all", "none"]
    for wrong in ("some", "3", ""):
        with pytest.raises(SystemExit) as stop:
            parse("--replay", wrong)
        assert stop.value.code == 2 and f"argument --replay: invalid choice: '{wrong}'" in capsys.readouterr().err


def test_each_step_takes_shuffled_batches_of_all_videos():
    matching = matching_of(TinyNet(K, 4, 8), random_clips([0, 1, 2], K), syn_steps=5, batch_syn=4)
    batches, seeds = zip(*matching.plan(10))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4] and len(set(seeds)) == 5
    assert sorted(torch.cat(batches[:3]).tolist()) == list(range(10)) and torch.cat(batches[:3]).tolist() != list(range(10))
    assert torch.cat(batches[3:]).unique().numel() == 8


@needs_bf16
def test_bfloat16_points_the_same_way():
    net, clips, results = networks.ConvNet3D(K, 8, 43, width=32), random_clips([0, 1, 2], K, T=8, size=43), {}
    videos = torch.randn(K, 8, 3, 43, 43)
    for precision, kept in (("fp32", 0), ("bf16", 0), ("bf16", 3)):
        torch.manual_seed(1)
        synset, matching = PixelSet(videos.clone(), K), matching_of(net, clips, kept=kept, precision=precision)
        matching(synset).backward()
        results[precision, kept] = synset.videos.grad.flatten()
    fp32, replayed, kept = results.values()
    assert replayed.dtype == torch.float32 and not torch.equal(fp32, replayed)
    assert torch.cosine_similarity(fp32, replayed, dim=0) > 0.9 and torch.cosine_similarity(kept, replayed, dim=0) > 0.9999


def test_mtt_descends():
    """Videos of noise are led to where steps on them move the student as steps on other videos did."""
    net, teacher, alpha = TinyNet(K, 4, 8), torch.randn(K, 4, 3, 8, 8), 0.05
    synset, matching = PixelSet(torch.randn(K, 4, 3, 8, 8), K), matching_of(net, random_clips([0, 1, 2], K), alpha, learn=False)
    target = matching.experts.vectors[0]
    for _ in range(3):
        target = target - alpha * matching.step_gradient(target, PixelSet(teacher, K), torch.arange(K), 0)
    matching.experts.vectors = matching.experts.vectors[0], target
    optimizer, losses = torch.optim.SGD(synset.param_groups(30.0), momentum=0.5), []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(matching(synset))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


# ---------------------------------------------------------------- the step size

def test_the_step_size_never_falls_below_its_least():
    net, synset = TinyNet(K, 4, 8), PixelSet(torch.randn(K, 4, 3, 8, 8), K)
    matching = matching_of(net, random_clips([0, 1, 2], K), alpha=0.05)
    for value in (-1.0, 0.0, 1e-4):
        matching.step_size.data.fill_(value)
        assert matching.eval_lr() == LEAST_STEP_SIZE
        loss = matching(synset)
        assert matching.step_size.item() == pytest.approx(LEAST_STEP_SIZE)
        assert loss.item() > 0 and len(list(matching.parameters())) == 1
    matching.step_size.data.fill_(0.2)
    matching(synset)
    assert matching.eval_lr() == pytest.approx(0.2)


class Weights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.values = torch.nn.Parameter(torch.zeros(3))


@pytest.fixture
def guarded():
    """step(gradient, loss) of a LastGood over SGD with momentum; also the parameter and the LastGood."""
    weights = Weights()
    optimizer = torch.optim.SGD([{"params": weights.parameters(), "lr": 1.0}], momentum=0.5)
    last_good = LastGood(optimizer, patience=4)

    def step(gradient, loss=1.0):
        weights.values.grad = torch.full((3,), float(gradient))
        return last_good.step(torch.tensor(loss))
    return step, weights.values, last_good


def test_a_step_whose_loss_is_not_finite_is_taken_back_with_its_momentum(guarded):
    step, values, _ = guarded
    assert step(1) and values.tolist() == [-1] * 3
    assert step(1) and values.tolist() == [-2.5] * 3
    for loss in (float("nan"), float("inf")):
        assert not step(0, loss)
        assert values.tolist() == [-1] * 3  # once: a state that was gone back to is not left again
    assert step(1) and values.tolist() == [-2.5] * 3  # the velocity was that of the state, too


def test_a_gradient_that_is_not_finite_or_leads_there_is_not_followed(guarded):
    step, values, _ = guarded
    for gradient in (float("nan"), float("inf")):
        assert step(1)
        assert not step(gradient) and values.tolist() == [0] * 3
    assert step(-2e38)
    before = values.tolist()
    assert not step(-2e38) and values.tolist() == before  # with the momentum it would be 5e38


def test_patience_ends_with_a_sentence_and_only_after_steps_that_never_held(guarded):
    step, _, last_good = guarded
    for _ in range(10):  # one step in two holds
        assert step(1) and step(1) and not step(1, float("nan"))
    assert last_good.in_a_row == 1
    with pytest.raises(ValueError, match="^4 steps in a row were rolled back, the last loss is nan: lower the learning rates$"):
        for _ in range(3):  # each step is followed by a loss that is not finite
            step(1)
            step(1, float("nan"))


def test_last_good_goes_on_from_its_state(guarded):
    step, values, last_good = guarded
    step(1), step(1)
    weights = Weights()
    with torch.no_grad():
        weights.values.copy_(values)
    optimizer = torch.optim.SGD(weights.parameters(), lr=1.0, momentum=0.5)
    optimizer.load_state_dict(last_good.optimizer.state_dict())
    other = LastGood(optimizer, patience=4)
    other.load_state_dict(copy.deepcopy(last_good.state_dict()))
    for gradient, loss in ((0, float("nan")), (1, 1.0), (2, 1.0), (0, float("inf"))):
        weights.values.grad = torch.full((3,), float(gradient))
        assert step(gradient, loss) == other.step(torch.tensor(loss)) and torch.equal(values, weights.values)


# ---------------------------------------------------------------- experts on disk

SHAPES = [(2, 3), (K, 2, 1, 1, 1), (K,)]


def make_expert(number, epochs=4, classes=K, shapes=None):
    """Snapshots whose values are 100·number + epoch."""
    shapes = shapes or [SHAPES[0], (classes, *SHAPES[1][1:]), (classes,)]
    return [[torch.full(shape, 100.0 * number + epoch) for shape in shapes] for epoch in range(epochs)]


@pytest.fixture
def files(tmp_path):
    """Three files of 2, 1 and 3 experts; the number of the last one has two digits."""
    numbers = iter(range(6))
    for name, count in ((0, 2), (2, 1), (10, 3)):
        torch.save([make_expert(next(numbers)) for _ in range(count)], tmp_path / f"replay_buffer_{name}.pt")
    (tmp_path / "replay_buffer_x.pt").write_text("not one of them")
    return tmp_path


def test_all_experts_of_all_files_are_visited_once_a_pass(files):
    assert [path.stem for path in buffer_files(files)] == ["replay_buffer_0", "replay_buffer_2", "replay_buffer_10"]
    experts = Experts(buffer_files(files), SHAPES, 4)
    passes = []
    for turn in range(5):
        vectors = [experts.draw(6 * turn + visit, (1, 3)) for visit in range(6)]
        assert all(len(vector) == 6 + 2 * K + K for pair in vectors for vector in pair)
        assert all(after[0] - before[0] == 2 and before[0] % 100 == 1 for before, after in vectors)
        passes.append([int(before[0]) // 100 for before, _ in vectors])
        assert sorted(passes[-1]) == list(range(6))
    assert len(set(map(tuple, passes))) == 5
    again = Experts(buffer_files(files), SHAPES, 4)
    assert [int(again.draw(visit, (0, 1))[0][0]) // 100 for visit in range(6)] == passes[0]
    other = Experts(buffer_files(files), SHAPES, 4, seed=1)
    assert [int(other.draw(visit, (0, 1))[0][0]) // 100 for visit in range(6)] != passes[0]


def test_the_matching_visits_all_experts_and_all_starts(files):
    class Spy(Experts):
        def draw(self, visit, epochs):
            vectors = super().draw(visit, epochs)
            drawn.append((int(vectors[0][0]) // 100, epochs))
            return [torch.zeros(self.parameters), torch.ones(self.parameters)]
    drawn, net = [], TinyNet(K, 4, 8)
    experts = Spy(buffer_files(files), SHAPES, 4)
    experts.parameters = sum(parameter.numel() for parameter in net.parameters())
    matching = TrajectoryMatching(experts, FlatNetwork(net), random_clips([0, 1, 2], K), syn_steps=1, expert_epochs=2, max_start_epoch=2,
                                  step_size=0.01, learn_step_size=True)
    synset = PixelSet(torch.randn(K, 4, 3, 8, 8), K)
    for _ in range(12):
        matching(synset)
    assert sorted(expert for expert, _ in drawn[:6]) == sorted(expert for expert, _ in drawn[6:]) == list(range(6))
    assert {epochs for _, epochs in drawn} == {(0, 2), (1, 3)}
    resumed = copy.deepcopy(matching)
    resumed.load_state_dict(matching.state_dict())
    assert int(resumed.visits) == 12


def test_buffers_of_the_original_code_load_unchanged(tmp_path):
    """Ten to a file, parameters that require gradients, old and new file formats, bfloat16."""
    path, expert = tmp_path / "replay_buffer_0.pt", make_expert(0)
    variants = {"parameters": [[torch.nn.Parameter(tensor) for tensor in epoch] for epoch in expert],
                "gradients": [[tensor.clone().requires_grad_() for tensor in epoch] for epoch in expert],
                "bfloat16": [[tensor.bfloat16() for tensor in epoch] for epoch in expert], "plain": expert}
    for variant in variants.values():
        for new in (True, False):
            torch.save([variant] * 10, path, _use_new_zipfile_serialization=new)
            experts = Experts([path], SHAPES, 4)
            before, after = experts.draw(3, (0, 3))
            assert len(experts) == 10 and before.dtype == torch.float32 and not before.requires_grad
            assert before.unique().tolist() == [0] and after.unique().tolist() == [3]


def test_epochs_that_were_not_kept_are_not_needed(tmp_path):
    path, expert = tmp_path / "replay_buffer_0.pt", make_expert(0, epochs=6)
    torch.save([[None, None, *expert[2:5], None]], path)
    experts = Experts([path], SHAPES, 5, first=2)
    assert [int(vector[0]) for vector in experts.draw(0, (2, 4))] == [2, 4]
    for first, epochs, missing in ((1, 5, 1), (2, 6, 5)):
        with pytest.raises(ValueError, match=f"does not have epoch {missing}, which .*another --keep"):
            Experts([path], SHAPES, epochs, first=first)


@pytest.mark.parametrize("content, sentence", (
    ([make_expert(0, classes=5)], "was trained on 5 classes, but the data have 3"),
    ([make_expert(0, shapes=[(4, 3), *SHAPES[1:]])], "is not of ConvNet3D: its parameters have shapes"),
    ([make_expert(0, shapes=SHAPES[:2])], "is not of ConvNet3D"),
    ([[[1, 2]] * 4], r"is not of ConvNet3D: its parameters have shapes \['int', 'int'\]"),
    ([[1] * 4], "is not of ConvNet3D"),
    ([make_expert(0), make_expert(1, epochs=3)], "expert 1 has 3 snapshots, but --max_start_epoch and --expert_epochs need 4: lower them"),
    ([], "is not a list of experts"), ({"a": 1}, "is not a list of experts"), ([1], "is not a list of experts"), (torch.zeros(3), "is not a list"),
))
def test_buffers_that_do_not_fit(tmp_path, content, sentence):
    torch.save(content, tmp_path / "replay_buffer_0.pt")
    with pytest.raises(ValueError, match=sentence) as caught:
        Experts(buffer_files(tmp_path), SHAPES, 4)
    assert str(tmp_path / "replay_buffer_0.pt") in str(caught.value)


class Harmful:
    def __reduce__(self):
        return print, ("code from the file ran",)


def test_a_pickled_object_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "replay_buffer_0.pt"
    for write in (lambda: torch.save([[[Harmful()]]], path), lambda: path.write_bytes(pickle.dumps(Harmful(), protocol=2)),
                  lambda: torch.save([[[Harmful()]]], path, _use_new_zipfile_serialization=False), lambda: path.write_bytes(b"")):
        write()
        with pytest.raises(ValueError, match=f"^{path} cannot be read as a file of tensors"):
            Experts([path], SHAPES, 4)
    assert "code" not in capsys.readouterr().out


def test_snapshots_that_say_nothing_are_refused_when_drawn(tmp_path):
    path, living = tmp_path / "replay_buffer_0.pt", make_expert(0)
    torch.save([[living[0]] * 4], path)  # what `.detach().cpu()` of living weights leaves
    with pytest.raises(ValueError, match="is the same after epochs .*its snapshots are not copies"):
        Experts([path], SHAPES, 4).draw(0, (0, 3))
    living[3][0][0, 0] = float("nan")
    torch.save([living], path)
    with pytest.raises(ValueError, match="expert 0 is not finite"):
        Experts([path], SHAPES, 4).draw(0, (0, 3))


def test_no_buffer_in_the_folder(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path} has no replay_buffer_<n>.pt: make the experts with sh/baseline/buffer.sh$"):
        buffer_files(tmp_path)


# ---------------------------------------------------------------- buffer.py

def test_a_snapshot_is_a_copy():
    net = TinyNet(K, 4, 8)
    before = snapshot(net, torch.float32)
    kept = [tensor.clone() for tensor in before]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert all(torch.equal(*pair) for pair in zip(before, kept))
    assert all(torch.equal(now, then + 1) for now, then in zip(snapshot(net, torch.float32), kept))
    assert all(tensor.dtype == torch.bfloat16 and not tensor.requires_grad for tensor in snapshot(net, torch.bfloat16))


@pytest.fixture
def train_experts(tiny, tmp_path, monkeypatch, capfd):
    """train_experts(*flags) runs buffer.py on the tiny data; gives its folder and what it printed."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def train(*flags, name="results"):
        arguments = ("--dataset custom --frames 8 --size 43 --width 32 --test_clips 1 --device cpu --num_experts 2 --train_epochs 3 --batch_train 3 "
                     "--lr_teacher 0.1").split()
        before = set(tmp_path.glob(f"{name}/*/*"))
        capfd.readouterr()
        run_script(buffer.main, buffer.parser(), [*arguments, "--data_path", str(tiny), "--pack_path", str(tmp_path / "packs"),
                                                  "--save_path", str(tmp_path / name), *map(str, flags)])
        folder, = set(tmp_path.glob(f"{name}/*/*")) - before
        return folder, capfd.readouterr().out
    return train


def test_an_expert_retrained_from_a_snapshot_by_a_plain_epoch_reaches_the_next(train_experts, tiny, tmp_path):
    from distill_utils.clips import draw_flips, load_clips
    folder, _ = train_experts("--precision", "fp32")
    clips = load_clips("custom", split="train", data_path=tiny, T=8, size=43, pack_path=tmp_path / "packs")
    net = networks.ConvNet3D(2, 8, 43, width=32)
    for expert, path in enumerate(buffer_files(folder)):
        trajectory, = load(path)
        for epoch in (1, 2, 3):
            before, after = trajectory[epoch - 1], trajectory[epoch]
            with torch.no_grad():
                for parameter, tensor in zip(net.parameters(), before, strict=True):
                    parameter.copy_(tensor)
            with random_stream(stream_seed("expert", 0, expert, epoch)):
                for batch in torch.randperm(7).split(3):
                    videos = clips.draw(batch, flip=draw_flips(len(batch)))
                    found = torch.autograd.grad(F.cross_entropy(net(videos), clips.labels[batch]), list(net.parameters()))
                    with torch.no_grad():
                        for parameter, gradient in zip(net.parameters(), found):
                            parameter -= 0.1 * gradient
            moved = [(new - old).norm().item() for new, old in zip(after, before)]
            assert min(moved) > 0
            for parameter, tensor, distance in zip(net.parameters(), after, moved):
                assert (parameter - tensor).norm() < 1e-3 * distance


def test_experts_differ_in_start_and_way_and_are_the_same_again(train_experts):
    folder, printed = train_experts()
    first, second = (load(path)[0] for path in buffer_files(folder))
    snapshots = [torch.cat([tensor.flatten() for tensor in epoch]) for expert in (first, second) for epoch in expert]
    assert len(snapshots) == 8 and all(not torch.equal(a, b) for i, a in enumerate(snapshots) for b in snapshots[:i])
    again, _ = train_experts(name="again")
    assert [path.read_bytes() for path in buffer_files(again)] == [path.read_bytes() for path in buffer_files(folder)]
    other, _ = train_experts("--seed", 1)
    assert not torch.equal(load(buffer_files(other)[0])[0][0][0], first[0][0])
    gigabytes = 2 * 4 * sum(tensor.numel() for tensor in first[0]) * 4 / 1e9
    assert f"2 experts of 3 epochs take {gigabytes:.2f} GB in {folder}" in printed
    assert sum(path.stat().st_size for path in buffer_files(folder)) == pytest.approx(gigabytes * 1e9, rel=0.01)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["epoch"]) for line in metrics] == [(n, e) for n in (0, 1) for e in (1, 2, 3)]
    assert all(line["loss"] > 0 and 0 <= line["train_top1"] <= 100 and 0 <= line["top1"] <= 100 for line in metrics)
    result = json.loads((folder / "result.json").read_text())
    assert result["experts_top1"] == (metrics[2]["top1"] + metrics[5]["top1"]) / 2


def test_bfloat16_halves_the_disk_and_rounds(train_experts):
    full, half = train_experts()[0], train_experts("--buffer_dtype", "bfloat16")[0]
    sizes = [sum(path.stat().st_size for path in buffer_files(folder)) for folder in (full, half)]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, rel=0.01)
    for one, other in zip(load(buffer_files(full)[1])[0], load(buffer_files(half)[1])[0]):
        assert all(torch.equal(tensor.bfloat16(), rounded) for tensor, rounded in zip(one, other))


def test_only_the_epochs_that_are_asked_for_are_kept(train_experts, capfd):
    whole, some = train_experts()[0], train_experts("--keep", "1:2")[0]
    for one, other in zip(map(load, buffer_files(whole)), map(load, buffer_files(some))):
        assert other[0][0] is other[0][3] is None
        assert all(torch.equal(*pair) for epoch in (1, 2) for pair in zip(one[0][epoch], other[0][epoch]))
    sizes = [sum(path.stat().st_size for path in buffer_files(folder)) for folder in (whole, some)]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, rel=0.01)
    for wrong, sentence in (("1:4", "--keep 1:4 ends after --train_epochs 3"), ("2:2", "is not a range"), ("2", "is not a range"), ("a:b", "is not a range")):
        with pytest.raises(SystemExit) as stop:
            train_experts("--keep", wrong)
        assert stop.value.code == 2 and sentence in capfd.readouterr().err


def test_a_disk_that_is_too_small_is_refused_before_training(train_experts, monkeypatch, capfd, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000_000))
    with pytest.raises(SystemExit) as stop:
        train_experts("--width", 128)
    assert stop.value.code == 2
    assert "has 0.1 GB free and a buffer needs 0.1 GB: give another --save_path" in capfd.readouterr().err
    assert not list(tmp_path.glob("results/*/*/*.pt"))


@pytest.mark.parametrize("flags, sentence", (
    (("--lr_teacher", 1e30), "lower --lr_teacher"),
    (("--lr_teacher", 0), "an epoch did not change an expert's snapshot: raise --lr_teacher"),
    (("--lr_teacher", 1e-12, "--buffer_dtype", "bfloat16"), "an epoch did not change an expert's snapshot: raise --lr_teacher, or give --buffer_dtype"),
))
def test_experts_that_matching_could_not_use(train_experts, capfd, tmp_path, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        train_experts(*flags)
    assert stop.value.code == 2 and sentence in capfd.readouterr().err
    assert not list(tmp_path.glob("results/*/*/replay_buffer_*"))


def test_a_last_step_that_diverges_is_no_snapshot():
    before, after = [torch.zeros(3)], [torch.tensor([0, float("inf"), 1])]
    with pytest.raises(ValueError, match="an expert's weights are not finite after an epoch: lower --lr_teacher"):
        check_epoch(before, after)
    check_epoch(before, [torch.ones(3)])


def test_a_step_of_several_trajectories_is_the_mean_of_single_ones():
    """Loss and gradients; the experts are visited one after another."""
    class Visited(OneExpert):
        def draw(self, visit, epochs):
            return [vector * (1 + visit) for vector in self.vectors]

    net, clips, synset = TinyNet(K, 4, 8).double(), random_clips([0, 1, 2], K), static_dynamic(4, 8)
    matching, single = matching_of(net, clips), matching_of(net, clips)
    matching.experts = single.experts = Visited(net)
    matching.trajectories, losses = 3, []
    learned = [*synset.parameters()]
    torch.manual_seed(1)
    loss = matching(synset)
    of_three = torch.autograd.grad(loss, [*learned, matching.step_size])
    totals = [0] * len(of_three)
    plans = []
    torch.manual_seed(1)
    for _ in range(3):  # all are planned before the first is followed
        plans.append((int(torch.randint(1, ())), single.plan(len(synset))))
    for first, plan in plans:
        single.plan = lambda videos, plan=plan: plan
        value = single(synset)
        losses.append(value.item())
        totals = [total + piece for total, piece in zip(totals, torch.autograd.grad(value, [*learned, single.step_size]))]
    assert int(matching.visits) == int(single.visits) == 3 and len(set(losses)) == 3
    assert abs(loss.item() - sum(losses) / 3) < 1e-12
    for mean, total in zip(of_three, totals):
        torch.testing.assert_close(mean, total / 3, rtol=1e-10, atol=1e-14)
