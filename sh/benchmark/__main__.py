"""Benchmark the main operations on this machine.

    bash sh/benchmark.sh [GPU]                              # sizes of the toy set
    bash sh/benchmark.sh [GPU] --plain                      # each operation beside its plain form
    bash sh/benchmark.sh [GPU] --classes 50 --frames 16 --size 112 --batch_real 64 --clips_per_class 96 --syn_steps 10
    bash sh/benchmark.sh [GPU] --growth classes,ipc,frames,size,clips

The third command has the sizes of miniUCF101. The operations are: preparing a video (decoding it into a folder of
JPEGs); loading a batch of clips; an iteration of DM, of DM with a pool of networks, and of FRePo; a step of MTT; an
evaluation; an expert's epoch. For each, the benchmark reports counted FLOP and bytes, peak memory, and the share of
this machine's own rates (a large matmul, a convolution, a copy).

The clips are random, in packs in a temporary folder. Measurements take turns, so that other load on the machine affects
all alike. The table shows medians, with the first and third quartiles in brackets.
"""
import argparse
import functools
import pathlib
import tempfile
import time

import pandas as pd

import networks
import plain
from distill_utils import options
from distill_utils.compute import PRECISIONS, cpu_has_bf16, has_tf32, is_ampere, set_precision
from distill_utils.identity import as_setting
from distill_utils.processes import run_script, world_size
from distill_utils.workers import CRASHED, alone
from measure import (
    alternate,
    count,
    in_precision,
    machine,
    memory_apart,
    quartiles,
    references,
)
from utils import ROOT, find_device, has_own_memory, save_json, seed_everything
from workload import SECTIONS, Workload

RATES = ("matmul", "flop", 0), ("convolution", "flop", 0), ("copy", "bytes", 1)
DECODING = ("preparing", "loading")  # not affected by the precision of convolutions
SMALL = {"classes": 2, "clips_per_class": 2, "test_clips": 2, "frames": 8, "size": 48, "ipc": 1, "batch_real": 2,
         "syn_steps": 1}
GROWTH = {  # variable: (its values, other differences from SMALL, what is measured)
    "classes": ((2, 20, 100, 400), {}, ("dm", "mtt")),
    "ipc": ((1, 5, 20, 50), {"clips_per_class": 50}, ("dm", "mtt")),
    "frames": ((8, 16, 32, 64), {}, ("dm", "mtt")),
    "size": ((64, 112, 160, 224), {}, ("dm", "mtt")),
    "clips": ((10 ** 2, 10 ** 3, 10 ** 4, 10 ** 5, 10 ** 6), {"classes": 50, "device": "cpu"},
              ("start_up", "class_batch", "gather")),
}
COLUMNS = {"clips/s": ("clips_per_second", 1, 4), "TFLOP": ("flop", 1e12, 3), "GB moved": ("bytes", 1e9, 3),
           "peak GB": ("peak_bytes", 1e9, 3), "GB above start": ("bytes_above_start", 1e9, 3),
           "speed, plain = 1": ("times_plain", 1, 3), "predicted": ("predicted", 1, 3), "ratio": ("ratio", 1, 3),
           "relative": ("relative", 1, 3)}
SHARES = {f"of {name}": f"share_of_{name}" for name, _, _ in RATES}


# ---------------------------------------------------------------- the sections at given sizes

