"""Bad input, through the scripts' own command line: one sentence that names flag or file, exit code 2, no traceback."""
import builtins
import errno
import gc
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import dry
import pytest
import torch

import distill_DM
import distill_MTT
import distill_s2d
import networks
import utils
from distill_utils import options
from distill_utils.compute import KnownGradient
from distill_utils.identity import check_places
from distill_utils.processes import run_script
from distill_utils.synset import load_set, load_static

LOOPS = ("--outer_loop", 1, "--inner_loop", 1)
SMALL = "--frames 8 --size 43 --width 8 --test_clips 1 --device cpu --num_eval 1 --epoch_eval_train 1 --eval_it 2 --Iteration 2".split()
OF_MATCHING = {"MTT": ("--syn_steps", 1, "--max_start_epoch", 1)}


@pytest.fixture
def script(tiny, tmp_path, capfd, monkeypatch):
    """script("DM", *flags) runs distill_DM.py with the tiny data's flags and gives (exit code, last line on stderr)."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def script(name, *flags, data=tiny):
        module = importlib.import_module(f"distill_{name}")
        monkeypatch.setattr("sys.argv", [f"distill_{name}.py"])  # the parser's name
        arguments = ["--dataset", "custom", "--data_path", data, "--save_path", tmp_path / "results",
                     "--pack_path", tmp_path / "packs", *SMALL, *OF_MATCHING.get("MTT" if "MTT" in flags else name, ("--batch_real", 2)), *flags]
        capfd.readouterr()
        try:
            run_script(module.main, module.parser(), list(map(str, arguments)))
            code = 0
        except SystemExit as stop:
            code = stop.code
            stop.__traceback__ = stop.__context__ = None  # they hold the run, and so its lock
        if (tmp_path / "results").exists():
            gc.collect()
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        lines = [line for line in printed.err.splitlines() if line.strip()]
        return code, lines[-1] if lines else ""
    return script


@pytest.fixture
def refused(script, tmp_path):
    """As script, for what must be refused before any work: no clip decoded, no folder made. Gives the sentence."""
    def refused(name, *flags, **options):
        before = sorted(tmp_path.rglob("*"))
        code, sentence = script(name, *flags, **options)
        assert code == 2 and sentence.startswith(f"distill_{name}.py: error: "), sentence
        assert sorted(tmp_path.rglob("*")) == before
        return sentence.removeprefix(f"distill_{name}.py: error: ")
    return refused


@pytest.fixture
def stopped(script, tmp_path):
    """As script, for what must be refused before the first evaluation and iteration. Gives the sentence."""
    def stopped(name, *flags, **options):
        code, sentence = script(name, *flags, **options)
        assert code == 2 and sentence.startswith(f"distill_{name}.py: error: "), sentence
        assert not list(tmp_path.glob("results/*/*/distilled.*")) + list(tmp_path.glob("results/*/*/checkpoint.pt"))
        return sentence.removeprefix(f"distill_{name}.py: error: ")
    return stopped


# ---------------------------------------------------------------- names and numbers

def test_unknown_names_come_with_the_choices(refused):
    for name in ("DM", "DC", "MTT", "s2d"):
        assert refused(name, "--dataset", "UCF-101").startswith(
            "unknown --dataset 'UCF-101': choose one of UCF101, miniUCF101, HMDB51, Kinetics400, SSv2, toy, custom")
    assert refused("DM", "--network", "ResNet") == ("unknown --network 'ResNet': choose one of "
                                                    + ", ".join(networks.NETWORKS))
    assert refused("s2d", "--method", "MTTT").startswith("argument --method: invalid choice: 'MTTT' (choose from ")
    for name, flag in (("DM", "--init"), ("DC", "--init"), ("s2d", "--init_dynamic"), ("s2d", "--init_hal"),
                       ("DM", "--precision"), ("DM", "--wandb")):
        assert refused(name, flag, "nonsense").startswith(f"argument {flag}: invalid choice: 'nonsense' (choose from ")


def test_unknown_wandb_mode_in_the_environment(refused, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "maybe")
    assert refused("DM") == "unknown --wandb 'maybe': choose one of online, offline, disabled"


def test_unknown_flag_and_missing_data_set(refused):
    assert refused("DM", "--learning_rate", "1") == "unrecognized arguments: --learning_rate 1"
    with pytest.raises(SystemExit) as stop:
        run_script(None, distill_DM.parser(), [])
    assert stop.value.code == 2


WHOLE = {"DM": "ipc num_eval epoch_eval_train eval_it batch_real batch_train "
               "frames size stride train_clips test_clips workers",
         "DC": "spc ipc outer_loop inner_loop batch_real", "s2d": "ipc spc dpc batch_real syn_steps",
         "MTT": "ipc syn_steps expert_epochs max_start_epoch batch_syn trajectories_per_step"}


@pytest.mark.parametrize("name, flag", [(name, f"--{flag}") for name, flags in WHOLE.items() for flag in flags.split()])
def test_whole_numbers_of_at_least_one(refused, name, flag):
    for value in ("0", "-1", "1.5", "many", ""):
        assert refused(name, flag, value) == f"argument {flag}: {value!r} is not a whole number of at least 1"


@pytest.mark.parametrize("name, flag", (("DM", "--Iteration"), ("DC", "--Iteration"), ("s2d", "--Iteration"),
                                        ("DM", "--seed"), ("MTT", "--min_start_epoch")))
def test_whole_numbers_of_at_least_zero(refused, name, flag):
    for value in ("-1", "1.5", "many"):
        assert refused(name, flag, value) == f"argument {flag}: {value!r} is not a whole number of at least 0"


NUMBERS = {options.positive: "a whole number of at least 1", options.count: "a whole number of at least 0", options.seed: "a whole number of at least 0",
           options.even: "an even number of at least 2"}


@pytest.mark.parametrize("name", ("buffer", "distill_DC", "distill_DM", "distill_MTT", "distill_s2d", "sh/benchmark",
                                  *(f"distill_utils.{name}" for name in ("coreset", "evaluate", "export", "inspect", "prepare", "report"))))
def test_numbers_that_do_not_fit(name, capsys):
    """What PyTorch and NumPy cannot take is refused with the flags, before anything is made."""
    parser = (dry.script(name) if name == "sh/benchmark" else importlib.import_module(name)).parser()
    numeric = {action: NUMBERS[action.type] for action in parser._actions if action.type in NUMBERS}
    assert numeric and not [action.dest for action in parser._actions if action.type in (int, float)]
    for action, description in numeric.items():
        most = 2 ** 64 - 1 if action.type is options.seed else 2 ** 31 - 1
        for value in (most + 1, 2 ** 64, 10 ** 30):
            with pytest.raises(SystemExit):
                parser.parse_args([action.option_strings[0], str(value)])
            assert capsys.readouterr().err.endswith(f"argument {action.option_strings[0]}: '{value}' is not {description} and at most {most}\n")
        assert action.type(str(most - most % 2)) == most - most % 2


@pytest.mark.parametrize("name, seed", (("distill_DM", 1764055000123456789), *((name, 2 ** 64 - 1) for name in (
    "distill_DM", "distill_DC", "distill_MTT", "distill_s2d", "buffer", "distill_utils.coreset"))))
def test_seeds_as_large_as_pytorchs(command, whole, tmp_path, name, seed):
    """One of a clock in nanoseconds, and the largest."""
    code, output = command(name, tmp_path, *(whole(name)[1] if name in ("distill_MTT", "distill_s2d") else ()), "--seed", seed)
    assert code == 0, output


@pytest.mark.parametrize("name, flags", (("DM", ("--width", 2 ** 31 - 2)), ("DM", ("--train_clips", 2 ** 31 - 1)), ("s2d", ("--dpc", 2 ** 31 - 1, "--ipc", 1))))
def test_too_much_memory(script, tmp_path, name, flags):
    save_static(tmp_path / "static.pt")
    code, sentence = script(name, *flags, *(("--path_static", tmp_path / "static.pt") if name == "s2d" else ()))
    assert code == 2 and re.search(r"error: out of memory: (tried|Unable) to allocate [\d.]+ \w+$", sentence), sentence


@pytest.mark.parametrize("name, flag", (("DM", "--lr_img"), ("DM", "--lr_net"), ("DC", "--lr_img"),
                                        ("s2d", "--lr_dynamic"), ("s2d", "--lr_hal"), ("s2d", "--lr_static"), ("s2d", "--lr_lr"),
                                        ("MTT", "--lr_img"), ("MTT", "--lr_lr"), ("MTT", "--lr_teacher"), ("MTT", "--lr_net"),
                                        ("DM", "--checkpoint_seconds")))
def test_rates(refused, name, flag):
    for value in ("-1", "nan", "inf", "1e38", "fast"):
        assert refused(name, flag, value) == f"argument {flag}: {value!r} is not a number from 0 to 1e37"


def test_precisions(refused, monkeypatch):
    assert refused("DM", "--precision", "tf32") == "--precision tf32 needs an NVIDIA GPU of the Ampere generation or later: give fp32 or bf16"
    monkeypatch.setenv("CXX", "no such compiler")
    assert refused("DM", "--compile") == "--compile needs a C++ compiler: install g++, or leave out --compile"


def here(monkeypatch, kind, count):
    """PyTorch sees so many accelerators of this kind."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))


