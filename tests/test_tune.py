"""The search on validation: ranges, trials, pruning, failures; several processes on one study, killed and resumed. A fake launcher is the run."""
import json
import multiprocessing
import os
import re
import signal
import time
import types

import pandas as pd
import pytest
import torch
from commands import only_folder

from distill_utils import search_space, trial, tune
from distill_utils.last_good import LastGood
from distill_utils.processes import run_script
from distill_utils.run import Run
from utils import ROOT

# A launcher GPU DATASET LR IPC [FLAG …] whose run's folder is a function of its flags and whose accuracy is best at LR 100; it goes on where it stopped.
FAKE = r"""
lr=$3; shift 4
while (($#)); do case $1 in --save_path) save=$2 ;; --Iteration) last=$2 ;; --pause) pause=$2 ;; --init) init=$2 ;; esac; shift; done
last=${last:-3}; folder=$save/toy/fake_${lr}_$init; mkdir -p "$folder"
if [[ $FAKE == refuse ]]; then echo "fake: error: it is refused" >&2; exit 2; fi
echo "run folder: $folder"
exec 9> "$folder/lock"
if command -v flock > /dev/null && ! flock -n 9; then echo "fake: error: another process runs the same settings" >&2; exit 2; fi
if [[ $FAKE == "refuse late" ]]; then echo "fake: error: it is refused" >&2; exit 2; fi
echo "$$ $lr" >> "$save/started"
echo "{\"settings\": {\"Iteration\": $last}, \"chosen\": {}}" > "$folder/config.json"
touch "$folder/metrics.jsonl"
if [[ $FAKE == "refuse when begun" ]]; then echo "fake: error: no space left on the disk" >&2; exit 2; fi
if [[ $FAKE == diverge ]] && awk "BEGIN { exit !($lr > 100) }"; then echo "fake: error: the loss is nan: lower the learning rate" >&2; exit 2; fi
for ((i = $(wc -l < "$folder/metrics.jsonl"); i <= last; i++)); do
  awk "BEGIN { printf \"{\\\"iteration\\\": $i, \\\"split\\\": \\\"validation\\\", \\\"top1\\\": %f}\\n\", $i ? $i * (10 - (log($lr / 100)) ^ 2 / 10) : ${START:-0} }" >> "$folder/metrics.jsonl"
  sleep "$FAKE_SECONDS"
done
"""


@pytest.fixture
def study(tmp_path, tiny, capfd, monkeypatch):
    """study(*flags) runs a search with the fake launcher -> exit code, what it printed; study.start(*flags) in a process of its own."""
    launcher = tmp_path / "fake.sh"
    launcher.write_text(FAKE)
    monkeypatch.setitem(search_space.METHODS, "DM", search_space.METHODS["DM"]._replace(launcher=str(launcher)))
    for name, value in (("FAKE", "learn"), ("FAKE_SECONDS", "0")):
        monkeypatch.setenv(name, value)
    line = ["cpu", "custom", "DM", "--data_path", tiny, "--save_path", tmp_path / "tune"]

    def call(flags):
        run_script(tune.main, tune.parser(), list(map(str, [*line, *flags])))

    def study(*flags):
        capfd.readouterr()
        try:
            call(flags)
            code = 0
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    def start(*flags):
        process = multiprocessing.get_context("fork").Process(target=call, args=(flags,))
        process.start()
        return process
    study.start, study.launcher = start, launcher
    return study


def table(tmp_path):
    path, = tmp_path.glob("tune/*/tune_*/trials.csv")
    return pd.read_csv(path)


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it does not come")


def started(tmp_path):
    """(process, learning rate) of the fake runs so far."""
    path = tmp_path / "tune" / "started"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- flags and ranges

