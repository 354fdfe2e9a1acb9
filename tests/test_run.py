"""The run folder: atomic files, resuming bitwise after a kill at any moment, one process at a time, contents, wandb."""
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
import types

import numpy as np
import pandas as pd
import pytest
import torch
from commands import FLAGS, only_folder
from fakes import random_clips
from PIL import Image

import utils
from distill_utils import record
from distill_utils import run as run_module
from distill_utils.clips import denormalize
from distill_utils.identity import WITHOUT_EFFECT, start_run
from distill_utils.pictures import save_pictures
from distill_utils.record import finish
from distill_utils.run import Run, git_commit
from distill_utils.synset import PixelSet
from utils import ROOT, atomic_write

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
    checkpoint = leaves(torch.load(folder / "checkpoint.pt", "cpu", weights_only=True))
    del checkpoint["metrics_bytes"]
    return {"set": leaves(torch.load(folder / "distilled.pt", weights_only=True)), "metrics": lines,
            "checkpoint": checkpoint, "result": leaves(json.loads((folder / "result.json").read_text())),
            "pictures": [(folder / name).read_bytes() for name in ("distilled.png", "distilled.gif")]}


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


@pytest.mark.parametrize("shape", ((10 ** 9,), (2 ** 31, 2 ** 31)))  # the bytes of the second overflow 64 bits
def test_a_small_file_is_no_large_tensor(tmp_path, shape):
    torch.save({"label": torch.zeros(1, dtype=torch.int64).expand(shape)}, tmp_path / "set.pt")
    with pytest.raises(ValueError, match="larger than"):
        utils.load(tmp_path / "set.pt")


# ---------------------------------------------------------------- resuming

ENDLESS = 10 ** 9  # iterations: for what is ended from outside
SCRIPTS = ("distill_DM", "distill_DC", "distill_MTT", "distill_s2d", "distill_s2d MTT", "distill_s2d compact", "distill_FRePo", "distill_s2d FRePo")


def test_killed_at_each_kind_of_write(command, whole, tmp_path):
    """Each process dies before (positive) or after (negative) its n-th renaming of a file.

    An evaluation renames the checkpoint, each network's scores, the set, two pictures and the checkpoint again.
    """
    died, rounds = 0, itertools.cycle((1, -2, 3, -4, 6, -7))
    while (code := (answer := command("distill_DM", tmp_path, "--checkpoint_seconds", 0, replace=next(rounds)))[0]) != 0:
        assert code == -signal.SIGKILL, answer[1]
        died += 1
        assert died < 30
    assert died >= 6
    assert_same_outcome(only_folder(tmp_path), whole("distill_DM")[0])


def moments(command, seed, script, save_path, *flags):
    """Numbers of calls of functions, drawn from all those of a whole run: where to kill it, however fast the machine is."""
    assert command(script, save_path, *flags, call=0)[0] == 0
    calls, generator = command.calls(), random.Random(seed)
    return iter(lambda: generator.randrange(1, calls), None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_moments(command, whole, script, tmp_path):
    reference, extra = whole(script)
    flags, killed = (*extra, "--checkpoint_seconds", 0), 0
    calls = moments(command, 0, script, tmp_path / "counted", *flags)
    while True:
        code, output = command(script, tmp_path / "killed", *flags, call=next(calls) if killed < 5 else None)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        killed += 1
    assert killed
    assert_same_outcome(only_folder(tmp_path / "killed"), reference)


@pytest.mark.parametrize("place", ("elsewhere/data", "renamed"))
def test_moved_data(command, tmp_path, place):
    """A run of the data under another path is the same run, and what it was made from is found; other frames of the same list are another run."""
    data, flags = tmp_path / "data", ("--pack_path", tmp_path / "packs")
    shutil.copytree(command.folder / "data", data)

    def run(script, *more):
        code, output = command(script, tmp_path / "results", "--data_path", data, *flags, *more)
        return code, output, {path.parent for path in tmp_path.glob(f"results/*/{script.removeprefix('distill_')}_*/result.json")}
    code, output, made = run("distill_DC")
    assert code == 0, output
    packs = {path: path.stat().st_mtime_ns for path in (tmp_path / "packs").glob("*.npy")}
    (tmp_path / place).parent.mkdir(exist_ok=True)
    data = data.rename(tmp_path / place)

    code, output, again = run("distill_DC")
    assert code == 0 and {folder.name for folder in again} == {folder.name for folder in made}
    assert again == made or place == "renamed"  # a custom set's runs lie in a folder of its name
    code, output, found = run("distill_s2d")
    assert code == 0 and len(found) == 1, output
    assert packs.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "packs").glob("*.npy")}.items()

    for path in (data / "jpegs" / "fall_train_0").iterdir():
        Image.open(path).convert("L").save(path)
    code, output, _ = run("distill_s2d")
    assert code == 2 and "no finished static memory" in output
    code, output, more = run("distill_DC")
    assert code == 0 and len({folder.name for folder in more}) == 2