def test_devices(refused, monkeypatch):
    here(monkeypatch, "cuda", 0)
    for device in ("gpu", "cuda:x", "meta", "mps", "xpu:1", "vulkan", ""):
        assert refused("DM", "--device", device) == f"--device {device}: PyTorch {torch.__version__} finds no such device here: give one of cpu (to a launcher as its first argument: cpu, a GPU's number, mps or xpu)"
    for name in ("DM", "DC", "s2d"):
        assert refused(name, "--device", "cuda", *(("--path_static", "x") if name == "s2d" else ())).startswith("--device cuda: PyTorch")
    for kind, count, wrong in (("cuda", 2, "cuda:3"), ("cuda", 1, "mps"), ("mps", 1, "cuda"), ("mps", 1, "mps:1"), ("xpu", 2, "xpu:2")):
        here(monkeypatch, kind, count)
        assert refused("DM", "--device", wrong).endswith(", ".join(["one of cpu", *(f"{kind}:{number}" for number in range(count))]) + " (to a launcher as its first argument: cpu, a GPU's number, mps or xpu)")


@pytest.mark.parametrize("device", ("cuda", "cuda:1", "mps", "xpu"))
def test_devices_that_do_not_work(refused, monkeypatch, device):
    """As with a driver that is too old for this PyTorch: the first use fails."""
    here(monkeypatch, device.split(":")[0], 2)

    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")
    monkeypatch.setattr(torch.accelerator, "set_device_index", fail)
    assert refused("DM", "--device", device) == f"--device {device} does not work here: CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize("device", ("cuda:1", "mps", "xpu", "xpu:0"))
