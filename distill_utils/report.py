"""Write one web page about finished runs: tables, plots, and the distilled videos side by side, animated.

    python -m distill_utils.report RUNS… [--out report/]

RUNS are run folders, or folders that contain some. report/index.html is self-contained and opens from disk; the plots
are also beside it as PNG files.
"""
import argparse
import base64
import html
import io
import json
import math
import os
import pathlib
import time

os.environ["MPLBACKEND"] = "agg"  # no display needed; a notebook's backend may be missing or unknown
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from distill_utils.dynamics import class_dynamics
from distill_utils.export import gif
from distill_utils.options import positive
from distill_utils.pictures import memories
from distill_utils.processes import run_script
from distill_utils.record import check_figure
from distill_utils.run import git_commit
from distill_utils.synset import load_set
from distill_utils.table import accuracy, compared, mark, read_results
from utils import TEXT, atomic_write

matplotlib.rcdefaults()  # ignore the user's matplotlibrc, which may require LaTeX
matplotlib.rcParams["text.parse_math"] = False  # show a dollar sign in a class name as such

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222;
  background: #fff; }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd } .note { color: #666 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left } th { background: #f6f6f6; position: sticky; top: 0 }
.best td { font-weight: 600 }
.videos td, .videos th { padding: 2px 3px; white-space: normal; max-width: 90px; text-align: center; border: 0;
  font-size: 12px }
