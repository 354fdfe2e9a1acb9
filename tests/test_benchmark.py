"""The benchmark: what it counts against hand counts, its launcher, and its program end to end at tiny sizes."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from dry import script
from fakes import PRECISIONS
from PIL import Image

import distill_FRePo
import networks
import plain
from measure import count, memory_of, quartiles
from utils import ROOT, peak_memory
from workload import Workload

benchmark = script("sh/benchmark")
TINY = "--device cpu --classes 2 --clips_per_class 3 --test_clips 2 --size 43 --batch_real 2 --epoch_eval_train 2 --batch_train 4 --repeats 2".split()
KILO = 4 * 1000  # bytes of float32


def forward_flop(frames, size):
    """Of one clip through the first, the second and the third convolution: outputs × inputs of each × 2."""
    flop = []
    for inputs, outputs, pool in ((3, 64, 1), (64, 128, 2), (128, 128, 2)):
        size = (size + 1) // 2
        flop.append(2 * outputs * frames * size ** 2 * inputs * 3 * 7 * 7)
        frames, size = frames // pool, size // 2
    return flop


def learned_flop(frames, size):
    """As forward_flop, of a video that needs a gradient: the first convolution sees 8×8 pixels, as blocks, instead of 7×7."""
    first, *others = forward_flop(frames, size)
    return [first * 64 // 49, *others]


def make(folder, *flags):
    return Workload(benchmark.parser().parse_args([*TINY, *flags]), folder).write()


@pytest.mark.parametrize("frames, size", ((16, 112), (8, 64), (9, 43)))
def test_flop_of_a_forward(frames, size):
    net = networks.ConvNet3D(5, frames, size).eval()
    with torch.inference_mode():
        assert count(lambda: net.embed(torch.randn(1, frames, 3, size, size)))[0] == sum(forward_flop(frames, size))
    if size == 112:
        assert [round(flop / 2e9, 2) for flop in forward_flop(frames, size)] == [1.42, 3.78, 0.31]  # GMAC, as in the notes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_flop_of_a_dm_iteration(tmp_path, precision):
    """A forward of each real clip; forward and gradient of each video; the sums of 256 features over the 4 clips of 2 classes."""
    flop, moved = count(make(tmp_path, "--ipc", "2").dm(precision))
    assert flop == sum(forward_flop(8, 43)) * 4 + sum(learned_flop(8, 43)) * 2 * 4 + 2 * 256 * 4 * 2 and moved > 12 * 8 * 3 * 43 ** 2 * 4


def test_flop_of_pool_and_frepo(tmp_path):
    """With a pool, only forward and gradient of each video. FRePo: a forward of each real clip; of each video one without a graph, one with it and its
    gradient, and the network's three, less the gradient of the first layer's input."""
    workload, whole, learned = make(tmp_path, "--ipc", "2"), sum(forward_flop(8, 43)), sum(learned_flop(8, 43))
    assert count(workload.pool("fp32"))[0] == 2 * 4 * learned
    logits = 3 * 4 * 2 * 128 * 2                       # of the network's step
    regression = count(lambda: plain_regression())[0]
    assert count(workload.frepo("fp32"))[0] == whole * 4 + 4 * (whole + 2 * learned + 3 * whole - forward_flop(8, 43)[0]) + logits + regression


def plain_regression():
    """The regression of 4 clips from 4 videos of 256 features, and its gradient."""
    of_set, labels = torch.rand(4, 256, dtype=torch.float64, requires_grad=True), torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    distill_FRePo.predict(of_set, torch.rand(4, 256, dtype=torch.float64), labels).sum().backward()


def test_flop_of_the_plain_forms(tmp_path):
    """The same as ours, where nothing is computed twice: our sums over clips, replayed steps, and features without a graph; and no convolution in
    blocks."""
    workload, whole = make(tmp_path, "--ipc", "2", "--syn_steps", "2"), sum(forward_flop(8, 43))
    ours = {section: count(getattr(workload, section)("fp32"))[0] for section in ("dm", "frepo", "evaluation", "experts")}
    flop = {section: count(getattr(plain, section)(workload))[0] for section in (*ours, "mtt")}
    blocks = 2 * 4 * (sum(learned_flop(8, 43)) - whole)
    assert flop["dm"] == ours["dm"] - 2 * 256 * 4 * 2 - blocks and flop["frepo"] == ours["frepo"] - 4 * whole - blocks
    assert (flop["evaluation"], flop["experts"]) == (ours["evaluation"], ours["experts"])
    three = tmp_path / "three"
    three.mkdir()
    per_step = count(plain.mtt(make(three, "--ipc", "2", "--syn_steps", "3")))[0] - flop["mtt"]
    assert per_step == 4 * (9 * (whole + 2 * 128 * 2) - 3 * forward_flop(8, 43)[0])


def test_plain_files(tmp_path):
    """Both forms prepare the same film into as many frames of the same size, and the plain form loads as many clips."""
    workload = make(tmp_path)
    workload.preparing(None)(), plain.preparing(workload)()
    ours, theirs = (sorted(tmp_path.glob(pattern)) for pattern in ("ours*/frames/*", "plain*/*"))
    assert len(ours) == len(theirs) == 128 and {Image.open(path).size for path in (*ours, *theirs)} == {(43, 43)}
    differences = [np.abs(np.subtract(*(np.asarray(Image.open(path), float) for path in pair))).mean() for pair in zip(ours, theirs)]
    assert max(differences) < 6
    assert plain.loading(workload)().shape == (4, 8, 3, 43, 43)


@pytest.mark.parametrize("kept", (False, True))
def test_flop_of_an_mtt_step(tmp_path, monkeypatch, kept):
    """Of each video in each inner step nine forwards, or twelve where no graph is kept and the step is computed twice, less the gradients that the first
    layer's inputs do not need; nothing lies before the first step."""
    monkeypatch.setattr("distill_MTT.count_kept_steps", lambda *sizes: 3 if kept else 0)
    first, whole = learned_flop(8, 43)[0], sum(learned_flop(8, 43)) + 2 * 128 * 2
    step = 9 * whole - 3 * first if kept else 12 * whole - 4 * first
    flop = [count(make(tmp_path / folder, "--syn_steps", folder).mtt("fp32"))[0] for folder in "123" if not (tmp_path / folder).mkdir()]
    assert flop[2] - flop[1] == flop[1] - flop[0] == 2 * step
    assert -2 * whole <= flop[0] / 2 - step <= 0


