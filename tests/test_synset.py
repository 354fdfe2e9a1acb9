"""Synthetic sets: storage, pairing, gradients, initialisation, and the file of a static memory."""
import argparse
import collections

import pytest
import torch
from fakes import random_clips

import distill_s2d
from distill_utils.clips import normalize
from distill_utils.starts import choose_random, initial_dynamic, initial_static, initial_videos
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet, check_divides, load_static
from networks import Hallucinator

K, T, SIZE = 3, 4, 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def static_dynamic(ipc=2, spc=4, dpc=6, init="random"):
    static, dynamic = torch.randn(K, spc, 3, SIZE, SIZE), torch.randn(K, dpc, T, 1, SIZE, SIZE)
    return StaticDynamicSet(static, dynamic, Hallucinator(init), ipc)


def still(ipc=2, spc=4):
    return StillSet(torch.randn(K, spc, 3, SIZE, SIZE), ipc, T)


def pixels(ipc=2):
    return PixelSet(torch.randn(K * ipc, T, 3, SIZE, SIZE), K)


def numbered(memory, unit=1):
    """A memory (K, M, ...) whose values are its number c·M + m times `unit`."""
    numbers = torch.arange(memory.shape[0] * memory.shape[1]) * float(unit)
    return numbers.view(*memory.shape[:2], *[1] * (memory.dim() - 2)).expand_as(memory).clone()


def pairs(synset, index):
    """Which static and dynamic memories, c·spc + s and c·dpc + d, the set pairs next for video numbers `index`."""
    before = torch.get_rng_state()
    static, dynamic = numbered(synset.static), numbered(synset.dynamic, 1000)
    probe = StaticDynamicSet(static, dynamic, Hallucinator("identity"), synset.N)
    torch.set_rng_state(before)  # the hallucinator's own initialisation draws too
    values = probe(index)[0][:, T // 2, 0, SIZE // 2, SIZE // 2].round().long()
    return values % 1000, values // 1000


# ---------------------------------------------------------------- what a set is

@pytest.mark.parametrize("make", [pixels, still, static_dynamic])
def test_a_set_gives_videos_and_their_labels_for_any_numbers(make):
    synset, index = make(), torch.tensor([5, 0, 2, 2, 1])
    videos, labels = synset(index)
    assert len(synset) == 6 and synset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert videos.shape == (5, T, 3, SIZE, SIZE) and labels.tolist() == [2, 0, 1, 1, 0]
    for label in range(K):
        torch.manual_seed(label)
        of_class = synset.of_class(label)
        torch.manual_seed(label)
        assert torch.equal(of_class, synset(torch.tensor([2 * label, 2 * label + 1]))[0])


def test_pixel_videos_are_what_is_learned():
    synset, index = pixels(), torch.tensor([5, 0, 2])
    videos, _ = synset(index)
    videos.sum().backward()
    assert torch.equal(videos, synset.videos[index])
    assert torch.equal(synset.videos.grad.flatten(1).mean(1), torch.tensor([1., 0, 1, 0, 0, 1]))


def test_still_videos_repeat_one_frame_of_their_slot():
    synset, seen = still(ipc=2, spc=4), collections.Counter()
    synset.static.data = numbered(synset.static)
    for _ in range(40):
        videos, _ = synset(torch.arange(6))
        assert torch.equal(videos, videos[:, :1, :1, :1, :1].expand_as(videos))
        seen.update((slot, int(value)) for slot, value in enumerate(videos[:, 0, 0, 0, 0]))
    assert set(seen) == {(slot, 2 * slot + member) for slot in range(6) for member in range(2)}


@pytest.mark.parametrize("ipc, spc, dpc", [(2, 4, 6), (1, 3, 2), (3, 3, 3), (2, 2, 4)])
def test_pairs_stay_within_their_slot_and_all_are_drawn_equally_often(ipc, spc, dpc):
    synset, draws, seen = static_dynamic(ipc, spc, dpc), 300, collections.Counter()
    for _ in range(draws):
        index = torch.randperm(K * ipc)
        for number, s, d in zip(index.tolist(), *(numbers.tolist() for numbers in pairs(synset, index))):
            seen[number, s, d] += 1
    group_static, group_dynamic = spc // ipc, dpc // ipc
    expected = {(number, number * group_static + s, number * group_dynamic + d)
                for number in range(K * ipc) for s in range(group_static) for d in range(group_dynamic)}
    assert set(seen) == expected  # slots lie one after another, class by class: memories are numbered like them
    mean = draws / (group_static * group_dynamic)
    assert all(abs(times - mean) <= 5 * mean ** 0.5 for times in seen.values())


def test_each_video_of_a_batch_draws_a_pair_of_its_own():
    static, dynamic = pairs(static_dynamic(ipc=1, spc=2, dpc=2), torch.zeros(200, dtype=torch.long))
    assert collections.Counter(zip(static.tolist(), dynamic.tolist())).keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_video_is_the_hallucinators_of_its_pair():
    synset, index = static_dynamic(), torch.tensor([4, 1, 0, 5, 3])
    torch.manual_seed(3)
    s, d = pairs(synset, index)
    torch.manual_seed(3)
    videos, _ = synset(index)
    assert torch.equal(videos, synset.hallucinator(synset.static.flatten(0, 1)[s], synset.dynamic.flatten(0, 1)[d]))


def test_what_learns_is_what_has_a_learning_rate():
    synset = static_dynamic()
    groups = synset.param_groups(0.5, 0.25)
    assert [(group["lr"], sum(tensor.numel() for tensor in group["params"])) for group in groups] == [
        (0.5, synset.dynamic.numel()), (0.25, 327)]
    synset(torch.arange(6))[0].square().sum().backward()
    assert synset.static.grad is None and synset.dynamic.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in synset.hallucinator.parameters())
    groups = synset.param_groups(0.5, 0.25, 0.125)
    assert [group["lr"] for group in groups] == [0.5, 0.25, 0.125] and groups[2]["params"][0] is synset.static
    synset(torch.arange(6))[0].square().sum().backward()
    assert synset.static.grad.abs().sum() > 0
    group, = pixels().param_groups(30)
    assert group["lr"] == 30 and len(group["params"]) == 1


