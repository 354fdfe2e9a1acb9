"""What a flag changes: each flag of a script reaches the computation, and the paper's values reach the optimizer and the launchers."""
import json
import math

import pytest
import torch
from commands import only_folder
from fakes import random_clips

import buffer
import distill_DM
import distill_MTT
from distill_utils import coreset, experts, options, protocol
from distill_utils.augment import OPERATORS
from distill_utils.pool import pool_path
from utils import load

ALL = "_".join(OPERATORS)


def tensors(value):
    """All tensors of a file, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def differ(one, other):
    one, other = tensors(one), tensors(other)
    assert one and other
    return len(one) != len(other) or any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other))


# ---------------------------------------------------------------- flag -> what is learned

EFFECTS = {  # script: (flags of both runs, the flag that differs), one per line
    "distill_DM": (
        "| --seed 1", "| --mirror 0", f"| --dsa {ALL}", "| --batch_real 1", "| --pool 2 --batch_real 64", "--pool 2 --batch_real 64 | --mirror 0", "| --n_real 2", "| --segments 2",
        "| --width 10", "| --init mean", "| --init still", "--n_syn 3 | --interpolation linear", "--n_syn 3 --interpolation parametric | --lr_interpolation 1"),
    "distill_DC": ("| --seed 1", "| --mirror 0", f"| --dsa {ALL}", "| --lr_net 1", "| --batch_train 1", "| --init mean", "| --inner_loop 2",
                   "| --outer_loop 3", "| --batch_real 1"),
    "distill_MTT": ("| --seed 1", "| --min_start_epoch 1", "--Iteration 6 | --expand 99", "--expand 99 --Iteration 6 | --current_max_start_epoch 2", "| --batch_syn 1",
                    "| --trajectories_per_step 2", "| --lr_teacher 0.5", "| --lr_lr 1", "| --no-train_lr --lr_lr 1e-5", "| --syn_steps 1", "| --init mean"),
    "distill_s2d": ("| --seed 1", "| --mirror 0", f"| --dsa {ALL}", "| --lr_hal 1", "| --lr_dynamic 20", "| --train_static",
                    "--train_static | --lr_static 30", "| --init_dynamic residual", "| --init_hal identity", "| --dynamic_frames 4"),
    "distill_FRePo": ("| --seed 1", "| --mirror 0", f"| --dsa {ALL}", "| --lr_label 1", "| --no-learn_label", "| --lr_pool 1", "| --num_pool 1",
                      "| --pool_steps 1", "| --batch_target 1", "| --Iteration 4"),
    "distill_utils.coreset": ("| --seed 1",),
}


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [(script, flags) for script, rows in EFFECTS.items() for flags in rows])
def test_a_flag_changes_what_is_learned(command, whole, tmp_path, script, flags):
    common, changed = (part.split() for part in flags.split("|"))
    folder, extra = whole(script)
    extra += ("--eval_it", 9) if script != "distill_utils.coreset" else ()  # at the end only, which does not change what is learned
    folders = [folder]
    for number, given in enumerate(([common] if common else []) + [common + changed]):
        code, output = command(script, tmp_path / str(number), *extra, *given)
        assert code == 0, output
        folders.append(only_folder(tmp_path / str(number)))
    assert differ(*(load(folder / "distilled.pt") for folder in folders[-2:]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ("--seed 1", "--mirror 0", f"--dsa {ALL}", "--n_real 2", "--lr_teacher 0.2", "--batch_train 2", "--width 10"))
def test_a_flag_changes_the_experts(command, whole, tmp_path, flags):
    code, output = command("buffer", tmp_path, *flags.split())
    assert code == 0, output
    files = [folder / "replay_buffer_0.pt" for folder in (whole("buffer")[0], only_folder(tmp_path))]
    assert differ(*map(load, files))


@pytest.mark.slow
@pytest.mark.parametrize("script", (*EFFECTS, "buffer"))
def test_an_equal_command_learns_the_same(command, whole, tmp_path, script):
    """Else the tests above could not fail."""
    code, output = command(script, tmp_path, *whole(script)[1])
    assert code == 0, output
    file = "replay_buffer_0.pt" if script == "buffer" else "distilled.pt"
    assert not differ(*(load(folder / file) for folder in (whole(script)[0], only_folder(tmp_path))))


def test_the_stride_reaches_the_clips(tiny, tmp_path):
    def clips(*flags):
        args = distill_DM.parser().parse_args(["--dataset", "custom", "--data_path", str(tiny), "--pack_path", str(tmp_path / "packs"), "--device", "cpu",
                                               "--frames", "8", "--size", "16", *flags])
        return options.load_data(args, "train").draw(torch.arange(7))
    assert torch.equal(clips("--stride", "2"), clips("--stride", "2")) and not torch.equal(clips("--stride", "2"), clips("--stride", "1"))


@pytest.mark.slow
def test_a_run_is_known_by_the_content_of_the_static_memory_and_experts(command, whole, tmp_path):
    """Not by their paths: another content is another run."""
    for script, made, flag, file in (("distill_s2d", "distill_DC", "--path_static", "distilled.pt"), ("distill_MTT", "buffer", "--buffer_path", "")):
        code, output = command(made, tmp_path / made, "--seed", 3)
        assert code == 0, output
        folder, _ = whole(script)
        code, output = command(script, tmp_path / script, flag, only_folder(tmp_path / made) / file)
        assert code == 0, output
        other = only_folder(tmp_path / script)
        assert other.name != folder.name and differ(*(load(each / "distilled.pt") for each in (folder, other)))


@pytest.mark.slow
def test_full_data_of_few_frames(command, tmp_path):
    """--n_real keeps that many frames of the clips that are trained on; its bytes count them once."""
    for flags, frames in (((), 8), (("--n_real", 2), 2)):
        code, output = command("distill_utils.evaluate", tmp_path / str(frames), *flags)
        assert code == 0, output
        result = json.loads((only_folder(tmp_path / str(frames)) / "result.json").read_text())
        assert result["bytes"] == 6 * frames * 3 * 43 ** 2


# ---------------------------------------------------------------- flag -> evaluation

def test_evaluation_passes_its_settings_on(monkeypatch):
    """To the training of every network; each flag changes its own value only."""
    flags = {"epoch_eval_train": ("epochs", 7), "lr_net": ("lr", 0.3), "batch_train": ("batch_size", 5), "precision": ("precision", "bf16"),
             "dsa": ("dsa", "flip"), "eval_protocol": ("protocol", "frepo"), "width": ("width", 10), "network": ("network", "CNN+mean"),
             "num_eval": ("num_eval", 2), "seed": ("seed", 4), "compile": ("compile", True)}
    start = vars(distill_DM.parser().parse_args(["--dataset", "toy"]))
    plain = options.evaluation_values(type("Args", (), start))
    assert set(plain) == {name for name, _ in flags.values()}
    for flag, (name, value) in flags.items():
        assert options.evaluation_values(type("Args", (), start | {flag: value})) == plain | {name: value} != plain

    calls = []

    def train(net, videos, epochs, lr, batch_size, at_once, precision, bar, dsa, protocol):
        calls.append((epochs, lr, batch_size, precision, dsa, protocol))
        return 100.0
    monkeypatch.setattr(protocol, "train", train)
    clips = random_clips([0, 1, 2], 3, T=8, size=43)
    clips.videos, clips.split = torch.arange(3), "test"
    protocol.evaluate(protocol.RealSet(clips), clips, num_eval=2, epochs=7, lr=0.3, batch_size=5, precision="fp32", width=8, dsa="flip", protocol="frepo")
    assert calls == [(7, 0.3, 5, "fp32", "flip", "frepo")] * 2


def test_a_stopped_evaluation_keeps_its_finished_networks(monkeypatch, tmp_path):
    clips = random_clips([0, 1, 2], 3, T=8, size=43)
    clips.videos, clips.split = torch.arange(3), "test"
    settings = {"num_eval": 3, "epochs": 1, "width": 8, "batch_size": 3}
    whole = protocol.evaluate(protocol.RealSet(clips), clips, **settings)
    trained, train = [], protocol.train

    def stop_at_the_second(*values):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(1)
        return train(*values)
    monkeypatch.setattr(protocol, "train", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        protocol.evaluate(protocol.RealSet(clips), clips, **settings, keep=tmp_path)
    monkeypatch.setattr(protocol, "train", lambda *values: trained.append(1) or train(*values))
    again = protocol.evaluate(protocol.RealSet(clips), clips, **settings, keep=tmp_path)
    assert len(trained) == 3 and str(again | {"seconds": 0}) == str(whole | {"seconds": 0})


def test_a_given_lr_net_comes_before_the_learned_step_size():
    args = distill_MTT.parser().parse_args(["--dataset", "toy"])
    assert options.evaluation_values(args, 0.02)["lr"] == 0.02
    args.lr_net = 0.005
    assert options.evaluation_values(args, 0.02)["lr"] == 0.005


def test_experts_accuracy_at_the_last_matched_epoch(tmp_path):
    """On the split of the run's own evaluations (methods.md 16)."""
    lines = [{"iteration": number, "epoch": epoch, "split": split, "top1": 10 * epoch + number + (100 if split == "test" else 0)}
             for number in (0, 2) for epoch in (1, 2, 3) for split in ("validation", "test")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = distill_MTT.parser().parse_args(["--dataset", "toy", "--buffer_path", str(tmp_path)])
    assert experts.mean_expert_top1(args, 2) == 121 and experts.mean_expert_top1(args, 4) is None
    args.validation = 0.25
    assert experts.mean_expert_top1(args, 2) == 21
    args.buffer_path = tmp_path / "none"
    assert experts.mean_expert_top1(args, 2) is None


# ---------------------------------------------------------------- optimizers

@pytest.mark.slow
@pytest.mark.parametrize("script, groups", (
    ("distill_DM", [(10, 0.5)]),
    ("distill_DC", [(1, 0.5)]),
    ("distill_MTT", [(100, 0.5), (1e-6, 0.5)]),
    ("distill_s2d", [(10, 0.95), (1e-3, 0.95)]),
    ("distill_s2d MTT", [(100, 0.95), (1e-3, 0.95), (1e-5, 0.5)])))
def test_learning_rates_and_momenta_of_the_optimizers(whole, script, groups):
    """methods.md 3 to 5: momentum 0.5 for pixels, stills and the step size, 0.95 for the dynamic memory and the hallucinator."""
    state = load(whole(script)[0] / "checkpoint.pt")["optimizer"]
    assert [(group["lr"], group["momentum"]) for group in state["param_groups"] if group["params"] and group["lr"]] == groups


@pytest.mark.slow
def test_the_rates_of_frepo_decay_over_the_run(whole):
    state = load(whole("distill_FRePo")[0] / "checkpoint.pt")["optimizer"]
    share = 0.55 + 0.45 * math.cos(math.pi * 2 / 3)  # at the last of three steps
    assert [group["lr"] for group in state["param_groups"] if group["params"]] == pytest.approx([0.01 * share, 1e-3 * share])


# ---------------------------------------------------------------- names of what is kept

def test_the_pool_of_clips_that_are_not_mirrored_is_another_one(tmp_path):
    (tmp_path / "pack.npy").touch()
    paths = set()
    for mirror in (0.5, 0.0):
        clips = random_clips([0, 1], 2, T=8, size=43)
        clips.mirror, clips.origin, clips.shown = mirror, (tmp_path / "pack.npy", "digest"), slice(None)
        paths.add(pool_path(clips, "fp32"))
    assert len(paths) == 2


def test_a_feature_network_is_known_by_all_that_it_learned_from(monkeypatch, tmp_path):
    """Else one that has seen the held-out videos would choose the clips."""
    trained = []
    monkeypatch.setattr(coreset, "train", lambda *values: trained.append(1) or 99.0)
    monkeypatch.setattr(coreset, "list_digest", lambda args: args.listed)
    monkeypatch.setattr(coreset, "content_digest", lambda args: args.content)
    clips = random_clips([0, 1], 2, T=8, size=43)
    run = type("Run", (), {"folder": tmp_path / "runs" / "a", "log_line": lambda self, text: None})()
    (tmp_path / "runs").mkdir()
    plain = {"feature_epochs": 1, "feature_lr": 0.1, "feature_batch": 4, "seed": 0, "precision": "fp32", "listed": "a", "content": "b", "stride": None,
             "train_clips": 1, "width": 8, "mirror": 0.5, "dsa": "none"}
    others = {"feature_epochs": 2, "feature_lr": 0.2, "feature_batch": 5, "seed": 1, "precision": "bf16", "listed": "c", "content": "d", "stride": 2,
              "train_clips": 2, "width": 10, "mirror": 0.0, "dsa": "flip"}
    for values in (plain, *(plain | {name: value} for name, value in others.items()), plain):
        coreset.feature_network(run, type("Args", (), values), clips)
    assert len(trained) == len(list((tmp_path / "runs").glob("feature_network_*.pt"))) == 1 + len(others)


# ---------------------------------------------------------------- the paper's schedules

SCHEDULES = {  # methods.md 8; the launcher's arguments besides the GPU and the data set
    ("baseline/DM.sh", "30 1"): "--lr_img 30 --Iteration 5000 --batch_real 64 --num_eval 3 --epoch_eval_train 500",
    ("baseline/MTT.sh", "1e5 1"): "--Iteration 8000 --syn_steps 10 --expert_epochs 1 --max_start_epoch 10 --lr_teacher 0.01 --lr_lr 1e-5",
    ("s2d/DM.sh", "1e-4 1"): "--method DM --Iteration 5000 --lr_hal 1e-5 --batch_real 64",
    ("s2d/DM.sh", "1e3 5"): "--lr_hal 1e-6",
    ("s2d/MTT.sh", "1e4 1"): "--method MTT --Iteration 10000 --syn_steps 10 --eval_it 400 --lr_hal 1e-3 --max_start_epoch 10",
    ("s2d/MTT.sh", "1e4 4"): "--syn_steps 10 --eval_it 400",
    ("s2d/MTT.sh", "1e4 5"): "--syn_steps 5 --eval_it 200",
    ("s2d/compact.sh", "7.5 8"): "--ipc 8 --lr_static 7.5 --lr_dynamic 7.5 --static_size 14 --dynamic_size 14",   # of 112 pixels
}


@pytest.mark.parametrize("launcher, arguments", SCHEDULES)
def test_launchers_have_the_papers_schedules(launch, launcher, arguments):
    command = " ".join(map(str, launch(f"sh/{launcher}", "cpu", "miniUCF101", *arguments.split())[1]["command"]))
    for pair in SCHEDULES[launcher, arguments].split(" --"):
        assert f"--{pair.removeprefix('--')} " in command + " ", pair


@pytest.mark.parametrize("spc, expected", ((1, (1, 1)), (2, (1, 1)), (5, (1, 1)), (10, (10, 50)), (20, (20, 25)), (50, (50, 10))))
def test_loops_of_dc(spc, expected):
    from distill_DC import loops
    assert loops(spc, None, None) == expected and loops(spc, 3, None) == (3, expected[1]) and loops(spc, None, 4) == (expected[0], 4)


def test_experts_have_the_papers_defaults():
    args = buffer.parser().parse_args(["--dataset", "toy"])
    assert (args.num_experts, args.train_epochs, args.lr_teacher, args.batch_train) == (30, 10, 0.01, 256)
