"""Differentiable siamese augmentation: each operator against plain formulas and kornia, and what training, evaluation and the matchings make of it."""
import copy
import json
import math
import re
import types

import pytest
import torch
from fakes import TinyNet, random_clips
from kornia import enhance
from kornia.geometry import bbox, transform
from test_matching import LABELS, close, gradient_matching, plain_row_distance, plain_weight_gradients, spy_draws
from test_run import assert_same_outcome, moments, only_folder
from test_trajectories import assert_same_gradients, matching_of

import distill_DC
import distill_DM
import networks
from distill_DM import DistributionMatching
from distill_utils import augment as augmentation
from distill_utils.augment import OPERATORS, augment, augment_each, choices_of, draw_operators
from distill_utils.identity import differing_settings
from distill_utils.pool import pool_path
from distill_utils.protocol import RealSet, evaluate, train_epoch
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet
from networks import Hallucinator
from utils import load, random_stream, stream_seed

ALL = "color_crop_cutout_flip_scale_rotate"
TOGETHER = ALL.replace("_", "+")
K, T, SIZE = 3, 4, 8
each_group = pytest.mark.parametrize("group", OPERATORS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def parameters(group, count):
    """Those of one group, a tensor (count,) each."""
    return draw_operators(group, count)[group].unbind(1)


def some_clips(count=5, T=3, size=16):
    return torch.randn(count, T, 3, size, size, dtype=torch.float64)


# ---------------------------------------------------------------- operators against plain formulas

def interpolated(frame, y, x):
    """Value (3,) of a frame at a place between pixels, by its four neighbours; outside of it there are zeros."""
    size, total = frame.shape[-1], torch.zeros(3, dtype=frame.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < size and 0 <= column < size:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * frame[:, row, column]
    return total


def resampled(frame, origin):
    """The frame whose pixel, (x, y) from the centre, is what `frame` shows at origin(x, y)."""
    size = frame.shape[-1]
    centre, result = (size - 1) / 2, torch.empty_like(frame)
    for row in range(size):
        for column in range(size):
            x, y = origin(column - centre, row - centre)
            result[:, row, column] = interpolated(frame, y + centre, x + centre)
    return result


def plain_scale(frame, horizontal, vertical):
    return resampled(frame, lambda x, y: (x / horizontal, y / vertical))


def plain_rotate(frame, degrees):
    """Anti-clockwise, with y downwards."""
    angle = math.radians(degrees)
    return resampled(frame, lambda x, y: (x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)))


def plain_flip(frame, chance):
    return torch.stack([frame[:, :, -1 - column] for column in range(frame.shape[-1])], 2) if chance < 0.5 else frame


def plain_crop(frame, top, left):
    """Two pixels of border around the test's sixteen."""
    result = torch.zeros_like(frame)
    down, right = 2 - int(top * 5), 2 - int(left * 5)
    for row in range(16):
        for column in range(16):
            if 0 <= row - down < 16 and 0 <= column - right < 16:
                result[:, row, column] = frame[:, row - down, column - right]
    return result


def plain_cutout(frame, row, column):
    result, (top, left) = frame.clone(), (int(place * 17) - 4 for place in (row, column))
    result[:, max(top, 0):top + 8, max(left, 0):left + 8] = 0
    return result


PLAIN = {"crop": plain_crop, "cutout": plain_cutout, "flip": plain_flip, "scale": plain_scale, "rotate": plain_rotate}


@pytest.mark.parametrize("group", PLAIN)
def test_operators_of_place_are_their_plain_formulas_frame_by_frame(group):
    clips, draw = some_clips(), draw_operators(group, 5)
    found = augment(clips, draw)
    for clip, mine, values in zip(clips, found, draw[group].tolist()):
        assert torch.allclose(mine, torch.stack([PLAIN[group](frame, *values) for frame in clip]), atol=1e-5)  # angles and factors are float32
        assert not torch.equal(mine, clip) or group == "flip" and values[0] >= 0.5


def test_color_is_its_three_steps_one_after_another():
    clips, draw = some_clips(), draw_operators("color", 5)
    for clip, mine, (brightness, saturation, contrast) in zip(clips, augment(clips, draw), draw["color"].tolist()):
        clip = clip + brightness
        gray = (clip[:, :1] + clip[:, 1:2] + clip[:, 2:]) / 3
        clip = gray + saturation * (clip - gray)
        mean = clip.sum() / clip.numel()
        assert torch.allclose(mine, mean + contrast * (clip - mean), atol=1e-6)


def test_operators_are_kornias_where_it_has_them_one_clip_at_a_time():
    clips = some_clips()
    for clip, mine, top, left in zip(clips, augmentation.crop(clips, *(places := parameters("crop", 5))), *places):
        moved = transform.translate(clip, torch.tensor([[2 - int(left * 5), 2 - int(top * 5)]] * 3).to(clip))
        assert torch.allclose(mine, moved, atol=1e-6)
    for clip, mine, row, column in zip(clips, augmentation.cut_out(clips, *(places := parameters("cutout", 5))), *places):
        top, left = (max(int(place * 17) - 4, 0) for place in (row, column))
        bottom, right = (min(int(place * 17) + 3, 15) for place in (row, column))
        square = bbox.bbox_to_mask(torch.tensor([[[left, top], [right, top], [right, bottom], [left, bottom]]]), 16, 16)
        assert torch.equal(mine, clip * (1 - square.to(clip)))
    for clip, mine, chance in zip(clips, augmentation.flip(clips, *(chances := parameters("flip", 5))), *chances):
        assert torch.equal(mine, transform.hflip(clip) if chance < 0.5 else clip)


def test_each_step_of_color_is_kornias_where_that_cuts_nothing_off():
    """kornia's grey weighs the channels: on colours whose weighted mean is their plain one, they are the same."""
    red, green = 0.4 + 0.1 * torch.rand(2, 5, 1, 1, 6, 6, dtype=torch.float64)
    blue = ((0.299 - 1 / 3) * red + (0.587 - 1 / 3) * green) / (1 / 3 - 0.114)
    clips = torch.cat((red, green, blue), 2)                               # (B, 1, 3, H, W): kornia's mean is a frame's
    brightness, saturation, contrast = parameters("color", 5)
    none, one = torch.zeros(5), torch.ones(5)
    assert torch.allclose(augmentation.change_color(clips, brightness, one, one),
                          enhance.adjust_brightness(clips[:, 0], brightness.double(), clip_output=False)[:, None], atol=1e-6)
    assert torch.allclose(augmentation.change_color(clips, none, saturation, one),
                          enhance.adjust_saturation_with_gray_subtraction(clips[:, 0], saturation.double())[:, None], atol=1e-6)
    assert torch.allclose(augmentation.change_color(clips, none, one, contrast),
                          enhance.adjust_contrast_with_mean_subtraction(clips[:, 0], contrast.double())[:, None], atol=1e-6)


NEUTRAL = {"color": (0, 1, 1), "crop": (0.5, 0.5), "flip": (0.5,), "scale": (1, 1), "rotate": (0,)}  # a cutout is never nothing


@pytest.mark.parametrize("group", NEUTRAL)
@pytest.mark.parametrize("size", (16, 43, 64))
def test_neutral_parameters_change_nothing(group, size):
    clips = some_clips(2, size=size)
    assert torch.allclose(augment(clips, {group: torch.tensor([NEUTRAL[group]] * 2, dtype=torch.float32)}), clips, atol=1e-4)


@pytest.mark.parametrize("group", ("crop", "cutout", "flip", "scale", "rotate"))
def test_everything_is_some_of_the_clip_or_zero(group):
    """On an even clip all groups but color leave one value and zero, and mixtures at edges."""
    found = augment_each(torch.ones(50, 1, 3, 32, 32), group)
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6 and 0.7 < found.mean() <= 1 and (group == "flip") == (found == 1).all()


# ---------------------------------------------------------------- draws

@each_group
def test_a_draw_holds_for_all_frames(group):
    """Of a clip of one frame repeated all frames stay alike; and pixels of one colour become one colour wherever they are in time."""
    still = some_clips(T=1).expand(-1, 4, -1, -1, -1)
    found = augment_each(still, group)
    assert torch.equal(found, found[:, :1].expand_as(found))
    clips, draw = some_clips(), draw_operators(group, 5)
    if group != "color":                                                   # whose mean is the whole clip's
        for t in range(clips.shape[1]):
            assert torch.allclose(augment(clips, draw)[:, t], augment(clips[:, t], draw), atol=1e-12)
    else:
        clips[:, 1, :, 0, 0] = clips[:, 0, :, 5, 5]
        found = augment(clips, draw)
        assert torch.allclose(found[:, 1, :, 0, 0], found[:, 0, :, 5, 5])


@each_group
def test_each_clip_has_a_draw_of_its_own(group):
    clip = some_clips(1)
    found = augment_each(clip.expand(40, -1, -1, -1, -1), group)
    assert len({tuple(each.flatten().tolist()) for each in found}) >= {"flip": 2, "crop": 12}.get(group, 30)  # crop: of 25 places


RANGES = {"color": ((-0.5, 0.5), (0, 2), (0.5, 1.5)), "scale": ((1 / 1.2, 1.2),) * 2, "rotate": ((-15, 15),), "flip": ((0, 1),)}


@pytest.mark.parametrize("group", RANGES)
def test_parameters_fill_their_range_evenly(group):
    values = draw_operators(group, 4000)[group]
    for column, (low, high) in zip(values.T, RANGES[group], strict=True):
        shares = torch.histc(column, 10, low, high) / 4000
        assert low <= column.min() and column.max() <= high and ((shares - 0.1).abs() < 0.03).all()
    if values.shape[1] > 1:
        assert torch.corrcoef(values.T).fill_diagonal_(0).abs().max() < 0.1  # each axis by itself


@pytest.mark.parametrize("size", (16, 43, 64, 112))
def test_crops_and_cutouts_reach_everywhere_as_far_as_they_may(size):
    """A crop moves the clip by up to an eighth of the side, each place as likely; a cutout's centre is anywhere."""
    border, count = round(size / 8), 3000
    marked = torch.zeros(count, 1, 1, size, size)
    marked[..., size // 2, size // 2] = 1
    where = augmentation.crop(marked, *parameters("crop", count)).flatten(1).argmax(1)
    for places in (where // size - size // 2, where % size - size // 2):
        assert (places.min(), places.max()) == (-border, border)
        assert (torch.bincount(places + border) > count / (2 * border + 1) / 2).all()
    left = augmentation.cut_out(torch.ones(count, 1, 1, size, size), *parameters("cutout", count))[:, 0, 0]
    out = 1 - left.mean(0)                                                  # how often each pixel is cut out: a quarter of the time in the middle,
    assert out.min() > 0.04 and 0.2 < out.max() < 0.3                       # a sixteenth in the corners
    areas = (1 - left).sum((1, 2))
    assert areas.max() == (size // 2) ** 2 and areas.min() >= (size // 4) ** 2


def test_neighbours_of_the_ends_stay_inside():
    """The largest number below one that the generator gives."""
    for size in range(8, 130):
        last = torch.tensor([1 - 2.0 ** -24])
        assert augmentation.crop(torch.ones(1, 1, 1, size, size), last, last).shape[-1] == size
        assert augmentation.cut_out(torch.ones(1, 1, 1, size, size), last, last).sum() >= size ** 2 - (size - size // 2) ** 2


def test_a_draw_is_of_one_choice_and_each_of_them_has_its_turn():
    draws = [draw_operators("crop_flip_scale+rotate", 7) for _ in range(60)]
    assert all(len(parameters) == 7 for draw in draws for parameters in draw.values())
    counts = [sum(list(draw) == names for draw in draws) for names in (["crop"], ["flip"], ["scale", "rotate"])]
    assert min(counts) > 8 and sum(counts) == 60
    assert len(draws[0].popitem()[1].unique()) > 1  # rows differ


def test_joined_operators_follow_one_another_in_order():
    clips = some_clips()
    for strategy in ("cutout+color", "color+cutout"):
        draw, (first, second) = draw_operators(strategy, 5), strategy.split("+")
        assert list(draw) == [first, second]
        assert torch.equal(augment(clips, draw), augment(augment(clips, {first: draw[first]}), {second: draw[second]}))


@each_group
def test_rows_are_the_parameters_that_clips_share(group):
    clips, draw, labels = some_clips(6), draw_operators(group, K), torch.tensor([2, 0, 2, 1, 1, 2])
    found = augment(clips, draw, labels)
    for clip, mine, label in zip(clips, found, labels.tolist()):
        assert torch.allclose(mine, augment(clip[None], {group: draw[group][label:label + 1]})[0], atol=1e-12)


def test_none_draws_nothing_and_changes_nothing():
    clips, before = some_clips(), torch.get_rng_state()
    assert augment_each(clips, "none") is clips and augment(clips, draw_operators("none", K), torch.zeros(5, dtype=torch.long)) is clips
    assert torch.equal(torch.get_rng_state(), before) and choices_of("none") == []


def test_draws_come_from_the_runs_stream_on_the_cpu():
    with random_stream(5):
        draws = [draw_operators(ALL, 3) for _ in range(20)]
    with random_stream(5):
        for draw in draws:
            again = draw_operators(ALL, 3)
            assert draw.keys() == again.keys() and all(torch.equal(draw[group], again[group]) and draw[group].device.type == "cpu" for group in draw)
    assert not torch.equal(draw_operators("flip", 3)["flip"], draw_operators("flip", 3)["flip"])


# ---------------------------------------------------------------- gradients

@pytest.mark.parametrize("strategy", (*OPERATORS, TOGETHER))
@pytest.mark.parametrize("shape", ((2, 2, 3, 8, 8), (2, 3, 8, 8)))
def test_gradients_pass_gradcheck(strategy, shape):
    draw = draw_operators(strategy, 2)
    assert torch.autograd.gradcheck(lambda clips: augment(clips, draw), torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_gradients_are_the_same_bits_with_several_threads():
    clips, draw, threads = torch.randn(8, 8, 3, 64, 64, requires_grad=True), draw_operators(TOGETHER, 8), torch.get_num_threads()
    weights, found = torch.randn_like(clips), []
    try:
        for count in (1, 2, 4, 4):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad((augment(clips, draw) * weights).sum(), clips)[0])
    finally:
        torch.set_num_threads(threads)
    assert found[0].any() and all(torch.equal(each, found[2]) for each in found[2:])
    assert all(torch.allclose(each, found[0], atol=1e-5) for each in found)


# ---------------------------------------------------------------- training and evaluation

class Watching(TinyNet):
    """Notes what it is shown in training and in testing."""

    shown = {True: [], False: []}

    def forward(self, clips):
        self.shown[self.training].append(clips.detach().clone())
        return super().forward(clips)


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "Watching", Watching)
    monkeypatch.setattr(Watching, "shown", {True: [], False: []})
    return Watching.shown


@pytest.mark.parametrize("strategy", (ALL, TOGETHER))
@pytest.mark.parametrize("at_once", (2, 100))
def test_training_augments_each_video_anew_by_itself(shown, at_once, strategy):
    """By one group for each batch, in however many parts it is trained on; the videos that it is drawn from stay as they are."""
    synset, net, optimizer = PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE), K), Watching(K, T, SIZE), types.SimpleNamespace(
        zero_grad=lambda: None, step=lambda: None)
    kept = synset.videos.detach().clone()
    with random_stream(3):
        train_epoch(net, synset, optimizer, 4, at_once, "fp32", strategy)
    batches = iter(shown[True])
    with random_stream(3):
        for batch in torch.randperm(6).split(4):
            whole = augment_each(kept[batch], strategy)
            for rows in torch.arange(len(batch)).split(at_once):
                assert torch.equal(next(batches), whole[rows])
    assert torch.equal(synset.videos, kept)


def test_evaluation_augments_what_it_trains_on_and_never_test_clips(shown):
    """Synthetic and real sets alike; each epoch and each network has draws of its own, and the run's random state is left as it was."""
    test, clips = random_clips([0, 1, 2], K, seed=4), random_clips(LABELS, K)
    plain = test.draw(torch.arange(3))
    for synset in (PixelSet(torch.randn(K, T, 3, SIZE, SIZE), K), RealSet(clips)):
        before = torch.get_rng_state()
        shown[True].clear(), shown[False].clear()
        evaluate(synset, test, network="Watching", num_eval=2, epochs=3, dsa=ALL)
        assert torch.equal(torch.get_rng_state(), before) and len(shown[True]) == 6 and len(shown[False]) == 2
        assert all(torch.equal(each, plain) for each in shown[False])
        assert all(not torch.equal(one, other) for number, one in enumerate(shown[True]) for other in shown[True][:number])
        shown[True].clear()
        evaluate(synset, test, network="Watching", num_eval=1, epochs=1)
        drawn = synset.videos if isinstance(synset, PixelSet) else clips.draw(torch.arange(len(clips)))
        flat = {tuple(each.flatten().tolist()) for video in drawn for each in (video, video.flip(-1))}
        assert {tuple(video.flatten().tolist()) for video in shown[True][0]} <= flat


def test_nothing_is_augmented_within_autocast(shown, monkeypatch):
    """In bfloat16 coordinates would be rounded to a pixel."""
    seen = []
    for group, (operator, *ranges) in OPERATORS.items():
        def watched(clips, *values, operator=operator):
            seen.append((torch.is_autocast_enabled("cpu"), clips.dtype))
            return operator(clips, *values)
        monkeypatch.setitem(OPERATORS, group, (watched, *ranges))
    monkeypatch.setitem(networks.NETWORKS, "ConvNet3D", TinyNet)
    clips, pixels = random_clips(LABELS, K), PixelSet(torch.randn(K, T, 3, SIZE, SIZE), K)
    evaluate(pixels, clips, num_eval=1, epochs=40, precision="bf16", dsa=ALL)
    DistributionMatching(clips, 2, "bf16", dsa=ALL)(pixels)
    matching_of(TinyNet(K, T, SIZE), clips, precision="bf16", dsa=ALL)(pixels)
    stills, single = StillSet(torch.randn(K, 2, 3, 16, 16), 1, T), random_clips(LABELS, K, T=1, size=16)
    matching = distill_DC.GradientMatching(single, 2, 2, 1, 0.01, 4, "bf16", ALL)
    matching.iterate(stills, torch.optim.SGD(stills.parameters(), lr=0.1), lambda loss: None)
    assert len(seen) > 50 and set(seen) == {(False, torch.float32)}


# ---------------------------------------------------------------- DM

@pytest.fixture
def nets(monkeypatch):
    """The networks that are built, in order: TinyNets."""
    built, build = [], networks.build
    monkeypatch.setitem(networks.NETWORKS, "ConvNet3D", TinyNet)
    monkeypatch.setattr(networks, "build", lambda *settings: built.append(build(*settings)) or built[-1])
    return built


@pytest.fixture
def siamese(monkeypatch):
    """The siamese draws that the matchings make, in order."""
    drawn = []
    for module in (distill_DC, distill_DM):
        monkeypatch.setattr(module, "draw_operators", lambda *settings: drawn.append(draw_operators(*settings)) or drawn[-1])
    return drawn


def of_class(clip, draw, label):
    """A clip (T, 3, H, W) as its class is augmented."""
    return augment(clip[None], draw, torch.tensor([label]))[0]


def static_dynamic():
    return StaticDynamicSet(torch.randn(K, 2, 3, SIZE, SIZE), torch.randn(K, 2, T, 1, SIZE, SIZE), Hallucinator(), 2)


@pytest.mark.parametrize("make", (lambda: PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE), K), static_dynamic))
@pytest.mark.parametrize("at_once", (1, 3, 1000))
@each_group
def test_dm_is_siamese(nets, siamese, group, at_once, make):
    """Loss and gradient are those of a plain loop in float64 in which each clip and video is changed as its class is, from one draw for all."""
    clips, synset = random_clips(LABELS, K, T=T, size=SIZE), make()
    drawn, matching = spy_draws(clips), DistributionMatching(clips, 3, dsa=group)
    matching.at_once = at_once
    states = []
    synset.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    loss = matching(synset)
    loss.backward()
    draw, = siamese
    assert list(draw) == [group] and len(draw[group]) == K

    torch.set_rng_state(states[0])
    double, net = copy.deepcopy(synset).double(), copy.deepcopy(nets[0]).double()
    double.zero_grad()
    plain = 0
    for label, video in zip(range(K), double(torch.arange(K * 2))[0].unflatten(0, (K, 2))):
        real = [net.embed(of_class(clip, draw, label)[None])[0] for c, clip in drawn if c == label]
        synthetic = [net.embed(of_class(each, draw, label)[None])[0] for each in video]
        plain = plain + (sum(real) / len(real) - sum(synthetic) / 2).square().sum()
    plain.backward()
    assert close(loss, plain)
    for parameter, reference in zip(synset.parameters(), double.parameters()):
        assert reference.grad is None or close(parameter.grad, reference.grad)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in synset.parameters())


