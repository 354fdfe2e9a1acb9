"""The run folder: atomic files, resuming bitwise after a kill at any moment, one process at a time, contents, wandb."""
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_frames
from PIL import Image

import utils
from distill_utils.clips import denormalize
from utils import ROOT, Run, atomic_write

# A process that has imported the scripts and forks for each command line, since importing takes seconds. `die` kills
# the child, as kill -9 would, before its n-th renaming of a file (n > 0) or right after it (n < 0).
SERVER = """
import importlib, json, os, signal, sys, traceback
sys.path.insert(0, {root!r})
scripts = {{name: importlib.import_module(name) for name in ("buffer", "distill_DC", "distill_DM", "distill_MTT", "distill_s2d")}}
import utils

def die_at_replace(number):
    replace, calls = os.replace, []
    def counted(source, target):
        calls.append(target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if len(calls) == -number:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = counted

def run(script, arguments, output, environment, die):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(0)  # whoever asks a question gets no answer
    os.environ.update(environment)
    sys.argv = [script + ".py", *arguments]
    if die:
        die_at_replace(die)
    try:
        utils.run_script(scripts[script].main, scripts[script].parser(), arguments)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: what runs in a shell's background ignores it
    child = os.fork()
    if child == 0:
        code = run(**json.loads(line))
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Runs the scripts with the tiny data's flags. Each call returns (exit code, all that was printed)."""

    def __init__(self, folder):
        self.folder, self.numbers = folder, itertools.count()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER.format(root=str(ROOT))], env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def arguments(self, script, save_path, flags=()):
        return [*FLAGS["data"], *(FLAGS["evaluation"] if script != "buffer" else ()), *FLAGS[script], "--data_path", str(self.folder / "data"),
                "--pack_path", str(self.folder / "packs"), "--save_path", str(save_path), "--device", "cpu",
                *map(str, flags)]

    def start(self, script, save_path, *flags, die=0, **environment):
        self.output = self.folder / f"output{next(self.numbers)}"
        job = {"script": script.split()[0], "arguments": self.arguments(script, save_path, flags), "output": str(self.output),
               "environment": environment, "die": die}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def end(self):
        return int(self.server.stdout.readline()), self.output.read_text()

    def __call__(self, script, save_path, *flags, **options):
        self.start(script, save_path, *flags, **options)
        return self.end()

    def killed_after(self, seconds, script, save_path, *flags):
        """As a call, with kill -9 after so many seconds."""
        child = self.start(script, save_path, *flags)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child, signal.SIGKILL)
        return self.end()