@pytest.mark.parametrize("make", [pixels, still, static_dynamic])
def test_a_frozen_set_draws_the_same_has_no_gradients_and_is_a_copy(make):
    synset = make()
    before, frozen = {name: tensor.clone() for name, tensor in synset.state_dict().items()}, synset.frozen()
    torch.manual_seed(1)
    living, _ = synset(torch.arange(6))
    torch.manual_seed(1)
    videos, labels = frozen(torch.arange(6))
    assert torch.equal(videos, living) and labels.tolist() == synset.labels.tolist()
    assert living.requires_grad and not videos.requires_grad
    for parameter in frozen.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in synset.state_dict().items())
    assert all(parameter.requires_grad for parameter in synset.parameters())


def test_storage_is_the_methods_example():
    videos = torch.empty(50, 16, 3, 112, 112, device="meta")
    static, dynamic = torch.empty(50, 2, 3, 112, 112, device="meta"), torch.empty(50, 2, 16, 1, 112, 112, device="meta")
    assert PixelSet(videos, 50).bytes() == 120_422_400
    assert StillSet(static, 1, 16).bytes() == 15_052_800
    synset = StaticDynamicSet(static, dynamic, Hallucinator(), 1)
    assert synset.bytes() == 15_052_800 + 80_281_600 + 1_308 == 95_335_708
    synset.param_groups(1, 1)  # a frozen memory is kept all the same
    assert synset.bytes() == synset.frozen().bytes() == 95_335_708


@pytest.mark.parametrize("ipc, spc, dpc, flag", [
    (2, 3, 4, "spc 3"), (2, 4, 3, "dpc 3"), (2, 1, 2, "spc 1"), (4, 4, 6, "dpc 6")])
def test_memories_that_cannot_be_shared_out_are_refused(ipc, spc, dpc, flag):
    with pytest.raises(ValueError, match=f"--{flag} is not a multiple of --ipc {ipc}"):
        static_dynamic(ipc, spc, dpc)