def test_dm_of_real_clips_is_nothing_whatever_the_draw(nets):
    """Where the set is the class itself, and clips are not mirrored by the data, all distances are zero: both sides are changed alike."""
    clips = random_clips([0, 1, 2, 0, 1, 2], K, T=T, size=SIZE)
    plain_draw = clips.draw
    clips.draw = lambda index, flip: plain_draw(index)
    synset = PixelSet(plain_draw(torch.tensor([0, 3, 1, 4, 2, 5])), K)
    matching, other = DistributionMatching(clips, 2, dsa=ALL), DistributionMatching(clips, 2, dsa=ALL)
    for _ in range(12):
        assert matching(synset) < 1e-8 < other(PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE), K))


def test_dm_sees_each_group_of_the_strategy_in_turn(nets, siamese):
    synset, matching = PixelSet(torch.randn(K, T, 3, SIZE, SIZE), K), DistributionMatching(random_clips(LABELS, K), 2, dsa="crop_flip_rotate")
    for _ in range(30):
        matching(synset)
    assert all(len(draw) == 1 for draw in siamese) and {group for draw in siamese for group in draw} == {"crop", "flip", "rotate"}


@pytest.fixture
def packed(tmp_path, nets):
    """Clips that seem to come from a pack."""
    clips = random_clips(LABELS, K, T=T, size=SIZE)
    clips.origin = tmp_path / "pack.npy", "all"
    clips.origin[0].touch()
    return clips


