"""The evaluation protocol: scores and training against plain loops, and what an evaluation must leave as it was."""
import copy
import math
import statistics
import types

import pytest
import torch
import torch.nn.functional as F
from fakes import PRECISIONS, TinyNet, random_clips
from torch import nn

import networks
from distill_DM import DistributionMatching
from distill_utils import protocol
from distill_utils.clips import normalize
from distill_utils.protocol import RealSet, evaluate, predict, score, train, train_epoch
from distill_utils.record import learned_too_little
from distill_utils.synset import PixelSet, StaticDynamicSet
from networks import Hallucinator
from networks.convnet3d import LEAST_FRAMES

K, T, SIZE = 3, 4, 8
NO_BAR = types.SimpleNamespace(update=lambda: None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "Tiny", TinyNet)


def pixels(ipc=2):
    return PixelSet(torch.randn(K * ipc, T, 3, SIZE, SIZE), K)


def static_dynamic(ipc=1):
    static, dynamic = torch.randn(K, 2 * ipc, 3, SIZE, SIZE), torch.randn(K, 2 * ipc, T, 1, SIZE, SIZE)
    return StaticDynamicSet(static, dynamic, Hallucinator(), ipc)


def some_test_clips(num_classes=K, videos=14):
    """Test clips in no order of class or video; a video has one to four clips."""
    generator = torch.Generator().manual_seed(7)
    of_video = torch.arange(videos).repeat_interleave(torch.randint(1, 5, (videos,), generator=generator))
    of_video = of_video[torch.randperm(len(of_video), generator=generator)]
    labels = (of_video * 5 % num_classes).tolist()
    return random_clips(labels, num_classes, T=T, size=SIZE, videos=of_video.tolist(), seed=3)


# ---------------------------------------------------------------- scores

def plain_score(logits, labels, videos, num_classes):
    """methods.md 6 with loops over lists."""
    rows, top1, top5, of_class = logits.tolist(), [], [], {}
    for row, label in zip(rows, labels.tolist()):
        ranking = sorted(range(num_classes), key=lambda k: -row[k])
        top1.append(ranking[0] == label)
        top5.append(label in ranking[:5])
        of_class.setdefault(label, []).append(ranking[0] == label)
    video_hits = []
    for video in set(videos.tolist()):
        members = [number for number, each in enumerate(videos.tolist()) if each == video]
        mean = [sum(rows[number][k] for number in members) / len(members) for k in range(num_classes)]
        video_hits.append(mean.index(max(mean)) == int(labels[members[0]]))
    return (100 * sum(top1) / len(top1), 100 * sum(top5) / len(top5), 100 * sum(video_hits) / len(video_hits),
            [100 * sum(of_class[k]) / len(of_class[k]) if k in of_class else math.nan for k in range(num_classes)])


@pytest.mark.parametrize("num_classes, seed", [(3, 0), (7, 1), (12, 2), (12, 3), (40, 4)])
def test_score_is_the_plain_loop(num_classes, seed):
    torch.manual_seed(seed)
    test = some_test_clips(num_classes, 26)
    logits = torch.randn(len(test), num_classes)
    logits[torch.arange(len(test)), test.labels] += 1
    result = score(logits, test)
    top1, top5, video_top1, per_class = plain_score(logits, test.labels, test.videos, num_classes)
    assert (result["top1"], result["top5"], result["video_top1"]) == pytest.approx((top1, top5, video_top1))
    assert result["per_class"].tolist() == pytest.approx(per_class, nan_ok=True)


def test_equal_logits_are_counted_alike():
    """In bf16 several classes can have the largest logit: top-1, its classes, the confusion matrix and top-5 then agree."""
    torch.manual_seed(0)
    test = some_test_clips(9, 26)
    for logits in torch.zeros(len(test), 9), torch.randint(2, (len(test), 9)).float():
        result = score(logits, test)
        assert result["top1"] == pytest.approx(100 * result["confusion"].diagonal().sum().item() / len(test)) and result["top5"] >= result["top1"]
        assert result["per_class"].tolist() == pytest.approx((100 * result["confusion"].diagonal() / result["confusion"].sum(1)).tolist(), nan_ok=True)


def test_a_video_is_judged_by_the_mean_of_its_clips_logits_not_by_votes():
    test = random_clips([0, 0, 0, 1], 2, T=T, size=SIZE, videos=[0, 0, 0, 1])
    result = score(torch.tensor([[0., 1], [0, 1], [9, 0], [0, 1]]), test)
    assert (result["top1"], result["video_top1"], result["top5"]) == (50, 100, 100)
    assert result["per_class"].tolist() == pytest.approx([100 / 3, 100])


