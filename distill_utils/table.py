"""Print the results of all finished runs below some folders as one table.

    python -m distill_utils.table results/ [--over_seeds] [--csv FILE]

over random: accuracy minus that of random selection at the same bytes, in points. Random selection is `coreset --method
random` with the same data, network and protocol, below these folders: mean over seeds, linear interpolation in
log(bytes). It is empty below the smallest and above the largest random run.
of full: accuracy as a share of the full training set's (sh/baseline/full.sh with the same data and network); empty
without such a run.
"""
import argparse
import json
import pathlib

import numpy as np
import pandas as pd

from distill_utils.datasets import DATASETS
from distill_utils.frames import files_below
from distill_utils.identity import default_settings
from distill_utils.processes import run_script
from distill_utils.record import FIGURES, check_figure, read_result
from distill_utils.run import read_config
from utils import atomic_write

SETTINGS = ("ipc", "spc", "dpc", "n_syn", "interpolation", "n_real", "segments", "init", "lr_img", "lr_dynamic",
            "lr_static", "lr_hal", "batch_real", "syn_steps", "expert_epochs", "method", "network", "width", "pool",
            "storage", "dynamic_frames", "dynamic_size", "static_size", "static", "select", "mirror", "dsa",
            "learn_label", "eval_protocol", "epoch_eval_train", "lr_net", "batch_train", "list_path", "frames", "size",
            "stride", "train_clips", "test_clips", "precision", "validation", "seed", "Iteration")
WORDS = ("interpolation", "init", "method", "network", "storage", "static", "select", "dsa", "eval_protocol",
         "learn_label", "list_path", "precision", "validation")  # the SETTINGS that are words or booleans


def read_results(folders):
    """Return a row for each result.json below `folders`.

    Columns: data, run, path, SETTINGS, FIGURES (percent, bytes, seconds), headline, per_class accuracies, class_names,
    the best accuracy of the intermediate evaluations (best_on_test), the confusion matrix, the chosen settings, the
    comparisons over_random and of_full with other rows, and the mark that tells rows of other lists, clips, networks
    or precisions apart.
    """
    rows = []
    paths = sorted({path.resolve() for folder in folders for path in files_below(folder, strict=False)
                    if path.name == "result.json" and (path.parent / "config.json").is_file()},
                   key=lambda path: path.stat().st_mtime)
    for path in paths:
        config, result = read_config(path.parent / "config.json"), read_result(path)
        if result is None:
            continue
        settings, folder = config["settings"], path.parent
        try:
            hash(same(config["chosen"], CLIPS + NETWORK + PROTOCOL + MARKED))  # TypeError now if the file is damaged
            rows.append({"data": folder.parent.name, "run": folder.name, "path": folder, "dataset": settings["dataset"],
                         "headline": DATASETS[settings["dataset"]].headline,
                         **{name: setting(name, settings.get(name)) for name in SETTINGS},
                         "ipc": setting("ipc", settings.get("ipc") or settings.get("spc")),  # DC's default
                         **{name: result[name] for name in FIGURES},
                         "per_class": result["per_class"], "class_names": tuple(result["class_names"]),
                         **best_on_validation(result), "best_on_test": result.get("best_on_test", {}).get("value"),
                         "confusion": result["confusion"], "chosen": config["chosen"]})
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.parent / 'config.json'} is damaged ({type(error).__name__}: {error})") from None
    if not rows:
        raise ValueError(f"no finished run below {' or '.join(map(str, folders))}: give the --save_path of some runs")
    rows = pd.DataFrame(rows, dtype=object)
    return rows.assign(over_random=over_random(rows), of_full=of_full(rows), mark=marks(rows))


def setting(name, value):
    return value if value is None or name in WORDS and isinstance(value, (str, bool)) else check_figure(value)


def best_on_validation(result):
    """Return the iteration with the best validation accuracy and the test figures of its set; {} without validation."""
    best = result.get("best_on_validation")
    if not best:
        return {}
    return {"best_iteration": best["iteration"],
            **{f"best_{name}": best["test"][name] for name in ("top1", "top1_std", "top5", "top5_std")}}


# ---------------------------------------------------------------- comparison with random selection and the full set

CLIPS = ("dataset", "list_digest", "content_digest", "frames", "size", "stride", "train_clips", "test_clips")
NETWORK = ("network", "width")
PROTOCOL = ("epoch_eval_train", "lr_net", "batch_train", "dsa", "eval_protocol")


def same(chosen, names):
    """Return the chosen settings `names` as a key to compare runs; missing ones are the default.

    A learned step size counts as the default of --lr_net.
    """
    defaults = default_settings(chosen["dataset"])
    return tuple(defaults.get(name) if chosen.get(name) is None else chosen[name] for name in names)