def test_a_pools_draw_is_its_networks_own(packed, monkeypatch):
    """The real means and each step with a network see the same draw; the networks' draws differ."""
    matching = DistributionMatching(packed, 2, pool=8, dsa=ALL)
    draws = [matching.pool_network(number)[2] for number in range(8)]
    assert len({group for draw in draws for group in draw}) > 2 and all(len(draw) == 1 for draw in draws)
    videos = packed.draw(torch.arange(len(packed))).double()
    monkeypatch.setattr(matching, "pool", matching.pool)
    for number, draw in enumerate(draws):
        again = matching.pool_network(number)[2]
        assert again.keys() == draw.keys() and all(torch.equal(again[group], draw[group]) for group in draw)
        net = copy.deepcopy(matching.pool_network(number)[0]).double()
        with random_stream(stream_seed("pool clips", number)):
            flips = torch.rand(len(packed)) < 0.5
        mirrored = [clip.flip(-1) if flipped else clip for clip, flipped in zip(videos, flips)]
        for label in range(K):
            mean = sum(net.embed(of_class(clip, draw, label)[None])[0] for clip, c in zip(mirrored, packed.labels.tolist()) if c == label)
            assert close(matching.pool.means(number)[label], mean / LABELS.count(label))

    synset = PixelSet(torch.randn(K, T, 3, SIZE, SIZE), K)
    state = torch.get_rng_state()
    loss = matching(synset)
    torch.set_rng_state(state)
    number = int(torch.randint(8, ()))
    net = copy.deepcopy(matching.pool_network(number)[0]).double()
    means = torch.stack([net.embed(of_class(video, draws[number], label)[None])[0] for label, video in enumerate(synset.videos.detach().double())])
    assert close(loss, (matching.pool.means(number) - means).square().sum())


