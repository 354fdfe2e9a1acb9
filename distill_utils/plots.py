"""The plots of a report: accuracy against bytes, over iterations and per class, and confusion matrices."""
import json
import math
import os

os.environ["MPLBACKEND"] = "agg"  # no display needed; a notebook's backend may be missing or unknown
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, LogLocator

from distill_utils.record import check_figure
from distill_utils.table import accuracy

matplotlib.rcdefaults()  # ignore the user's matplotlibrc, which may require LaTeX
matplotlib.rcParams["text.parse_math"] = False  # show a dollar sign in a class name as such

MOST_IN_A_PLOT = 10  # methods or runs
MOST_MATRICES = 6
MOST_BARS = 20  # classes, above which they are shown as a heat map
HATCHES = ("", "//", "..", "xx")  # bars of one method with other numbers of videos
MARKERS = "osD^vP*"  # one for each ten methods, which have ten colours


def label(row):
    return row.method if pd.isna(row.ipc) else f"{row.method}, IPC {int(row.ipc)}"


def plot_frontier(rows):
    """Plot accuracy against stored bytes; a line joins the frontier; full data is the upper limit."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    headline = rows.headline.iloc[0]
    for row in rows[rows.run.str.startswith("full_") & rows.n_real.isna()].itertuples():
        axes.axhline(getattr(row, headline), color="0.3", ls="--", lw=1, label=row.method)
    rows = rows[~rows.method.str.startswith("full")]
    if rows.empty:
        plt.close(figure)
        return None
    for method, group in rows.groupby("method", sort=False):
        number = int(group.number.iloc[0])
        axes.errorbar(group.bytes.astype(float), group[headline].astype(float), group[f"{headline}_std"].astype(float),
                      fmt=MARKERS[number // 10 % len(MARKERS)], ms=6, capsize=2, color=f"C{number % 10}", label=method)
    for mark, group in rows.groupby("mark"):
        frontier = frontier_of(group)
        axes.step(frontier.bytes.astype(float), frontier[headline].astype(float), where="post", color="0.6", lw=1,
                  zorder=0, label=f"frontier{mark}")
    axes.set(xscale="log", xlabel="size of the set", ylabel=f"{headline}, %")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter(EngFormatter("B"))  # the default writes powers as LaTeX
    axes.tick_params("x", which="both", rotation=30)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    return figure


def frontier_of(rows):
    """Return the runs that are more accurate than every run of the same or fewer bytes, sorted by bytes."""
    headline = rows.headline.iloc[0]
    rows = rows.sort_values(["bytes", headline], ascending=[True, False], kind="stable")
    before = rows[headline].astype(float).cummax().shift(fill_value=-math.inf)
    return rows[rows[headline].astype(float) > before]


def plot_iterations(rows):
    """Plot accuracy over iterations, of runs with intermediate evaluations; dashed if these were on validation."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    headline = rows.headline.iloc[0]
    for row in rows.itertuples():
        split, points = read_points(row.path / "metrics.jsonl", headline)
        held_out = split == "validation"
        axes.errorbar(*zip(*points), marker="o", ms=4, capsize=2, ls="--" if held_out else "-",
                      label=label(row) + (" (on validation)" if held_out else ""))
    axes.set(xlabel="iteration", ylabel=f"{headline}, %")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    return figure


def read_points(path, headline):
    """Return the split of the evaluations in a metrics.jsonl, and (iteration, accuracy, std) of each."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [each for each in lines if headline in each]
        return (lines[0].get("split") if lines else None,
                [tuple(check_figure(each[name]) for name in ("iteration", headline, f"{headline}_std"))
                 for each in lines])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def plot_classes(rows, classes):
    """Plot accuracy per class of the rows of `means_of_classes`: bars, or a heat map of many classes.

    Classes are sorted by their dynamics score if known.
    """
    names = rows.class_names.iloc[0]
    order = list(range(len(names))) if classes is None else [names.index(name) for name in classes.index]
    many = len(names) > MOST_BARS
    size = (2 + 0.16 * len(names), 3 + 0.25 * len(rows)) if many else (max(9, 0.12 * len(names) * len(rows)), 5.5)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    (draw_heat_map if many else draw_bars)(axes, rows, np.array(rows.per_class.tolist(), dtype=float)[:, order])
    ticks = [names[number] for number in order]
    if classes is not None:
        ticks = [f"{name} ({classes.dynamics[name]:+.0f})" for name in classes.index]
    axes.set_xticks(range(len(order)), ticks, rotation=90 if many else 60 if len(names) > 8 else 20,
                    ha="center" if many else "right", fontsize=7 if many else None)
    for tick, name in zip(axes.get_xticklabels(), [] if classes is None else classes.index):
        tick.set_color("#b40" if classes.dynamic[name] else "0.2")
    return figure


def means_of_classes(rows):
    """Return a row for each method and number of videos, full data and then the most accurate: means over its runs."""
    headline, shown = rows.headline.iloc[0], []
    for _, group in rows.groupby(["method", "ipc"], dropna=False, sort=False):
        shown.append(group.iloc[-1].to_dict() | {
            "per_class": np.array(group.per_class.tolist(), dtype=float).mean(0).tolist(),
            headline: group[headline].astype(float).mean()})
    shown = pd.DataFrame(shown, dtype=object)
    full = shown.method.str.startswith("full")
    best = (shown[headline].astype(float) + 1000 * full).sort_values(ascending=False, kind="stable")
    return shown.loc[sorted(best.index[:MOST_IN_A_PLOT])]


def draw_bars(axes, rows, accuracies):
    width = 0.85 / len(rows)
    for place, (row, values) in enumerate(zip(rows.itertuples(), accuracies)):
        axes.bar(np.arange(len(values)) - 0.425 + (place + 0.5) * width, values, width, label=label(row),
                 color="0.3" if pd.isna(row.number) else f"C{int(row.number) % 10}",  # as in plot_frontier
                 hatch=HATCHES[hatch_of(rows, place) % len(HATCHES)], edgecolor="white")
    axes.set(ylabel="top-1, %", xlim=(-0.6, accuracies.shape[1] - 0.4))
    axes.grid(axis="y", alpha=0.3)
    axes.figure.legend(fontsize=9, loc="outside lower center", ncols=2)


def draw_heat_map(axes, rows, accuracies):
    image = axes.imshow(accuracies, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(rows)), [label(row) for row in rows.itertuples()], fontsize=8)
    axes.figure.colorbar(image, ax=axes, label="top-1, %", pad=0.01)


def hatch_of(rows, place):
    """Return the number of a bar's hatch: bars of one method differ, and so do methods of the same colour."""
    row = rows.iloc[place]
    return sum(rows.method[:place] == row.method) + (0 if pd.isna(row.number) else int(row.number) // 10)


def plot_confusion(rows):
    """Plot the confusion matrices of the most accurate runs, in percent of each true class."""
    known = rows[rows.confusion.notna()]
    if known.empty:
        return None
    known = known.sort_values(known.headline.iloc[0], ascending=False).head(MOST_MATRICES)
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