.videos td:first-child { text-align: right; font-size: 13px }
.videos img { width: 84px; image-rendering: pixelated; display: block } .dynamic { color: #b40 }
.plot { max-width: 100%; } .scroll { overflow-x: auto }
"""


def main(args):
    every = read_results(args.runs)
    every["method"] = [method_name(row) for row in every.itertuples()]
    plots = {}
    parts = [f"<h1>Distilled video data sets</h1><p class=note>{len(every)} runs, {time.strftime('%Y-%m-%d %H:%M')}, "
             f"code {html.escape(git_commit() or 'unknown')}</p>"]
    groups, titles = every.groupby(["data", "class_names"]), set()
    for (data, names), rows in groups:
        if data in titles:  # the same name with other classes
            data += f", {len(names)} classes, {sum(title.startswith(data) for title in titles) + 1}"
        titles.add(data)
        rows = rows.sort_values(["ipc", "method"], kind="stable", na_position="last")
        parts += [f"<h2>{html.escape(data)}</h2>", *section(data, rows, plots, args.classes)]
    page = (f"<!doctype html><html lang=en><meta charset=utf-8><title>Distilled video data sets</title>"
            f"<style>{STYLE}</style>{''.join(parts)}</html>")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in (plots | {"index.html": page.encode(**TEXT)}).items():
        with atomic_write(args.out / name) as file:
            file.write(content)
    print(f"{len(every)} runs: {args.out / 'index.html'}, {len(page) / 1e6:.1f} MB")


def section(data, rows, plots, most_classes):
    """Yield the page's parts about the runs of one data set; add {file name: PNG} to `plots`."""
    classes = class_dynamics(rows)
    figures = {"frontier": plot_frontier(rows), "iterations": plot_iterations(rows),
               "classes": plot_classes(rows, classes), "confusion": plot_confusion(rows)}
    yield table_of(rows, classes)
    titles = {"frontier": "Accuracy against bytes", "iterations": "Accuracy over iterations",
              "classes": "Accuracy of each class" + (
                  ": the dynamic half marked, full clips against one frame" if classes is not None else ""),
              "confusion": "Confusion: rows are the true classes"}
    for name, figure in figures.items():
        if figure is not None:
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
            plots[f"{data}_{name}.png"] = file.getvalue()
            plt.close(figure)
            yield f"<h3>{titles[name]}</h3><img class=plot alt='{titles[name]}' src='{inline(file.getvalue(), 'png')}'>"
    yield from videos_of(rows, classes, most_classes)


def method_name(row):
    """Return a run's name in tables: its method, and what distinguishes it from other runs of the method."""
    kind = (row.run.split("_ipc")[0].rsplit("_", 1)[0] if row.run.startswith(("full", "DC"))
            else row.run.split("_ipc")[0])
    names = {"DM": "random" if row.Iteration == 0 and row.init == "real" else "DM", "s2d_DM": "static-dynamic DM",
             "s2d_MTT": "static-dynamic MTT", "s2d_FRePo": "static-dynamic FRePo", "full": "full data",
             "full_1frames": "full data, one frame", "coreset_random": "random", "coreset_herding": "herding",
             "coreset_k-center": "k-center"}
    name = f"static memory, {row.spc} frames" if kind.startswith("DC") else names.get(kind, kind)
    study = [f"{flag} {getattr(row, flag)}" for flag in ("n_syn", "n_real")
             if not pd.isna(getattr(row, flag)) and not kind.startswith("full")]
    study += [f"segments {row.segments}"] if row.segments and row.segments > 1 else []
    study += [row.interpolation] if row.interpolation == "parametric" or study and row.interpolation == "linear" else []
    study += [row.storage] if row.storage in ("fp16", "uint8", "uint4") else []
    return ", ".join([name, *study]) + mark(row)


def label(row):
    return row.method if pd.isna(row.ipc) else f"{row.method}, IPC {int(row.ipc)}"


# ---------------------------------------------------------------- tables and plots

def table_of(rows, classes):
    """Return the table of all runs; bold: the best run for each number of videos per class, except full data."""
    groups = None if classes is None else {
        True: sorted(classes.index[classes.dynamic]), False: sorted(classes.index[~classes.dynamic])}
    best = {ipc: group[group.headline.iloc[0]].max()
            for ipc, group in rows[~rows.method.str.startswith("full")].groupby("ipc", dropna=False)}
    head = ["method", "IPC", rows.headline.iloc[0], "video top-1", "top-5", "bytes", "bytes at fp32", "over random",
            "of full", "steps", "s / step", "distilling, s", "evaluating, s", "GB"]
    head += ["dynamic classes", "static classes"] if groups else []
    lines = []
    for row in rows.itertuples():
        seconds = row.seconds_per_iteration or 0
        cells = [row.method, "" if pd.isna(row.ipc) else int(row.ipc), accuracy(row, row.headline),
                 accuracy(row, "video_top1"), accuracy(row, "top5"),
                 f"{row.bytes:,}", f"{row.bytes_fp32:,}", *compared(row.over_random, row.of_full).values(),
                 row.steps, f"{seconds:.2f}", f"{seconds * row.steps:.0f}", f"{row.seconds:.0f}",
                 f"{row.peak_memory / 2 ** 30:.2f}"]
        if groups:
            per_class = pd.Series(row.per_class, index=row.class_names, dtype=float)
            cells += [f"{per_class[names].mean():.1f}" for names in groups.values()]
        bold = (" class=best" if getattr(row, row.headline) == best.get(row.ipc) and not row.method.startswith("full")
                else "")
        lines.append(f"<tr{bold}>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return (f"<p class=note>Percent, mean ± std over networks; bold: the most accurate of its IPC. Over random: points "
            "above random real clips of the same bytes, "
            "interpolated in log(bytes); of full: the share of the full set's accuracy.</p>"
            "<div class=scroll><table><tr>"
            f"{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(lines)}</table></div>")


def plot_frontier(rows):
    """Plot accuracy against stored bytes; a line joins the frontier; full data is the upper limit."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    headline = rows.headline.iloc[0]
    for row in rows[rows.method == "full data"].itertuples():
        axes.axhline(getattr(row, headline), color="0.3", ls="--", lw=1, label="full data")
    rows = rows[~rows.method.str.startswith("full")]
    if rows.empty:
        plt.close(figure)
        return None
    for (method, group), colour in zip(rows.groupby("method", sort=False),
                                       np.tile(plt.get_cmap("tab20").colors, (20, 1))):
        axes.errorbar(group.bytes.astype(float), group[headline].astype(float), group[f"{headline}_std"].astype(float),
                      fmt="o", ms=6, capsize=2, color=colour, label=method)
    frontier = frontier_of(rows)
    axes.step(frontier.bytes.astype(float), frontier[headline].astype(float), where="post", color="0.6", lw=1, zorder=0,
              label="frontier")
    axes.set(xscale="log", xlabel="bytes of the set", ylabel=f"{headline}, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def frontier_of(rows):
    """Return the runs that are more accurate than every run of the same or fewer bytes, sorted by bytes."""
    headline = rows.headline.iloc[0]
    rows = rows.sort_values(["bytes", headline], ascending=[True, False], kind="stable")
    before = rows[headline].astype(float).cummax().shift(fill_value=-math.inf)
    return rows[rows[headline].astype(float) > before]


def plot_iterations(rows):
    """Plot accuracy over iterations, for runs with intermediate evaluations."""
    figure, axes = plt.subplots(figsize=(9, 5))
    headline = rows.headline.iloc[0]
    for row in rows.itertuples():
        points = read_points(row.path / "metrics.jsonl", headline)
        if len(points) > 1:
            axes.errorbar(*zip(*points), marker="o", ms=4, capsize=2, label=label(row))
    if not axes.has_data():
        plt.close(figure)
        return None
    axes.set(xlabel="iteration", ylabel=f"{headline}, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def read_points(path, headline):
    """Return (iteration, accuracy, std) of each evaluation in a metrics.jsonl."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [tuple(check_figure(each[name]) for name in ("iteration", headline, f"{headline}_std"))
                for each in lines if headline in each]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def plot_classes(rows, classes, most=12):
    """Plot bars of accuracy per class, for at most 12 runs; classes are sorted by their dynamics score if known."""
    names = rows.class_names.iloc[0]
    order = list(range(len(names))) if classes is None else [names.index(name) for name in classes.index]
    shown = rows.drop_duplicates(["method", "ipc"], keep="last").tail(most)
    figure, axes = plt.subplots(figsize=(max(8, 0.12 * len(names) * len(shown)), 4.5))
    width = 0.85 / len(shown)
    for place, row in enumerate(shown.itertuples()):
        values = np.array(row.per_class, dtype=float)[order]
        axes.bar(np.arange(len(order)) - 0.425 + (place + 0.5) * width, values, width, label=label(row),
                 color=plt.get_cmap("tab20")(place % 20))
    ticks = [names[number] for number in order]
    if classes is not None:
        ticks = [f"{name} ({classes.dynamics[name]:+.0f})" for name in classes.index]
    axes.set_xticks(range(len(order)), ticks, rotation=60 if len(names) > 8 else 20, ha="right")
    for tick, name in zip(axes.get_xticklabels(), [] if classes is None else classes.index):
        tick.set_color("#b40" if classes.dynamic[name] else "0.2")
    axes.set(ylabel="top-1, %", xlim=(-0.6, len(order) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def plot_confusion(rows, most=6):
    """Plot the confusion matrices of the most accurate runs, in percent of each true class."""
    known = rows[rows.confusion.notna()]
    if known.empty:
        return None
    known = known.sort_values(known.headline.iloc[0], ascending=False).head(most)
    columns = min(3, len(known))
    lines = math.ceil(len(known) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.2 * columns, 4 * lines), squeeze=False, layout="constrained")
    for axes in grid.flat[len(known):]:
        axes.axis("off")
    for axes, row in zip(grid.flat, known.itertuples()):
        counts = np.array(row.confusion, dtype=float)
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, vmin=0, vmax=100, cmap="Blues")
        axes.set_title(f"{label(row)}: {accuracy(row, row.headline)}", fontsize=9)
        if len(shares) <= 20:
            axes.set_xticks(range(len(shares)), row.class_names, rotation=60, ha="right", fontsize=7)
            axes.set_yticks(range(len(shares)), row.class_names, fontsize=7)
            for (true, taken), share in np.ndenumerate(shares.round()):
                axes.text(taken, true, f"{share:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if share > 50 else "black")
    return figure


# ---------------------------------------------------------------- videos

@torch.no_grad()
def videos_of(rows, classes, most_classes):
    """Yield the table of videos: each class's first video of every run, and both memories of a static-dynamic set."""
    columns = []
    for row in rows.itertuples():
        if (row.path / "distilled.pt").exists():
            synset, _ = load_set(row.path)
            if synset.K != len(row.class_names):
                raise ValueError(f"{row.path / 'distilled.pt'} has other classes than the result.json beside it: "
                                 "delete the run's folder")
            shown = memories(synset)
            first, *others = shown
            columns += [(label(row) if first == "video" else f"{label(row)}: {first}", shown[first]),
                        *((title, shown[title]) for title in others)]
    if not columns:
        return
    names = rows.class_names.iloc[0]
    shown = [name for name in (names if classes is None else classes.index)][:most_classes]
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _ in columns)
    lines = []
    for name in shown:
        kind = " class=dynamic" if classes is not None and classes.dynamic[name] else ""
        cells = "".join(f"<td><img alt='' src='{moving(videos[names.index(name)])}'></td>" for _, videos in columns)
        lines.append(f"<tr><td{kind}>{html.escape(name)}</td>{cells}</tr>")
    more = f" {len(names) - len(shown)} more classes are not shown." if len(names) > len(shown) else ""
    yield (f"<h3>Distilled videos</h3><p class=note>The first video of each class.{more}</p>"
           f"<div class=scroll><table class=videos><tr><th></th>{head}</tr>{''.join(lines)}</table></div>")


def moving(video):
    """Return uint8 (T, 3, H, W) as the source of an animated image element."""
    pixels = video.permute(0, 2, 3, 1).numpy()
    return inline(gif(pixels, fps=8), "gif")


def inline(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def parser():
    parser = argparse.ArgumentParser(prog="report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", metavar="RUNS",
                        help="run folders, or folders that contain some")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("report"), metavar="DIR",
                        help="output folder of the page (default: %(default)s)")
    parser.add_argument("--classes", type=positive, default=12, metavar="N",
                        help="number of classes whose videos are shown (default: %(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