def test_a_pool_is_of_its_strategy(packed, tmp_path):
    for strategy in ("none", "color_crop", "crop_color", "color"):
        DistributionMatching(packed, 2, pool=2, dsa=strategy)
    assert len(list(tmp_path.glob("pool_*.f32"))) == 4
    assert pool_path(packed, "fp32", 1, 128, False).exists()  # as it was before there were strategies


# ---------------------------------------------------------------- DC

@each_group
def test_dc_is_siamese(siamese, group):
    clips, synset, net = random_clips(LABELS, K, T=1, size=16), StillSet(torch.randn(K, 2, 3, 16, 16), 1, T), networks.ConvNet(K, 16, width=12)
    drawn, matching = spy_draws(clips), gradient_matching(clips, 2)
    matching.dsa = group
    loss = matching.match(net, synset)
    draw, = siamese
    assert list(draw) == [group] and len(draw[group]) == K

    double, static, plain = copy.deepcopy(net).double(), synset.static.detach().double().requires_grad_(), 0
    for c in range(K):
        real = plain_weight_gradients(double, [of_class(clip, draw, c)[0] for label, clip in drawn if label == c], c)
        synthetic = plain_weight_gradients(double, [of_class(frame[None], draw, c)[0] for frame in static[c]], c, create_graph=True)
        plain = plain + sum(plain_row_distance(s, r) for s, r in zip(synthetic, real))
    plain.backward()
    assert close(torch.tensor(loss), plain, 1e-4) and close(synset.static.grad, static.grad, 1e-3)


