"""A search over flags on validation videos by Optuna (METHOD 12): TPE, and the median pruner on the evaluations along the way. No test video is read.

    bash sh/study/tune.sh GPU DATASET METHOD [--trials N] [--search FLAG=RANGE] [any flag of the method's script]

A trial is a run of the method's launcher with --validation and --no_test; its figure is the last accuracy on the validation videos. A flag that is
given is not searched. A study is a folder, a function of data, method, given flags and ranges: the same command goes on with it, and several at a
time, on GPUs or on machines that see the folder, share its trials. A trial that was killed is taken up again: its run goes on from its checkpoint.
"""
import argparse
import collections
import contextlib
import importlib
import math
import os
import pathlib
import shlex
import warnings

import optuna
import pandas as pd
from optuna.trial import TrialState

from distill_utils import options
from distill_utils.datasets import DATASETS
from distill_utils.processes import run_script
from distill_utils.run import WITHOUT_EFFECT, as_setting, dataset_label, list_digest
from distill_utils.trial import run_folder, run_trial
from utils import ROOT, atomic_write, lock, stream_seed

Method = collections.namedtuple("Method", "launcher script positionals search")

# Launcher; script; the flags that the launcher takes by their place, after DATASET; what is searched. A range is log:LOW:HIGH, linear:LOW:HIGH, or choices
# A,B,C; of whole numbers where the flag takes these.
METHODS = {
    "coreset": Method("sh/baseline/coreset.sh", "distill_utils.coreset", ("method", "ipc"), {
        "method": "random,herding,k-center",
        "feature_lr": "log:0.002:0.05",
    }),
    "DM": Method("sh/baseline/DM.sh", "distill_DM", ("lr_img", "ipc"), {
        "lr_img": "log:1:10000",
        "init": "real,mean",
    }),
    "MTT": Method("sh/baseline/MTT.sh", "distill_MTT", ("lr_img", "ipc"), {
        "lr_img": "log:100:1000000",
        "lr_teacher": "log:0.002:0.05",
        "syn_steps": "5,10",
        "expert_epochs": "1,2,3",
    }),
    "FRePo": Method("sh/baseline/FRePo.sh", "distill_FRePo", ("lr_img", "ipc"), {
        "lr_img": "log:0.001:0.3",
        "lr_pool": "log:3e-5:0.003",
        "lr_label": "log:0.0001:0.03",
    }),
    "DC": Method("sh/s2d/DC.sh", "distill_DC", ("spc",), {
        "lr_img": "log:0.001:10",
        "init": "real,mean",
    }),
    "s2d-DM": Method("sh/s2d/DM.sh", "distill_s2d", ("lr_dynamic", "ipc"), {
        "lr_dynamic": "log:0.01:10000",
        "lr_hal": "log:1e-6:0.01",
        "lr_static": "log:0.01:1000",       # with --train_static only
    }),
    "s2d-MTT": Method("sh/s2d/MTT.sh", "distill_s2d", ("lr_dynamic", "ipc"), {
        "lr_dynamic": "log:1:100000",
        "lr_hal": "log:1e-6:0.01",
        "lr_static": "log:1:100000",        # with --train_static only
        "lr_teacher": "log:0.002:0.05",
        "syn_steps": "5,10",
        "expert_epochs": "1,2,3",
    }),
    "s2d-FRePo": Method("sh/s2d/FRePo.sh", "distill_s2d", ("lr_dynamic", "ipc"), {
        "lr_dynamic": "log:0.001:0.3",
        "lr_hal": "log:1e-6:0.01",
        "lr_static": "log:0.001:0.3",       # with --train_static only
        "lr_pool": "log:3e-5:0.003",
        "lr_label": "log:0.0001:0.03",
    }),
}
SAVE_PATH = ROOT / "results" / "tune"
ONLY_WITH = {"lr_static": "train_static"}
MOST_FAILURES = 3  # that a command's first trials may be, before it is the command that is at fault