def test_no_memory_at_all_is_refused():
    with pytest.raises(ValueError, match="--spc 0"):
        check_divides(1, spc=0)
    with pytest.raises(ValueError, match="--spc 3"):
        still(ipc=2, spc=3)


@pytest.mark.parametrize("make", [pixels, still, static_dynamic])
def test_the_content_of_a_file_is_the_whole_set(make):
    synset = make()
    flat = {}
    for name, value in synset.content().items():
        flat |= {f"{name}.{key}": tensor for key, tensor in value.items()} if isinstance(value, dict) else {name: value}
    assert not any(tensor.requires_grad for tensor in flat.values())
    kept = sum(tensor.numel() * 4 for name, tensor in flat.items() if name not in ("label", "labels"))
    assert kept == synset.bytes()


# ---------------------------------------------------------------- initialisation

def training_clips(T=T):
    return random_clips([2, 0, 1, 0, 2, 2, 1, 0, 1, 2], K, T=T, size=SIZE)  # not in class order


def sources(videos, clips):
    """The number of the clip that each video is."""
    stored = normalize(clips.resident)
    return [next(number for number, clip in enumerate(stored) if torch.equal(clip, video)) for video in videos]


def test_real_videos_are_different_clips_in_class_order():
    clips = training_clips()
    drawn = [sources(clips.draw(choose_random(clips, 2)), clips) for _ in range(20)]
    for numbers in drawn:
        assert clips.labels[numbers].tolist() == [0, 0, 1, 1, 2, 2] and len(set(numbers)) == 6
    assert {number for numbers in drawn for number in numbers} == set(range(10))


def test_a_class_with_too_few_clips_is_refused_by_name():
    clips = random_clips([0, 0, 0, 1, 2, 2, 2], K, T=T, size=SIZE)
    assert len(clips.draw(choose_random(clips, 1))) == 3
    for start in (lambda: clips.draw(choose_random(clips, 2)), lambda: initial_static(clips, 3, "real"),
                  lambda: initial_dynamic(clips, torch.zeros(K, 2, 3, SIZE, SIZE), 2, 2, "residual")):
        with pytest.raises(ValueError, match="class class1 has fewer training clips"):
            start()


def test_pixels_start_from_real_clips_noise_or_a_still_frame():
    clips = training_clips()
    assert clips.labels[sources(initial_videos(clips, 2, "real"), clips)].tolist() == [0, 0, 1, 1, 2, 2]
    noise = initial_videos(clips, 3, "noise")
    assert noise.shape == (9, T, 3, SIZE, SIZE) and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    stills = initial_videos(clips, 2, "still")
    assert stills.is_contiguous() and torch.equal(stills, stills[:, :1].expand_as(stills))
    for video, label in zip(stills, [0, 0, 1, 1, 2, 2]):
        frames = normalize(clips.resident[clips.labels == label]).flatten(0, 1)
        assert any(torch.equal(video[0], frame) for frame in frames)


def test_static_memory_starts_from_frames_of_its_class():
    clips = training_clips(T=1)
    static = initial_static(clips, 3, "real")
    assert static.shape == (K, 3, 3, SIZE, SIZE)
    for label in range(K):
        numbers = sources(static[label].unsqueeze(1), clips)
        assert clips.labels[numbers].tolist() == [label] * 3 and len(set(numbers)) == 3
    assert initial_static(clips, 2, "noise").shape == (K, 2, 3, SIZE, SIZE)


def test_dynamic_memory_starts_from_noise_or_the_motion_of_real_clips():
    clips = training_clips()
    noise = initial_dynamic(clips, torch.zeros(K, 2, 3, SIZE, SIZE), 1, 5, "noise")  # more memories than clips: noise needs none
    assert noise.shape == (K, 5, T, 1, SIZE, SIZE) and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    chosen = [(clips.labels == label).nonzero().flatten()[:2].tolist() for label in range(K)]
    frames = torch.stack([normalize(clips.resident[index])[:, 3] for index in chosen])   # (K, 2, 3, H, W): frame 3 of two clips of each class
    residual = initial_dynamic(clips, frames, 2, 2, "residual")
    assert residual.shape == (K, 2, T, 1, SIZE, SIZE)
    for label in range(K):
        for slot in range(2):  # the frame's own clip is nearest to it: static plus dynamic memory has that clip's brightness
            clip = normalize(clips.resident[chosen[label][slot]])
            grey = (frames[label, slot] + residual[label, slot]).mean(1)                 # (T, H, W)
            assert torch.allclose(grey, clip.mean(1), atol=1e-5)