def test_dcs_network_is_trained_on_frames_augmented_each_by_itself():
    synset, net = StillSet(torch.randn(K, 2, 3, 16, 16), 1, T), Still()
    matching = gradient_matching(random_clips(LABELS, K, T=1, size=16), inner_loop=2, batch_train=4)
    matching.dsa = ALL
    with random_stream(3):
        matching.train(net, synset)
    frames, shown = synset.static.detach().flatten(0, 1), iter(net.shown)
    with random_stream(3):
        for _ in range(2):
            for part in torch.randperm(6).split(4):
                assert torch.equal(next(shown), augment_each(frames[part], ALL))


class Still(networks.ConvNet):
    """Notes the frames that it is shown."""

    def __init__(self):
        super().__init__(K, 16, width=4)
        self.shown = []

    def forward(self, frames):
        self.shown.append(frames.clone())
        return super().forward(frames)


# ---------------------------------------------------------------- MTT and its experts

@pytest.mark.parametrize("strategy", (*OPERATORS, ALL))
def test_mtts_gradients_are_the_unrolled_graphs_however_many_steps_are_replayed(strategy):
    """Of pixels and step size, in float64: a replayed step has the draw of its first time, and the gradient goes back through it."""
    matching = matching_of(TinyNet(K, T, SIZE).double(), random_clips([0, 1, 2], K), batch_syn=4, dsa=strategy)
    matching.at_once = 3
    of_set, _ = assert_same_gradients(matching, PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE).double(), K))
    plain = matching_of(TinyNet(K, T, SIZE).double(), random_clips([0, 1, 2], K), batch_syn=4)
    plain.student, plain.experts = matching.student, matching.experts
    synset = PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE).double(), K)
    losses = []
    for each in (matching, plain):
        torch.manual_seed(5)
        losses.append(each(synset).item())
    assert losses[0] != losses[1]