def benchmark(args, folder):
    """Return this machine's rates, and a row for each section and precision.

    With --plain, a row of precision "plain" is added for each section that has a plain form.
    """
    workload = Workload(args, folder).write()
    jobs = [(section, precision) for section in args.sections for precision in (
        *([None] if section in DECODING else args.precisions),
        *(["plain"] if args.plain and hasattr(plain, section) else []))]
    makes = {(section, precision): functools.partial(getattr(plain, section), workload) if precision == "plain"
             else functools.partial(getattr(workload, section), precision) for section, precision in jobs}
    # Measure resident memory in separate processes, and first: a process starts with its parent's peak.
    apart = memory_apart if has_own_memory(workload.device) else functools.partial(alone, memory_apart)
    for job in jobs:
        if job[0] == "pool":
            apart((makes[job], workload.device))                           # computes and stores the class means
    memory = {job: apart((makes[job], workload.device)) for job in jobs}
    functions = {job: in_precision(makes[job](), job[1] if job[1] in PRECISIONS else "fp32", workload.device)
                 for job in jobs}
    functions |= references(args.precisions, workload.device, min(workload.at_once, workload.batch), args.frames,
                            args.size)
    counts, seconds = measured(functions, args)
    if ("loading", None) in counts:                                        # uint8 read, float32 written
        counts["loading", None] = 0, workload.batch * args.frames * 3 * args.size ** 2 * 5
    rates, rows = rates_of(counts, seconds), []
    for job in jobs:
        section, precision = job
        peak, above = (None, None) if memory[job] == CRASHED else memory[job]
        row = {"section": section, "precision": precision, **figures(counts[job], seconds[job]), "peak_bytes": peak,
               "bytes_above_start": above}
        row |= {f"share_of_{name}": row[kind] / row["seconds"] / rate
                for (name, of), (kind, rate) in rates.items() if of in (precision, None) and precision != "plain"}
        if (section, "plain") in jobs and precision != "plain":
            row["times_plain"] = quartiles(seconds[section, "plain"])[1] / row["seconds"]
        rows.append(row | ({"clips_per_second": workload.batch / row["seconds"]} if section == "loading" else {}))
    return rates, rows


def measured(functions, args):
    """Return FLOP and bytes of each function, and its seconds; counting also warms it up."""
    counts = {}
    for name, function in functions.items():
        start = time.perf_counter()
        counts[name] = count(function)
        print(f"counted {' '.join(map(str, name))}: {counts[name][0]:.3g} FLOP, {counts[name][1]:.3g} bytes, "
              f"{time.perf_counter() - start:.1f} s", flush=True)
    return counts, alternate(functions, args.repeats)


def figures(count, seconds):
    first, median, third = quartiles(seconds)
    return {"seconds": median, "quartiles": [first, third], "all_seconds": seconds, "flop": count[0], "bytes": count[1]}


def rates_of(counts, seconds):
    """Return this machine's rates in the reference calls: {(name, precision): ("flop" or "bytes", rate)}."""
    return {job: (kind, counts[job][place] / quartiles(seconds[job])[1])
            for job in counts for name, kind, place in RATES if job[0] == name}


# ---------------------------------------------------------------- growth of costs