def test_the_width_counts_only_for_the_network_that_has_one(monkeypatch):
    """The memory of the others does not shrink with --width."""
    seen = []
    monkeypatch.setattr(protocol, "clips_at_once", lambda *values: seen.append(values[3]) or 4)
    monkeypatch.setattr(networks, "build", lambda *_: TinyNet(K, T, SIZE))
    for network in ("ConvNet3D", "CNN+mean"):
        evaluate(pixels(), some_test_clips(), network=network, num_eval=1, epochs=1, width=32)
    assert seen == [32, 128]


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_predict_sees_every_clip_once_in_order_unflipped_and_without_dropout(at_once):
    test = some_test_clips()
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(T * 3 * SIZE * SIZE, K)).train()
    with torch.no_grad():
        plain = normalize(test.resident).double().flatten(1) @ net[2].weight.double().T + net[2].bias
    logits = predict(net, test, at_once)
    assert logits.shape == (len(test), K) and (logits - plain).abs().max() < 1e-4 * plain.abs().max()


# ---------------------------------------------------------------- training

class Recorder:
    """A set that notes which videos are asked for together."""

    def __init__(self, synset):
        self.synset, self.parts = synset, []

    def __len__(self):
        return len(self.synset)

    def __call__(self, index):
        self.parts.append(index.tolist())
        return self.synset(index)