def test_mtts_gradients_of_memories_are_the_unrolled_graphs():
    net, clips, synset = networks.ConvNet3D(K, 8, 43, width=4).double(), random_clips([0, 1, 2], K, T=8, size=43), StaticDynamicSet(
        torch.randn(K, 4, 3, 43, 43), torch.randn(K, 2, 8, 1, 43, 43), Hallucinator(), 2).double()
    synset.param_groups(1, 1, 1)
    matching = matching_of(net, clips, dsa=ALL, syn_steps=2)
    of_set, _ = assert_same_gradients(matching, synset, splits=[0, 1, 2])
    assert set(of_set) == {"static", "dynamic", "hallucinator.convolution.weight", "hallucinator.convolution.bias"}


def test_experts_see_augmented_clips(command, tmp_path):
    """Other experts than without, the same again, and those that a matching of the same strategy finds; one of another strategy is told apart."""
    made = {}
    for name, flags in (("none", ()), ("crop", ("--dsa", "crop")), ("again", ("--dsa", "crop"))):
        code, output = command("buffer", tmp_path / name, *flags)
        assert code == 0, output
        made[name] = only_folder(tmp_path / name)
    tensors = {name: load(folder / "replay_buffer_0.pt")[0] for name, folder in made.items()}
    for one, other in zip(tensors["crop"], tensors["again"]):
        assert all(torch.equal(*pair) for pair in zip(one, other))
    assert all(torch.equal(*pair) for pair in zip(tensors["none"][0], tensors["crop"][0]))       # the starts
    assert not all(torch.equal(*pair) for pair in zip(tensors["none"][1], tensors["crop"][1]))

    code, output = command("distill_MTT", tmp_path / "crop", "--dsa", "crop", "--Iteration", 1)
    assert code == 0, output
    code, output = command("distill_MTT", tmp_path / "crop", "--dsa", "crop_flip", "--Iteration", 1)
    assert code == 2 and "no finished buffer of experts" in output and "--dsa crop_flip" in output
    code, output = command("distill_MTT", tmp_path / "crop", "--Iteration", 1, "--buffer_path", made["crop"])
    assert code == 2 and "were trained with a different dsa: give the same settings" in output


