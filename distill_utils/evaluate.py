"""Evaluate the full training set, the upper bound of every table, or a distilled set with several networks.

    bash sh/baseline/full.sh GPU DATASET
    python -m distill_utils.evaluate RUN --networks ConvNet3D,CNN+GRU,r3d_18
"""
import argparse
import json
import pathlib

import pandas as pd

import networks
from distill_utils.identity import (
    DATA_PATHS,
    check_places,
    content_digest,
    digest,
    file_fingerprint,
    list_digest,
    start_run,
)
from distill_utils.options import (
    LR_NET,
    add_evaluation_options,
    check,
    evaluation_values,
    load_data,
    load_splits,
    positive,
    script_parser,
)
from distill_utils.processes import broadcast, error_line, gather, rank, run_script
from distill_utils.protocol import RealSet, evaluate
from distill_utils.record import ACCURACIES, check_figure, evaluate_and_keep, finish, log_evaluation, remove_scores
from distill_utils.run import read_config
from distill_utils.synset import load_set
from utils import read_json, save_json, seed_everything


def main(args):
    if args.run and not args.run.exists():
        raise ValueError(f"{args.run} does not exist")
    if not args.dataset:
        raise ValueError("a set's file needs --dataset and the other data flags"
                         if args.run else "give a RUN, or --dataset for the full training set")
    if args.run and args.n_real or args.networks and not args.run:
        raise ValueError("--n_real applies only to the full set, and --networks only to a RUN: leave out the flag that "
                         "does not apply")
    if args.run and args.no_test:
        raise ValueError("--no_test does not apply to a RUN, whose set is evaluated on the test videos: leave it out")
    check(args, networks=args.networks)
    if args.run:
        across_networks(args)
    else:
        full_data(args)


def full_data(args):
    """Evaluate the full training set; with --n_real, training and test clips keep only that many frames."""
    run = start_run(args, "full" if args.n_real is None else f"full_{args.n_real}frames")
    seed_everything(args.seed)
    train_clips, eval_clips, test = (clips and clips.reduced(args.n_real) for clips in load_splits(args))
    synset, values = RealSet(train_clips), evaluation_values(args, LR_NET)
    run.resume()
    if run.result is None:
        log_evaluation(run, eval_clips, evaluate_and_keep(run, synset, eval_clips, **values))
        run.checkpoint()
        remove_scores(run)
    finish(run, synset, eval_clips, test, **values)


def across_networks(args):
    """Evaluate a distilled set with several networks, and print a table.

    The results are added to networks.json beside the set; results that are already there, with the same settings, are
    not computed again. Nor are finished networks, whose scores are kept below scores/: after a kill, or with a larger
    --num_eval.
    """
    check_places(args)
    path, file = ((args.run / "networks.json", args.run / "distilled.pt") if args.run.is_dir()
                  else (args.run.with_suffix(".networks.json"), args.run))
    mark = None
    while mark != (mark := file_fingerprint(file)):  # again if the run, which still learns, replaces its set meanwhile
        synset, content = load_set(file)
    mark = digest([mark])
    if len(set(gather([mark]))) > 1:
        raise ValueError(f"{file} was replaced while the processes read it: run the same command again")
    test = load_data(args, "test")
    if (content["class_names"] != test.class_names
            or synset.of_class(0).shape[1:] != (test.T, 3, test.size, test.size)):
        raise ValueError(f"{args.run} and the test clips differ in classes, number of frames or size: give the data "
                         "flags of its run")
    if args.run.is_dir() and (args.run / "config.json").exists():
        made = read_config(args.run / "config.json")["settings"]
        if (made.get("validation", 0.0) == args.validation
                and made.get("list_digest", list_digest(args)) != list_digest(args)):
            print(f"warning: the list of videos is not the one of {args.run}: the set may have been learned from some "
                  "of these test videos")
        steps, total = content.get("iteration"), made.get("Iteration")
        if isinstance(steps, int) and isinstance(total, int) and steps < total:
            print(f"{args.run} is not finished: this is its set after {steps} of {total} iterations")
    clips = {"set": mark, "list": list_digest(args), "content": content_digest(args),
             "test_clips": args.test_clips, "stride": args.stride}
    rows = []
    for name in args.networks or [args.network]:
        values = evaluation_values(args, content["lr"]) | {"network": name}
        done, settings = broadcast(read_networks(path) if rank() == 0 else None), values | clips
        result = next((each for each in done.values() if each.get("settings") == settings), None)
        if result is None:
            if rank() == 0 and not path.exists():
                save_json({}, path)  # an error now, before hours of training, if nothing can be written there
            keep = path.parent / "scores" / settings_key({**settings, "num_eval": None})
            result = {"settings": settings, **evaluate(synset.to(test.device), test, **values, keep=keep)}
            if rank() == 0:  # read again: another command may have added results
                save_json(read_networks(path) | {f"{name}_{settings_key(settings)}": result}, path)
        rows.append({"network": name,
                     **{top: f"{result[top]:.1f} ± {result[top + '_std']:.1f}"
                        for top in ("top1", "top5", "video_top1")},
                     "train top1": f"{result['train_top1']:.1f}", "seconds": f"{result['seconds']:.0f}"})
    print(f"{args.run}: {synset.bytes():,} bytes, {synset.bytes_fp32():,} at fp32")
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"all figures: {path}")


