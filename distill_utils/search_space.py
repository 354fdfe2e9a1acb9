"""The search space of each method: its flags, their ranges, and the command of a trial."""
import argparse
import collections
import importlib
import math
import os

from utils import ROOT

Method = collections.namedtuple("Method", "launcher script positionals search")

# Launcher; script; flags that the launcher takes by position, after DATASET; ranges to search. A range is log:LOW:HIGH,
# linear:LOW:HIGH, or choices A,B,C. It holds whole numbers if the flag does.
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
        "lr_static": "log:0.01:1000",       # only with --train_static
    }),
    "s2d-MTT": Method("sh/s2d/MTT.sh", "distill_s2d", ("lr_dynamic", "ipc"), {
        "lr_dynamic": "log:1:100000",
        "lr_hal": "log:1e-6:0.01",
        "lr_static": "log:1:100000",        # only with --train_static
        "lr_teacher": "log:0.002:0.05",
        "syn_steps": "5,10",
    }),
    "s2d-FRePo": Method("sh/s2d/FRePo.sh", "distill_s2d", ("lr_dynamic", "ipc"), {
        "lr_dynamic": "log:0.001:0.3",
        "lr_hal": "log:1e-6:0.01",
        "lr_static": "log:0.001:0.3",       # only with --train_static
        "lr_pool": "log:3e-5:0.003",
        "lr_label": "log:0.0001:0.03",
    }),
    "compact": Method("sh/s2d/compact.sh", "distill_s2d", ("lr_dynamic", "ipc"), {
        "lr_dynamic": "log:0.3:300",        # the launcher gives lr_static the same
    }),
}


class Flags:
    """The flags of a method's script, read by the script's own parser."""

    def __init__(self, method, dataset):
        self.script, self.needed = METHODS[method].script, ["--dataset", dataset]

    def read(self, words, defaults=True):
        """Parse `words` as flags; return a dict of all values, or without `defaults` only of those given.

        ValueError if the script rejects them.
        """
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
        """Return the value of the flag --name for a word."""
        if name not in self.read([]):
            raise ValueError(f"--search {name}: {self.script} has no flag --{name}")
        return self.read([f"--{name}", word])[name]


def refuse(message):
    raise ValueError(message)


class Range:
    """The search range of a flag: `log:LOW:HIGH`, `linear:LOW:HIGH`, or choices `A,B,C`."""

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
        if (not all(isinstance(value, (int, float)) for value in values)
                or not (0 if self.log else -math.inf) < values[0] < values[1]):
            raise ValueError(f"--search {name}={text}: LOW must be less than HIGH"
                             + (", and both above 0" if self.log else ""))
        self.low, self.high = values
        self.whole = all(isinstance(value, int) for value in values)

    def suggest(self, trial):
        """Return the flag's value for a trial as a word; real numbers have three digits, to keep commands short."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return str(trial.suggest_int(self.name, self.low, self.high, log=self.log))
        return f"{float(f'{trial.suggest_float(self.name, self.low, self.high, log=self.log):.3g}'):g}"


def has_effect(name, given):
    """Return whether a flag changes anything beside the flags that are `given` or searched."""
    return not (name == "lr_static" and not given.get("train_static")
                or name == "lr_label" and given.get("learn_label") is False
                or name == "feature_lr" and given.get("method") == "random"
                or name == "init" and given.get("select", "random") != "random")


def ranges(method, flags, given, search):
    """Return the Range of each searched flag, and their texts: those of METHODS, replaced or extended by --search.

    Flags that are `given`, or that have no effect here, are not searched.
    """
    searched = {each.partition("=")[0]: "searched" for each in search}
    texts = {name: text for name, text in METHODS[method].search.items()
             if name not in given and has_effect(name, searched | given)}
    for each in search:
        name, separator, text = each.partition("=")
        if not separator:
            raise ValueError(f"--search {each} is not FLAG=RANGE")
        if name in given:
            raise ValueError(f"--{name} is both given and searched: choose one")
        texts[name] = text
    if not texts:
        raise ValueError("all flags are given, so nothing is left to search: give --search FLAG=RANGE")
    return {name: Range(name, text, flags) for name, text in texts.items()}, texts


def command_of(method, gpu, dataset, flags, words, given_words):
    """Return the launcher command of a trial; words: {searched flag: value}; given_words: the user's flags."""
    launcher, _, positionals, _ = METHODS[method]
    values = flags.read(given_words)
    places = [words.get(name, f"{values[name]:g}" if isinstance(values[name], float) else str(values[name]))
              for name in positionals]
    others = [word for name, value in words.items() if name not in positionals for word in (f"--{name}", value)]
    return ["bash", os.path.relpath(ROOT / launcher), gpu, dataset, *places, *others, *given_words]
