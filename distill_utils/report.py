"""Write one web page about finished runs: tables, plots, and the distilled videos side by side, animated.

    python -m distill_utils.report RUNS… [--out report/]

RUNS are run folders, or folders that contain some. report/index.html is self-contained and opens from disk; the plots
are also beside it as PNG files.
"""
import argparse
import base64
import html
import io
import pathlib
import time

import pandas as pd
from PIL import Image

from distill_utils.dynamics import class_dynamics
from distill_utils.options import positive
from distill_utils.pictures import memories, side_by_side
from distill_utils.plots import (
    MOST_IN_A_PLOT,
    label,
    means_of_classes,
    plot_classes,
    plot_confusion,
    plot_frontier,
    plot_iterations,
    plt,
    read_points,
)
from distill_utils.processes import run_script
from distill_utils.run import git_commit
from distill_utils.synset import load_set
from distill_utils.table import PROTOCOL, accuracy, compared, read_results, told_apart
from utils import TEXT, atomic_write

WEBP_SIDE = 16383  # pixels, the format's limit
STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --dim: #666; --line: #ddd; --head: #f4f4f4; --mark: #b40 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #181818; --dim: #999; --line: #444; --head: #262626; --mark: #f96 }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 1160px; padding: 0 1em; color: var(--text);
  background: var(--page); overflow-wrap: anywhere }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid var(--line) } .note { color: var(--dim) }