FLAGS = {
    "data": "--dataset custom --frames 8 --size 43 --test_clips 1".split(),
    "evaluation": "--num_eval 1 --epoch_eval_train 1".split(),
    "distill_DM": "--ipc 1 --lr_img 10 --Iteration 3 --eval_it 2 --batch_real 2".split(),
    "distill_DC": "--spc 2 --lr_img 1 --Iteration 3 --eval_it 2 --outer_loop 2 --inner_loop 1 --batch_real 3".split(),
    "distill_MTT": "--ipc 1 --lr_img 100 --Iteration 3 --eval_it 2 --syn_steps 2 --max_start_epoch 2 --lr_lr 1e-6".split(),
    "buffer": "--num_experts 2 --train_epochs 2 --batch_train 3 --lr_teacher 0.1".split(),
    "distill_s2d": "--ipc 1 --lr_dynamic 10 --lr_hal 1e-3 --Iteration 3 --eval_it 2 --batch_real 2".split(),
    "distill_s2d MTT": "--method MTT --ipc 1 --lr_dynamic 100 --lr_hal 1e-3 --Iteration 3 --eval_it 2 --syn_steps 2 --max_start_epoch 2".split(),
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    lines = ["folder_name,label,split"]
    for label, split, number in itertools.product(("fall", "rise"), ("train", "test"), range(3)):
        write_frames(folder / "data" / "jpegs" / f"{label}_{split}_{number}", 9, seed=len(lines))
        lines.append(f"{label}_{split}_{number},{label},{split}")
    (folder / "data" / "list.csv").write_text("\n".join(lines) + "\n")
    command = Commands(folder)
    yield command
    command.server.stdin.close()
    command.server.wait()
    command.server.stdout.close()


@pytest.fixture(scope="module")
def whole(command):
    """Results of uninterrupted runs: whole(script) gives (run folder, flags that the script needs besides)."""
    save_path, done = command.folder / "whole", {}

    def needs(script):
        static = ("--path_static", whole("distill_DC")[0] / "distilled.pt") if script.startswith("distill_s2d") else ()
        return static + (("--buffer_path", whole("buffer")[0]) if script.endswith("MTT") else ())

    def whole(script):
        if script not in done:
            extra = needs(script)
            before = set(save_path.glob("*/*/"))
            code, output = command(script, save_path, *extra)
            assert code == 0, output
            new, = set(save_path.glob("*/*/")) - before
            done[script] = new, extra
        return done[script]
    return whole


COSTS = ("seconds", "seconds_per_iteration", "peak_memory")


def leaves(content):
    """What a loaded file holds, tensors as bytes, so that == is bitwise; how long things took is left out."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {key: leaves(value) for key, value in content.items() if key not in COSTS}
    return [leaves(value) for value in content] if isinstance(content, (list, tuple)) else content


def outcome(folder):
    """What two runs of the same settings must have in common."""
    lines = [leaves(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoint = leaves(torch.load(folder / "checkpoint.pt", weights_only=True))
    del checkpoint["metrics_bytes"]
    return {"set": leaves(torch.load(folder / "distilled.pt", weights_only=True)), "metrics": lines,
            "checkpoint": checkpoint, "result": leaves(json.loads((folder / "result.json").read_text())),
            "pictures": [(folder / name).read_bytes() for name in ("distilled.png", "distilled.gif")]}


def only_folder(save_path):
    folder, = save_path.glob("*/*/")
    return folder


def assert_same_outcome(folder, reference):
    assert folder.name == reference.name
    found, expected = outcome(folder), outcome(reference)
    for part in expected:
        assert found[part] == expected[part], part
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


# ---------------------------------------------------------------- atomic files

def test_atomic_write_replaces_a_file_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), ValueError("wrong"), KeyboardInterrupt()))
def test_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, atomic_write(path, "w") as file:
        file.write("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert not isinstance(error, OSError) or caught.value.filename == str(path)  # the sentence can name it


# ---------------------------------------------------------------- resuming

SCRIPTS = ("distill_DM", "distill_DC", "distill_MTT", "distill_s2d", "distill_s2d MTT")


def test_killed_at_each_kind_of_write(command, whole, tmp_path):
    """Each process dies before (positive) or after (negative) its n-th renaming of a file.

    An evaluation renames the set, two pictures and the checkpoint: a round hits each of them and passes a checkpoint.
    """
    died, rounds = 0, itertools.cycle((1, -2, 3, -4, 6, -7))
    while (code := (answer := command("distill_DM", tmp_path, "--checkpoint_seconds", 0, die=next(rounds)))[0]) != 0:
        assert code == -signal.SIGKILL, answer[1]
        died += 1
        assert died < 30
    assert died >= 6
    assert_same_outcome(only_folder(tmp_path), whole("distill_DM")[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_moments(command, whole, script, tmp_path):
    reference, extra = whole(script)
    moments, killed = random.Random(0), 0
    while True:
        flags = script, tmp_path, *extra, "--checkpoint_seconds", 0
        code, output = command.killed_after(moments.uniform(0.05, 0.7), *flags) if killed < 5 else command(*flags)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        killed += 1
    assert killed
    assert_same_outcome(only_folder(tmp_path), reference)


def experts(folder):
    """What the files of a buffer hold, bitwise, and its metrics."""
    lines = [leaves(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {path.name: leaves(torch.load(path, weights_only=True)) for path in folder.glob("replay_buffer_*.pt")}, lines


def test_experts_killed_at_random_moments(command, whole, tmp_path):
    """Also between an expert's file and the checkpoint that knows of it."""
    reference, _ = whole("buffer")
    moments, killed, codes = random.Random(1), 0, []
    for die in (-2, 3, 0, 0, 0):  # config.json is the first renaming, the first expert the second, its checkpoint the third
        code, output = (command("buffer", tmp_path, die=die) if die else
                        command.killed_after(moments.uniform(0.1, 0.6), "buffer", tmp_path))
        killed += code == -signal.SIGKILL
        codes.append(code)
    assert killed >= 3, codes
    code, output = command("buffer", tmp_path)
    assert code == 0, output
    folder = only_folder(tmp_path)
    assert experts(folder) == experts(reference)
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


def test_the_script_itself_killed(command, whole, tmp_path):
    """Not through the server: python distill_DM.py in a process of its own, kill -9 once it has a checkpoint."""
    arguments = command.arguments("distill_DM", tmp_path, ["--checkpoint_seconds", 0, "--wandb", "disabled"])
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen([sys.executable, ROOT / "distill_DM.py", *arguments], stdout=output, stderr=output,
                                   cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list(tmp_path.glob("*/*/checkpoint.pt")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
    code, output = command("distill_DM", tmp_path)
    assert code == 0 and "resumed at iteration" in output
    assert_same_outcome(only_folder(tmp_path), whole("distill_DM")[0])


def test_evaluating_more_often_does_not_change_the_set(command, whole, tmp_path):
    for script in ("distill_DM", "distill_s2d", "distill_s2d MTT"):
        reference, extra = whole(script)
        assert command(script, tmp_path / script, *extra, "--eval_it", 1)[0] == 0
        folder = only_folder(tmp_path / script)
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
        assert outcome(folder)["set"] == outcome(reference)["set"]


def test_a_finished_run_started_again_changes_nothing(command, whole):
    folder, _ = whole("distill_DM")
    files = [path for path in sorted(folder.iterdir()) if path.name != "log.txt"]  # which says that it was started
    before = {path.name: path.read_bytes() for path in files}
    written = {name: (folder / name).stat().st_mtime_ns for name in ("distilled.pt", "checkpoint.pt", "result.json")}
    code, output = command("distill_DM", folder.parent.parent)
    assert code == 0 and "resumed at iteration 3" in output and "result: top1" in output
    assert before == {path.name: path.read_bytes() for path in files}
    assert written == {name: (folder / name).stat().st_mtime_ns for name in written}


def test_stopped_by_the_keyboard(command, tmp_path):
    child = command.start("distill_DM", tmp_path, "--checkpoint_seconds", 0, "--Iteration", 500)
    while not list(tmp_path.glob("*/*/checkpoint.pt")):
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    code, output = command.end()
    assert code == 130 and "Traceback" not in output
    assert output.rstrip().endswith("distill_DM.py: stopped; the same command goes on from the last checkpoint")


# ---------------------------------------------------------------- one folder, one run

@pytest.fixture
def copied(whole, tmp_path):
    """A finished DM run that a test may spoil: its folder, under tmp_path."""
    folder, _ = whole("distill_DM")
    return pathlib.Path(shutil.copytree(folder, tmp_path / folder.parent.name / folder.name))


def test_a_second_process_is_refused(command, copied, tmp_path):
    lock = utils.lock_folder(copied)
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    code, output = command("distill_DM", tmp_path)
    assert code == 2 and output == f"distill_DM.py: error: another process runs the same settings in {copied}\n"
    assert before == {path.name: path.read_bytes() for path in copied.iterdir()}
    lock.close()
    assert command("distill_DM", tmp_path)[0] == 0


def test_two_processes_at_once(command, tmp_path):
    """The first holds the folder while it runs, and a kill frees it."""
    child = command.start("distill_DM", tmp_path, "--Iteration", 500)
    while not list(tmp_path.glob("*/*/lock")):
        time.sleep(0.01)
    time.sleep(0.1)
    folder = only_folder(tmp_path)
    with pytest.raises(ValueError, match="another process runs the same settings"):
        utils.lock_folder(folder)
    os.kill(child, signal.SIGKILL)
    command.end()
    utils.lock_folder(folder).close()


@pytest.mark.parametrize("content", (b"", b"{", b"[1]", b'{"chosen": 1, "settings": {}}', b'{"settings": {}}', b"\xff"))
def test_damaged_config(command, copied, tmp_path, content):
    (copied / "config.json").write_bytes(content)
    code, output = command("distill_DM", tmp_path)
    assert code == 2 and output.count("\n") == 1
    assert output.startswith(f"distill_DM.py: error: {copied}/config.json is damaged: delete its folder")


def test_config_of_other_settings(command, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["chosen"]["seed"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    code, output = command("distill_DM", tmp_path)
    assert code == 2 and output.count("\n") == 1
    assert f"{copied}/config.json has other settings than this command" in output


def spoil_checkpoint(path, how):
    state = torch.load(path, weights_only=True)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "tensor":
        torch.save(torch.zeros(3), path)
    elif how == "other shape":
        torch.save({**state, "synset": {"videos": torch.zeros(1)}}, path)
    elif how == "pickle":
        torch.save(print, path)
    else:
        torch.save({key: value for key, value in state.items() if key != how}, path)


@pytest.mark.parametrize("how", ("empty", "truncated", "text", "tensor", "other shape", "pickle",
                                 "synset", "random", "steps", "metrics_bytes"))
def test_damaged_checkpoint(command, copied, tmp_path, how):
    spoil_checkpoint(copied / "checkpoint.pt", how)
    metrics = (copied / "metrics.jsonl").read_bytes()
    code, output = command("distill_DM", tmp_path)
    assert code == 2 and "Traceback" not in output
    assert f"error: {copied}/checkpoint.pt is damaged: delete its folder to start anew" in output.splitlines()[-1]
    assert (copied / "metrics.jsonl").read_bytes() == metrics


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    run = Run({}, tmp_path, "run")
    leftover = run.folder / f".{'distilled.pt'}.12345.tmp"
    leftover.write_bytes(b"half")
    run.lock.close()
    Run({}, tmp_path, "run").lock.close()
    assert not leftover.exists()


# ---------------------------------------------------------------- which folder, and what is in it

def test_settings_choose_the_folder(tmp_path):
    def folder(without_effect=("device",), **settings):
        run = Run(settings, tmp_path, "run", without_effect)
        run.lock.close()
        return run.folder

    first = folder(seed=0, lr=1.0, device="cpu")
    assert folder(lr=1.0, seed=0, device="cpu") == first and folder(lr=1.0, seed=0, device="cuda") == first
    assert len({first, folder(seed=1, lr=1.0), folder(seed=0, lr=2.0), folder(seed=0, lr=1.0, ipc=1)}) == 4


def test_every_flag_with_an_effect_chooses_another_folder(command, whole, tmp_path, monkeypatch):
    from distill_DM import parser
    from distill_utils.options import WITHOUT_EFFECT, start_run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill_utils.options.list_videos", lambda args: (pd.DataFrame({"folder": ["a"]}), ["a"]))
    common = command.arguments("distill_DM", tmp_path, ["--wandb", "disabled"])

    def folder(*flags):
        run = start_run(parser().parse_args([*common, *flags]), "DM")
        run.lock.close()
        return run.folder

    first, other = folder(), {"precision": "bf16", "validation": "0.5", "width": "18", "init": "noise", "interpolation": "linear", "device": "cuda:7", "wandb": "disabled"}
    for action in parser()._actions:
        if action.dest != "help":
            changed = folder(action.option_strings[0], *([] if action.nargs == 0 else [other.get(action.dest, "17")]))
            assert (changed.name == first.name) == (action.dest in WITHOUT_EFFECT), action.dest


def test_an_edited_list_or_static_memory_is_another_run(tiny, tmp_path):
    from distill_DM import parser
    from distill_utils.options import start_run
    static = tmp_path / "static.pt"
    arguments = parser().parse_args(["--dataset", "custom", "--data_path", str(tiny), "--save_path", str(tmp_path), "--wandb", "disabled"])
    names = []
    for memory, line in ((b"1", ""), (b"1", ""), (b"2", ""), (b"2", "v_more,fall,train\n")):
        static.write_bytes(memory)
        with open(tiny / "list.csv", "a") as file:
            file.write(line)
        run = start_run(arguments, "DM", static)
        run.lock.close()
        names.append(run.folder.name)
    assert names[0] == names[1] and len(set(names)) == 3


def test_the_folder_of_the_working_directory_does_not_matter(command, tmp_path, monkeypatch):
    from distill_DM import parser
    from distill_utils.options import start_run
    names = []
    for folder, data in ((command.folder, "data"), (command.folder.parent, f"{command.folder.name}/data")):
        monkeypatch.chdir(folder)
        arguments = [*FLAGS["data"], "--data_path", data, "--save_path", str(tmp_path), "--wandb", "disabled"]
        run = start_run(parser().parse_args(arguments), "DM")
        run.lock.close()
        names.append(run.folder)
    assert names[0] == names[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_of_a_run(whole, script):
    folder, _ = whole(script)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoint.pt", "distilled.pt", "distilled.png", "distilled.gif",
        "result.json", "lock"}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [0, 2, 3]
    result = json.loads((folder / "result.json").read_text())
    assert (result["iteration"], result["steps"], len(result["per_class"])) == (3, 3, 2)
    assert result["top1"] == metrics[-1]["top1"]
    assert result["best_on_test"]["value"] == max(line["top1"] for line in metrics)
    assert result["seconds_per_iteration"] > 0 and result["peak_memory"] > 0
    assert "result: top1" in (folder / "log.txt").read_text()


def test_config(whole):
    from distill_DM import parser
    folder, _ = whole("distill_DM")
    config = json.loads((folder / "config.json").read_text())
    assert set(config["settings"]) == {action.dest for action in parser()._actions} - {"help"} | {"digest", "list_digest"}
    assert (config["settings"]["lr_img"], config["settings"]["seed"], config["settings"]["device"]) == (10, 0, "cpu")
    assert "device" not in config["chosen"] and config["chosen"]["lr_img"] == 10
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(config["versions"]) == {"torch", "torchvision", "numpy"}
    assert config["command"][0] == "distill_DM.py" and "--lr_img" in config["command"]
    assert config["git"] == utils.git_commit() and config["python"] == sys.version.split()[0]


def test_the_distilled_set(whole):
    files = {script: torch.load(whole(script)[0] / "distilled.pt", weights_only=True) for script in SCRIPTS}
    for content in files.values():
        assert content["class_names"] == ["fall", "rise"]
        assert content["dataset"] == "custom" and content["iteration"] == 3
    assert files["distill_DM"]["videos"].shape == (2, 8, 3, 43, 43) and files["distill_DM"]["labels"].tolist() == [0, 1]
    assert files["distill_DC"]["image"].shape == (4, 3, 43, 43)
    assert files["distill_DC"]["label"].tolist() == [0, 0, 1, 1]
    learned = files["distill_s2d"]
    assert learned["static"].shape == (2, 2, 3, 43, 43) and learned["dynamic"].shape == (2, 2, 8, 1, 43, 43)
    assert torch.equal(learned["static"].flatten(0, 1), files["distill_DC"]["image"])  # frozen
    assert sum(tensor.numel() for tensor in learned["hallucinator"].values()) == 327
    for script in ("distill_MTT", "distill_s2d MTT"):  # what it was evaluated with is what was learned
        assert files[script]["lr"] == files[script]["step_size"] != 0.01
    assert files["distill_DM"]["lr"] == files["distill_s2d"]["lr"] == 0.01 and "step_size" not in files["distill_DM"]


def test_pictures(whole):
    for script in ("distill_DM", "distill_s2d"):
        folder, _ = whole(script)
        with Image.open(folder / "distilled.png") as png, Image.open(folder / "distilled.gif") as gif:
            assert png.size == (8 * 44 + 1, 2 * 44 + 1)  # a row of T frames for each class, a pixel between
            assert gif.n_frames == 8 and gif.info["duration"] == 150 and gif.info["loop"] == 0
    videos = torch.load(whole("distill_DM")[0] / "distilled.pt", weights_only=True)["videos"]
    with Image.open(whole("distill_DM")[0] / "distilled.png") as png:
        frame = torch.from_numpy(np.array(png)[45:88, 89:132]).permute(2, 0, 1)  # second row, third column
    assert torch.equal(frame, denormalize(videos[1, 2]))


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    assert utils.git_commit() is None


# ---------------------------------------------------------------- wandb

def without_account(tmp_path):
    return {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}


def test_wandb_is_disabled_by_its_variable(whole):
    assert not (whole("distill_DM")[0] / "wandb").exists()


def test_wandb_offline_needs_no_account_and_asks_nothing(command, tmp_path):
    flags = "--wandb", "offline", "--Iteration", 0
    code, output = command("distill_DM", tmp_path / "runs", *flags, **without_account(tmp_path))
    assert code == 0, output
    log, = only_folder(tmp_path / "runs").glob("wandb/offline-run-*/run-*.wandb")
    assert log.stat().st_size > 0


def test_wandb_online_without_account_is_refused(command, tmp_path):
    start = time.monotonic()
    code, output = command("distill_DM", tmp_path, "--wandb", "online", **without_account(tmp_path))
    assert code == 2 and "Traceback" not in output and time.monotonic() - start < 30
    assert output.splitlines()[-1] == ("distill_DM.py: error: --wandb online needs an account: "
                                       "run `wandb login` first, or give --wandb offline")


def test_wandb_that_fails_is_a_sentence(monkeypatch, tmp_path):
    import wandb

    def refuse(**options):
        raise wandb.errors.CommError("no such host")
    monkeypatch.setattr(wandb, "login", refuse)
    with pytest.raises(ValueError, match=r"^--wandb online does not work here: .*\(no such host\)"):
        Run({}, tmp_path, "run", wandb_mode="online")


@pytest.mark.parametrize("variable, mode", ((None, "offline"), ("", "offline"), ("online", "online"),
                                            ("disabled", "disabled")))
def test_wandb_default(monkeypatch, variable, mode):
    from distill_DM import parser
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert parser().parse_args(["--dataset", "toy"]).wandb == mode
