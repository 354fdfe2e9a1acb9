"""DM with a pool of networks (methods.md 13): its class means, its file, and the steps that draw from it."""
import contextlib
import copy
import os

import numpy as np
import pytest
import torch
from fakes import random_clips
from test_matching import LABELS, SIZE, K, T, close, nets, plain_distribution_matching, seeded, static_dynamic  # noqa: F401 (fixtures)

import distill_DM
from distill_DM import DistributionMatching
from distill_utils import pool as pool_module
from distill_utils import processes
from distill_utils.clips import draw_flips, load_clips
from distill_utils.pool import Pool, pool_path
from distill_utils.synset import PixelSet
from utils import random_stream, stream_seed


@pytest.fixture
def clips(tmp_path, nets):  # noqa: F811
    """Clips of TinyNet's size that seem to come from a pack."""
    clips = random_clips(LABELS, K, T=T, size=SIZE)
    clips.origin = tmp_path / "custom_train_T4_8px_abc.npy", "all"
    clips.origin[0].touch()
    return clips


def pools(folder):
    return sorted(folder.glob("pool_*.f32"))


def plain_means(clips, net, flips):
    """Class means of the embeddings, one clip at a time, in float64: (K, F)."""
    net, sums = copy.deepcopy(net).double(), [0] * clips.K
    for number, label in enumerate(clips.labels.tolist()):
        clip = clips.draw(torch.tensor([number])).double()
        sums[label] = sums[label] + net.embed(clip.flip(-1) if flips[number] else clip)[0]
    return torch.stack(sums) / clips.counts()[:, None]


@pytest.mark.parametrize("at_once", (1, 3, 1000))
def test_means_are_those_of_all_clips_in_networks_of_their_number(clips, nets, at_once, monkeypatch):  # noqa: F811
    monkeypatch.setattr(distill_DM, "clips_at_once", lambda *_: at_once)
    matching = DistributionMatching(clips, 2, pool=3)
    assert len(matching.pool) == 3
    found = []
    for number in range(3):
        net, frames, _ = matching.pool_network(number)
        with random_stream(stream_seed("pool clips", number)):
            flips = draw_flips(len(clips))
        assert 0 < flips.sum() < len(flips) and frames == slice(None)
        assert close(matching.pool.means(number), plain_means(clips, net, flips))
        found.append(matching.pool.means(number))
    assert len({tuple(means.flatten().tolist()) for means in found}) == 3


@pytest.mark.parametrize("make", (lambda: PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE), K), lambda: static_dynamic(2, 2, 2)))
def test_a_step_is_the_plain_loop_with_one_of_the_pools_networks(clips, nets, make):  # noqa: F811
    synset, matching = make(), DistributionMatching(clips, 2, pool=4)
    clips.draw = None  # the real side is computed already
    learned = [value for value in synset.parameters() if value.requires_grad]
    seen = set()
    for _ in range(30):
        state = torch.get_rng_state()
        loss = matching(synset)
        gradients = torch.autograd.grad(loss, learned)
        torch.set_rng_state(state)
        number = int(torch.randint(4, ()))
        seen.add(number)
        plain_set = copy.deepcopy(synset).double()
        videos = plain_set(torch.arange(K * 2))[0]
        net = copy.deepcopy(matching.pool_network(number)[0]).double()
        means = net.embed(videos).unflatten(0, (K, 2)).mean(1)
        plain = (matching.pool.means(number) - means).square().sum()
        assert close(loss, plain)
        for gradient, reference in zip(gradients, torch.autograd.grad(plain, plain_set.parameters())):
            assert close(gradient, reference)
    assert seen == {0, 1, 2, 3}


def test_segments_are_the_networks_own(tmp_path):
    clips = random_clips([0, 1, 0, 1], 2, T=8, size=43)
    clips.origin = tmp_path / "pack.npy", "all"
    clips.origin[0].touch()
    matching = DistributionMatching(clips, 2, segments=2, width=4, pool=6)
    chosen = [tuple(matching.pool_network(number)[1].tolist()) for number in range(6)]
    assert set(chosen) == {(0, 1, 2, 3), (4, 5, 6, 7)} and chosen == [tuple(matching.pool_network(number)[1].tolist()) for number in range(6)]
    synset = PixelSet(torch.randn(2, 8, 3, 43, 43), 2)
    for _ in range(6):
        state = torch.get_rng_state()
        gradient, = torch.autograd.grad(matching(synset), synset.videos)
        torch.set_rng_state(state)
        matched = set(chosen[int(torch.randint(6, ()))])
        assert {frame for frame in range(8) if gradient[:, frame].any()} == matched


