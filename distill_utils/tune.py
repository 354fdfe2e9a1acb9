"""Search over a method's flags with Optuna, scored on validation videos (methods.md 12); test videos are never read.

    bash sh/study/tune.sh GPU DATASET METHOD [--trials N] [--search FLAG=RANGE] [any flag of the method's script]

The sampler is TPE. A median pruner acts on the evaluations during a run. A trial is a run of the method's launcher with
--validation and --no_test; its value is the last accuracy on the validation videos. A flag that is given is not
searched.

A study is a folder, a function of data set, method, given flags and ranges. The same command continues it. Several
commands at a time, on GPUs or on machines that share the folder, share its trials. A killed trial is restarted, and its
run resumes from its checkpoint.
"""
import argparse
import contextlib
import pathlib
import shlex
import warnings

import optuna
import pandas as pd
from optuna.trial import TrialState

from distill_utils import options
from distill_utils.datasets import DATASETS
from distill_utils.identity import WITHOUT_EFFECT, as_setting, content_digest, dataset_label, list_digest
from distill_utils.processes import run_script
from distill_utils.search_space import METHODS, Flags, command_of, ranges
from distill_utils.trial import run_folder, run_trial
from utils import ROOT, atomic_write, lock, stream_seed

SAVE_PATH = ROOT / "results" / "tune"
MOST_FAILURES = 3  # in a row, after which the command, the disk or the GPU is at fault, not the flags


# ---------------------------------------------------------------- a study, shared by several processes

class Study:
    """A study's folder: journal.log (Optuna's), trials.csv (one row per trial), trials/<number>.log (a run's output).

    Each running trial holds a lock that ends with its process: a trial without a lock was killed.
    """

    def __init__(self, folder, ranges, seed, startup):
        self.folder, self.ranges, self.seed, self.startup = folder, ranges, seed, startup
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        with self.alone():
            storage = optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(folder / "journal.log")))
            pruner = optuna.pruners.MedianPruner(n_startup_trials=startup)
            self.optuna = optuna.create_study(study_name="tune", storage=storage, direction="maximize",
                                              load_if_exists=True, pruner=pruner)

    @contextlib.contextmanager
    def alone(self):
        """Exclude the study's other processes from such blocks."""
        with open(self.folder / "lock", "w") as file:
            lock(file)
            yield

    def begin(self, most):
        """Return the next trial, its words {flag: value} and its lock; None if `most` trials have begun.

        Killed trials are restarted and do not count. Nor do trials that failed, whose cause may have been repaired,
        but for those whose flags were refused.
        """
        with self.alone():
            self.take_up_killed()
            trials = self.optuna.get_trials(deepcopy=False)
            killed = restarted(trials)
            begun = [trial for trial in trials
                     if trial.state != TrialState.WAITING and trial.number not in killed
                     and (trial.state != TrialState.FAIL or trial.user_attrs.get("refused"))]
            if len(begun) >= most:
                return None
            with warnings.catch_warnings():
                # constant_liar keeps away from trials that run in other processes.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.optuna.sampler = optuna.samplers.TPESampler(
                    n_startup_trials=self.startup, constant_liar=True,
                    seed=stream_seed("tune", self.seed, len(trials)) % 2 ** 32)
            trial = self.optuna.ask()
            words = {name: each.suggest(trial) for name, each in self.ranges.items()}
            file = open(self.lock_path(trial.number), "a")
            lock(file)
            trial.set_user_attr("words", words)
            return trial, words, file

    def wait_for_same(self, trial, words):
        """Wait for earlier trials that run the same settings in other processes; this one then reads their run."""
        for other in self.optuna.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if other.number < trial.number and other.user_attrs.get("words") == words:
                print(f"trial {trial.number} waits for trial {other.number}, which runs the same settings", flush=True)
                with open(self.lock_path(other.number), "a") as file:
                    lock(file)

    def take_up_killed(self):
        for trial in self.optuna.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            with open(self.lock_path(trial.number), "a") as file:
                try:
                    lock(file, wait=False)
                except BlockingIOError:
                    continue
                if trial.number not in restarted(self.optuna.get_trials(deepcopy=False)):
                    # Otherwise it was enqueued before, by a process that was killed before the next line.
                    self.optuna.enqueue_trial(trial.params, user_attrs={"again": trial.number})
                self.optuna.tell(trial.number, state=TrialState.FAIL)

    def lock_path(self, number):
        return self.folder / "trials" / f"{number}.lock"

    def log_path(self, number):
        return self.folder / "trials" / f"{number}.log"

    def best(self):
        """Return the best finished trial, or None."""
        finished = self.optuna.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return max(finished, key=lambda trial: trial.value, default=None)

    def write_csv(self):
        """Write trials.csv: all trials, the best first."""
        with self.alone():
            trials = self.optuna.get_trials(deepcopy=False)
            killed = restarted(trials)
            rows = [{"trial": trial.number,
                     "state": "killed" if trial.number in killed else state_name(trial.state),
                     "validation": trial.value, **{name: trial.params.get(name) for name in self.ranges},
                     "evaluations": len(trial.intermediate_values),
                     "minutes": trial.duration and trial.duration.total_seconds() / 60,
                     **{name: trial.user_attrs.get(name) for name in ("command", "run", "why")}}
                    for trial in trials]
            table = pd.DataFrame(rows).sort_values("validation", ascending=False, kind="stable", na_position="last")
            with atomic_write(self.folder / "trials.csv", "w") as file:
                table.to_csv(file, index=False)


def state_name(state):
    return "failed" if state == TrialState.FAIL else state.name.lower()