def test_each_methods_ranges_are_its_scripts():
    assert set(search_space.METHODS) == {"coreset", "DM", "MTT", "FRePo", "DC", "s2d-DM", "s2d-MTT", "s2d-FRePo", "compact"}
    for name, method in search_space.METHODS.items():
        flags = search_space.Flags(name, "toy")
        found, _ = search_space.ranges(name, flags, {"train_static": True}, [])
        assert set(found) == set(method.search) and set(method.positionals) <= set(flags.read([]))
        assert set(search_space.ranges(name, flags, {}, [])[0]) == set(method.search) - {"lr_static"}
        line = re.search(rf"^# Usage: bash {method.launcher} (.*?) \[", (ROOT / method.launcher).read_text(), re.MULTILINE)
        assert line[1].split()[2:] == [{"lr_img": "LR", "lr_dynamic": "LR"}.get(flag, flag.upper()) for flag in method.positionals]


@pytest.mark.parametrize("method, given, without", (("FRePo", {"learn_label": False}, "lr_label"), ("DM", {"select": "herding"}, "init")))
def test_flags_without_effect_are_not_searched(method, given, without):
    found, _ = search_space.ranges(method, search_space.Flags(method, "toy"), given, [])
    assert set(found) == set(search_space.METHODS[method].search) - {without}
    assert "init" not in search_space.ranges("DM", search_space.Flags("DM", "toy"), {}, ["select=random,herding"])[0]
    assert not search_space.has_effect("feature_lr", {"method": "random"}) and search_space.has_effect("feature_lr", {"method": "herding"})


@pytest.mark.parametrize("search, sentence", (
    (["nonsense=1,2"], "--search nonsense: distill_DM has no flag --nonsense"), (["lr_img"], "--search lr_img is not FLAG=RANGE"),
    (["lr_img=log:1"], "--search lr_img=log:1 is not log:LOW:HIGH"), (["lr_img=log:0:1"], "LOW must be less than HIGH, and both above 0"),
    (["lr_img=linear:2:1"], "LOW must be less than HIGH"), (["lr_img=a,b"], "argument --lr_img: 'a' is not a number"),
    (["init=real,imaginary"], "argument --init: invalid choice: 'imaginary'"), (["n_syn=linear:0:3"], "argument --n_syn: '0' is not a whole number"),
    (["ipc=1,2"], "--ipc is both given and searched: choose one")))
def test_ranges_that_are_refused(study, tmp_path, search, sentence):
    code, printed = study("--ipc", 3, "--search", *search)
    assert code == 2 and sentence in printed and printed.count("\n") == 1 and not (tmp_path / "tune").exists(), printed


@pytest.mark.parametrize("flags, sentence", ((("--learning_rate", 3), "distill_DM has no flag --learning_rate"), (("--lr_img", "x"), "argument --lr_img: 'x' is not a number"),
                                             (("--lr_img", 3, "--init", "real"), "nothing is left to search"), (("--validation", 0), "--validation 0 leaves no videos"),
                                             (("--search", "validation=0.1,0.2"), "--validation is the same for all trials"), (("--no_test",), "--no_test is the same for all trials"),
                                             (("--validation", "x"), "argument --validation: 'x' is not a share"), (("--data_path", "nowhere"), "nowhere")))
def test_flags_that_are_refused(study, tmp_path, flags, sentence):
    code, printed = study(*flags)
    assert code == 2 and sentence in printed and printed.count("\n") == 1 and not (tmp_path / "tune").exists(), printed


def test_what_is_suggested_is_within_its_range_and_short():
    flags = search_space.Flags("DM", "toy")

    class Trial:
        """Suggests the upper end."""
        def suggest_float(self, name, low, high, log):
            return high / 3 if log else high

        def suggest_int(self, name, low, high, log):
            return high

        def suggest_categorical(self, name, choices):
            return choices[-1]
    for text, word in (("lr_img=log:1:1000", "333"), ("lr_img=linear:0:0.25", "0.25"), ("n_syn=log:1:8", "8"), ("ipc=linear:1:5", "5"), ("init=real,mean", "mean")):
        name, text = text.split("=")
        assert search_space.Range(name, text, flags).suggest(Trial()) == word
        flags.value(name, word)