def experts(folder):
    """What the files of a buffer hold, bitwise, and its metrics."""
    lines = [leaves(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {path.name: leaves(torch.load(path, weights_only=True)) for path in folder.glob("replay_buffer_*.pt")}, lines


def test_experts_killed_at_random_moments(command, whole, tmp_path):
    """Also between an expert's file and the checkpoint that knows of it."""
    reference, _ = whole("buffer")
    calls, codes = moments(command, 1, "buffer", tmp_path / "counted"), []
    for replace in (-2, 3, 0, 0, 0):  # config.json is the first renaming, the first expert the second, its checkpoint the third
        code, output = command("buffer", tmp_path / "killed", replace=replace, call=None if replace else next(calls))
        codes.append(code)
    assert codes[:2] == [-signal.SIGKILL] * 2 and set(codes) <= {-signal.SIGKILL, 0}, output
    code, output = command("buffer", tmp_path / "killed")
    assert code == 0, output
    folder = only_folder(tmp_path / "killed")
    assert experts(folder) == experts(reference)
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


KILL_AT_A_CHECKPOINT = """
import os, runpy, signal, sys
replace = os.replace
def kill(source, target):
    replace(source, target)
    if str(target).endswith("checkpoint.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_itself_killed(command, whole, tmp_path):
    """Not through the server: distill_DM.py as the main program of a process of its own, kill -9 at its first checkpoint."""
    arguments = command.arguments("distill_DM", tmp_path, ["--checkpoint_seconds", 0, "--wandb", "disabled"])
    process = subprocess.run([sys.executable, "-c", KILL_AT_A_CHECKPOINT, ROOT / "distill_DM.py", *arguments], cwd=tmp_path, capture_output=True,
                             text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert process.returncode == -signal.SIGKILL, process.stderr
    code, output = command("distill_DM", tmp_path)
    assert code == 0 and "resumed at iteration" in output
    assert_same_outcome(only_folder(tmp_path), whole("distill_DM")[0])


@pytest.mark.parametrize("kept", (0, 10, None))
def test_metrics_that_were_lost(command, copied, tmp_path, kept):
    """What a checkpoint knows to have been logged is not there any more."""
    path = copied / "metrics.jsonl"
    if kept is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:kept])
    code, output = command("distill_DM", tmp_path)
    assert code == 2 and str(path if kept is None else copied / "checkpoint.pt is damaged") in output and "Traceback" not in output
    assert kept is None and not path.exists() or path.stat().st_size == kept


def test_evaluating_more_often_does_not_change_the_set(command, whole, tmp_path):
    for script in ("distill_DM", "distill_s2d", "distill_s2d MTT"):
        reference, extra = whole(script)
        assert command(script, tmp_path / script, *extra, "--eval_it", 1)[0] == 0
        folder = only_folder(tmp_path / script)
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
        assert outcome(folder)["set"] == outcome(reference)["set"]


def test_a_finished_run_without_its_checkpoint_is_left_alone(command, whole, tmp_path):
    folder, _ = whole("distill_DM")
    copied = tmp_path / folder.parent.name / folder.name
    shutil.copytree(folder, copied)
    (copied / "checkpoint.pt").unlink()
    before = {path: path.read_bytes() for path in copied.iterdir() if path.name != "log.txt"}
    code, output = command("distill_DM", tmp_path)
    assert code == 2 and output.startswith("distill_DM.py: error: ") and f"{copied} is finished, but its checkpoint.pt is gone" in output
    assert before == {path: path.read_bytes() for path in before}


def test_a_finished_run_started_again_changes_nothing(command, whole):
    folder, _ = whole("distill_DM")
    files = [path for path in sorted(folder.iterdir()) if path.name != "log.txt"]  # which says that it was started
    before = {path.name: path.read_bytes() for path in files}
    written = {name: (folder / name).stat().st_mtime_ns for name in ("distilled.pt", "checkpoint.pt", "result.json")}
    code, output = command("distill_DM", folder.parent.parent)
    assert code == 0 and "resumed at iteration 3" in output and "result: top1" in output
    assert before == {path.name: path.read_bytes() for path in files}
    assert written == {name: (folder / name).stat().st_mtime_ns for name in written}


@pytest.mark.parametrize("script, flags", (("distill_DM", ("--Iteration", 0)), ("distill_utils.coreset", ()), ("distill_utils.coreset", ("--validation", 0.34))))
def test_an_evaluation_goes_on_with_its_finished_networks(command, tmp_path, script, flags):
    flags = ("--num_eval", 2, *flags)
    assert command(script, tmp_path / "whole", *flags)[0] == 0
    whole = only_folder(tmp_path / "whole")
    while not (kept := list(tmp_path.glob("killed/*/*/unfinished_evaluation/*/network0.pt"))):
        assert command(script, tmp_path / "killed", *flags, replace=-2)[0] == -signal.SIGKILL
    score = torch.load(kept[0], weights_only=True)
    utils.save(score | {"top1": 12.5}, kept[0])  # seen again: not trained again
    assert command(script, tmp_path / "killed", *flags)[0] == 0
    folder = only_folder(tmp_path / "killed")
    found, expected = (json.loads((place / "metrics.jsonl").read_text().splitlines()[0])["networks"] for place in (folder, whole))
    assert found == [12.5, expected[1]] and score["top1"] == expected[0]
    assert (folder / "distilled.pt").read_bytes() == (whole / "distilled.pt").read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_no_evaluation_finds_the_scores_of_another(tmp_path, monkeypatch):
    """Of another set, split or setting; the same one does, whatever was computed in between."""
    monkeypatch.setattr(record, "evaluate", lambda *arguments, keep, **values: keep)
    run, clips = types.SimpleNamespace(folder=tmp_path), {name: types.SimpleNamespace(split=name) for name in ("test", "validation")}
    synset = PixelSet(torch.zeros(2, 2, 3, 4, 4), 2)

    def folder(split="test", **values):
        return record.evaluate_and_keep(run, synset, clips[split], **{"lr": 0.01, "num_eval": 2} | values)

    first = folder()
    others = [folder("validation"), folder(lr=0.02), folder(num_eval=3)]
    with torch.no_grad():
        synset.videos[1, 0, 0, 0, 0] = 1e-30
    assert len({first, folder(), *others}) == 5
    with torch.no_grad():
        synset.videos[1, 0, 0, 0, 0] = 0
    assert folder() == first


def test_stopped_by_the_keyboard(command, tmp_path):
    child = command.start("distill_DM", tmp_path, "--checkpoint_seconds", 0, "--Iteration", ENDLESS)
    while not list(tmp_path.glob("*/*/checkpoint.pt")):
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    code, output = command.end()
    assert code == 130 and "Traceback" not in output
    assert output.rstrip().endswith("distill_DM.py: stopped: run the same command to resume from the last checkpoint")


def test_the_papers_width(command, tmp_path):
    """The other runs of the tests are of narrow networks."""
    code, output = command("distill_DM", tmp_path, "--width", 128, "--Iteration", 1)
    assert code == 0 and torch.load(only_folder(tmp_path) / "distilled.pt", weights_only=True)["width"] == 128, output


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
    assert code == 2 and output == f"distill_DM.py: error: another process runs the same settings in {copied}: wait for it to end\n"
    assert before == {path.name: path.read_bytes() for path in copied.iterdir()}
    lock.close()
    assert command("distill_DM", tmp_path)[0] == 0


def test_two_processes_at_once(command, tmp_path):
    """The first holds the folder while it runs, and a kill frees it."""
    child = command.start("distill_DM", tmp_path, "--Iteration", ENDLESS)
    while not list(tmp_path.glob("*/*/config.json")):  # written under the lock
        time.sleep(0.01)
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
    assert f"error: {copied}/checkpoint.pt is damaged: delete its folder to start again" in output.splitlines()[-1]
    assert (copied / "metrics.jsonl").read_bytes() == metrics


def test_peak_memory_is_that_of_all_the_runs_processes(tmp_path):
    """A run that was killed keeps the peak of its earlier process; the checkpoint of an older version has none."""
    run = Run({}, tmp_path, "run")
    run.resume()
    run.peak_memory["cpu"] = 2 ** 60
    run.checkpoint()
    for kept, peak in ((True, 2 ** 60), (False, utils.peak_memory(torch.device("cpu")))):
        run.lock.close()
        if not kept:
            state = torch.load(run.folder / "checkpoint.pt")
            del state["peak_memory"]
            torch.save(state, run.folder / "checkpoint.pt")
        run = Run({}, tmp_path, "run")
        run.resume()
        assert (run.update_peak_memory() == peak) if kept else (peak <= run.update_peak_memory() < 2 ** 50)
    run.lock.close()


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

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill_utils.identity.list_videos", lambda args: (pd.DataFrame({"folder": ["a"]}), ["a"]))
    monkeypatch.setattr("distill_utils.identity.content_digest", lambda args: "of the same frames")
    monkeypatch.setattr("distill_utils.identity.check_places", lambda args: None)
    common = command.arguments("distill_DM", tmp_path, ["--wandb", "disabled"])

    def folder(*flags):
        run = start_run(parser().parse_args([*common, *flags]), "DM")
        run.lock.close()
        return run.folder

    first, other = folder(), {"validation": "0.5", "mirror": "0.25", "width": "18", "device": "cuda:7", "wandb": "disabled", "dsa": "flip"}
    for action in parser()._actions:
        if action.dest != "help":
            choice = next((each for each in action.choices or () if each != action.default), "17")
            changed = folder(action.option_strings[0], *([] if action.nargs == 0 else [other.get(action.dest, choice)]))
            assert (changed.name == first.name) == (action.dest in WITHOUT_EFFECT), action.dest


def test_an_edited_list_or_static_memory_is_another_run(tiny, tmp_path):
    from distill_DM import parser

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


def test_a_folder_that_other_code_began_is_told(tmp_path, capsys, monkeypatch):
    """The old result stays, but not in silence."""
    def begin():
        Run({"a": 1}, tmp_path, "x").lock.close()
        return "warning: the code has changed since this run began" in "".join(capsys.readouterr())
    assert not begin() and not begin()
    monkeypatch.setattr(run_module, "code_digest", lambda *patterns: "other")
    assert begin()
    config, = tmp_path.glob("x_*/config.json")
    content = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in content.items() if name != "code"}))  # of an older version
    assert not begin()


def test_the_code_of_a_run_is_found():
    assert all(list(ROOT.glob(pattern)) for pattern in run_module.CODE) and {"distill_DM.py", "distill_s2d.py"} <= {path.name for path in ROOT.glob("distill_*.py")}


def test_config(whole):
    from distill_DM import parser
    folder, _ = whole("distill_DM")
    config = json.loads((folder / "config.json").read_text())
    assert set(config["settings"]) == {action.dest for action in parser()._actions} - {"help"} | {"digest", "list_digest", "content_digest"}
    assert (config["settings"]["lr_img"], config["settings"]["seed"], config["settings"]["device"]) == (10, 0, "cpu")
    assert "device" not in config["chosen"] and config["chosen"]["lr_img"] == 10
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(config["versions"]) == {"torch", "torchvision", "numpy"}
    assert config["command"][0] == "distill_DM.py" and "--lr_img" in config["command"]
    assert config["git"] == git_commit() and config["python"] == sys.version.split()[0]


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


def test_pictures_of_several_videos_per_class(tmp_path):
    """The png has each class's first video, the gif a row for each class."""
    videos = torch.rand(6, 8, 3, 10, 10)
    save_pictures(PixelSet(videos, 2), tmp_path)
    with Image.open(tmp_path / "distilled.png") as png, Image.open(tmp_path / "distilled.gif") as gif:
        assert png.size == (8 * 11 + 1, 2 * 11 + 1) and gif.size == (3 * 11 + 1, 2 * 11 + 1) and gif.n_frames == 8
        for row in range(2):
            frame = torch.from_numpy(np.array(png)[1 + 11 * row:11 + 11 * row, 1:11]).permute(2, 0, 1)
            assert torch.equal(frame, denormalize(videos[3 * row, 0]))


@pytest.mark.parametrize("start, last, falls", ((50.0, 40.0, True), (40.0, 50.0, False), (40.0, 40.0, False)))
def test_a_run_says_that_learning_lowered_its_accuracy(start, last, falls, monkeypatch, tmp_path):
    figures = dict.fromkeys(("top1", "top5", "video_top1", "top1_std", "top5_std", "video_top1_std"), last)
    result = figures | {"networks": [last], "bytes": 10, "seconds": 1.0, "per_class": [last] * 3}
    run, lines = Run({}, tmp_path, "run"), []
    run.start, run.result, run.best = start, result, {"value": max(start, last), "iteration": 0}
    monkeypatch.setattr(run, "log_line", lines.append)
    clips = random_clips([0, 1, 2], 3)
    clips.split = "test"
    finish(run, None, clips, clips)
    run.lock.close()
    assert any(line.startswith(f"accuracy on test fell during learning, from {start} % at the start to {last} %") for line in lines) == falls


@pytest.mark.parametrize("asked, saving, pause", ((60, 0.1, 60), (60, 3, 60), (60, 15, 300), (60, 999, 600), (0, 5, 0)))
def test_slow_checkpoints_are_rarer(asked, saving, pause, tmp_path):
    run = Run({}, tmp_path, "run", checkpoint_seconds=asked)
    run.saving = saving
    assert run.pause() == pause
    run.lock.close()


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("distill_utils.run.ROOT", tmp_path)
    assert git_commit() is None


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
    assert b"video_top1" in log.read_bytes()


def test_wandb_online_without_account_is_refused(command, tmp_path):
    code, output = command("distill_DM", tmp_path, "--wandb", "online", **without_account(tmp_path))
    assert code == 2 and "Traceback" not in output
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