table { border-collapse: collapse; overflow-wrap: normal; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .2em .6em; text-align: right; border-bottom: 1px solid var(--line) } td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9em } th { background: var(--head) }
.best td { font-weight: 600 } .scroll { overflow-x: auto } .plot { max-width: 100%; background: #fff }
.wide { background: #fff }
summary { cursor: pointer; margin: .6em 0; color: var(--dim) } .dynamic { color: var(--mark) }
.runs { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; font-size: 12px; max-width: 100% }
figcaption { max-width: 16em; min-height: 5em }
.runs img { display: block; max-width: 100%; image-rendering: pixelated }
@media (max-width: 600px) { body { font-size: 14px; padding: 0 .5em } table { font-size: 12px } }
"""


def main(args):
    every = read_results(args.runs)
    every["method"] = [method_name(row) for row in every.itertuples()]
    every["method"] += told_apart(list(zip(every.data, every.method, every.ipc.map(str))), every.chosen.tolist(),
                                  keys=("init", *PROTOCOL))
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
    page = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            "<title>Distilled video data sets</title>"
            f"<style>{STYLE}</style>{''.join(parts)}</html>")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in (plots | {"index.html": page.encode(**TEXT)}).items():
        with atomic_write(args.out / name) as file:
            file.write(content)
    print(f"{len(every)} runs: {args.out / 'index.html'}, {len(page) / 1e6:.1f} MB")


def section(data, rows, plots, most_classes):
    """Yield the page's parts about the runs of one data set; add {file name: PNG} to `plots`."""
    classes = class_dynamics(rows)

    def plot(name, title, figure, kind="plot"):
        if figure is None:
            return ""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
        plots[f"{data}_{name}.png"] = file.getvalue()
        plt.close(figure)  # plt is from plots, which sets the backend before it imports matplotlib
        picture = f"<img class={kind} alt='{title}' src='{inline(file.getvalue(), 'png')}'>"
        return f"<h3>{title}</h3>" + (f"<div class=scroll>{picture}</div>" if kind == "wide" else picture)

    rows = numbered(rows)
    first, others = most_accurate(rows)
    yield plot("frontier", "Accuracy against bytes", plot_frontier(first))
    if not others.empty:
        more = plot("frontier_more", "Accuracy against bytes", plot_frontier(others))
        yield folded("Accuracy against bytes: more methods", more)
    yield table_of(rows, classes)
    followed = rows[[len(read_points(row.path / "metrics.jsonl", row.headline)[1]) > 1 for row in rows.itertuples()]]
    followed = followed.sort_values(rows.headline.iloc[0], ascending=False, kind="stable")
    more = []
    for start in range(0, len(followed), MOST_IN_A_PLOT):
        figure = plot_iterations(followed.iloc[start:start + MOST_IN_A_PLOT])
        number = f"_{start // MOST_IN_A_PLOT + 1}" if start else ""
        more.append(plot(f"iterations{number}", "Accuracy over iterations", figure))
    yield "".join(more[:1])
    yield folded("Accuracy over iterations: less accurate runs", "".join(more[1:]))
    shown, count = means_of_classes(rows), len(rows.drop_duplicates(["method", "ipc"]))
    title = "Accuracy of each class" + (f", of the {len(shown)} most accurate of {count}" if len(shown) < count else "")
    marked = ": the dynamic half is marked; in parentheses full clips against one frame" if classes is not None else ""
    yield plot("classes", f"{title}{marked}", plot_classes(shown, classes), "wide")
    yield plot("confusion", "Confusion: rows are the true classes", plot_confusion(rows))
    yield from videos_of(rows, classes, most_classes)


def numbered(rows):
    """Number the methods but full data: a method has the same colour in the plots of bytes and of classes."""
    learned = ~rows.method.str.startswith("full")
    return rows.assign(number=pd.Series(pd.factorize(rows.method[learned])[0], rows.index[learned]))


def most_accurate(rows):
    """Return the rows of the ten most accurate methods, full data first, and the other rows."""
    full = rows.method.str.startswith("full")
    best = rows.assign(score=rows[rows.headline.iloc[0]].astype(float) + 1000 * full).groupby("method").score.max()
    first = rows.method.isin(best.nlargest(MOST_IN_A_PLOT).index)
    return rows[first], rows[~first]


def folded(title, content):
    """Return html that shows its content after a click."""
    return content and f"<details><summary>{title}</summary>{content}</details>"


def method_name(row):
    """Return a run's name in tables: its method, and what distinguishes it from other runs of the method."""
    kind = (row.run.split("_ipc")[0].rsplit("_", 1)[0] if row.run.startswith(("full", "DC"))
            else row.run.split("_ipc")[0])
    select = row.select if isinstance(row.select, str) else "random"
    names = {"DM": select if row.Iteration == 0 and row.init == "real" else "DM", "s2d_DM": "static-dynamic DM",
             "s2d_MTT": "static-dynamic MTT", "s2d_FRePo": "static-dynamic FRePo", "full": "full data",
             "full_1frames": "full data, one frame", "coreset_random": "random", "coreset_herding": "herding",
             "coreset_k-center": "k-center"}
    name = f"static memory, {row.spc} frames" if kind.startswith("DC") else names.get(kind, kind)
    if row.Iteration == 0 and name != select:
        name = f"{'static-dynamic' if kind.startswith('s2d') else name}, not learned"
    study = [f"select {select}"] if select not in ("random", name) else []
    study += [f"{flag} {getattr(row, flag)}" for flag in ("n_syn", "n_real")
              if not pd.isna(getattr(row, flag)) and not kind.startswith("full")]
    study += [f"segments {row.segments}"] if row.segments and row.segments > 1 else []
    study += [row.interpolation] if row.interpolation == "parametric" or study and row.interpolation == "linear" else []
    study += [row.storage] if row.storage in ("fp16", "uint8", "uint4") else []
    return ", ".join([name, *study]) + row.mark


# ---------------------------------------------------------------- tables

def table_of(rows, classes):
    """Return the table of all runs, and a folded one of their costs.

    Bold: the best run for each number of videos per class, except full data.
    """
    groups = None if classes is None else {
        kind: sorted(classes.dropna().index[classes.dropna().dynamic == kind]) for kind in (True, False)}
    best = {ipc: group[group.headline.iloc[0]].max()
            for ipc, group in rows[~rows.method.str.startswith("full")].groupby(["ipc", "mark"], dropna=False)}
    head = ["method", "IPC", rows.headline.iloc[0], "video top-1", "bytes", "over random", "of full"]
    head += ["dynamic classes", "static classes"] if groups else []
    lines, costs = [], []
    for row in rows.itertuples():
        ipc = "" if pd.isna(row.ipc) else int(row.ipc)
        cells = [row.method, ipc, accuracy(row, row.headline), accuracy(row, "video_top1"), f"{row.bytes:,}",
                 *compared(row.over_random, row.of_full).values()]
        if groups:
            per_class = pd.Series(row.per_class, index=row.class_names, dtype=float)
            cells += [f"{per_class[names].mean():.1f}" for names in groups.values()]
        bold = getattr(row, row.headline) == best.get((row.ipc, row.mark)) and not row.method.startswith("full")
        lines.append(table_row(cells, " class=best" if bold else ""))
        seconds = row.seconds_per_iteration or 0
        costs.append(table_row([
            row.method, ipc, accuracy(row, "top5"), f"{row.bytes_fp32:,}", row.steps, f"{seconds:.2f}",
            f"{seconds * row.steps:.0f}", f"{row.seconds:.0f}", f"{row.peak_memory / 2 ** 30:.2f}"]))
    cost_head = ["method", "IPC", "top-5", "bytes at fp32", "steps", "s / step", "distilling, s", "evaluating, s", "GB"]
    return ("<p class=note>Percent, mean ± std over networks; bold: the most accurate of its IPC. Over random: points "
            "above random real clips of the same bytes, interpolated in log(bytes); of full: the share of the full "
            f"set's accuracy.</p>{html_table(head, lines)}"
            + folded("Costs: top-5, steps, seconds, memory", html_table(cost_head, costs)))


def table_row(cells, kind=""):
    return f"<tr{kind}>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"


def html_table(head, lines):
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<div class=scroll><table><tr>{titles}</tr>{''.join(lines)}</table></div>"


# ---------------------------------------------------------------- videos

def videos_of(rows, classes, most_classes):
    """Yield a moving picture of every run: each class's first video, and the memories of a static-dynamic set."""
    names = rows.class_names.iloc[0]
    order = [names.index(name) for name in (names if classes is None else classes.index)][:most_classes]
    figures = []
    for row in rows.itertuples():
        if (row.path / "distilled.pt").exists():
            synset, _ = load_set(row.path)
            if synset.K != len(row.class_names):
                raise ValueError(f"{row.path / 'distilled.pt'} has other classes than the result.json beside it: "
                                 "delete the run's folder")
            shown = memories(synset)
            columns = "" if len(shown) == 1 else f"<br>{', '.join(shown)}"
            figures.append(f"<figure><figcaption>{html.escape(label(row))}{columns}</figcaption>"
                           f"<img alt='' src='{moving([videos[order] for videos in shown.values()])}'></figure>")
    if not figures:
        return
    kinds = ["" if classes is None or not classes.dynamic[names[number]] else " class=dynamic" for number in order]
    listed = ", ".join(f"<span{kind}>{html.escape(names[number])}</span>" for kind, number in zip(kinds, order))
    more = f" {len(names) - len(order)} more classes are not shown." if len(names) > len(order) else ""
    yield (f"<h3>Distilled videos</h3><p class=note>The first video of each class, a row each: {listed}.{more}</p>"
           f"<div class=runs>{''.join(figures)}</div>")


def moving(columns, fps=8):
    """Return videos, uint8 (K, T or 1, 3, H, W) per column, as the source of one animated image, a row per class."""
    first, *others = map(Image.fromarray, side_by_side(columns))
    if max(first.size) > WEBP_SIDE:
        raise ValueError(f"the videos of {len(columns[0])} classes make a picture of {first.width} × {first.height} "
                         f"pixels, and the limit of its format is {WEBP_SIDE}: give fewer --classes")
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=1000 // fps, loop=0, quality=60)
    return inline(file.getvalue(), "webp")


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