def test_the_trials_command_is_the_launchers(monkeypatch):
    """All searched flags and all given ones, once; trials alone have --validation and --no_test."""
    monkeypatch.chdir(ROOT)
    flags = search_space.Flags("s2d-MTT", "toy")
    command = search_space.command_of("s2d-MTT", "1", "toy", flags, {"lr_dynamic": "150", "lr_hal": "0.001"}, ["--ipc", "5", "--size", "48"])
    assert command == ["bash", "sh/s2d/MTT.sh", "1", "toy", "150", "5", "--lr_hal", "0.001", "--ipc", "5", "--size", "48"]
    assert search_space.command_of("DM", "cpu", "toy", search_space.Flags("DM", "toy"), {"init": "mean"}, ["--lr_img", "3"])[2:7] == ["cpu", "toy", "3", "1", "--init"]
    assert search_space.command_of("coreset", "cpu", "toy", search_space.Flags("coreset", "toy"), {"method": "herding"}, [])[2:] == ["cpu", "toy", "herding", "1"]


# ---------------------------------------------------------------- studies

def test_a_study(study, tmp_path):
    """It finds the peak, prunes what is below the median, and prints the best command; again it has nothing to do, and more trials go on with it."""
    code, printed = study("--trials", 14, "--startup", 4, "--Iteration", 4)
    assert code == 0, printed
    rows = table(tmp_path)
    assert len(rows) == 14 and set(rows.state) <= {"complete", "pruned"} and rows.state.iloc[0] == "complete"
    assert rows.validation.is_monotonic_decreasing and rows.lr_img.between(1, 10_000).all() and set(rows.init) <= {"real", "mean"}
    best = re.search(r"best on validation: ([\d.]+) %, trial (\d+)\..*\n(bash .*)\n", printed)
    assert float(best[1]) == pytest.approx(rows.validation[0], abs=0.05) and int(best[2]) == rows.trial[0] and best[3] == f"{rows.command[0]} --save_path {tmp_path / 'tune'}"
    assert f"bash {os.path.relpath(study.launcher)} cpu custom " in best[3] and "--no_test" not in best[3] and "--validation" not in best[3]
    runs = len(started(tmp_path))
    code, printed = study("--trials", 14, "--startup", 4, "--Iteration", 4)
    assert code == 0 and best[3] in printed and len(started(tmp_path)) == runs and "\ntrial " not in printed
    assert study("--trials", 16, "--startup", 4, "--Iteration", 4)[0] == 0 and len(table(tmp_path)) == 16
    assert study("--trials", 1, "--search", "init=noise,still")[0] == 0 and len(list(tmp_path.glob("tune/*/tune_*"))) == 2  # another study


@pytest.mark.parametrize("start", (0, 1000))
def test_pruning(study, tmp_path, monkeypatch, start):
    """A run that is worse than the median of the finished ones ends early, but not at its first evaluation; the accuracy of its start does not save it."""
    monkeypatch.setenv("START", str(start))
    flags = "--startup", 2, "--Iteration", 50, "--search", "lr_img=log:99:101", "--init", "real"
    assert study("--trials", 2, *flags)[0] == 0
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    suggest = search_space.Range.suggest
    monkeypatch.setattr(search_space.Range, "suggest", lambda self, trial: f"{50 * float(suggest(self, trial)):.3g}")
    code, printed = study("--trials", 3, *flags)
    assert code == 0 and "trial 2: pruned below the median at iteration 1:" in printed, printed
    rows = table(tmp_path)
    assert sorted(rows.state) == ["complete", "complete", "pruned"] and rows.evaluations.tolist() == [50, 50, 1]