def test_networks_are_kept_as_the_memory_budget_allows(clips, monkeypatch):
    """Kept or made again, they are the same."""
    plain = DistributionMatching(clips, 2, pool=4)
    size = distill_DM.parameter_bytes(plain.pool_network(0)[0])
    monkeypatch.setattr(distill_DM, "memory_budget", lambda device: 2 * size)
    matching = DistributionMatching(clips, 2, pool=4)
    for number in (3, 1, 3, 0, 2, 1):
        net, frames, _ = matching.pool_network(number)
        other, same_frames, _ = plain.pool_network(number)
        assert frames == same_frames and all(torch.equal(one, two) for one, two in zip(net.parameters(), other.parameters(), strict=True))
    assert len(matching.kept) == 2 and len(plain.kept) == 4
    assert matching.pool_network(next(iter(matching.kept)))[0] is next(iter(matching.kept.values()))[0]


# ---------------------------------------------------------------- the file

def test_what_is_there_is_not_computed_again(clips, tmp_path, monkeypatch):
    first = DistributionMatching(clips, 2, pool=3)
    made, means = [], DistributionMatching.pool_means
    monkeypatch.setattr(DistributionMatching, "pool_means", lambda self, number: made.append(number) or means(self, number))
    again, larger, smaller = (DistributionMatching(clips, 2, pool=count) for count in (3, 5, 2))
    assert made == [3, 4] and len(pools(tmp_path)) == 1 and len(smaller.pool) == 2
    for number in range(3):
        assert torch.equal(larger.pool.means(number), first.pool.means(number))
    assert torch.equal(again.pool.means(2), first.pool.means(2))


