"""Static and dynamic classes (methods.md 7): how much a class gains from motion, and the accuracy on both kinds.

    bash sh/study/dynamics.sh GPU DATASET; python -m distill_utils.dynamics results/

The dynamics of a class is its accuracy with full clips minus its accuracy with one frame repeated T times. Both are of
networks trained on the full set of such clips. The upper half of the classes are the dynamic ones.
"""
import argparse
import pathlib

import numpy as np
import pandas as pd

from distill_utils.processes import run_script
from distill_utils.table import read_results


def class_dynamics(rows):
    """Return the classes of one data set, the most dynamic first, as a table indexed by class.

    The columns are full, one_frame, dynamics (percent) and dynamic (bool); a class without test videos has dynamics nan
    and belongs to no half. rows: from read_results. Uses the latest two runs on the full set that differ only in
    --n_real; None if there are none.
    """
    full = rows[rows.run.str.startswith("full")].sort_index()  # read_results has the latest last
    pairs = [(whole, still) for whole in full[full.n_real.isna()].itertuples()
             for still in full[full.n_real == 1].itertuples()
             if whole.chosen | {"n_real": 1} == still.chosen]
    if not pairs:
        return None
    whole, still = pairs[-1]
    table = pd.DataFrame({"full": whole.per_class, "one_frame": still.per_class},
                         index=pd.Index(whole.class_names, name="class"), dtype=float)
    table["dynamics"] = table.full - table.one_frame
    table = table.sort_values("dynamics", ascending=False, kind="stable")
    return table.assign(dynamic=np.arange(len(table)) < table.dynamics.notna().sum() // 2)


def by_group(rows, classes):
    """Return each run's mean accuracy over the dynamic and over the static classes, in percent."""
    groups, classes = [], classes.dropna()
    for row in rows.itertuples():
        accuracy = pd.Series(row.per_class, index=row.class_names, dtype=float)
        groups.append({"run": row.run, "dynamic": accuracy[classes.index[classes.dynamic]].mean(),
                       "static": accuracy[classes.index[~classes.dynamic]].mean()})
    return pd.DataFrame(groups)


def main(args):
    every = read_results(args.folders)
    for (data, _), rows in every.groupby(["data", "class_names"]):
        classes = class_dynamics(rows)
        print(f"\n{data}")
        if classes is None:
            print("no dynamics: two runs on the full set are missing: run bash sh/study/dynamics.sh GPU DATASET")
            continue
        print(classes.round(1).to_string())
        print()
        print(by_group(rows, classes).round(1).to_string(index=False))


def parser():
    parser = argparse.ArgumentParser(prog="dynamics", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=pathlib.Path, nargs="+", metavar="FOLDER",
                        help="parent folder of run folders, as given by --save_path")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