def test_a_trial_that_diverges_ends_no_study(study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "diverge")
    code, printed = study("--trials", 12, "--startup", 12, "--Iteration", 1)
    rows = table(tmp_path)
    assert code == 0 and len(rows) == 12 and ((rows.state == "pruned") == (rows.lr_img > 100)).all(), printed
    assert (rows.why.dropna() == "fake: error: the loss is nan: lower the learning rate").all() and rows.why.notna().any()


def test_divergence_is_told_from_other_errors():
    """By the sentences of the runs themselves."""
    broken = types.SimpleNamespace(iteration=3, folder="here", stateful={"synset": torch.nn.Linear(1, 1)}, kept={}, patience=1, in_a_row=0)
    torch.nn.init.constant_(broken.stateful["synset"].weight, float("nan"))
    for call in (lambda: Run.check_loss(broken, float("nan")), lambda: Run.check_finite(broken), lambda: LastGood.roll_back(broken, torch.tensor(float("inf")))):
        with pytest.raises(ValueError, match=trial.DIVERGED):
            call()
    for other in ("no space left on the disk for x", "the GPU's memory is full: end other programs that use it, or lower the sizes (x)"):
        assert not re.search(trial.DIVERGED, other)


def test_failures_after_a_divergence(study, tmp_path, monkeypatch):
    """They do not use up the trials either, since no trial has finished."""
    for when, code in (("diverge", 2), ("refuse", 2), ("learn", 0)):
        monkeypatch.setenv("FAKE", when)
        found = study("--trials", 2 if when == "learn" else 1 if when == "diverge" else 2, "--search", "lr_img=log:101:200")
        assert found[0] == code, found
    assert sorted(table(tmp_path).state) == ["complete"] + ["failed"] * 3 + ["pruned"]


@pytest.mark.parametrize("when", ("refuse", "refuse late", "refuse when begun"))
def test_a_command_that_always_fails_stops_with_its_sentence(study, tmp_path, monkeypatch, when):
    monkeypatch.setenv("FAKE", when)
    code, printed = study("--trials", 2)
    assert code == 2 and re.search("3 trials in a row failed; the last error was: fake: error: (it is refused|no space left on the disk)", printed)
    assert table(tmp_path).state.tolist() == ["failed"] * 3
    monkeypatch.setenv("FAKE", "learn")
    assert study("--trials", 2)[0] == 0  # once it is mended it goes on, and has all its trials
    assert sorted(table(tmp_path).state) == ["complete"] * 2 + ["failed"] * 3


def test_failures_after_a_success(study, tmp_path, monkeypatch):
    """A disk that is full for an hour uses up no trials: the search stops, and goes on once it is mended."""
    assert study("--trials", 1)[0] == 0
    monkeypatch.setenv("FAKE", "refuse when begun")
    code, printed = study("--trials", 6)
    assert code == 2 and "3 trials in a row failed; the last error was: fake: error: no space left on the disk" in printed
    monkeypatch.setenv("FAKE", "learn")
    assert study("--trials", 6)[0] == 0
    assert sorted(table(tmp_path).state.replace("pruned", "complete")) == ["complete"] * 6 + ["failed"] * 3


def test_flags_that_do_not_fit_together_end_no_study(study, tmp_path, monkeypatch):
    """Once others of the same command have finished, refused trials are trials like others."""
    assert study("--trials", 1)[0] == 0
    monkeypatch.setenv("FAKE", "refuse")
    code, printed = study("--trials", 6)
    assert code == 0 and "best on validation" in printed and sorted(table(tmp_path).state) == ["complete"] + ["failed"] * 5
    assert study("--trials", 6)[0] == 0 and len(table(tmp_path)) == 6


def test_a_study_is_of_its_frames(study, tmp_path, monkeypatch):
    assert study("--trials", 1)[0] == 0
    monkeypatch.setattr(tune, "content_digest", lambda settings: "other frames")
    assert study("--trials", 1)[0] == 0 and len(list(tmp_path.glob("tune/*/tune_*"))) == 2


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in open(f"/proc/{process}/status").read() if os.path.exists("/proc") else True