@pytest.mark.parametrize("section, clips", (("loading", 0), ("evaluation", 3 * 2 * 2 + 2), ("experts", 3 * 6)))
def test_flop_of_the_other_sections(tmp_path, section, clips):
    """About a forward of each test clip, and three of each clip in training, less the gradient of the input."""
    first, whole = forward_flop(8, 43)[0], sum(forward_flop(8, 43)) + 2 * 128 * 2
    assert count(getattr(make(tmp_path), section)("fp32"))[0] == whole * clips - clips // 3 * first


@pytest.mark.parametrize("operation, expected", (
    (lambda x: x + 1, 2), (lambda x: x.add_(1), 2), (lambda x: torch.empty_like(x), 0), (lambda x: x.sum(), 1.001),
    (lambda x: x.view(50, 20).T[::2].unsqueeze(0).expand(9, -1, -1).detach(), 0), (lambda x: x.contiguous().reshape(-1).float(), 0),
    (lambda x: x.view(50, 20).T.contiguous(), 2), (lambda x: x[:1].expand(1000) + x, 2.001), (lambda x: x.bfloat16(), 1.5),
    (lambda x: x.index_select(0, torch.arange(0).new_full((10,), 3)), 0.06), (lambda x: torch._foreach_add_([x, x[:500]], 1), 3),
    (lambda x: x.view(20, 50) @ x.view(50, 20), 2.4), (lambda x: torch.add(x, x, out=torch.empty_like(x)), 3),
    (lambda x: x.requires_grad_().square().sum().backward(), None)), ids=range(14))
def test_bytes_of_known_operations(operation, expected):
    """In thousands of float32; under inference_mode composite operations count as their parts."""
    for mode in torch.enable_grad(), torch.inference_mode():
        with mode:
            x = torch.randn(1000)
            if expected is not None:
                assert count(lambda: operation(x))[1] / KILO == pytest.approx(expected)
            elif torch.is_grad_enabled() and not x.is_inference():
                assert count(lambda: operation(x))[1] / KILO > 4  # forward, sum, and both of the way back