def plain_training(net, videos, labels, batches, epochs, lr):
    """SGD with momentum 0.9 and decay 5e-4 in float64, a tenth of lr after half of the epochs; batches: of each epoch."""
    net = copy.deepcopy(net).double()
    parameters = list(net.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    for epoch in range(epochs):
        hits = 0
        for batch in batches[epoch]:
            logits = net(videos[batch].double())
            hits += sum(int(logit.argmax() == labels[number]) for logit, number in zip(logits, batch))
            loss = sum(-F.log_softmax(logit, 0)[labels[number]] for logit, number in zip(logits, batch)) / len(batch)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, velocity, gradient in zip(parameters, velocities, gradients):
                    velocity.mul_(0.9).add_(gradient + 5e-4 * parameter)
                    parameter.sub_((lr if epoch < epochs // 2 else lr / 10) * velocity)
    return net, 100 * hits / len(videos)


@pytest.mark.parametrize("at_once", [1, 2, 3, 1000])
@pytest.mark.parametrize("batch_size, epochs", [(4, 6), (256, 5), (3, 2)])
def test_train_is_plain_sgd_whatever_goes_through_at_once(at_once, batch_size, epochs):
    synset, net = pixels(ipc=3).frozen(), TinyNet(K, T, SIZE)
    recorder, start = Recorder(synset), copy.deepcopy(net)
    top1 = train(net, recorder, epochs, 0.05, batch_size, at_once, "fp32", NO_BAR)

    assert max(map(len, recorder.parts)) == min(at_once, batch_size, 9)
    order = sum(recorder.parts, [])
    passes = [order[start:start + 9] for start in range(0, len(order), 9)]
    assert len(passes) == epochs and all(sorted(each) == list(range(9)) for each in passes)
    assert passes[0] != passes[1]
    batches = [[each[start:start + batch_size] for start in range(0, 9, batch_size)] for each in passes]
    plain, plain_top1 = plain_training(start, synset.videos, synset.labels, batches, epochs, 0.05)
    assert top1 == pytest.approx(plain_top1)
    for parameter, reference, before in zip(net.parameters(), plain.parameters(), start.parameters()):
        assert (parameter - reference).norm() < 1e-4 * (before - reference).norm()


def test_train_uses_dropout():
    synset, modes = pixels().frozen(), []
    net = TinyNet(K, T, SIZE).eval()
    net.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train(net, synset, 2, 0.01, 256, 1000, "fp32", NO_BAR)
    assert modes == [True, True]


def test_train_redraws_the_pairs_each_epoch():
    synset, seen = static_dynamic().frozen(), set()
    synset.register_forward_hook(lambda _, inputs, output: seen.add(
        tuple(output[0][inputs[0].argsort()[0]].flatten()[:20].mul(1e3).round().tolist())))
    train(TinyNet(K, T, SIZE), synset, 40, 0.01, 256, 1000, "fp32", NO_BAR)
    assert len(seen) == 4  # of the first video: two static by two dynamic memories


# ---------------------------------------------------------------- the whole evaluation

def settings(**changed):
    return {"network": "Tiny", "num_eval": 3, "epochs": 4, "lr": 0.05, **changed}


def without_seconds(result):
    return {name: value for name, value in result.items() if name != "seconds"}


def test_an_evaluation_is_the_mean_and_deviation_over_fresh_networks(monkeypatch):
    scores, nets = [], []
    monkeypatch.setattr(protocol, "score", lambda logits, test: scores.append(score(logits, test)) or scores[-1])
    monkeypatch.setattr(protocol, "predict", lambda net, *values: nets.append(net) or predict(net, *values))
    test, synset = some_test_clips(7, 26), PixelSet(torch.randn(7, T, 3, SIZE, SIZE), 7)
    result = evaluate(synset, test, **settings())
    assert len(scores) == 3 and len({net.logits.weight.sum().item() for net in nets}) == 3
    for name in ("top1", "top5", "video_top1"):
        values = [each[name] for each in scores]
        assert result[name] == pytest.approx(statistics.fmean(values))
        assert result[f"{name}_std"] == pytest.approx(statistics.pstdev(values))
    assert result["networks"] == [each["top1"] for each in scores] and len(set(result["networks"])) > 1
    for label in range(7):
        mean = statistics.fmean(each["per_class"][label].item() for each in scores)
        assert result["per_class"][label] == pytest.approx(mean)
    assert result["bytes"] == synset.bytes() and result["seconds"] > 0


def test_each_network_of_an_evaluation_is_trained_by_the_protocol(monkeypatch):
    calls = []

    def spy(net, synset, epochs, lr, batch_size, *others):
        calls.append((epochs, lr, batch_size))
        return train(net, synset, epochs, lr, batch_size, *others)
    monkeypatch.setattr(protocol, "train", spy)
    evaluate(pixels(), some_test_clips(), network="Tiny", num_eval=2, epochs=3)
    assert calls == [(3, 0.01, 256)] * 2


@pytest.mark.parametrize("make", [pixels, static_dynamic])
def test_an_evaluation_is_a_function_of_the_set_and_the_seed(make):
    synset, test = make(), some_test_clips()
    results = []
    for before, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        results.append(without_seconds(evaluate(synset, test, **settings(num_eval=2, seed=seed))))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1] != results[2]


def test_the_random_state_is_as_found_after_an_error_too():
    synset, state = pixels(), torch.get_rng_state()
    with pytest.raises(ValueError, match="unknown network 'ConvNet4D'.*ConvNet3D"):
        evaluate(synset, some_test_clips(), network="ConvNet4D")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [pixels, static_dynamic])
def test_an_evaluation_leaves_the_set_untouched(make):
    synset = make()
    if isinstance(synset, StaticDynamicSet):
        synset.param_groups(1, 1)
    synset(torch.arange(len(synset)))[0].sum().backward()
    before = copy.deepcopy(synset)
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in synset.parameters()]
    evaluate(synset, some_test_clips(), **settings(num_eval=1))
    for parameter, kept, gradient in zip(synset.parameters(), before.parameters(), gradients, strict=True):
        assert torch.equal(parameter, kept) and parameter.requires_grad == kept.requires_grad
        assert parameter.grad is gradient or torch.equal(parameter.grad, gradient)


def test_evaluating_more_often_changes_nothing(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "ConvNet3D", TinyNet)

    def distill(every):
        torch.manual_seed(4)
        clips, synset = random_clips([0, 1, 2] * 4, K, T=T, size=SIZE), static_dynamic()
        optimizer = torch.optim.SGD(synset.param_groups(1.0, 0.01), momentum=0.95)
        matching = DistributionMatching(clips, 2)
        for iteration in range(6):
            if iteration % every == 0:
                evaluate(synset, some_test_clips(), **settings(num_eval=1, seed=iteration))
            optimizer.zero_grad()
            matching(synset).backward()
            optimizer.step()
        return synset.state_dict()
    often, once = distill(1), distill(100)
    assert all(torch.equal(often[name], once[name]) for name in once)