@pytest.mark.parametrize("ipc", (1, 2, 3))
def test_means_are_of_all_clips_of_a_class_each_in_one_video(ipc):
    clips = training_clips()
    means = initial_videos(clips, ipc, "mean").unflatten(0, (K, ipc))
    for label in range(K):
        pixels = normalize(clips.resident[clips.labels == label])
        sizes = [len(part) for part in torch.arange(len(pixels)).tensor_split(ipc)]
        total = sum(size * mean for size, mean in zip(sizes, means[label]))              # of as many clips as each is dealt
        assert torch.allclose(total, pixels.sum(0), atol=1e-4)
        assert all(not torch.equal(means[label, i], means[label, j]) for i in range(ipc) for j in range(i))
    if ipc == 3:  # a class of three clips: each is its own mean
        assert sorted(sources(means[0], clips)) == (clips.labels == 0).nonzero().flatten().tolist()
    assert initial_static(training_clips(T=1), ipc, "mean").shape == (K, ipc, 3, SIZE, SIZE)


def test_motion_is_a_clip_less_its_own_mean_frame():
    clips = training_clips()
    motion = initial_dynamic(clips, torch.randn(K, 1, 3, SIZE, SIZE), 1, 3, "motion")
    assert motion.shape == (K, 3, T, 1, SIZE, SIZE) and motion.mean(2).abs().max() < 1e-5  # whatever stands still is left out
    for label in range(K):
        grey = normalize(clips.resident[clips.labels == label]).mean(2, keepdim=True)    # (n, T, 1, H, W)
        found = [next(i for i, clip in enumerate(grey) if torch.allclose(clip - clip.mean(0), each, atol=1e-5)) for each in motion[label]]
        assert len(set(found)) == 3
    with pytest.raises(ValueError, match="class class0 has fewer training clips"):
        initial_dynamic(clips, torch.randn(K, 1, 3, SIZE, SIZE), 1, 4, "motion")


@pytest.mark.parametrize("spc, dpc", ((1, 1), (3, 3), (3, 1)))
def test_the_stills_of_real_clips_move_by_the_motion_of_the_same_clips(spc, dpc):
    """Then motion, which leaves out a clip's own mean frame, is the residual, which leaves out the still."""
    clips, memories = training_clips(), []
    for init in ("residual", "motion"):
        args = argparse.Namespace(static="real", static_frame="mean", static_size=None, dynamic_frames=None, dynamic_size=None, ipc=1, spc=spc, dpc=dpc,
                                  select="random", init_dynamic=init)
        torch.manual_seed(0)
        memories.append(distill_s2d.initial_memories(None, args, clips))
    for residual, motion in zip(*memories):
        assert residual.shape == motion.shape and torch.allclose(residual, motion, atol=1e-6)


def test_memories_of_one_slot_start_from_different_clips():
    clips = training_clips()
    static = normalize(clips.resident[[int((clips.labels == label).nonzero()[0]) for label in range(K)]])[:, :1]
    residual = initial_dynamic(clips, static, 1, 3, "residual")
    assert all(not torch.equal(each[i], each[j]) for each in residual for i in range(3) for j in range(i))


# ---------------------------------------------------------------- the file of a static memory

def static_file(path, **content):
    torch.save(content, path)
    return path


def test_static_memory_comes_back_from_its_file(tmp_path):
    synset = still(ipc=2, spc=4)
    path = static_file(tmp_path / "static.pt", **synset.content())
    static = load_static(path, K, 4, SIZE)
    assert torch.equal(static, synset.static) and static.dtype == torch.float32 and not static.requires_grad


