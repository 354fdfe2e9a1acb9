"""Neural feature regression: loss and gradients against an independent float64 formula, the pool's ages, learned labels in sets and files."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import random_clips
from torch import nn

import distill_FRePo
import networks
from distill_FRePo import CosineAdam, FeatureRegression, margin, predict
from distill_utils import export
from distill_utils.protocol import RealSet, evaluate, train_epoch
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet, load_set
from networks import Hallucinator
from utils import save

K, T, SIZE = 3, 8, 43


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def clips_of(count=4):
    return random_clips([0, 1, 2] * count, K, T=T, size=SIZE)


def matching_of(clips, **settings):
    return FeatureRegression(clips, **{"batch_target": 5, "width": 8, "pool": 3, "steps": 4} | settings)


def pixels(ipc=2, learn=True):
    synset = PixelSet(torch.randn(K * ipc, T, 3, SIZE, SIZE), K)
    if learn:
        synset.soft_labels = nn.Parameter(synset.scores() + 0.1 * torch.randn(K * ipc, K))
    return synset


def plain_loss(of_set, of_real, y_set, y_real):
    """methods.md 14 by an explicit inverse and a loop over targets."""
    kernel = of_set @ of_set.T
    inverse = torch.linalg.inv(kernel + 1e-6 * kernel.trace() / len(kernel) * torch.eye(len(kernel), dtype=kernel.dtype))
    total = 0
    for feature, label in zip(of_real, y_real):
        prediction = sum((of_set[i] @ feature) * (inverse[i, j] * y_set[j]) for i in range(len(of_set)) for j in range(len(of_set)))
        total = total + ((prediction - label) ** 2).sum()
    apart = 0
    for label in y_set:
        entries = sorted(label, key=lambda entry: entry.item())
        apart = apart + min(entries[-1] - entries[-2], torch.tensor(1 / K, dtype=kernel.dtype))
    return total / len(of_real) - apart / len(y_set)


@pytest.mark.parametrize("at_once", (1, 4, 1000))
def test_loss_and_gradients_are_the_plain_formulas(at_once):
    clips, synset = clips_of(), pixels()
    matching = matching_of(clips)
    matching.at_once = at_once
    for learner in matching.pool:
        learner.missing = 0
    torch.manual_seed(5)
    loss = matching(synset)
    loss.backward()

    torch.manual_seed(5)
    net = copy.deepcopy(matching.pool[int(torch.randint(3, ()))].net).double()
    index, flips = torch.randperm(len(clips))[:5], torch.rand(5) < 0.5
    videos = synset.videos.detach().double().requires_grad_()
    y_set = synset.soft_labels.detach().half().double().requires_grad_()
    y_real = F.one_hot(clips.labels[index], K).double() - 1 / K
    with torch.no_grad():
        of_real = net.embed(clips.draw(index, flip=flips).double())
    plain = plain_loss(net.embed(videos), of_real, y_set, y_real)
    plain.backward()
    assert abs(loss.item() - plain.item()) < 1e-4 * abs(plain.item())
    for mine, reference in ((synset.videos.grad, videos.grad), (synset.soft_labels.grad, y_set.grad)):
        assert reference.norm() > 0 and (mine.double() - reference).norm() < 2e-3 * reference.norm()


def test_prediction_is_kernel_ridge_regression():
    of_set, of_real, labels = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 9), (6, 9), (4, K)))
    kernel = of_set @ of_set.T
    ridge = 1e-6 * kernel.trace() / 4
    weights = of_set.T @ torch.linalg.inv(kernel + ridge * torch.eye(4, dtype=torch.float64)) @ labels    # of a linear model of the features
    assert torch.allclose(predict(of_set, of_real, labels), of_real @ weights, atol=1e-8)
    assert torch.allclose(predict(of_set, of_set, labels), labels, atol=1e-4)                           # the set itself is fitted


def test_margin_is_of_each_label():
    labels = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.1, 0.15]])
    assert math.isclose(margin(labels).item(), (1 / 3 + 0.05) / 2, rel_tol=1e-5)


def test_ages_differ_and_a_network_is_made_anew_after_its_steps():
    matching, synset = matching_of(clips_of(), pool=4, steps=8), pixels()
    assert [learner.missing for learner in matching.pool] == [0, 2, 4, 6]
    nets, renewed = [learner.net for learner in matching.pool], 0
    for _ in range(40):
        ages = [learner.age for learner in matching.pool]
        matching(synset)
        for number, (learner, net) in enumerate(zip(matching.pool, nets)):
            if learner.net is not net:
                assert ages[number] == 7 and learner.age == 0
                renewed += 1
        nets = [learner.net for learner in matching.pool]
        assert all(learner.age < 8 for learner in matching.pool)
    assert renewed > 2
    features = [matching.features(learner.net, [synset.videos]) for learner in matching.pool]
    assert all((a - b).norm() > 0.01 * a.norm() for i, a in enumerate(features) for b in features[:i])


def test_the_network_follows_the_set_after_the_sets_step():
    """Its step is down the mean squared error on the set as the optimizer left it, not as the loss saw it."""
    matching, synset = matching_of(clips_of(), pool=1, steps=100), pixels()
    matching(synset)
    net, before = copy.deepcopy(matching.pool[0].net), copy.deepcopy(matching.pool[0].net)
    with torch.no_grad():
        synset.videos.add_(0.5)
    matching(synset)                                                       # first the network follows
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    F.mse_loss(net(synset.videos.detach()), synset.scores().detach()).backward()
    optimizer.step()
    for mine, plain, old in zip(matching.pool[0].net.parameters(), net.parameters(), before.parameters()):
        assert torch.allclose(mine, plain, atol=2e-6) and not torch.equal(mine, old)


def test_a_network_without_features_gives_no_loss():
    """All its features are zero, and the kernel is singular. The scripts report the loss, or take the step back."""
    matching = matching_of(clips_of(), pool=1)
    for parameter in matching.pool[0].net.parameters():
        parameter.data.zero_()
    assert matching(pixels()).isnan()


def test_networks_do_not_follow_a_set_that_will_be_rolled_back():
    matching, synset = matching_of(clips_of(), pool=1, steps=100), pixels()
    matching(synset)
    kept = copy.deepcopy(synset.state_dict())
    with torch.no_grad():
        synset.videos.fill_(1e37)
    assert not matching(synset).isfinite()
    synset.load_state_dict(kept)
    assert matching(synset).isfinite() and matching(synset).isfinite()


def test_state_goes_on_to_the_bit():
    synset, clips = pixels(), clips_of()
    matching = matching_of(clips)
    for _ in range(6):
        matching(synset)
    again = matching_of(clips)
    again.load_state_dict(copy.deepcopy(matching.state_dict()))
    for seed in range(8):
        losses = []
        for each in (matching, again):
            torch.manual_seed(seed)
            losses.append(each(synset).item())
        assert losses[0] == losses[1]


def test_learning_rates_fall_to_a_tenth_and_resume():
    value = nn.Parameter(torch.ones(1))
    optimizer = CosineAdam([{"params": [value], "lr": 2.0}], 10)
    rates = []
    for step in range(12):
        value.grad = torch.ones(1)
        if step == 5:
            state, optimizer = optimizer.state_dict(), CosineAdam([{"params": [value], "lr": 2.0}], 10)
            optimizer.load_state_dict(state)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 2.0 and math.isclose(rates[5], 1.1) and math.isclose(rates[10], 0.2) and rates[11] == rates[10]
    assert rates == sorted(rates, reverse=True)


# ---------------------------------------------------------------- learned labels

def test_a_set_gives_its_learned_labels_and_counts_them(tmp_path):
    static, dynamic = torch.randn(K, 2, 3, SIZE, SIZE), torch.randn(K, 2, T, 1, SIZE, SIZE)
    for synset in (pixels(), StillSet(static.clone(), 2, T, SIZE, storage="uint8"), StaticDynamicSet(static, dynamic, Hallucinator(), 2, storage="uint8")):
        hard = synset(torch.tensor([4, 0]))[1] if synset.soft_labels is None else torch.tensor([2, 0])
        synset.soft_labels = None
        without, fp32 = synset.bytes(), synset.bytes_fp32()
        assert torch.equal(synset(torch.tensor([4, 0]))[1], hard)
        synset.soft_labels = nn.Parameter(torch.randn(6, K))
        assert synset.bytes() == without + 2 * 6 * K and synset.bytes_fp32() == fp32 + 4 * 6 * K
        labels = synset(torch.tensor([4, 0]))[1]
        assert torch.allclose(labels, synset.soft_labels[[4, 0]].half().float().softmax(1))
        save({"kind": type(synset).__name__, **synset.content(), "ipc": 2, "class_names": ["a", "b", "c"], "frames": T, "size": SIZE,
              "storage": synset.storage}, tmp_path / "distilled.pt")
        loaded, _ = load_set(tmp_path / "distilled.pt")
        assert torch.equal(loaded(torch.tensor([4, 0]))[1], labels) and loaded.bytes() == synset.bytes()


def test_labels_of_another_shape_are_refused(tmp_path):
    synset = pixels()
    save({"kind": "PixelSet", **synset.content(), "soft_labels": torch.zeros(6, K + 1), "ipc": 2, "class_names": ["a", "b", "c"], "frames": T}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is not a distilled set"):
        load_set(tmp_path / "x.pt")


def test_evaluation_trains_on_the_softmax_of_learned_labels():
    synset, net = pixels().frozen(), networks.build("ConvNet3D", K, T, SIZE, 8).eval()
    net.train = lambda: net                                               # no dropout: the same logits again
    loss, top1 = train_epoch(net, synset, torch.optim.SGD(net.parameters(), lr=0.0), 6, 6, "fp32")
    logits, targets = net(synset.videos), synset.soft_labels.half().float().softmax(1)
    assert math.isclose(loss, -(targets * logits.log_softmax(1)).sum(1).mean().item(), rel_tol=1e-5)
    assert math.isclose(top1, 100 * (logits.argmax(1) == targets.argmax(1)).float().mean().item(), rel_tol=1e-5)


def test_the_released_protocol_regresses_on_the_learned_labels():
    synset, net = pixels().frozen(), networks.build("ConvNet3D", K, T, SIZE, 8).eval()
    net.train = lambda: net
    loss, _ = train_epoch(net, synset, torch.optim.SGD(net.parameters(), lr=0.0), 6, 4, "fp32", targets=synset.scores().detach())
    assert math.isclose(loss, (net(synset.videos) - synset.scores()).square().sum(1).mean().item(), rel_tol=1e-5)
    clips, values = clips_of(), dict(num_eval=1, epochs=2, lr=0.01, width=8)
    for each in (synset, RealSet(clips)):
        results = [evaluate(each, clips, **values, protocol=protocol) for protocol in ("standard", "frepo", "frepo")]
        assert results[1]["networks"] == results[2]["networks"] and {"top1", "bytes"} < results[0].keys()


def test_learned_labels_are_exported(tmp_path):
    static, dynamic = torch.randn(K, 2, 3, SIZE, SIZE), torch.randn(K, 4, T, 1, SIZE, SIZE)
    synset = StaticDynamicSet(static, dynamic, Hallucinator(), 2)
    synset.soft_labels = nn.Parameter(torch.randn(6, K))
    save({"kind": "StaticDynamicSet", **synset.content(), "ipc": 2, "class_names": ["a", "b", "c"], "frames": T}, tmp_path / "distilled.pt")
    for kind, read in (("pt", lambda path: torch.load(path)["soft_labels"]), ("npz", lambda path: torch.from_numpy(np.load(path)["soft_labels"]))):
        export.main(export.parser().parse_args([str(tmp_path / "distilled.pt"), "--format", kind, "--out", str(tmp_path / kind)]))
        labels = read(tmp_path / kind / f"distilled.{kind}")
        assert torch.equal(labels, synset.scores().detach().repeat_interleave(2, 0))  # two pairs of each slot


def test_labels_that_are_not_learned_are_not_stored():
    arguments = distill_FRePo.parser().parse_args(["--dataset", "toy", "--no-learn_label"])
    synset = pixels(learn=False)
    distill_FRePo.make_optimizer(arguments, synset, synset.param_groups(1.0), None)
    assert synset.soft_labels is None and synset.scores().shape == (6, K)
    assert torch.allclose(synset.scores()[0], torch.tensor([2 / 3, -1 / 3, -1 / 3]) / math.sqrt(0.3))
