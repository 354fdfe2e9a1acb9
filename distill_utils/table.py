"""The results of all finished runs below some folders as one table.

    python -m distill_utils.table results/ [--over_seeds] [--csv FILE]
"""
import argparse
import json
import pathlib

import pandas as pd

from distill_utils.datasets import DATASETS
from distill_utils.record import FIGURES, check_figure, read_result
from utils import atomic_write, read_config, run_script

SETTINGS = ("ipc", "spc", "dpc", "n_syn", "interpolation", "n_real", "segments", "init", "lr_img", "lr_dynamic", "method", "network", "width", "pool", "storage", "dynamic_frames", "dynamic_size", "static_size", "static", "select", "validation", "seed", "Iteration")
WORDS = ("interpolation", "init", "method", "network", "storage", "static", "select", "validation")  # of these: settings that may be words


def read_results(folders):
    """A row for each result.json below `folders`: data, run, path, SETTINGS, FIGURES (percent, bytes, seconds), headline; per_class accuracies with class_names,
    the confusion matrix, and the chosen settings."""
    rows = []
    paths = sorted({path for folder in folders for path in folder.rglob("result.json")}, key=lambda path: path.stat().st_mtime)
    for path in paths:
        config, result = read_config(path.parent / "config.json"), read_result(path)
        if result is None:
            continue
        settings, folder = config["settings"], path.parent.resolve()
        try:
            rows.append({"data": folder.parent.name, "run": folder.name, "path": folder, "dataset": settings["dataset"],
                         "headline": DATASETS[settings["dataset"]].headline, **{name: setting(name, settings.get(name)) for name in SETTINGS},
                         **{name: result[name] for name in FIGURES}, "per_class": result["per_class"], "class_names": tuple(result["class_names"]),
                         **best_on_validation(result), "confusion": result["confusion"], "chosen": config["chosen"]})
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path.parent / 'config.json'} is damaged ({type(error).__name__}: {error})") from None
    if not rows:
        raise ValueError(f"no finished run below {' or '.join(map(str, folders))}")
    return pd.DataFrame(rows, dtype=object)


def setting(name, value):
    return value if value is None or name in WORDS and isinstance(value, str) else check_figure(value)


def best_on_validation(result):
    """Of a run with validation clips: the iteration that was best on them, and the test figures of that iteration's set."""
    best = result.get("best_on_validation")
    if not best:
        return {}
    return {"best_iteration": best["iteration"], **{f"best_{name}": best["test"][name] for name in ("top1", "top1_std", "top5", "top5_std")}}


def shown(rows):
    """The rows of read_results for a reader: accuracy ± std in percent, seconds per step and of the steps, GB. Accuracies are of test clips: at the
    last iteration, and in columns of their own at the one that was best on validation."""
    table = []
    for row in rows.itertuples():
        seconds, headline = row.seconds_per_iteration or 0, row.headline
        table.append({"data": row.data, "run": row.run, "steps": row.steps, "ipc": row.ipc,
                      headline: accuracy(row, headline), **at_best(row, headline), "video top1": accuracy(row, "video_top1"), "bytes": f"{row.bytes:,}", "bytes at fp32": f"{row.bytes_fp32:,}",
                      "s/step": f"{seconds:.2f}", "distilled in s": f"{seconds * row.steps:.0f}", "evaluated in s": f"{row.seconds:.0f}",
                      "GB": f"{row.peak_memory / 2 ** 30:.2f}"})
    return pd.DataFrame(table, dtype=object).fillna("")


def over_seeds(rows):
    """The rows of read_results with those as one that differ in nothing but the seed, in the order of the first of each: the mean over seeds of the
    accuracy at the last iteration ± its standard deviation over seeds, percent, with the seeds, bytes, and seconds of all seeds together. Of several
    runs of one seed, which differ in the static memory or the experts that they read, the latest counts."""
    table, last = [], {}
    for row in rows.itertuples():
        same = {name: value for name, value in row.chosen.items() if name not in ("seed", "digest")}  # digest: of experts and static memories
        last.setdefault((row.data, row.run.rpartition("_")[0], json.dumps(same, sort_keys=True)), []).append(row)
    for (data, run, _), group in last.items():
        headline, group = group[0].headline, list({row.seed: row for row in group}.values())
        top1 = pd.Series([getattr(row, headline) for row in group], dtype=float)
        table.append({"data": data, "run": run, "steps": group[0].steps, "seeds": ", ".join(str(row.seed) for row in group),
                      headline: f"{top1.mean():.1f} ± {top1.std(ddof=0):.1f}", "bytes": f"{group[0].bytes:,}", "bytes at fp32": f"{group[0].bytes_fp32:,}",
                      "distilled in s": f"{sum((row.seconds_per_iteration or 0) * row.steps for row in group):.0f}",
                      "evaluated in s": f"{sum(row.seconds for row in group):.0f}"})
    return pd.DataFrame(table, dtype=object).fillna("")


def at_best(row, headline):
    if pd.isna(getattr(row, "best_iteration", None)):
        return {}
    return {f"{headline} at best on validation": f"{accuracy(row, f'best_{headline}')} (step {row.best_iteration})"}


def accuracy(row, name):
    return f"{getattr(row, name):.1f} ± {getattr(row, name + '_std'):.1f}"


def main(args):
    rows = read_results(args.folders)
    print((over_seeds if args.over_seeds else shown)(rows).to_string(index=False))
    print("\nEach run's folder holds distilled.png and distilled.gif, its pictures, and distilled.pt, the set.")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.csv, "w") as file:
            rows.drop(columns=["per_class", "class_names", "confusion", "chosen"]).to_csv(file, index=False)
        print(f"all figures: {args.csv}")


def parser():
    parser = argparse.ArgumentParser(prog="table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=pathlib.Path, nargs="+", metavar="FOLDER", help="of run folders, as given by --save_path")
    parser.add_argument("--over_seeds", action="store_true", help="runs that differ in nothing but --seed as one row, their mean ± their standard deviation")
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write settings and figures of every run there, unrounded")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