def test_killed_and_resumed(study, tmp_path, monkeypatch):
    """kill -9 ends the run, too; the same command takes the trial up, which goes on in its run's folder and counts once."""
    monkeypatch.setenv("FAKE_SECONDS", "1000")
    process = study.start("--trials", 2, "--Iteration", 1)
    wait_for(lambda: list(tmp_path.glob("tune/toy/fake_*/metrics.jsonl")) and next(tmp_path.glob("tune/toy/fake_*/metrics.jsonl")).read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (run, lr), = started(tmp_path)
    wait_for(lambda: not alive(int(run)))
    monkeypatch.setenv("FAKE_SECONDS", "0")
    code, printed = study("--trials", 2, "--Iteration", 1)
    assert code == 0 and [rate for _, rate in started(tmp_path)][:2] == [lr, lr], printed
    rows = table(tmp_path)
    assert sorted(rows.state) == ["complete", "complete", "killed"] and len(started(tmp_path)) == 3
    again, = rows[(rows.lr_img.map("{:.3g}".format) == f"{float(lr):.3g}") & (rows.state == "complete")].run
    assert len(open(f"{again}/metrics.jsonl").readlines()) == 2  # iteration 0 was not computed again


def test_two_processes_share_a_study(study, tmp_path, monkeypatch):
    """Each trial is one's; together they make as many as asked for, and a trial that runs is nobody's to take up."""
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    processes = [study.start("--trials", 8, "--startup", 3, "--Iteration", 1) for _ in range(2)]
    for process in processes:
        process.join()
    rows = table(tmp_path)
    assert [process.exitcode for process in processes] == [0, 0] and len(rows) == 8 and "killed" not in set(rows.state)
    assert len(started(tmp_path)) == 8 and len(set(rows.lr_img)) == 8


def test_the_same_settings_are_run_by_one_process_at_a_time(study, tmp_path, monkeypatch):
    """Two values and four processes: the others wait, and read the finished run."""
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    processes = [study.start("--trials", 6, "--lr_img", 3, "--Iteration", 1) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(table(tmp_path).state) == ["complete"] * 6 and len(list(tmp_path.glob("tune/toy/fake_*"))) == 2


def test_no_test_video_is_read(command, tmp_path):
    """Of a run with --no_test; the same command without it adds the result of the same set."""
    packs = tmp_path.with_name(tmp_path.name + "_packs")
    code, output = command("distill_DM", tmp_path, "--validation", 0.4, "--no_test", "--pack_path", packs)
    assert {path.name.split("_")[1] for path in packs.glob("*.npy")} == {"train", "validation"}
    folder = only_folder(tmp_path)
    assert code == 0 and "not tested" in output and not (folder / "result.json").exists(), output
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["split"]) for line in lines] == [(0, "validation"), (2, "validation"), (3, "validation")]
    before = (folder / "distilled.pt").read_bytes()
    code, output = command("distill_DM", tmp_path, "--validation", 0.4)
    assert code == 0 and (folder / "result.json").exists() and (folder / "distilled.pt").read_bytes() == before, output
    assert command("distill_DM", tmp_path, "--no_test")[0] == 2
    code, output = command("distill_utils.coreset", tmp_path, "--validation", 0.4, "--no_test")
    assert code == 0 and "not tested" in output
    code, output = command("distill_DC", tmp_path, "--validation", 0.4, "--no_test")
    assert code == 0 and "not tested" in output
    code, output = command("distill_utils.evaluate", tmp_path, "--validation", 0.4, "--no_test")
    assert code == 0 and "not tested" in output and len(list(tmp_path.rglob("result.json"))) == 1


def test_help_names_what_is_searched(capsys):
    with pytest.raises(SystemExit):
        tune.parser().parse_args(["--help"])
    assert re.search(r"s2d-MTT +lr_dynamic=log:1:100000", capsys.readouterr().out)