def restarted(trials):
    """Return the numbers of killed trials that were restarted under another number."""
    return {trial.user_attrs.get("again") for trial in trials}


# ---------------------------------------------------------------- the program

def main(args):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.dataset not in DATASETS:
        raise ValueError(f"unknown DATASET {args.dataset!r}: choose from {', '.join(DATASETS)}")
    flags = Flags(args.method, args.dataset)
    given, validation = flags.read(args.flags, defaults=False), ["--validation", args.validation]
    if flags.read(validation)["validation"] == 0:
        raise ValueError("--validation 0 leaves no videos to score trials on: give a share above 0")
    searched, texts = ranges(args.method, flags, given, args.search)
    if own := {*given, *searched} & {"validation", "no_test", "save_path"}:
        raise ValueError(f"--{min(own)} is the same for all trials: give --validation and --save_path to the search "
                         "itself, and leave out --no_test, which every trial has")
    settings = argparse.Namespace(**flags.read([*args.flags, *validation]))
    folder = study_folder(args, settings, texts)
    study, failures = Study(folder, searched, settings.seed, args.startup), 0
    print(f"study: {folder}\nsearched: {' '.join(f'{name}={text}' for name, text in texts.items())}", flush=True)

    while begun := study.begin(args.trials):
        state, why, refused = run_next(study, *begun, args, flags)
        study.write_csv()
        failures = 0 if state != TrialState.FAIL else failures + (not refused)
        if failures == MOST_FAILURES:
            raise ValueError(f"{failures} trials in a row failed; the last error was: {why}")
    report(study, [] if args.save_path == SAVE_PATH else ["--save_path", str(args.save_path)])


def run_next(study, trial, words, file, args, flags):
    """Run a trial, record and print its end; return its state, the reason if it has no value, and if it was refused.

    It was refused if it failed before it had a folder, where others of the same command have finished: its flags do not
    fit together.
    """
    command = command_of(args.method, args.gpu, args.dataset, flags, words, args.flags)
    trial.set_user_attr("command", shlex.join(command))
    alone = ["--validation", args.validation, "--no_test", "--save_path", str(args.save_path)]
    with file:
        study.wait_for_same(trial, words)
        state, value, why = run_trial(trial, [*command, *alone], study.log_path(trial.number), file,
                                      DATASETS[args.dataset].headline)
        folder = run_folder(study.log_path(trial.number))
        refused = state == TrialState.FAIL and folder is None and study.best() is not None
        for name, attribute in (("run", str(folder or "")), ("why", why), ("refused", refused)):
            trial.set_user_attr(name, attribute)
        study.optuna.tell(trial, value, state)
    print(f"trial {trial.number}: {state_name(state)} {why or f'{value:.1f} %'}: "
          f"{' '.join(f'{name}={word}' for name, word in words.items())}", flush=True)
    return state, why, refused


def study_folder(args, settings, texts):
    """Return the study's folder: a function of the data, the method, all settings with an effect, and the ranges."""
    left_out = set(WITHOUT_EFFECT) - {"path_static", "buffer_path", "bytes"}
    chosen = {name: as_setting(value) for name, value in vars(settings).items() if name not in left_out}
    name = stream_seed(args.method, sorted(chosen.items()), sorted(texts.items()), list_digest(settings),
                       content_digest(settings))
    return args.save_path.absolute() / dataset_label(settings) / f"tune_{args.method}_{f'{name:015x}'[:8]}"


def report(study, place):
    """Print the best trial's command without the flags of a trial, and with `place`: the flags that locate results."""
    best = study.best()
    print(f"all trials: {study.folder / 'trials.csv'}")
    if best is None:
        raise ValueError("no trial has finished yet")
    print(f"best on validation: {best.value:.1f} %, trial {best.number}. "
          "To distill all training videos and test the result, run:")
    print(shlex.join([*shlex.split(best.user_attrs["command"]), *place]))


class PassingOn(argparse.ArgumentParser):
    """A parser that leaves unknown flags, with their values, in `flags` for another parser."""

    def parse_args(self, arguments=None):
        args, flags = self.parse_known_args(arguments)
        args.flags = flags
        return args


def parser():
    table = "\n".join(f"  {name:9} {' '.join(f'{flag}={text}' for flag, text in method.search.items())}"
                      for name, method in METHODS.items())
    parser = PassingOn(prog="tune", description=__doc__,
                       epilog=f"searched flags (lr_static only with --train_static):\n{table}",
                       allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", metavar="GPU", help="GPU, in the form that the launchers take")
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("method", metavar="METHOD", choices=METHODS, help=", ".join(METHODS))
    parser.add_argument("--trials", type=options.positive, default=50, metavar="N",
                        help="total number of trials of the study, over all its commands (default: %(default)s)")
    parser.add_argument("--startup", type=options.positive, default=8, metavar="N",
                        help="number of random trials before TPE and pruning start (default: %(default)s)")
    parser.add_argument("--search", action="append", default=[], metavar="FLAG=RANGE",
                        help="search this flag too, or in this range instead of the one listed below: log:LOW:HIGH, "
                             "linear:LOW:HIGH, or choices A,B,C; may be repeated")
    parser.add_argument("--validation", default="0.25", metavar="F",
                        help="share of the training videos held out to score trials, or `list` for the list's own "
                             "validation videos (default: %(default)s)")
    parser.add_argument("--save_path", type=pathlib.Path, metavar="DIR",
                        help="folder for the studies and the runs of their trials (default: results/tune)",
                        default=SAVE_PATH)
    return parser


if __name__ == "__main__":
    run_script(main, parser())