# ---------------------------------------------------------------- what is searched

class Flags:
    """The flags of a method's script: how its own parser reads those of a command."""

    def __init__(self, method, dataset):
        self.script, self.needed = METHODS[method].script, ["--dataset", dataset]

    def read(self, words, defaults=True):
        """The values of the flags that `words` are, as a dict; without `defaults` of those only that are given. ValueError for what the script refuses."""
        parser, absent = importlib.import_module(self.script).parser(), object()
        parser.error = refuse
        start = argparse.Namespace()
        if not defaults:
            start = argparse.Namespace(**dict.fromkeys(self.read([]), absent))
        args, unknown = parser.parse_known_args([*self.needed, *words], start)
        if unknown:
            raise ValueError(f"{self.script} has no flag {unknown[0]}")
        return {name: value for name, value in vars(args).items() if value is not absent}

    def value(self, name, word):
        """The value of the flag --name for a word."""
        if name not in self.read([]):
            raise ValueError(f"--search {name}: {self.script} has no flag --{name}")
        return self.read([f"--{name}", word])[name]


def refuse(message):
    raise ValueError(message)


class Range:
    """What a flag is searched in: `log:LOW:HIGH`, `linear:LOW:HIGH`, or choices `A,B,C`."""

    def __init__(self, name, text, flags):
        self.name, (kind, *ends) = name, text.split(":")
        self.log, self.choices = kind == "log", None
        if kind not in ("log", "linear"):
            self.choices = text.split(",")
            for word in self.choices:
                flags.value(name, word)
            return
        if len(ends) != 2:
            raise ValueError(f"--search {name}={text} is not log:LOW:HIGH, linear:LOW:HIGH or A,B,C")
        values = [flags.value(name, end) for end in ends]
        if not all(isinstance(value, (int, float)) for value in values) or not (0 if self.log else -math.inf) < values[0] < values[1]:
            raise ValueError(f"--search {name}={text} is not from one number to a larger one" + (", both above 0" if self.log else ""))
        self.low, self.high = values
        self.whole = all(isinstance(value, int) for value in values)

    def suggest(self, trial):
        """The word of the flag for a trial, of three digits where it may be any number, so that commands are short."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return str(trial.suggest_int(self.name, self.low, self.high, log=self.log))
        return f"{float(f'{trial.suggest_float(self.name, self.low, self.high, log=self.log):.3g}'):g}"


def ranges(method, flags, given, search):
    """The Range of each searched flag: of the table above, then of --search; but for those that are `given`, or have no effect here."""
    texts = {name: text for name, text in METHODS[method].search.items() if name not in given and (name not in ONLY_WITH or given.get(ONLY_WITH[name]))}
    for each in search:
        name, separator, text = each.partition("=")
        if not separator:
            raise ValueError(f"--search {each} is not FLAG=RANGE")
        if name in given:
            raise ValueError(f"--{name} is given and searched: choose one")
        texts[name] = text
    if not texts:
        raise ValueError("all flags are given, so there is nothing to search: give --search FLAG=RANGE")
    return {name: Range(name, text, flags) for name, text in texts.items()}, texts


def command_of(method, gpu, dataset, flags, words, given_words):
    """The launcher's command of a trial: `words` are those of the searched flags by name, `given_words` the user's."""
    launcher, _, positionals, _ = METHODS[method]
    values = flags.read(given_words)
    places = [words.get(name, f"{values[name]:g}" if isinstance(values[name], float) else str(values[name])) for name in positionals]
    others = [word for name, value in words.items() if name not in positionals for word in (f"--{name}", value)]
    return ["bash", os.path.relpath(ROOT / launcher), gpu, dataset, *places, *others, *given_words]


# ---------------------------------------------------------------- a study, which several processes may share

class Study:
    """A study's folder: journal.log is Optuna's, trials.csv a row for each trial, trials/<number>.log what its run printed.

    Each running trial has a lock that ends with its process: one without was killed.
    """

    def __init__(self, folder, ranges, seed, startup):
        self.folder, self.ranges, self.seed, self.startup = folder, ranges, seed, startup
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        with self.alone():
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "journal.log")))
            # At the first evaluation nothing has been learned yet.
            pruner = optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=1)
            self.optuna = optuna.create_study(study_name="tune", storage=storage, direction="maximize", load_if_exists=True, pruner=pruner)

    @contextlib.contextmanager
    def alone(self):
        """No other process of the study is in such a block."""
        with open(self.folder / "lock", "w") as file:
            lock(file)
            yield

    def begin(self, most):
        """The next trial, the words of its flags and its lock; None where `most` have begun. Killed ones are begun anew and do not count."""
        with self.alone():
            self.take_up_killed()
            trials = self.optuna.get_trials(deepcopy=False)
            begun = [trial for trial in trials if trial.state != TrialState.WAITING and trial.number not in again(trials)]
            if len(begun) >= most:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar: other processes' trials are kept clear of
                self.optuna.sampler = optuna.samplers.TPESampler(n_startup_trials=self.startup, constant_liar=True,
                                                                 seed=stream_seed("tune", self.seed, len(trials)) % 2 ** 32)
            trial = self.optuna.ask()
            words = {name: each.suggest(trial) for name, each in self.ranges.items()}
            file = open(self.lock_path(trial.number), "a")
            lock(file)
            return trial, words, file

    def take_up_killed(self):
        for trial in self.optuna.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            with open(self.lock_path(trial.number), "a") as file:
                try:
                    lock(file, wait=False)
                except BlockingIOError:
                    continue
                self.optuna.enqueue_trial(trial.params, user_attrs={"again": trial.number})
                self.optuna.tell(trial.number, state=TrialState.FAIL)

    def lock_path(self, number):
        return self.folder / "trials" / f"{number}.lock"

    def log_path(self, number):
        return self.folder / "trials" / f"{number}.log"

    def best(self):
        """The best finished trial, or None."""
        finished = self.optuna.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return max(finished, key=lambda trial: trial.value, default=None)

    def write_csv(self):
        """All trials, the best first."""
        with self.alone():
            trials = self.optuna.get_trials(deepcopy=False)
            rows = [{"trial": trial.number, "state": "killed" if trial.number in again(trials) else state_name(trial.state), "validation": trial.value,
                     **{name: trial.params.get(name) for name in self.ranges}, "evaluations": len(trial.intermediate_values),
                     "minutes": trial.duration and trial.duration.total_seconds() / 60, **{name: trial.user_attrs.get(name) for name in ("command", "run", "why")}}
                    for trial in trials]
            table = pd.DataFrame(rows).sort_values("validation", ascending=False, kind="stable", na_position="last")
            with atomic_write(self.folder / "trials.csv", "w") as file:
                table.to_csv(file, index=False)


def state_name(state):
    return "failed" if state == TrialState.FAIL else state.name.lower()


def again(trials):
    """Numbers of the killed trials, in whose place another one is begun."""
    return {trial.user_attrs.get("again") for trial in trials}


# ---------------------------------------------------------------- as a program

def main(args):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.dataset not in DATASETS:
        raise ValueError(f"unknown DATASET {args.dataset!r}: choose one of {', '.join(DATASETS)}")
    flags = Flags(args.method, args.dataset)
    given, validation = flags.read(args.flags, defaults=False), ["--validation", args.validation]
    if flags.read(validation)["validation"] == 0:
        raise ValueError("--validation 0 leaves no videos to choose by")
    searched, texts = ranges(args.method, flags, given, args.search)
    settings = argparse.Namespace(**flags.read([*args.flags, *validation]))
    folder = study_folder(args, settings, texts)
    study, failures = Study(folder, searched, settings.seed, args.startup), []
    print(f"study: {folder}\nsearched: {' '.join(f'{name}={text}' for name, text in texts.items())}", flush=True)

    while begun := study.begin(args.trials):
        state, why = run_next(study, *begun, args, flags)
        study.write_csv()
        failures += [why] if state == TrialState.FAIL else []
        if len(failures) >= MOST_FAILURES and study.best() is None:
            raise ValueError(f"{len(failures)} trials failed and none has finished; the last said: {why}")
    report(study, [] if args.save_path == SAVE_PATH else ["--save_path", str(args.save_path)])


def run_next(study, trial, words, file, args, flags):
    """Runs a trial that has begun, and notes and prints how it ends: its state, and why where it has no value."""
    command = command_of(args.method, args.gpu, args.dataset, flags, words, args.flags)
    trial.set_user_attr("command", shlex.join(command))
    alone = ["--validation", args.validation, "--no_test", "--save_path", str(args.save_path)]
    with file:
        state, value, why = run_trial(trial, [*command, *alone], study.log_path(trial.number), file, DATASETS[args.dataset].headline)
        trial.set_user_attr("run", str(run_folder(study.log_path(trial.number)) or ""))
        trial.set_user_attr("why", why)
        study.optuna.tell(trial, value, state)
    print(f"trial {trial.number}: {state_name(state)} {why or f'{value:.1f} %'}: {' '.join(f'{name}={word}' for name, word in words.items())}", flush=True)
    return state, why


def study_folder(args, settings, texts):
    """Of the data, the method, all settings that have an effect, and the ranges."""
    paths = {"path_static", "buffer_path"}
    chosen = {name: as_setting(value) for name, value in vars(settings).items() if name not in set(WITHOUT_EFFECT) - paths - {"bytes"}}
    name = stream_seed(args.method, sorted(chosen.items()), sorted(texts.items()), list_digest(settings))
    return args.save_path.absolute() / dataset_label(settings) / f"tune_{args.method}_{f'{name:015x}'[:8]}"


def report(study, place):
    """Prints the best trial's command, without the flags that make it a trial, and with those of the `place` where experts and static memories may be."""
    best = study.best()
    print(f"all trials: {study.folder / 'trials.csv'}")
    if best is None:
        raise ValueError("no trial has finished yet")
    print(f"best on validation: {best.value:.1f} %, trial {best.number}. Learned from all training videos, and tested:")
    print(shlex.join([*shlex.split(best.user_attrs["command"]), *place]))


