"""The results of all finished runs below a folder as one table.

    python -m distill_utils.table results/
"""
import argparse
import json
import pathlib

import pandas as pd

from distill_utils.datasets import DATASETS
from utils import run_script


def results(folder):
    """A row for each result.json below `folder`: run, accuracy ± std in percent, bytes, seconds per step and of the steps, GB, path."""
    rows = []
    for path in sorted(folder.rglob("result.json"), key=lambda path: path.stat().st_mtime):
        result, settings = json.loads(path.read_text()), json.loads((path.parent / "config.json").read_text())["settings"]
        if "storage" not in result:  # a buffer of experts
            continue
        headline = DATASETS[settings["dataset"]].headline
        seconds = result["seconds_per_iteration"] or 0
        rows.append({"data": path.parts[-3], "run": path.parent.name, "steps": result["steps"], "ipc": settings.get("ipc"),
                     headline: f"{result[headline]:.1f} ± {result[headline + '_std']:.1f}",
                     "video top1": f"{result['video_top1']:.1f} ± {result['video_top1_std']:.1f}", "bytes": f"{result['storage']:,}",
                     "s/step": f"{seconds:.2f}", "distilled in s": f"{seconds * result['steps']:.0f}",
                     "evaluated in s": f"{result['seconds']:.0f}", "GB": f"{result['peak_memory'] / 2 ** 30:.2f}"})
    if not rows:
        raise ValueError(f"no finished run below {folder}")
    return pd.DataFrame(rows, dtype=object).fillna("")


def main(args):
    print(results(args.folder).to_string(index=False))
    print(f"\nEach run's folder in {args.folder} holds distilled.png and distilled.gif, its pictures, and distilled.pt, the set.")


def parser():
    parser = argparse.ArgumentParser(prog="table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of run folders, as given by --save_path")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