def settings_key(settings):
    return digest([json.dumps(settings, sort_keys=True).encode()])[:8]


def read_networks(path):
    """Return {network and a hash of its settings: result} from a networks.json; ValueError if it is damaged."""
    try:
        done = read_json(path) if path.exists() else {}
        for result in done.values():
            for name in (*ACCURACIES, "train_top1", "seconds"):
                check_figure(result[name])
        return done
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and its networks are trained again "
                         f"({type(error).__name__}: {error})") from None


class RunParser(argparse.ArgumentParser):
    """A parser in which the settings of RUN are the defaults of the other flags."""

    TAKEN = ("dataset", *DATA_PATHS, "frame_names", "frames", "size", "stride", "train_clips", "test_clips", "seed",
             "precision", "validation", "network", "num_eval", "epoch_eval_train", "lr_net", "batch_train", "width",
             "dsa", "eval_protocol")

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        if found.run is None or not (found.run / "config.json").is_file():
            return found, rest
        flags = {flag.dest: flag for flag in self._actions}
        try:
            settings = read_config(found.run / "config.json")["settings"]
            self.set_defaults(**{name: taken(flags[name], settings[name]) for name in self.TAKEN
                                 if settings.get(name) is not None})
        except (ValueError, OSError, argparse.ArgumentTypeError) as error:
            self.error(f"{found.run / 'config.json'}: {error_line(error)}")
        return super().parse_known_args(args, namespace)  # again: now with these defaults


def taken(flag, value):
    """Return a setting, parsed as if it were given on the command line for this flag."""
    value = (flag.type or str)(str(value))
    if flag.choices and value not in flag.choices:
        raise ValueError(f"--{flag.dest} {value!r} is unknown: choose one of {', '.join(flag.choices)}")
    return value


def network_names(text):
    names = text.split(",")
    for name in names:
        if name not in networks.NETWORKS:
            raise argparse.ArgumentTypeError(f"unknown network {name!r}: choose from {', '.join(networks.NETWORKS)}")
    return names


def parser():
    parser = script_parser(__doc__, dataset="optional", prog="evaluate", kind=RunParser)
    add_evaluation_options(parser, lr_net=None)
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("run", nargs="?", type=pathlib.Path, metavar="RUN",
                       help="run folder of a finished run, whose settings become the defaults, or the file of a set "
                       "(default: the full training set)")
    group.add_argument("--networks", type=network_names, metavar="A,B",
                       help=f"networks to train on the set of RUN, from {', '.join(networks.NETWORKS)} (--network)")
    group.add_argument("--n_real", type=positive,
                       help="full set only: keep this many frames of each clip, in training and testing (all)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