def test_a_file_with_only_images_loads(tmp_path):
    image = torch.randn(K * 2, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    static = load_static(static_file(tmp_path / "released.pt", image=image), K, 2, SIZE)
    assert static.shape == (K, 2, 3, SIZE, SIZE) and static.dtype == torch.float32 and not static.requires_grad
    assert torch.equal(static[1, 1], image[3].float())


def test_labels_of_other_types_are_read(tmp_path):
    image = torch.randn(K * 2, 3, SIZE, SIZE)
    for label in ([0, 0, 1, 1, 2, 2], torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)):
        path = static_file(tmp_path / "static.pt", image=image, label=label)
        assert load_static(path, K, 2, SIZE).shape == (K, 2, 3, SIZE, SIZE)


@pytest.mark.parametrize("content, error", [
    ({"image": torch.zeros(6, 3, SIZE, SIZE + 1)}, r"shape \(6, 3, 6, 7\).*need \(6, 3, 6, 6\)"),
    ({"image": torch.zeros(9, 3, SIZE, SIZE)}, "3 classes with --spc 2"),
    ({"image": torch.zeros(6, 1, SIZE, SIZE)}, "shape"),
    ({"image": torch.zeros(6, 3, SIZE, SIZE), "label": torch.tensor([0, 1, 2, 0, 1, 2])}, "class order"),
    ({"image": torch.zeros(6, 3, SIZE, SIZE), "label": torch.tensor([0, 0, 1])}, "class order"),
    ({"image": torch.full((6, 3, SIZE, SIZE), torch.nan)}, "finite"),
    ({"image": [1, 2]}, 'no tensor "image"'),
    ({"static": torch.zeros(6, 3, SIZE, SIZE)}, 'no tensor "image"'),
])
def test_a_static_memory_that_does_not_fit_is_refused(tmp_path, content, error):
    path = static_file(tmp_path / "static.pt", **content)
    with pytest.raises(ValueError, match=error) as raised:
        load_static(path, K, 2, SIZE)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("zipped", (True, False))
def test_a_flipped_bit_is_noticed(tmp_path, zipped):
    """Of a number in a file of today's format: older ones have no checksums."""
    path = tmp_path / "static.pt"
    torch.save({"image": torch.full((6, 3, SIZE, SIZE), 0.7)}, path, _use_new_zipfile_serialization=zipped)
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor([0.7, 0.7]).numpy().tobytes())] ^= 4
    path.write_bytes(data)
    if zipped:
        with pytest.raises(ValueError, match="static.pt is damaged: the checksum of .*data/0 is wrong"):
            load_static(path, K, 2, SIZE)
    else:
        assert load_static(path, K, 2, SIZE).unique().numel() == 2


@pytest.mark.parametrize("image", (
    torch.zeros(1).expand(10 ** 12), torch.zeros(6, 3, SIZE, SIZE).to_sparse(), torch.zeros(6, 3, SIZE, SIZE, dtype=torch.complex64),
    torch.zeros(6, 3, SIZE, SIZE, device="meta")), ids=("repeated by strides", "sparse", "complex", "meta"))
def test_tensors_that_are_not_their_numbers_one_by_one(tmp_path, image):
    with pytest.raises(ValueError, match="static.pt holds tensors that are sparse, quantised, complex, or larger than their stored data"):
        load_static(static_file(tmp_path / "static.pt", image=image), K, 2, SIZE)


class Stranger:
    """What a file must not bring to life."""

    def __reduce__(self):
        return (print, ("a pickled object was run",))


def test_other_files_are_refused_and_not_run(tmp_path, capsys):
    torch.save(torch.zeros(6, 3, SIZE, SIZE), tmp_path / "bare.pt")
    torch.save({"image": torch.zeros(6, 3, SIZE, SIZE), "more": Stranger()}, tmp_path / "pickled.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "empty.pt").touch()
    for name, error in (("bare", "no tensor"), ("pickled", "cannot be read"), ("text", "cannot be read"),
                        ("empty", "cannot be read"), ("missing", "does not exist")):
        with pytest.raises(ValueError, match=f"{name}.pt.*{error}"):
            load_static(tmp_path / f"{name}.pt", K, 2, SIZE)
    assert "run" not in capsys.readouterr().out