class PassingOn(argparse.ArgumentParser):
    """A parser that leaves flags that it does not know, with their values, to another: `flags`."""

    def parse_args(self, arguments=None):
        args, flags = self.parse_known_args(arguments)
        args.flags = flags
        return args


def parser():
    table = "\n".join(f"  {name:9} {' '.join(f'{flag}={text}' for flag, text in method.search.items())}" for name, method in METHODS.items())
    parser = PassingOn(prog="tune", description=__doc__, epilog=f"searched are (lr_static with --train_static only):\n{table}", allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", metavar="GPU", help="as the launchers take it")
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("method", metavar="METHOD", choices=METHODS, help=", ".join(METHODS))
    parser.add_argument("--trials", type=options.positive, default=50, metavar="N", help="of the study, those of all its commands together (%(default)s)")
    parser.add_argument("--startup", type=options.positive, default=8, metavar="N", help="trials at random before TPE, and before any is pruned (%(default)s)")
    parser.add_argument("--search", action="append", default=[], metavar="FLAG=RANGE",
                        help="in the place of, or besides, what is listed below: log:LOW:HIGH, linear:LOW:HIGH, or choices A,B,C; may be given several times")
    parser.add_argument("--validation", default="0.25", metavar="F", help="share of the training videos that trials are judged on, or `list` (%(default)s)")
    parser.add_argument("--save_path", type=pathlib.Path, metavar="DIR", help="folder of the studies and of their trials' runs (results/tune)",
                        default=SAVE_PATH)
    return parser


if __name__ == "__main__":
    run_script(main, parser())
