"""--bytes: the chosen set fits, one video more would not, and the run is that of the explicit flags."""
import importlib
import itertools
import json

import pytest
import torch

from distill_utils import budget
from distill_utils.processes import run_script
from distill_utils.storage import FORMATS, PIXELS
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet
from networks import Hallucinator, Interpolation

K, T, SIZE, MANY = 3, 8, 16, 10_000
BUDGETS = (9_000, 31_415, 250_000)


def pixel_set(ipc, n=T, interpolation="duplicate", storage="fp32"):
    stretch = Interpolation(interpolation, n, T) if n != T or interpolation == "parametric" else None
    return PixelSet(torch.zeros(K * ipc, n, 3, SIZE, SIZE), K, stretch, storage)


def static_dynamic_set(ipc, spc, dpc, static_size, dynamic_size, dynamic_frames, storage="fp32"):
    static, dynamic = torch.zeros(K, spc, 3, static_size, static_size), torch.zeros(K, dpc, dynamic_frames, 1, dynamic_size, dynamic_size)
    return StaticDynamicSet(static, dynamic, Hallucinator(), ipc, T, SIZE, storage)


def assert_largest(make, chosen, total, size):
    """`make(extra)` is the set of the chosen number of videos and so many more."""
    assert make(0).bytes() == total <= size < make(1).bytes(), chosen


@pytest.mark.parametrize("size", (20_000, *BUDGETS[1:]))
def test_real_clips(size):
    chosen, total = budget.real_clips(size, K, MANY, T, SIZE)
    assert_largest(lambda extra: pixel_set(chosen["ipc"] + extra, storage=PIXELS), chosen, total, size)


@pytest.mark.parametrize("size, storage, n, interpolation", list(itertools.product((80_000, 123_456), FORMATS, (None, 1, 2), ("linear", "parametric"))))
def test_pixels(size, storage, n, interpolation):
    chosen, total = budget.pixels(size, K, MANY, T, SIZE, n, interpolation, storage)
    assert_largest(lambda extra: pixel_set(chosen["ipc"] + extra, n or T, interpolation, storage), chosen, total, size)


@pytest.mark.parametrize("size, storage, side, ipc", list(itertools.product((15_000, 123_456), FORMATS, (None, 5), (None, 1, 2))))
def test_stills(size, storage, side, ipc):
    if storage == "fp32" and side is None and ipc == 2 and size == 15_000:
        return  # two frames a class do not fit
    chosen, total = budget.stills(size, K, MANY, T, SIZE, ipc, side, storage)
    assert chosen["spc"] % (ipc or 1) == 0
    assert_largest(lambda extra: StillSet(torch.zeros(K, chosen["spc"] + extra * (ipc or 1), 3, side or SIZE, side or SIZE), 1, T, SIZE, storage), chosen, total, size)


@pytest.mark.parametrize("size, storage, given", list(itertools.product(BUDGETS, FORMATS, ({}, {"static_size": 7}, {"dynamic_size": 3, "dynamic_frames": 5}))))
def test_static_dynamic(size, storage, given):
    chosen, total = budget.static_dynamic(size, K, MANY, T, SIZE, **given, storage=storage)
    assert chosen["spc"] == chosen["dpc"] == chosen["ipc"] and given.items() <= chosen.items()
    assert_largest(lambda extra: static_dynamic_set(**chosen | {name: chosen[name] + extra for name in ("ipc", "spc", "dpc")}, storage=storage), chosen, total, size)


@pytest.mark.parametrize("storage", FORMATS)
def test_learned_labels_count(storage):
    """FRePo's, in the formats that sets keep them in."""
    def with_labels(synset):
        synset.soft_labels = torch.nn.Parameter(torch.zeros(len(synset), K))
        return synset
    chosen, total = budget.pixels(80_000, K, MANY, T, SIZE, n_syn=1, storage=storage, learn_label=True)
    assert_largest(lambda extra: with_labels(pixel_set(chosen["ipc"] + extra, 1, storage=storage)), chosen, total, 80_000)
    chosen, total = budget.static_dynamic(80_000, K, MANY, T, SIZE, storage=storage, learn_label=True)
    assert_largest(lambda extra: with_labels(static_dynamic_set(**chosen | {name: chosen[name] + extra for name in ("ipc", "spc", "dpc")}, storage=storage)),
                   chosen, total, 80_000)


def static_dynamic_bytes(ipc, static_size, dynamic_size, dynamic_frames, storage="uint8"):
    return static_dynamic_set(ipc, ipc, ipc, static_size, dynamic_size, dynamic_frames, storage).bytes()