def growth(args, folder):
    """Return this machine's rates, and rows of costs with one size varied at a time, for each name in args.growth.

    A row is for one value and one figure: seconds, the seconds predicted from FLOP and bytes, their ratio, and that
    ratio relative to the smallest value's. Reading a list has no counted operations, so the ratios of start_up are
    comparable with each other only.
    """
    precision, functions = args.precisions[0], {}
    for axis in args.growth:
        values, other, names = GROWTH[axis]
        for value in values:
            place = pathlib.Path(folder, f"{axis}{value}")
            place.mkdir()
            varied = {axis: value} if axis != "clips" else {
                "clips_per_class": value // other["classes"], "test_clips": max(1, value // 10)}
            workload = Workload(argparse.Namespace(**vars(args) | SMALL | other | varied), place,
                                sparse=axis == "clips").write()
            functions |= {(axis, value, name): in_precision(getattr(workload, name)(precision), precision,
                                                            workload.device) for name in names}
    small = Workload(argparse.Namespace(**vars(args) | SMALL), folder)
    functions |= references([precision], small.device, small.batch, small.args.frames, small.args.size)
    counts, seconds = measured(functions, args)
    rates, rows, smallest = rates_of(counts, seconds), [], {}
    for axis, value, name in [job for job in functions if job not in rates]:
        row = {"axis": axis, "value": value, "figure": name,
               **figures(counts[axis, value, name], seconds[axis, value, name])}
        row["predicted"] = row["flop"] / rates["convolution", precision][1] + row["bytes"] / rates["copy", None][1]
        row["ratio"] = row["seconds"] / row["predicted"]
        rows.append(row | {"relative": row["ratio"] / smallest.setdefault((axis, name), row["ratio"])})
    return rates, rows


# ---------------------------------------------------------------- tables

def shown(rows):
    """Format the rows as a table, without empty columns."""
    table = [{**{name: row.get(name) for name in ("section", "precision", "axis", "value", "figure")},
              "seconds": spread(row["seconds"], *row["quartiles"]),
              **{title: f"{row[name] / unit:.{digits}g}" if row.get(name) else None
                 for title, (name, unit, digits) in COLUMNS.items()},
              **{title: f"{row[name]:.0%}" if row.get(name) else None for title, name in SHARES.items()}}
             for row in rows]
    return pd.DataFrame(table, dtype=object).dropna(axis=1, how="all").fillna("").to_string(index=False)


def spread(median, first, third):
    return f"{median:.3g} [{first:.3g}, {third:.3g}]"


# ---------------------------------------------------------------- the program

def has_bf16(device):
    return cpu_has_bf16() if device.type == "cpu" else device.type != "cuda" or is_ampere(device)


def main(args):
    device = find_device(args.device)
    if world_size() > 1:
        raise ValueError("the benchmark measures one device: give one GPU, or cpu")
    args.precisions = args.precisions or ["fp32", *(["tf32"] if has_tf32(device) else []),
                                          *(["bf16"] if has_bf16(device) else [])]
    for precision in args.precisions:
        set_precision(device, precision)  # ValueError if the device lacks it
    networks.build("ConvNet3D", args.classes, args.frames, args.size)  # ValueError if the clips are too small
    seed_everything(0)
    about, start = machine(device), time.strftime("%Y-%m-%dT%H-%M-%S")
    out = args.out or (
        ROOT / "results" / "benchmark" / f"{about.get('gpu', about['host']).replace(' ', '-')}_{start}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        rates, rows = (growth if args.growth else benchmark)(args, folder)
    print("\nthis machine: " + ", ".join(
        f"{' '.join(filter(None, name))} {rate / 1e12:.3g} T{'B' if kind == 'bytes' else 'FLOP'}/s"
        for name, (kind, rate) in rates.items()))
    print(shown(rows))
    save_json({"machine": about, "created": start,
               "settings": {name: as_setting(value) for name, value in vars(args).items()},
               "rates": [{"name": name, "precision": precision, "of": kind, "per_second": rate}
                         for (name, precision), (kind, rate) in rates.items()],
               "rows": rows}, out)
    print(f"all figures: {out}")


def some_of(choices):
    """Return the argparse type of a flag that takes some of `choices`, separated by commas."""
    def names(text):
        for name in text.split(","):
            if name not in choices:
                raise argparse.ArgumentTypeError(f"unknown {name!r}: choose from {','.join(choices)}")
        return list(dict.fromkeys(text.split(",")))
    return names


def parser():
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda",
                        help="cuda, cuda:1, mps, xpu or cpu; set by the launcher's GPU argument (default: %(default)s)")
    parser.add_argument("--sections", type=some_of(SECTIONS), default=list(SECTIONS), metavar="A,B",
                        help=f"operations to measure, from {','.join(SECTIONS)} (default: all)")
    parser.add_argument("--precisions", type=some_of(PRECISIONS), metavar="A,B",
                        help=f"number formats of convolutions, from {','.join(PRECISIONS)}; --growth uses the first "
                             "(default: fp32, tf32 on CUDA, bf16)")
    parser.add_argument("--plain", action="store_true",
                        help="also measure each operation as it is usually written (sh/benchmark/plain.py), "
                             "in float32, and how many times faster ours is")
    parser.add_argument("--growth", type=some_of(tuple(GROWTH)), metavar="A,B",
                        help=f"instead of the sections, measure how costs grow with each of {','.join(GROWTH)}, "
                             "starting from small sizes")
    parser.add_argument("--repeats", type=options.positive, default=5,
                        help="timed calls of each operation, in turns (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE",
                        help="json file for all figures (default: results/benchmark/<GPU or host>_<time>.json)")
    group = parser.add_argument_group("sizes")
    for name, default, meaning in (
            ("classes", 8, "number of classes"), ("clips_per_class", 24, "training clips per class"),
            ("test_clips", 96, "test clips in total"), ("frames", 8, "frames per clip"),
            ("size", 64, "height and width in pixels"), ("ipc", 1, "synthetic videos per class"),
            ("batch_real", 24, "real clips per class in a DM iteration, and in loading"),
            ("syn_steps", 5, "inner steps of an MTT step"), ("batch_train", 16, "batch size of an expert"),
            ("epoch_eval_train", 20, "training epochs of an evaluation, with one network")):
        group.add_argument(f"--{name}", type=options.positive, default=default,
                           help=f"{meaning} (default: %(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