def test_quartiles_and_memory():
    assert quartiles([5, 1, 4, 2, 3]) == [2, 3, 4] and quartiles([7]) == [7, 7, 7]
    device = torch.device("cpu")
    most = peak_memory(device) + 2 ** 28  # other tests of this process may have taken more than is in use now
    peak, above = memory_of(lambda: lambda: torch.ones(most // 4), device)
    assert peak > most and peak > above > 2 ** 27


@pytest.mark.parametrize("gpus, given, device, visible", (
    ("GPU 0: NVIDIA H200", (), "cuda", "0"), ("", (), "cpu", ""), ("GPU 0: NVIDIA H200", ("cpu",), "cpu", ""), ("", ("3",), "cuda", "3"),
    ("", ("-1",), "cpu", ""), ("", ("--growth", "ipc,size"), "cpu", ""), ("GPU 0: NVIDIA H200", ("1", "--repeats", "3"), "cuda", "1")))
def test_launcher(launch, tmp_path, gpus, given, device, visible):
    """Without a GPU it is the first one that nvidia-smi lists, else the CPU."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\n[ -n '{gpus}' ] && echo '{gpus}'\n")
    smi.chmod(0o755)
    process, call = launch("sh/benchmark.sh", *given, PATH=f"{smi.parent}:{os.environ['PATH']}")
    assert process.returncode == 0, process.stderr
    program, *flags = call["command"]
    found = vars(benchmark.parser().parse_args(flags))
    assert os.path.samefile(program, ROOT / "sh" / "benchmark") and call["environment"]["CUDA_VISIBLE_DEVICES"] == visible
    assert (found["device"], found["growth"]) == (device, ["ipc", "size"] if "--growth" in given else None)
    assert found["repeats"] == (3 if "--repeats" in given else 5)


def test_launcher_refuses_nonsense(launch):
    process, call = launch("sh/benchmark.sh", "gpu0")
    assert process.returncode == 2 and call is None and process.stderr == "error: GPU must be a number, a list such as 0,1, cpu, -1, cpu*2, mps or xpu, not 'gpu0'\n"


@pytest.mark.slow
def test_end_to_end(launch, tmp_path):
    out = tmp_path / "figures" / "tiny.json"
    process, _ = launch("sh/benchmark.sh", "cpu", *TINY[2:], "--sections", "preparing,loading,dm", "--plain", "--precisions", ",".join(PRECISIONS), "--out", str(out),
                        PYTHON=sys.executable)
    assert process.returncode == 0, process.stderr
    content = json.loads(out.read_text())
    rows = content["rows"]
    assert [(row["section"], row["precision"]) for row in rows] == [
        *((section, precision) for section in ("preparing", "loading") for precision in (None, "plain")),
        *(("dm", precision) for precision in (*PRECISIONS, "plain"))]
    assert {(rate["name"], rate["precision"]) for rate in content["rates"]} == {
        ("copy", None), *((name, precision) for name in ("matmul", "convolution") for precision in PRECISIONS)}
    assert all(row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1] and len(row["all_seconds"]) == 2 for row in rows)
    assert all(row["peak_bytes"] >= row["bytes_above_start"] >= 0 for row in rows)
    assert all(0 < row["share_of_convolution"] and 0 < row["share_of_matmul"] and 0 < row["share_of_copy"] for row in rows[4:-1])
    for row in rows:
        plain_form = next(other for other in rows if (other["section"], other["precision"]) == (row["section"], "plain"))
        assert row["precision"] == "plain" or row["times_plain"] == pytest.approx(plain_form["seconds"] / row["seconds"])
    assert rows[2]["bytes"] == 4 * 8 * 3 * 43 ** 2 * 5 and rows[2]["clips_per_second"] == pytest.approx(4 / rows[2]["seconds"])
    assert {"cpu", "threads", "torch"} <= set(content["machine"]) and content["settings"]["size"] == 43
    lines = process.stdout.splitlines()
    assert lines[-7 - len(PRECISIONS)].split()[:3] == ["section", "precision", "seconds"] and lines[-1] == f"all figures: {out}" and "threads" in lines[0]
    assert not process.stderr and not list(out.parent.glob(".*"))


def test_growth(tmp_path, monkeypatch, capsys):
    tiny = {"ipc": ((1, 2), {"clips_per_class": 2}, ("dm", "mtt")), "clips": ((4, 40), {"classes": 2}, ("start_up", "class_batch", "gather"))}
    monkeypatch.setattr(benchmark, "GROWTH", tiny)
    args = benchmark.parser().parse_args(["--device", "cpu", "--growth", "ipc,clips", "--repeats", "1", "--out", str(tmp_path / "out.json")])
    benchmark.main(args)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["axis"], row["value"], row["figure"]) for row in rows] == [(axis, value, name) for axis, (values, _, names) in tiny.items()
                                                                           for value in values for name in names]
    assert all(row["ratio"] == pytest.approx(row["seconds"] / row["predicted"]) for row in rows)
    assert [row["relative"] for row in rows[:2]] == [1, 1] and rows[2]["flop"] > rows[0]["flop"] and rows[9]["bytes"] == rows[6]["bytes"]
    assert "relative" in capsys.readouterr().out


@pytest.mark.parametrize("flags, sentence", (
    ("--sections dm,mmt", "argument --sections: unknown 'mmt': choose from preparing,loading,dm,pool,mtt,frepo,evaluation,experts"),
    ("--precisions fp64", "argument --precisions: unknown 'fp64': choose from fp32,"), ("--growth", "argument --growth: expected one argument"),
    ("--growth videos", "argument --growth: unknown 'videos'"), ("--classes 0", "argument --classes: '0' is not a whole number of at least 1"),
    ("--frames 4", "error: ConvNet3D needs at least 8 frames of 43 pixels, not 4 of 64"), ("--device gpu", "error: --device gpu: PyTorch "),
    ("--ipc 30", "error: class class000 has fewer training clips than the required 30")))
def test_bad_flags(flags, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        benchmark.run_script(benchmark.main, benchmark.parser(), ["--device", "cpu", "--out", str(tmp_path / "out.json"), *flags.split()])
    assert caught.value.code == 2 and sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_explains_every_flag():
    assert all(action.help for action in benchmark.parser()._actions)
    assert subprocess.run(["bash", "-n", ROOT / "sh" / "benchmark.sh"]).returncode == 0