def test_resolution_falls_until_sixty_videos_fit():
    for side in range(SIZE, 2, -1):
        enough = static_dynamic_bytes(60, side, side, T)
        chosen, _ = budget.static_dynamic(enough, K, MANY, T, SIZE, storage="uint8")
        assert tuple(chosen.values()) == (60, 60, 60, side, side, T)
        chosen, _ = budget.static_dynamic(enough - 1, K, MANY, T, SIZE, storage="uint8")
        assert tuple(chosen.values())[3:] == (side - 1, side - 1, T)
    chosen, _ = budget.static_dynamic(static_dynamic_bytes(60, 2, 2, T) - 1, K, MANY, T, SIZE, storage="uint8")  # an eighth is the coarsest
    assert tuple(chosen.values()) == (59, 59, 59, 2, 2, T)
    chosen, _ = budget.static_dynamic(static_dynamic_bytes(2, 16, 16, T), K, 2, T, SIZE, storage="uint8")        # two clips are the whole class
    assert tuple(chosen.values()) == (2, 2, 2, 16, 16, T)
    few = static_dynamic_bytes(60, 16, 5, T) - 1
    chosen, _ = budget.static_dynamic(few, K, MANY, T, SIZE, static_size=16, storage="uint8")                    # given values stay
    assert chosen["ipc"] >= 60 and tuple(chosen.values())[3:] == (16, 4, T)
    chosen, _ = budget.static_dynamic(few, K, MANY, T, SIZE, static_size=16, dynamic_size=3, dynamic_frames=4, storage="uint8")
    assert tuple(chosen.values())[3:] == (16, 3, 4)


@pytest.mark.parametrize("rule", (budget.real_clips, budget.pixels, budget.stills, budget.static_dynamic))
def test_no_more_than_the_smallest_class_has_and_no_less_than_one(rule):
    chosen, total = rule(10 ** 9, K, 4, T, SIZE)
    assert set(list(chosen.values())[:1]) == {4}
    smallest = rule(10 ** 9, K, 1, T, SIZE)[1] if rule is not budget.static_dynamic else static_dynamic_bytes(1, 2, 2, 8, "fp32")
    assert rule(smallest, K, 4, T, SIZE)[1] == smallest
    with pytest.raises(ValueError, match=f"^--bytes {smallest - 1} is too small: the smallest set, with --[si]pc 1.*, needs {smallest} bytes$"):
        rule(smallest - 1, K, 4, T, SIZE)


# ---------------------------------------------------------------- the scripts

SMALL = "--size 43 --frames 8 --width 8 --test_clips 1 --device cpu --num_eval 1 --epoch_eval_train 1".split()
LEARN = "--Iteration 1 --eval_it 1 --batch_real 2".split()


@pytest.fixture
def script(tiny, tmp_path, capfd, monkeypatch):
    """script(name, *flags) -> exit code, what it printed; the run's folders are below tmp_path / "results"."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def script(name, *flags):
        module = importlib.import_module(name)
        capfd.readouterr()
        try:
            run_script(module.main, module.parser(), list(map(str, ["--dataset", "custom", "--data_path", tiny, "--save_path", tmp_path / "results", "--pack_path",
                                                                    tmp_path / "packs", *SMALL, *flags])))
            code = 0
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err
    return script


COMPACT = "--static real --init_dynamic residual --init_hal identity --storage uint8".split()


@pytest.mark.parametrize("name, size, flags, explicit", (
    ("distill_utils.coreset", 200_000, [], "--ipc 2"),                                   # 88,752 bytes a clip of each of two classes
    ("distill_DM", 120_000, [*LEARN, "--storage", "uint8", "--n_syn", "2"], "--ipc 3"),  # the smaller class has three clips
    ("distill_DC", 25_000, ["--Iteration", "0", "--storage", "uint8"], "--spc 2"),
    ("distill_FRePo", 120_000, [*LEARN[:4], "--storage", "uint8", "--n_syn", "2", "--batch_target", "4", "--pool_steps", "1"], "--ipc 3"),
    ("distill_s2d", 10_000, [*LEARN, *COMPACT], "--ipc 3 --spc 3 --dpc 3 --static_size 11 --dynamic_size 11 --dynamic_frames 8")))
def test_the_run_is_that_of_the_explicit_flags(script, tmp_path, name, size, flags, explicit):
    code, printed = script(name, "--bytes", size, *flags)
    assert code == 0 and f"--bytes {size}: {explicit}, " in printed, printed
    path, = tmp_path.glob("results/*/*/result.json")
    before = path.stat().st_mtime_ns
    stored = json.loads(path.read_text())["bytes"]
    assert stored <= size and f"{explicit}, {stored} bytes" in printed
    settings = json.loads((path.parent / "config.json").read_text())["settings"]
    assert all(str(settings[flag.removeprefix("--")]) == value for flag, value in zip(explicit.split()[::2], explicit.split()[1::2]))
    code, printed = script(name, *explicit.split(), *flags)
    assert code == 0 and list(tmp_path.glob("results/*/*/result.json")) == [path] and path.stat().st_mtime_ns == before


@pytest.mark.parametrize("name, flags, sentence", (
    ("distill_utils.coreset", ["--bytes", "88000"], "error: --bytes 88000 is too small: the smallest set, with --ipc 1, needs 88752 bytes"),
    ("distill_s2d", ["--bytes", "1000", *LEARN, *COMPACT],
     "error: --bytes 1000 is too small: the smallest set, with --ipc 1 --static_size 5 --dynamic_size 5 --dynamic_frames 8, needs "),
    ("distill_DM", ["--bytes", "0", *LEARN], "argument --bytes: '0' is not a whole number of at least 1"),
    ("distill_DM", ["--bytes", "1000", "--dataset", "nonsense", *LEARN], "--dataset nonsense is unknown")))
def test_refused(script, tmp_path, name, flags, sentence):
    code, printed = script(name, *flags)
    assert code == 2 and sentence in printed and not (tmp_path / "results").exists(), printed