# ---------------------------------------------------------------- as commands

@pytest.mark.parametrize("script", ("distill_DM", "distill_DC", "distill_MTT", "distill_s2d MTT"))
def test_killed_at_random_moments_with_augmentation(command, whole, script, tmp_path):
    """It goes on bitwise as if it never had been: all that is drawn comes from the run's streams."""
    _, extra = whole(script)
    flags, killed = [*extra, "--checkpoint_seconds", 0, "--dsa", ALL], 0
    if "--buffer_path" in flags:  # experts of the same strategy
        code, output = command("buffer", tmp_path / "experts", "--dsa", ALL)
        assert code == 0, output
        flags[flags.index("--buffer_path") + 1] = only_folder(tmp_path / "experts")
    calls = moments(command, 0, script, tmp_path / "reference", *flags)
    while True:
        code, output = command(script, tmp_path / "killed", *flags, call=next(calls) if killed < 3 else None)
        if code == 0:
            break
        killed += 1
    assert killed
    assert_same_outcome(only_folder(tmp_path / "killed"), only_folder(tmp_path / "reference"))
    plain, _ = whole(script)
    assert json.loads((plain / "config.json").read_text())["chosen"]["dsa"] == "none" and plain.name != only_folder(tmp_path / "killed").name


@pytest.mark.parametrize("strategy, sentence", (
    ("sharpen", "--dsa sharpen: 'sharpen' is unknown: join some of color, crop, cutout, flip, scale, rotate by _ or +, or give none"),
    ("color_none", "--dsa color_none: 'none' is unknown: join some of color, crop, cutout, flip, scale, rotate by _ or +, or give none"),
    ("", "--dsa : '' is unknown: join some of color, crop, cutout, flip, scale, rotate by _ or +, or give none"),
    ("flip__crop", "--dsa flip__crop: '' is unknown: join some of color, crop, cutout, flip, scale, rotate by _ or +, or give none"),
    ("Flip", "--dsa Flip: 'Flip' is unknown: join some of color, crop, cutout, flip, scale, rotate by _ or +, or give none"),
    ("crop+", "--dsa crop+: '' is unknown: join some of color, crop, cutout, flip, scale, rotate by _ or +, or give none"),
    ("crop_crop+flip", "--dsa crop_crop+flip: crop is repeated: give each operator once"),
    ("crop_flip_crop", "--dsa crop_flip_crop: crop is repeated: give each operator once")))
