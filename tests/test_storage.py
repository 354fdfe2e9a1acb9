"""Quantised storage and compact memories: agreement with plain formulas, files as large as their figures, what is evaluated is what is stored."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from fakes import random_clips

from distill_utils.clips import normalize
from distill_utils.starts import (
    choose_random,
    downsample,
    initial_dynamic,
    initial_pixels,
    initial_static,
    real_memories,
)
from distill_utils.storage import (
    BITS,
    FORMATS,
    PIXELS,
    as_stored,
    decode,
    encode,
    pack_pairs,
    stored_bytes,
    unpack_pairs,
)
from distill_utils.synset import KINDS, OLDER, PixelSet, StaticDynamicSet, StillSet, load_set, load_static
from networks import Enlargement, Hallucinator, Interpolation
from utils import save

K, T, SIZE = 3, 4, 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def frames(*shape, scale=1.0, offset=0.0):
    return torch.randn(*shape) * scale + offset


def plain_quantize(frame, bits):
    """methods.md 9 for one frame (C, H, W), value by value."""
    least, most = frame.min().item(), frame.max().item()
    low, high = torch.tensor([least, most]).half().tolist()
    levels = 2 ** bits - 1
    return torch.tensor([low + round((value - least) / (most - least) * levels) * (high - low) / levels for value in frame.flatten().tolist()]).view_as(frame)


# ---------------------------------------------------------------- the formats

@pytest.mark.parametrize("storage", BITS)
def test_a_quantised_frame_is_the_plain_formulas(storage):
    values = frames(2, 3, 3, 5, 5)
    stored = as_stored(values, storage)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.allclose(stored[i, j], plain_quantize(values[i, j], BITS[storage]), atol=1e-6)
    step = (values.amax((2, 3, 4)) - values.amin((2, 3, 4))) / (2 ** BITS[storage] - 1)
    assert ((stored - values).abs().amax((2, 3, 4)) <= 0.5 * step + 0.002 * values.abs().amax((2, 3, 4))).all()   # half a step, and fp16's rounding of the ends


@pytest.mark.parametrize("storage", (*FORMATS, PIXELS))
@pytest.mark.parametrize("values", [
    frames(2, 3, 3, 5, 5), frames(1, 3, 4, 4, scale=1e-3, offset=100), torch.full((2, 1, 4, 4), 0.3), frames(2, 3, 4, 4, scale=1e6), torch.zeros(1, 1, 1, 1),
    frames(3, 1, 3, 3, scale=1e-9)], ids=["normal", "offset", "constant", "huge", "zero", "tiny"])
def test_stored_values_are_stored_again_without_change(storage, values):
    """So a set that was loaded, which quantises what it shows like any other, shows what its file holds."""
    stored = as_stored(values, storage)
    assert stored.isfinite().all() and torch.equal(as_stored(stored, storage), stored)
    assert torch.equal(decode(encode(values, storage)), stored)


def test_real_pixels_are_stored_exactly():
    clips = normalize(torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16))
    assert torch.equal(as_stored(clips, PIXELS), clips)


@pytest.mark.parametrize("storage", ("fp16", *BITS))
def test_the_gradient_passes_unchanged_twice(storage):
    values, weight = frames(2, 3, 4, 4).requires_grad_(), frames(2, 3, 4, 4)
    gradient, = torch.autograd.grad((as_stored(values, storage) * weight).sum(), values)
    assert torch.equal(gradient, weight)
    stored = as_stored(values, storage)
    first, = torch.autograd.grad((stored ** 3).sum(), values, create_graph=True)
    second, = torch.autograd.grad(first.sum(), values)
    assert torch.allclose(first, 3 * stored ** 2) and torch.allclose(second, 6 * stored)


@pytest.mark.parametrize("count", (1, 2, 7, 16))
def test_two_values_of_four_bits_share_a_byte(count):
    numbers = torch.randint(16, (count,), dtype=torch.uint8)
    packed = pack_pairs(numbers)
    assert packed.dtype == torch.uint8 and len(packed) == (count + 1) // 2
    assert torch.equal(unpack_pairs(packed, [count]), numbers)
    for wrong in ([count + 2], [count, 3]):
        with pytest.raises(ValueError, match="values of 4 bits"):
            unpack_pairs(packed, wrong)


# ---------------------------------------------------------------- sets

def pixel_set(storage="fp32", size=SIZE, ipc=2):
    return PixelSet(frames(K * ipc, 2, 3, size, size), K, Interpolation("linear", 2, T), storage)


def still_set(storage="fp32", size=SIZE, ipc=2):
    return StillSet(frames(K, 2 * ipc, 3, size // 2, size // 2), ipc, T, size, storage)


def compact_set(storage="fp32", size=SIZE, ipc=2):
    return StaticDynamicSet(frames(K, ipc, 3, size // 2, size // 2), frames(K, ipc, 2, 1, size // 4, size // 4), Hallucinator(), ipc, T, size, storage)


def saved(synset, path, size=SIZE, **other):
    save({"kind": type(synset).__name__, **synset.content(), "ipc": synset.N, "class_names": ["a", "b", "c"], "frames": T, "size": size,
          "storage": synset.storage, **other}, path)
    return path


@pytest.mark.parametrize("make, storage", [(make, storage) for make in (pixel_set, still_set, compact_set) for storage in FORMATS] + [(pixel_set, PIXELS)])
def test_a_loaded_set_shows_what_the_living_one_shows(make, storage, tmp_path):
    synset = make(storage)
    loaded, _ = load_set(saved(synset, tmp_path / "distilled.pt"))
    for seed in range(3):
        torch.manual_seed(seed)
        living, labels = synset(torch.tensor([5, 0, 3, 3]))
        torch.manual_seed(seed)
        again, same = loaded(torch.tensor([5, 0, 3, 3]))
        assert living.shape == (4, T, 3, SIZE, SIZE) and torch.equal(living, again) and torch.equal(labels, same)
    assert torch.equal(synset.every()[0], loaded.every()[0])
    assert loaded.bytes() == synset.bytes() and loaded.bytes_fp32() == synset.bytes_fp32() == 4 * sum(p.numel() for p in synset.parameters())


@pytest.mark.parametrize("make, storage", [(make, storage) for make in (pixel_set, still_set, compact_set) for storage in FORMATS] + [(pixel_set, PIXELS)])
def test_the_file_is_as_large_as_its_figure(make, storage, tmp_path):
    synset = make(storage, size=128, ipc=8)
    size = saved(synset, tmp_path / "distilled.pt", size=128).stat().st_size
    assert synset.bytes() > 100_000 / 8 and abs(size - synset.bytes()) <= 0.02 * synset.bytes() + 16_000


@pytest.mark.parametrize("ipc, spc, dpc, frame", ((1, 1, 8, "middle"), (4, 4, 4, "middle"), (1, 1, 8, "mean")))
def test_memories_of_real_clips_take_no_other_frames_of_them_along(ipc, spc, dpc, frame, tmp_path):
    clips = random_clips([0, 1, 2] * 8, K, T=T, size=64)
    memories = real_memories(clips, choose_random(clips, max(spc, dpc)), ipc, spc, dpc, frame, size=8)
    synset = StaticDynamicSet(*memories, Hallucinator(), ipc, T, 64)
    size = saved(synset, tmp_path / "distilled.pt", size=64).stat().st_size
    assert abs(size - synset.bytes()) <= 0.02 * synset.bytes() + 16_000


def test_many_small_still_frames_are_as_large_as_their_figure(tmp_path):
    synset = StillSet(frames(400, 50, 3, 8, 8), 50, T, 64, "uint4")
    assert saved(synset, tmp_path / "distilled.pt").stat().st_size <= 1.02 * synset.bytes() + 16_000


def test_bytes_are_those_of_values_scales_and_hallucinator():
    values = K * 2 * 3 * 16, K * 2 * 2 * 4
    scales = 4 * (K * 2 + K * 2 * 2)
    assert compact_set("uint8").bytes() == sum(values) + scales + 1308
    assert compact_set("uint4").bytes() == sum(values) // 2 + scales + 1308
    assert compact_set("fp16").bytes() == 2 * sum(values) + 1308
    assert compact_set("fp32").bytes() == compact_set("uint8").bytes_fp32() == 4 * sum(values) + 1308
    assert stored_bytes((5, 2, 3, 3, 3), "uint4") == 135 + 4 * 10
    assert pixel_set(PIXELS).bytes() == K * 2 * 2 * 3 * SIZE ** 2


@pytest.mark.parametrize("make", [pixel_set, still_set, compact_set])
def test_gradients_reach_the_master_values_through_quantiser_and_stretch(make):
    """The straight-through gradient is that of the unquantised set, taken where the quantised one stands."""
    synset, plain = make("uint8"), make("uint8")
    plain.load_state_dict(synset.state_dict())
    with torch.no_grad():
        for name in plain.MEMORIES:
            memory = getattr(plain, name)
            memory.copy_(as_stored(memory, "uint8"))
    plain.storage = "fp32"
    results = []
    for each in (synset, plain):
        torch.manual_seed(1)
        videos, _ = each(torch.arange(len(each)))
        videos.pow(2).sum().backward()
        results.append([getattr(each, name).grad for name in each.MEMORIES])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) and a.abs().sum() > 0 for a, b in zip(*results))


def test_files_of_older_versions_load(tmp_path):
    """They have plain fp32 tensors, and neither size nor storage nor, the first ones, a learning rate."""
    synset = StaticDynamicSet(frames(K, 2, 3, SIZE, SIZE), frames(K, 2, T, 1, SIZE, SIZE), Hallucinator(), 1)
    still = StillSet(frames(K, 2, 3, SIZE, SIZE), 1, T)
    for each in (synset, still, PixelSet(frames(K, T, 3, SIZE, SIZE), K)):
        content = {"kind": type(each).__name__, **each.content(), "ipc": each.N, "class_names": ["a", "b", "c"], "frames": T}
        assert all(isinstance(content[name], torch.Tensor) for name in ("static", "dynamic", "image", "videos") if name in content)
        save(content, tmp_path / "distilled.pt")
        loaded, content = load_set(tmp_path / "distilled.pt")
        assert torch.equal(loaded.every()[0], each.every()[0]) and content["lr"] == OLDER["lr"] and set(KINDS) >= {content["kind"]}


@pytest.mark.parametrize("change", [
    {"storage": "uint2"}, {"storage": 8}, {"static": {"storage": "uint8"}}, {"static": {"storage": "uint9", "numbers": torch.zeros(3)}}, {"static": 3},
    {"size": 2}, {"size": -1}, {"size": "8"}, {"frames": 1}, {"dynamic": {"storage": "uint4", "numbers": torch.zeros(4, dtype=torch.uint8), "shape": [3, 99, 1, 1, 2, 2],
                                                                    "low": torch.zeros(3, 99, 1), "high": torch.zeros(3, 99, 1)}},
], ids=range(10))
def test_a_damaged_file_is_refused_in_one_sentence(change, tmp_path):
    path = saved(compact_set("uint4"), tmp_path / "distilled.pt", **change)
    with pytest.raises(ValueError, match="distilled.pt is not a distilled set"):
        load_set(path)


def test_a_quantised_static_memory_starts_a_static_dynamic_set(tmp_path):
    synset = still_set("uint4")
    static = load_static(saved(synset, tmp_path / "distilled.pt"), K, 4, SIZE // 2)
    assert torch.equal(static, as_stored(synset.static, "uint4")) and static.dtype == torch.float32
    with pytest.raises(ValueError, match="8 pixels need"):
        load_static(tmp_path / "distilled.pt", K, 4, SIZE)


# ---------------------------------------------------------------- stretching and averaging

@pytest.mark.parametrize("h, H", [(3, 8), (4, 8), (1, 5), (7, 8), (8, 8)])
def test_frames_are_enlarged_as_pytorch_does_bilinearly(h, H):
    values = frames(2, 3, h, h).double()
    enlarged = Enlargement(h, H).double()(values)
    assert torch.allclose(enlarged, F.interpolate(values, (H, H), mode="bilinear", align_corners=False), atol=1e-6)


@pytest.mark.parametrize("h, H", [(9, 8), (0, 8)])
def test_frames_are_not_enlarged_to_less(h, H):
    with pytest.raises(ValueError, match=f"frames of {h} pixels"):
        Enlargement(h, H)


def test_shrinking_averages_what_a_value_stands_for():
    videos = frames(2, 3, 8, 1, 6, 6)
    small = downsample(videos, 4, 3)
    assert small.shape == (2, 3, 4, 1, 3, 3)
    assert torch.allclose(small[1, 2, 3, 0, 0, 2], videos[1, 2, 6:8, 0, 0:2, 4:6].mean(), atol=1e-6)
    assert downsample(videos) is videos and torch.allclose(downsample(videos, 1, 1).flatten(), videos.mean((2, 3, 4, 5)).flatten(), atol=1e-6)


def test_a_compact_set_is_its_stretched_memories_through_the_hallucinator():
    synset = compact_set(ipc=1)
    stretched = F.interpolate(synset.dynamic[:, 0].transpose(1, 2), (T, SIZE, SIZE), mode="trilinear", align_corners=False).transpose(1, 2)
    static = F.interpolate(synset.static[:, 0], (SIZE, SIZE), mode="bilinear", align_corners=False)
    assert torch.allclose(synset(torch.arange(K))[0], synset.hallucinator(static, stretched), atol=1e-5)


# ---------------------------------------------------------------- starts

def training_clips(T=T):
    return random_clips([2, 0, 1, 0, 2, 2, 1, 0, 1, 2], K, T=T, size=SIZE)


@pytest.mark.parametrize("frame", ("mean", "middle"))
@pytest.mark.parametrize("ipc, spc, dpc", [(1, 1, 1), (3, 3, 3), (1, 2, 3), (1, 3, 1)])
def test_real_memories_are_the_chosen_clips(frame, ipc, spc, dpc):
    clips = training_clips()
    chosen = choose_random(clips, max(spc, dpc))
    static, dynamic = real_memories(clips, chosen, ipc, spc, dpc, frame)
    assert static.shape == (K, spc, 3, SIZE, SIZE) and dynamic.shape == (K, dpc, T, 1, SIZE, SIZE)
    videos, own = clips.draw(chosen).unflatten(0, (K, -1)), min(spc, dpc)
    still = videos.mean(2) if frame == "mean" else videos[:, :, T // 2]
    assert torch.allclose(static, still[:, :spc], atol=1e-6)
    grey = (static[:, :own, None] + dynamic[:, :own]).mean(3)   # a clip's own still frame and residual have its brightness
    assert torch.allclose(grey, videos[:, :own].mean(3), atol=1e-5)


def test_compact_starts_have_the_shapes_that_are_stored():
    clips = training_clips()
    static, dynamic = real_memories(clips, choose_random(clips, 2), 2, 2, 2, "mean", 4, 2, 3)
    assert static.shape == (K, 2, 3, 4, 4) and dynamic.shape == (K, 2, 2, 1, 3, 3)
    for init in ("noise", "motion", "residual"):
        assert initial_dynamic(clips, static, 2, 2, init, 2, 3).shape == (K, 2, 2, 1, 3, 3)
    full = initial_dynamic(clips, static, 2, 2, "residual")
    assert torch.allclose(downsample(full, 2, 4), initial_dynamic(clips, static, 2, 2, "residual", 2, 4), atol=1e-6)
    for init in ("real", "mean", "noise"):
        assert initial_static(training_clips(T=1), 2, init, 3).shape == (K, 2, 3, 3, 3)


def test_a_set_starts_from_the_clips_that_are_chosen():
    clips = training_clips()
    chosen = choose_random(clips, 2)
    synset = initial_pixels(clips, 2, "real", n_syn=2, storage="uint8", chosen=chosen)
    assert synset.storage == "uint8" and torch.equal(synset.videos, clips.draw(chosen)[:, [1, 3]])
    motion = initial_dynamic(clips, frames(K, 1, 3, SIZE, SIZE), 1, 2, "motion", chosen=chosen)
    videos = clips.draw(chosen).mean(2, keepdim=True)
    assert torch.allclose(motion.flatten(0, 1), videos - videos.mean(1, keepdim=True), atol=1e-6)