@pytest.mark.parametrize("left", (0, 1, 100, 180, 181, 359))
def test_a_pool_that_was_stopped_goes_on_and_is_the_same(tmp_path, left):
    def make(number):
        return torch.full((3, 15), float(number)) + torch.arange(15)

    whole = Pool(tmp_path / "whole.f32", 3, (3, 15), make)
    data = (tmp_path / "whole.f32").read_bytes()
    assert len(data) == 3 * 180
    (tmp_path / "part.f32").write_bytes(data[:left])
    made = []
    part = Pool(tmp_path / "part.f32", 3, (3, 15), lambda number: made.append(number) or make(number))
    assert made == list(range(left // 180, 3)) and (tmp_path / "part.f32").read_bytes() == data
    assert torch.equal(part.means(2), whole.means(2))


def test_two_machines_whose_locks_do_not_hold_write_the_same_file(tmp_path, monkeypatch):
    """Some shared disks lock on one machine only: then both compute everything, each mean at its own place."""
    monkeypatch.setattr("distill_utils.pool.locked", lambda path: contextlib.nullcontext())

    def make(number, other=True):
        if other and number == 1:  # the other machine begins and ends meanwhile
            Pool(tmp_path / "pool.f32", 3, (2, 4), lambda number: make(number, other=False))
        return torch.full((2, 4), float(number))
    pool = Pool(tmp_path / "pool.f32", 3, (2, 4), make)
    assert [pool.means(number).unique().tolist() for number in range(3)] == [[0], [1], [2]]
    assert (tmp_path / "pool.f32").stat().st_size == 3 * 32


def test_a_part_of_a_mean_is_written_again(tmp_path):
    """Whoever wrote it, and whatever a machine that was faster wrote behind it."""
    (tmp_path / "pool.f32").write_bytes(np.full(12, 7, np.float32).tobytes())  # one network and a half
    pool = Pool(tmp_path / "pool.f32", 3, (2, 4), lambda number: torch.full((2, 4), float(number)))
    assert [pool.means(number).unique().tolist() for number in range(3)] == [[7], [1], [2]]


def test_a_complete_pool_needs_no_lock(tmp_path, monkeypatch):
    """Another user's packs may be read-only."""
    Pool(tmp_path / "pool.f32", 2, (2, 4), lambda number: torch.full((2, 4), float(number)))
    monkeypatch.setattr("distill_utils.pool.locked", None)
    assert Pool(tmp_path / "pool.f32", 2, (2, 4), None).means(1).unique().tolist() == [1]


def test_a_stopped_computation_keeps_what_is_whole(tmp_path):
    def make(number):
        if number == 2:
            raise KeyboardInterrupt
        return torch.full((2, 4), float(number))

    with pytest.raises(KeyboardInterrupt):
        Pool(tmp_path / "pool.f32", 4, (2, 4), make)
    assert (tmp_path / "pool.f32").stat().st_size == 2 * 32
    assert Pool(tmp_path / "pool.f32", 2, (2, 4), None).means(1).unique().tolist() == [1]


def test_a_stale_pool_is_never_used(clips, tmp_path, monkeypatch):
    def path(precision="fp32", segments=1, width=128, compile=False):
        return pool_path(clips, precision, segments, width, compile)

    first = path()
    others = [path("bf16"), path(segments=2), path(width=32), path(compile=True)]
    clips.origin = clips.origin[0], "but those held out"
    others.append(path())
    clips.origin = clips.origin[0], "all"
    clips.shown = torch.tensor([0, 0, 2, 2])
    others.append(path())
    clips.shown = slice(None)
    os.utime(clips.origin[0], ns=(1, 1))  # the pack was built anew
    others.append(path())
    monkeypatch.setattr(torch, "__version__", "0.0")
    others.append(path())
    assert len({first, *others}) == 1 + len(others) and first.parent == tmp_path


def test_clips_of_a_pack_name_it_and_what_is_held_out(tiny, tmp_path):
    def origin(**flags):
        return load_clips("custom", split="train", data_path=tiny, T=4, size=16, pack_path=tmp_path / "packs", **flags).origin

    assert origin(pack=False) is None
    assert origin() == origin() and origin()[0] == origin(validation=0.3)[0] and origin()[1] != origin(validation=0.3)[1]
    assert origin()[0].is_file() and origin(seed=1)[0] != origin()[0]


def test_a_full_disk_is_named_and_leaves_whole_means(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool_module.os, "fsync", full)
    with pytest.raises(OSError) as caught:
        Pool(tmp_path / "pool.f32", 2, (2, 4), lambda number: torch.zeros(2, 4))
    assert processes.error_line(caught.value) == f"no space left on the disk for {tmp_path / 'pool.f32'}"
    monkeypatch.undo()
    monkeypatch.setattr(pool_module, "check_space", lambda folder, size, what, remedy: pytest.fail(f"{size} bytes"))
    with pytest.raises(BaseException, match="160 bytes"):
        Pool(tmp_path / "larger.f32", 5, (2, 4), None)


@pytest.mark.parametrize("script, flags", (("distill_DM", ("--lr_img", "10")), ("distill_s2d", ("--spc", "1", "--dpc", "1"))))
def test_a_pool_without_a_pack_is_refused(tiny, tmp_path, capsys, script, flags):
    module = __import__(script)
    torch.save({"image": torch.zeros(2, 3, 43, 43)}, tmp_path / "static.pt")
    with contextlib.suppress(SystemExit):
        processes.run_script(module.main, module.parser(), [
            "--dataset", "custom", "--data_path", str(tiny), "--frames", "8", "--size", "43", "--save_path", str(tmp_path / "runs"), "--device", "cpu",
            *flags, *(("--path_static", str(tmp_path / "static.pt")) if script == "distill_s2d" else ()), "--pool", "2", "--no_pack"])
    assert "error: --pool stores its class means beside the packed clips: leave out --no_pack, or --pool" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_set_that_is_not_learned_needs_no_pool(command, tmp_path):
    before = pools(command.folder / "packs")
    code, output = command("distill_DM", tmp_path, "--Iteration", 0, "--pool", 2, "--batch_real", 64)
    assert code == 0 and pools(command.folder / "packs") == before, output