def test_an_evaluation_finds_what_is_there_to_find():
    """Classes of different brightness from top to bottom are learned and recognised."""
    test = random_clips([0, 1, 2] * 8, K, T=T, size=SIZE)
    for row in range(3):
        test.resident[test.labels == row, :, :, 3 * row:3 * row + 2] //= 8
    videos = torch.stack([normalize(test.resident[test.labels == label]).mean(0) for label in range(K)])
    result = evaluate(PixelSet(videos, K), test, **settings(epochs=60, lr=0.02))
    assert result["train_top1"] == 100 and result["top1"] > 80 and result["video_top1"] == result["top1"]
    assert result["networks_train_top1"] == [100] * len(result["networks"]) and learned_too_little(result) is None
    wrong = evaluate(PixelSet(videos.roll(1, 0), K), test, **settings(epochs=60, lr=0.02))
    assert wrong["top1"] < 20


def test_a_network_that_did_not_learn_its_set_is_reported():
    videos = torch.randn(20 * K, T, 3, SIZE, SIZE)
    untrained = evaluate(PixelSet(videos, K), random_clips([0, 1, 2], K, T=T, size=SIZE), **settings(epochs=1, lr=0.0))
    assert all(value < 50 for value in untrained["networks_train_top1"])
    assert "did not learn the set" in learned_too_little(untrained) and "--lr_net" in learned_too_little(untrained)
    mixed = {"networks": [9.6, 48.0], "networks_train_top1": [16.7, 50.0], "per_class": [0, 1, 2]}
    assert learned_too_little(mixed).startswith("warning: 1 of 2 networks") and "(17 % of" in learned_too_little(mixed)
    constant = mixed | {"per_class": [100, 0]}  # of two equal classes a constant answer knows half
    assert learned_too_little(constant).startswith("warning: 2 of 2 networks")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_evaluation_with_the_papers_network_and_in_bfloat16(precision):
    test = random_clips([0, 1, 1], 2, T=8, size=43)
    result = evaluate(PixelSet(torch.randn(2, 8, 3, 43, 43), 2), test, num_eval=1, epochs=1, precision=precision)
    assert 0 <= result["top1"] <= result["top5"] == 100 and len(result["per_class"]) == 2
    assert result["top1_std"] == 0


# ---------------------------------------------------------------- real clips in a set's place

def test_real_clips_are_mirrored_at_random_and_labelled():
    clips = random_clips([2, 0, 1, 1], K, T=T, size=SIZE)
    real, index = RealSet(clips), torch.tensor([3, 0, 1])
    assert len(real) == 4 and real.bytes() == clips.resident.numel()
    assert RealSet(clips.reduced(1)).bytes() == clips.resident.numel() // T and RealSet(clips.reduced(T)).bytes() == clips.resident.numel()
    seen = set()
    for _ in range(30):
        videos, labels = real(index)
        assert labels.tolist() == [1, 2, 0]
        for place, number in enumerate(index.tolist()):
            as_stored, mirrored = (torch.equal(videos[place], normalize(pixels)) for pixels in (
                clips.resident[number], clips.resident[number].flip(-1)))
            assert as_stored or mirrored
            seen.add((number, mirrored))
    assert len(seen) == 6


@pytest.mark.parametrize("at_once", (1, 2, 6))
def test_all_clips_of_a_batch_show_the_same_segment(at_once):
    """In however many pieces the batch is computed: experts must not depend on the memory."""
    class Recorder(TinyNet):
        def forward(self, clips):
            shown.append([clip[0, 0, 0, 0].item() for clip in clips])
            return super().forward(clips)

    clips, batches = random_clips([0, 1, 2] * 2, K, T=T, size=SIZE), []
    clips.resident[:] = torch.arange(T, dtype=torch.uint8).view(1, T, 1, 1, 1)  # a frame is its number
    net = Recorder(K, LEAST_FRAMES, SIZE)
    for _ in range(12):
        shown = []
        train_epoch(net, RealSet(clips), torch.optim.SGD(net.parameters(), lr=0), 6, at_once, "fp32", segments=2)
        first, = {value for piece in shown for value in piece}  # one segment for all
        batches.append(first)
    assert len(shown) == 6 // at_once and len(set(batches)) == 2


def test_real_clips_are_evaluated_like_a_set():
    test = some_test_clips()
    state = torch.get_rng_state()
    result = evaluate(RealSet(random_clips([0, 1, 2] * 4, K, T=T, size=SIZE)), test, **settings(num_eval=1))
    assert torch.equal(torch.get_rng_state(), state) and result["bytes"] == 12 * T * 3 * SIZE * SIZE