def test_one_device_for_several_processes(monkeypatch, device):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    here(monkeypatch, device.split(":")[0], 2)
    with pytest.raises(ValueError, match=f"--device {device} is a single device, but there are several processes: give cuda or cpu"):
        utils.find_device(device)


def test_too_little_memory_on_the_device(script, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB.")
    monkeypatch.setattr(networks, "build", fail)
    assert script("DM") == (2, "distill_DM.py: error: the GPU's memory is full: end other programs that use it, or lower the sizes "
                               "(CUDA out of memory. Tried to allocate 20.00 MiB.)")


def test_clips_too_small_for_the_network(refused):
    for flags in (("--size", 42), ("--frames", 7)):
        assert refused("DM", *flags).startswith("ConvNet3D needs at least 8 frames of 43 pixels, not ")
        assert refused("DM", *flags, "--network", "CNN+mean").startswith("ConvNet3D needs ")  # whose features DM matches
        assert refused("DM", *flags, "--network", "CNN+mean", "--Iteration", 0, "--select", "herding").startswith("ConvNet3D needs ")
        assert refused("s2d", *flags, "--network", "CNN+mean", "--static", "real").startswith("ConvNet3D needs ")
        assert refused("s2d", *flags, "--network", "CNN+mean", "--static", "real", "--method", "MTT", "--Iteration", 0).startswith("ConvNet3D needs ")


# ---------------------------------------------------------------- counts that do not fit

def test_counts_that_do_not_divide(refused):
    assert refused("s2d", "--ipc", 2, "--spc", 3) == ("--spc 3 is not a multiple of --ipc 2: each of a class's 2 videos "
                                                      "needs the same number of memories")
    assert refused("s2d", "--ipc", 2, "--dpc", 5).startswith("--dpc 5 is not a multiple of --ipc 2")
    assert refused("s2d", "--ipc", 4, "--spc", 2).startswith("--spc 2 is not a multiple of --ipc 4")
    assert refused("DC", "--spc", 5, "--ipc", 2).startswith("--spc 5 is not a multiple of --ipc 2")


def test_loops_that_the_paper_does_not_give(refused):
    assert refused("DC", "--spc", 3) == ("--spc 3 has no loops in the paper (it has 1, 2, 5, 10, 20, 30, 40, 50): "
                                         "give --outer_loop and --inner_loop")
    assert refused("DC", "--spc", 3, "--outer_loop", 2).startswith("--spc 3 has no loops")


def test_more_videos_than_clips_in_a_class(stopped, script, tmp_path):
    for name, *flags in (("DM", "--ipc", 4), ("DM", "--ipc", 4, "--init", "mean"), ("DC", "--spc", 4, *LOOPS)):
        assert stopped(name, *flags) == ("class rise has fewer training clips than the required 4: "
                                         "lower --ipc, --spc or --dpc, or raise --train_clips")
    save_static(tmp_path / "static.pt", spc=4)
    assert stopped("s2d", "--path_static", tmp_path / "static.pt", "--ipc", 2, "--init_dynamic", "residual").startswith(
        "class rise has fewer training clips than the required 4")
    assert script("DM", "--ipc", 4, "--train_clips", 2, "--Iteration", 0)[0] == 0
    for name, *flags in (("DM", "--ipc", 4), ("DC", "--spc", 4, *LOOPS)):
        assert script(name, *flags, "--init", "noise", "--Iteration", 0)[0] == 0  # noise needs no clips


@pytest.mark.parametrize("init", ("mean", "noise"))
def test_a_selection_without_effect(refused, init):
    for name in ("DM", "MTT"):
        assert refused(name, "--init", init, "--select", "herding").startswith(f"--select herding has no effect with --init {init}")


def test_one_class(tiny, refused):
    lines = [line for line in (tiny / "list.csv").read_text().splitlines(True) if "rise" not in line]
    (tiny / "one.csv").write_text("".join(lines))
    for name in ("DM", "MTT"):
        assert refused(name, "--list_path", tiny / "one.csv").startswith("the list has one class, fall")


# ---------------------------------------------------------------- the static memory

def save_static(path, spc=2, size=43, classes=2, **other):
    label = torch.arange(classes).repeat_interleave(spc)
    torch.save({"image": torch.randn(classes * spc, 3, size, size), "label": label, **other}, path)


def test_missing_static_memory_names_the_command(refused, tiny, tmp_path):
    sentence = refused("s2d", "--ipc", 1)
    assert sentence.startswith("no finished static memory of 2 frames per class for these data in ")
    command = f"bash sh/s2d/DC.sh GPU custom 2 --data_path {tiny} --size 43 --save_path {tmp_path / 'results'}"
    assert f"run `{command}` first, or give --path_static" in sentence


def test_static_memory_that_does_not_fit(stopped, tmp_path):
    path = tmp_path / "static.pt"
    for wrong in ({"spc": 1}, {"size": 48}, {"classes": 3}):
        save_static(path, **wrong)
        assert f"{path} has frames of shape (" in (sentence := stopped("s2d", "--path_static", path))
        assert sentence.endswith("but 2 classes with --spc 2 at 43 pixels need (4, 3, 43, 43)")
    save_static(path, label=torch.tensor([0, 1, 0, 1]))
    assert stopped("s2d", "--path_static", path) == f"{path} does not have 2 frames of each class in class order"
    save_static(path, image=torch.full((4, 3, 43, 43), float("nan")))
    assert stopped("s2d", "--path_static", path).startswith(f"{path} has frames that are not finite")
    for content in ([1, 2], {"images": torch.zeros(1)}, {"image": [1]}, torch.zeros(3)):
        torch.save(content, path)
        assert stopped("s2d", "--path_static", path) == f'{path} is not a static memory: it has no tensor "image"'


@pytest.mark.parametrize("flags, flag, other", (
    (("--static", "real", "--path_static", "x.pt"), "path_static", "--static DC"), (("--static_frame", "middle"), "static_frame", "--static real"),
    (("--lr_static", 30), "lr_static", "--train_static"), (("--method", "FRePo", "--pool", 3), "pool", "--method DM"),
    (("--syn_steps", 5), "syn_steps", "--method MTT"), (("--no-learn_label",), "no-learn_label", "--method FRePo"),
    (("--static", "real", "--feature_lr", 1), "feature_lr", "--select herding or k-center")))
def test_flags_without_effect(tiny, flags, flag, other):
    """One that another flag makes useless is refused; with that other flag, or at its default, it is taken."""
    def args(*flags):
        return distill_s2d.parser().parse_args(["--dataset", "custom", "--data_path", str(tiny), *map(str, flags)])
    with pytest.raises(ValueError, match=f"^--{flag} has no effect without {other}: give {other}, or leave out --{flag}$"):
        distill_s2d.check_effect(args(*flags))
    distill_s2d.check_effect(args(*flags, *other.partition(" or ")[0].split()))
    distill_s2d.check_effect(args())


@pytest.mark.parametrize("method, flags, flag, other", (
    ("DM", ("--pool", 3, "--batch_real", 32), "batch_real", "--pool 0"), ("MTT", ("--no-train_lr", "--lr_lr", 1), "lr_lr", "--train_lr"),
    ("FRePo", ("--no-learn_label", "--lr_label", 1), "lr_label", "--learn_label")))
def test_flags_of_a_matching_without_effect(command, tiny, tmp_path, method, flags, flag, other):
    sentence = f"--{flag} has no effect without {other}: give {other}, or leave out --{flag}"
    code, output = command(f"distill_{method}", tmp_path / "results", *flags)
    assert code == 2 and output.splitlines()[-1] == f"distill_{method}.py: error: {sentence}" and not (tmp_path / "results").exists()
    args = distill_s2d.parser().parse_args(["--dataset", "custom", "--data_path", str(tiny), "--method", method, *map(str, flags)])
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        distill_s2d.METHODS[method].prepare(args)


def test_an_interpolation_of_all_frames(refused):
    for flags in ((), ("--n_syn", 1), ("--n_syn", 8)):
        assert refused("DM", "--interpolation", "linear", *flags) == ("--interpolation linear has no effect unless --n_syn is from 2 to 7: give another --n_syn, or "
                                                                      "leave out --interpolation")


def test_a_shortened_flag(refused):
    """A launcher would not recognise it as one that it sets itself."""
    assert refused("DM", "--see", 7) == "unrecognized arguments: --see 7"


def test_packs_and_runs_beside_the_frames_of_a_custom_set(refused, tiny):
    """The second start would not know which folder has the frames."""
    for flag in ("save_path", "pack_path"):
        assert refused("DM", f"--{flag}", tiny / "mine").startswith(f"--{flag}: {tiny / 'mine'}")
    assert f"--save_path: {tiny / 'custom-data'} would lie in --data_path, which may hold no folder besides" in refused("DM", "--save_path", tiny)
    for flag, place in (("pack_path", tiny), ("pack_path", tiny / ".packs"), ("save_path", tiny / ".runs"), ("save_path", tiny.parent)):
        args = distill_DM.parser().parse_args(["--dataset", "custom", "--data_path", str(tiny), "--size", "43", f"--{flag}", str(place)])
        check_places(args)
    args = distill_DM.parser().parse_args(["--dataset", "custom", "--data_path", str(tiny), "--frames_path", str(tiny / "jpegs"), "--save_path", str(tiny / "x")])
    check_places(args)
    args = distill_DM.parser().parse_args(["--dataset", "custom", "--data_path", str(tiny), "--pack_path", str(tiny / "mine"), "--no_pack"])
    check_places(args)


def test_clip_flags_of_whole_videos():
    """Where a clip is the whole video these flags would only name the same run twice."""
    for flag, value in (("stride", 9), ("test_clips", 1)):
        args = distill_DM.parser().parse_args(["--dataset", "SSv2", "--device", "cpu", f"--{flag}", str(value)])
        with pytest.raises(ValueError, match=f"^--{flag} has no effect on SSv2, where a clip is the whole video: leave it out$"):
            options.check(args)
        with pytest.raises((ValueError, OSError), match="nowhere"):  # of a RUN they are taken: the data set is looked for
            options.check(distill_DM.parser().parse_args(["--dataset", "SSv2", "--device", "cpu", f"--{flag}", str(value), "--data_path", "nowhere"]), networks=["ConvNet3D"])


def test_real_memories_are_as_many_as_the_videos(script, tmp_path):
    """So by default each still frame of a real clip is moved by its own clip; learned ones are two per video, as in the paper."""
    assert script("s2d", "--static", "real", "--ipc", 2, "--init_dynamic", "residual", "--Iteration", 0)[0] == 0
    path, = tmp_path.rglob("distilled.pt")
    synset, _ = load_set(path)
    assert synset.static.shape[1] == synset.dynamic.shape[1] == 2


def test_methods_may_share_a_flag(monkeypatch):
    """As docs/extending.md adds one: --batch_real then is of both."""
    monkeypatch.setitem(distill_s2d.METHODS, "Moments", distill_DM)
    for method in ("DM", "Moments"):
        distill_s2d.check_effect(distill_s2d.parser().parse_args(["--dataset", "toy", "--method", method, "--batch_real", "32"]))
    with pytest.raises(ValueError, match="^--batch_real has no effect without --method DM or Moments: "):
        distill_s2d.check_effect(distill_s2d.parser().parse_args(["--dataset", "toy", "--method", "MTT", "--batch_real", "32"]))


def test_static_memory_that_cannot_be_read(refused, tmp_path):
    path = tmp_path / "static.pt"
    assert refused("s2d", "--path_static", path) == f"{path} does not exist"
    assert refused("s2d", "--path_static", tmp_path) == f"{path.with_name('distilled.pt')} does not exist"  # of a run folder
    for content in (b"", b"text", b"PK\3\4"):
        path.write_bytes(content)
        assert refused("s2d", "--path_static", path).startswith(f"{path} cannot be read as a file of tensors")


def test_the_authors_static_memory_loads(tmp_path):
    image = torch.randn(4, 3, 43, 43, requires_grad=True)
    torch.save({"image": image}, tmp_path / "static.pt")
    assert torch.equal(load_static(tmp_path / "static.pt", 2, 2, 43).flatten(0, 1), image)


def test_a_list_without_test_videos(refused, tiny):
    lines = (tiny / "list.csv").read_text().splitlines()
    (tiny / "list.csv").write_text("\n".join(line for line in lines if not line.endswith((",test", ",val"))) + "\n")
    for name in "DM", "DC":
        assert refused(name) == "the list of custom has no test videos: give another list by --list_path"


# ---------------------------------------------------------------- the experts

@pytest.fixture
def buffer(tmp_path):
    """A folder with one expert of two snapshots, for the tiny data."""
    folder, net = tmp_path / "experts", networks.ConvNet3D(2, 8, 43, width=8)
    folder.mkdir()
    start = [parameter.detach().clone() for parameter in net.parameters()]
    torch.save([[start, [tensor + 1e-3 * torch.randn_like(tensor) for tensor in start]]], folder / "replay_buffer_0.pt")
    return folder


def test_missing_experts_name_the_command(refused, tiny, tmp_path):
    save_static(tmp_path / "static.pt")
    for name, *flags in ("MTT",), ("s2d", "--method", "MTT", "--path_static", tmp_path / "static.pt"):
        sentence = refused(name, *flags)
        command = f"bash sh/baseline/buffer.sh GPU custom --frames 8 --size 43 --width 8 --data_path {tiny} --save_path {tmp_path / 'results'}"
        assert sentence.startswith("no finished buffer of experts for these data in ")
        assert f"run `{command}` first, or give --buffer_path" in sentence
        assert refused(name, *flags, "--buffer_path", tmp_path).startswith(f"{tmp_path} has no replay_buffer_<n>.pt: make the experts with ")


def test_experts_that_do_not_fit(refused, buffer, tmp_path):
    """Of another network or number of classes, of too few epochs, damaged, with an object inside."""
    save_static(tmp_path / "static.pt")
    path = buffer / "replay_buffer_0.pt"
    for name, *flags in (("MTT", "--buffer_path", buffer),
                         ("s2d", "--method", "MTT", "--path_static", tmp_path / "static.pt", "--buffer_path", buffer)):
        assert refused(name, *flags, "--max_start_epoch", 2).startswith(
            f"{path}: expert 0 has 2 snapshots, but --max_start_epoch and --expert_epochs need 3")
    flags = "--buffer_path", buffer
    for net, sentence in ((networks.ConvNet3D(5, 8, 43, width=8), " was trained on 5 classes, but the data have 2"),
                          (networks.ConvNet3D(2, 8, 43, width=16), " was trained with --width 16, but this run has --width 8"),
                          (networks.ConvNet(2, 43), " is not of ConvNet3D: its parameters have shapes")):
        torch.save([[list(net.parameters())] * 2], path)
        assert refused("MTT", *flags).startswith(f"{path}{sentence}")
    torch.save([[[print]]], path)
    assert refused("MTT", *flags).startswith(f"{path} cannot be read as a file of tensors")
    path.write_bytes(path.read_bytes()[:50])
    assert refused("MTT", *flags).startswith(f"{path} cannot be read as a file of tensors")


def test_a_step_size_below_its_least(refused, buffer):
    for flags in (), ("--no-train_lr",):
        assert refused("MTT", "--buffer_path", buffer, "--lr_teacher", 1e-4, *flags).startswith("--lr_teacher 0.0001 must be at least 0.001")


def test_a_first_start_epoch_that_is_none(refused, buffer):
    for least, most in ((3, 3), (4, 3), (10, 10)):
        assert refused("MTT", "--buffer_path", buffer, "--min_start_epoch", least, "--max_start_epoch", most) == \
            f"--min_start_epoch {least} must be below --max_start_epoch {most}"


# ---------------------------------------------------------------- data

def test_data_that_are_not_there(stopped, tmp_path):
    missing = tmp_path / "nowhere"
    assert stopped("DM", data=missing) == f"--data_path {missing} is not a directory"
    assert str(missing) in stopped("DM", "--dataset", "miniUCF101", data=missing)
    assert str(missing / "toy" / "toy_splits1.csv") in (sentence := stopped("DM", "--dataset", "toy", data=missing))
    assert "python -m distill_utils.toy" in sentence
    assert str(missing) in stopped("DM", "--list_path", missing)
    assert str(missing) in stopped("DM", "--frames_path", missing)


@pytest.mark.parametrize("name", ("DM", "DC"))
@pytest.mark.parametrize("pack", ((), ("--no_pack",)))
def test_truncated_frame(script, tiny, tmp_path, name, pack):
    for path in (tiny / "jpegs").glob("v_rise_train_*/*"):  # all, since without a pack only what is drawn is decoded
        path.write_bytes(path.read_bytes()[:-100])
    code, sentence = script(name, "--Iteration", 0, *pack)
    assert code == 2 and sentence.startswith(f"distill_{name}.py: error: {tiny}/jpegs/v_rise_train_")
    assert "cannot be read as an image" in sentence
    assert not list(tmp_path.glob("packs/*train*.npy")) and not list(tmp_path.glob("packs/*.tmp"))


# ---------------------------------------------------------------- while it runs

class Steep:
    """KnownGradient with far larger gradients, that of a step size upwards."""
    @staticmethod
    def apply(loss, gradients, *tensors):
        gradients = [gradient * 1e6 if gradient.dim() else -gradient.abs() * 1e6 for gradient in gradients]
        return KnownGradient.apply(loss, gradients, *tensors)


def finite(folder):
    """The last good checkpoint loads, and it and the distilled set hold only finite numbers."""
    for name in ("checkpoint.pt", "distilled.pt"):
        assert all(tensor.isfinite().all() for tensor in utils.tensors(utils.load(folder / name))), name
    return utils.load(folder / "checkpoint.pt")


@pytest.mark.parametrize("name, flags", (("DM", ("--lr_img", 1e37)), ("DC", ("--lr_img", 1e37))))
@pytest.mark.parametrize("often", (0, 1e9))
def test_a_loss_that_is_not_finite(script, tmp_path, name, flags, often, monkeypatch):
    command = name, *flags, "--Iteration", 9, "--eval_it", 4, "--checkpoint_seconds", often
    if name == "DM":  # left alone its gradient vanishes first, since the network standardises its input
        monkeypatch.setattr(distill_DM, "KnownGradient", Steep)
    code, sentence = script(*command)
    folder, = tmp_path.glob("results/*/*")
    assert code == 2 and sentence.startswith(f"distill_{name}.py: error: the "), sentence
    assert re.search(r" at iteration \d+: lower the learning rate ", sentence)
    assert sentence.endswith(f"(the last good checkpoint stays in {folder})")
    state = finite(folder)
    assert script(*command) == (2, sentence)  # from that checkpoint, the same again
    assert utils.load(folder / "checkpoint.pt")["iteration"] == state["iteration"]


@pytest.mark.parametrize("name, flags", (("s2d", ("--lr_dynamic", 1e37, "--lr_hal", 1e37)), ("MTT", ("--lr_lr", 1e30)),
                                         ("s2d", ("--method", "MTT", "--lr_lr", 1e30))))
def test_steps_that_are_taken_back(script, buffer, tmp_path, name, flags, monkeypatch):
    """Counted and reported while there are few; a sentence when none holds."""
    save_static(tmp_path / "static.pt")
    monkeypatch.setattr(distill_MTT, "KnownGradient", Steep)
    if name == "s2d":
        flags = *flags, "--path_static", tmp_path / "static.pt"
    if "MTT" in (name, *flags):
        flags = *flags, "--buffer_path", buffer
    command = name, *flags, "--lr_net", 0.01, "--checkpoint_seconds", 0
    assert script(*command, "--Iteration", 9, "--eval_it", 4)[0] == 0
    folder, = tmp_path.glob("results/*/*")
    finite(folder)
    result, log = json.loads((folder / "result.json").read_text()), (folder / "log.txt").read_text()
    assert 4 <= result["refused"] <= 9
    assert f"{result['refused']} of 9 steps were rolled back because the loss after them was not finite: lower the learning rates" in log
    metrics = [json.loads(line)["refused"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics == sorted(metrics) and metrics[-1] == result["refused"]
    code, sentence = script(*command, "--Iteration", 90, "--eval_it", 100)
    assert code == 2 and re.search(r"error: 20 steps in a row were rolled back, the last loss is .*: lower the learning rates$", sentence)
    folder, = set(tmp_path.glob("results/*/*")) - {folder}
    assert utils.load(folder / "checkpoint.pt")["refused"] >= 19


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs to mount a small disk: {mount.stderr.strip()}")
    yield folder
    gc.collect()
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(script, small_disk):
    filler = small_disk / "filler"
    seen = set()
    for kilobytes_left in (0, 8, 16, 20, 300, 900):  # so that the disk is full ever later in the run
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - kilobytes_left * 1024))
        code, sentence = script("DM", "--save_path", small_disk)
        assert code == 2, sentence
        assert sentence.startswith(f"distill_DM.py: error: no space left on the disk for {small_disk}")
        seen.add(os.path.basename(sentence))
        assert not list(small_disk.glob("*/*/.*.tmp"))
    assert len(seen) > 1
    filler.unlink()
    assert script("DM", "--save_path", small_disk)[0] == 0
    folder, = small_disk.glob("*/*")
    assert [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 2]


def test_disk_full_for_the_pack(script, small_disk):
    code, sentence = script("DM", "--pack_path", small_disk, "--train_clips", 16)  # 5 MB
    assert code == 2
    assert re.search(f"error: {small_disk} has .* free and the pack needs .*: give another --pack_path", sentence)
    assert not list(small_disk.glob("*.npy")) and not list(small_disk.glob("*.tmp"))


@pytest.mark.parametrize("name", ("config.json", "log.txt", "metrics.jsonl", "distilled.pt", "distilled.png",
                                  "distilled.gif", "checkpoint.pt", "result.json"))
def test_full_disk_for_each_file(script, monkeypatch, tmp_path, name):
    """A file's write fails as on a full disk, with no file name in the error. With space again the run goes on."""
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            self.file.write(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def full_open(path, mode="r", *rest, **options):
        file = real_open(path, mode, *rest, **options)
        return Full(file) if name in str(path) and mode in ("w", "wb", "a") else file

    real_open = builtins.open
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full_open)
        code, sentence = script("DM", "--Iteration", 0)
    folder, = tmp_path.glob("results/*/*")
    assert (code, sentence) == (2, f"distill_DM.py: error: no space left on the disk for {folder / name}")
    assert not list(folder.glob(".*.tmp"))
    assert script("DM", "--Iteration", 0)[0] == 0
    assert [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0]
    assert json.loads((folder / "result.json").read_text())["iteration"] == 0


def test_save_path_that_cannot_be_a_folder(script, tmp_path):
    (tmp_path / "file").write_text("")
    code, sentence = script("DM", "--save_path", tmp_path / "file")
    assert code == 2 and sentence.startswith("distill_DM.py: error: ") and str(tmp_path / "file") in sentence


def test_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown --dataset"):
        run_script(distill_DM.main, distill_DM.parser(), ["--dataset", "x"])


@pytest.mark.parametrize("length", (1, 100_000))  # less and more than Python holds back before it writes
def test_output_that_nobody_reads_ends_a_program_without_a_message(length):
    program = (f"import argparse; from distill_utils.processes import run_script; "
               f"run_script(lambda args: print('x' * {length}), argparse.ArgumentParser())")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], cwd=utils.ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