def over_random(rows):
    """Return each row's accuracy minus that of random selection at the same bytes, in points.

    Random selection is `coreset --method random` with the same clips, network and protocol: mean over seeds, linear
    interpolation in log(bytes). None unless random runs exist on both sides (or at the same bytes).
    """
    random, differences = {}, []
    for row in rows[rows.run.str.startswith("coreset_random_")].itertuples():
        accuracies = random.setdefault((row.data, same(row.chosen, CLIPS + NETWORK + PROTOCOL)), {})
        accuracies.setdefault(row.bytes, []).append(getattr(row, row.headline))
    for row in rows.itertuples():
        known = sorted(random.get((row.data, same(row.chosen, CLIPS + NETWORK + PROTOCOL)), {}).items())
        if known and known[0][0] <= row.bytes <= known[-1][0]:
            expected = np.interp(np.log(row.bytes), [np.log(size) for size, _ in known],
                                 [np.mean(accuracies) for _, accuracies in known])
            differences.append(getattr(row, row.headline) - expected)
        else:
            differences.append(None)
    return differences


def of_full(rows):
    """Return each row's accuracy in percent of the full training set's; None without a full run.

    The reference is the `full` runs with the same clips and network: mean over seeds; if they differ in other settings,
    the highest mean.
    """
    full = {}
    for row in rows[rows.run.str.startswith("full_") & rows.n_real.isna()].itertuples():
        alike = json.dumps({name: value for name, value in row.chosen.items() if name != "seed"}, sort_keys=True)
        full.setdefault((row.data, same(row.chosen, CLIPS + NETWORK)), {}).setdefault(alike, []).append(
            getattr(row, row.headline))
    best = {key: max(np.mean(accuracies) for accuracies in runs.values()) for key, runs in full.items()}
    references = [best.get((row.data, same(row.chosen, CLIPS + NETWORK))) for row in rows.itertuples()]
    return [100 * getattr(row, row.headline) / reference if reference else None
            for row, reference in zip(rows.itertuples(), references)]


def compared(over_random, of_full):
    """Format the two comparisons for display; empty strings where there is none."""
    return {"over random": "" if pd.isna(over_random) else f"{over_random:+.1f}",
            "of full": "" if pd.isna(of_full) else f"{of_full:.0f} %"}


# ---------------------------------------------------------------- tables

def shown(rows):
    """Format the rows of read_results for display: accuracy ± std in percent, seconds per step and in all, GB.

    Accuracies are on test clips: at the last iteration, and in extra columns at the best iteration on validation.
    """
    table = []
    for row in rows.itertuples():
        seconds, headline = row.seconds_per_iteration or 0, row.headline
        table.append({"data": row.data, "run": row.run + row.mark, "steps": row.steps, "ipc": row.ipc,
                      headline: accuracy(row, headline), **at_best(row, headline),
                      "video top1": accuracy(row, "video_top1"), "bytes": f"{row.bytes:,}",
                      "bytes at fp32": f"{row.bytes_fp32:,}", **compared(row.over_random, row.of_full),
                      "s/step": f"{seconds:.2f}", "distilled in s": f"{seconds * row.steps:.0f}",
                      "evaluated in s": f"{row.seconds:.0f}",
                      "GB": f"{row.peak_memory / 2 ** 30:.2f}"})
    return pd.DataFrame(table, dtype=object).fillna("")


def over_seeds(rows):
    """Merge rows of read_results that differ in the seed only, and format them for display.

    Accuracy is the mean ± standard deviation over seeds at the last iteration, in percent. Seconds are summed over the
    seeds. If each run has read another static memory, the latest run of a seed counts, and the table says how many
    others there are. The order is that of each group's first row. Rows of one name are told apart by their settings.
    """
    groups, table = {}, []
    for row in rows.itertuples():
        but_seed = {name: value for name, value in row.chosen.items() if name not in BUT_SEED}
        groups.setdefault((row.data, row.run.rpartition("_")[0], json.dumps(but_seed, sort_keys=True)), []).append(row)
    parts = [(data, run + group[0].mark + read, group) for (data, run, _), every in groups.items()
             for read, group in by_files(every)]
    apart = told_apart([(data, run) for data, run, _ in parts], [group[0].chosen for *_, group in parts])
    for (data, run, every), differ in zip(parts, apart):
        headline, group = every[0].headline, list({row.seed: row for row in every}.values())
        seeds = ", ".join(str(row.seed) for row in sorted(group, key=lambda row: row.seed))
        older = len(every) - len(group)
        table.append({"data": data, "run": run + differ, "steps": group[0].steps,
                      "seeds": seeds + (f" ({older} older left out)" if older else ""),
                      headline: mean_and_std(group, headline), **best_over_seeds(group, headline),
                      "bytes": f"{group[0].bytes:,}",
                      "bytes at fp32": f"{group[0].bytes_fp32:,}",
                      **compared(*(pd.Series([getattr(row, name) for row in group], dtype=float).mean()
                                   for name in ("over_random", "of_full"))),
                      "distilled in s": f"{sum((row.seconds_per_iteration or 0) * row.steps for row in group):.0f}",
                      "evaluated in s": f"{sum(row.seconds for row in group):.0f}"})
    return pd.DataFrame(table, dtype=object).fillna("")