def test_strategies_that_are_none(command, tmp_path, strategy, sentence):
    for script in ("distill_DM", "buffer", "distill_utils.coreset"):
        code, output = command(script, tmp_path, "--dsa", strategy)
        assert code == 2 and output.splitlines()[-1].endswith(f"error: {sentence}") and not list(tmp_path.iterdir())


def test_directions_that_are_classes_are_not_mirrored(tmp_path):
    from distill_utils import options
    for script in (distill_DM, distill_DC):
        for strategy in ("flip", ALL, "color+flip"):
            args = script.parser().parse_args(["--dataset", "SSv2", "--dsa", strategy, "--device", "cpu", "--data_path", str(tmp_path)])
            with pytest.raises(ValueError, match=f"^--dsa {re.escape(strategy)}: leave out flip, because classes of SSv2 distinguish left and right$"):
                options.check(args)
        args = script.parser().parse_args(["--dataset", "SSv2", "--dsa", "color_crop_cutout_scale_rotate", "--device", "cpu", "--data_path", str(tmp_path)])
        with pytest.raises(ValueError, match="annot_train.json"):  # no data here: it got as far as the list
            options.check(args)


def test_older_runs_had_no_augmentation(command, whole):
    """What a run of a version without --dsa was made with counts as none."""
    folder, _ = whole("distill_DM")
    args = distill_DM.parser().parse_args(command.arguments("distill_DM", command.folder / "whole"))
    config = json.loads((folder / "config.json").read_text())
    del config["settings"]["dsa"]
    older = command.folder / "older"
    older.mkdir()
    (older / "config.json").write_text(json.dumps(config))
    args.data_path = command.folder / "data"
    assert differing_settings(args, older, ("dsa",)) == []
    args.dsa = "crop"
    assert differing_settings(args, older, ("dsa",)) == ["dsa"]


def test_a_selections_features_are_of_a_network_of_the_strategy(command, tmp_path):
    for strategy in ("none", "crop"):
        code, output = command("distill_utils.coreset", tmp_path, "--method", "herding", "--feature_epochs", 1, "--dsa", strategy)
        assert code == 0, output
    first, second = (load(path) for path in tmp_path.glob("*/feature_network_*.pt"))
    assert not all(torch.equal(first[name], second[name]) for name in first)