BUT_SEED = ("seed", "digest")  # digest: of the experts and static memories that a run reads


def by_files(group):
    """Split runs of equal settings by the experts or static memory that they read; return [(label, runs)].

    They stay together if all have read the same file, or each another one: a static memory for each seed. Of copies
    of a run the latest counts.
    """
    latest, read = {(row.seed, row.chosen.get("digest")): row for row in group}, {}
    for row in latest.values():
        read.setdefault(row.chosen.get("digest"), []).append(row)
    if len(read) in (1, len(latest)):
        return [("", list(latest.values()))]
    return [(f" [experts or static memory {str(digest)[:6]}]", runs) for digest, runs in read.items()]


def told_apart(names, chosen, keys=None, most=4):
    """Return for each run the settings in which runs of its name differ, as " [name value, …]", else "".

    chosen: the settings of each run; those that a run of an older version lacks do not count. keys: the settings that
    count; None: all but those in MARKED.
    """
    labels = []
    for name, own in zip(names, chosen):
        alike = [other for each, other in zip(names, chosen) if each == name]
        counting = keys or [key for key in sorted(set().union(*alike)) if key not in MARKED + BUT_SEED]
        found = [f"{key} {own[key]}" for key in counting
                 if own.get(key) is not None and any(other.get(key, own[key]) != own[key] for other in alike)]
        labels.append(f" [{', '.join(found[:most] + ['…'] * (len(found) > most))}]" if found else "")
    return labels


def mean_and_std(group, name):
    values = pd.Series([getattr(row, name) for row in group], dtype=float)
    return f"{values.mean():.1f} ± {values.std(ddof=0):.1f}"


def best_over_seeds(group, headline):
    """Return the column of the sets that were best on validation, if all runs have one."""
    if any(pd.isna(getattr(row, "best_iteration", None)) for row in group):
        return {}
    return {f"{headline} at best on validation": mean_and_std(group, f"best_{headline}")}


MARKED = ("list_digest", "content_digest", "frame_names", "frames", "size", "stride", "train_clips", "test_clips",
          "validation", "mirror", "network", "width", "dsa", "precision")


def marks(rows):
    """Return a label for each row: the MARKED settings in which rows of its data set differ, and another protocol."""
    settings = pd.DataFrame([same(chosen, MARKED) for chosen in rows.chosen], rows.index, MARKED, dtype=object)
    differ = settings.groupby(rows.data).transform(lambda column: column.nunique(dropna=False)) > 1
    # --validation changes the list's digest: count lists among the rows of equal validation.
    alike = [rows.data, settings.validation.map(str)]
    lists = settings.list_digest.groupby(alike).transform("nunique") > 1
    differ["list_digest"] = lists.groupby(rows.data).transform("any")
    differ["content_digest"] = settings.content_digest.groupby([*alike, settings.list_digest]).transform("nunique") > 1
    labels = []
    for (number, row), chosen in zip(settings.iterrows(), rows.chosen):
        found = [label(name, row[name], rows.list_path[number]) for name in MARKED
                 if differ.loc[number, name] and row[name] is not None]
        found += ["frepo protocol"] if chosen.get("eval_protocol") == "frepo" else []
        labels.append(f" [{', '.join(found)}]" if found else "")
    return labels


def label(name, value, list_path):
    if name == "list_digest":
        return f"list {f'{pathlib.Path(list_path).name} ' if list_path else ''}{value[:6]}"
    if name == "content_digest":
        return f"content {value[:6]}"
    return f"{name} {value}"


def at_best(row, headline):
    if pd.isna(getattr(row, "best_iteration", None)):
        return {}
    return {f"{headline} at best on validation": f"{accuracy(row, f'best_{headline}')} (step {row.best_iteration})"}


def accuracy(row, name):
    return f"{getattr(row, name):.1f} ± {getattr(row, name + '_std'):.1f}"


def main(args):
    rows = read_results(args.folders)
    print((over_seeds if args.over_seeds else shown)(rows).to_string(index=False))
    print("\nEach run folder holds the distilled set (distilled.pt) and pictures of it (distilled.png, distilled.gif).")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.csv, "w") as file:
            others = pd.DataFrame(list(rows.chosen), rows.index)
            rows = rows.join(others[others.columns.difference(rows.columns)])
            rows.drop(columns=["per_class", "class_names", "confusion", "chosen", "mark"]).to_csv(file, index=False)
        print(f"all figures: {args.csv}")


def parser():
    parser = argparse.ArgumentParser(prog="table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=pathlib.Path, nargs="+", metavar="FOLDER",
                        help="folder that contains run folders, such as the --save_path of runs")
    parser.add_argument("--over_seeds", action="store_true",
                        help="merge runs that differ in --seed only: show mean ± standard deviation over seeds")
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE",
                        help="also write the settings and unrounded figures of every run to FILE")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
