"""What a loaded data set is: classes, videos, frames, sizes, what is missing or broken, bytes; and a picture of one clip per class.

    python -m distill_utils.inspect DATASET [--data_path DIR]

Every frame folder is listed and its first and last image are decoded; packing decodes the rest of what the scripts use. Exit code 1 where
a folder is missing or broken: each is named in the report.
"""
import argparse
import concurrent.futures
import dataclasses
import math
import os
import pathlib
import sys

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from distill_utils.clips import FrameFolders, mapped, select
from distill_utils.datasets import DATASETS, frame_names, frame_number, neighbour
from distill_utils.options import add_data_options, dataset_label, seed, selection_values
from distill_utils.pictures import write
from utils import ROOT, atomic_write, cores, progress, run_script

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


@dataclasses.dataclass(frozen=True)
class Folder:
    frames: int = 0
    bytes: int = 0
    size: tuple = ()  # (width, height) of its first image
    wrong: str = ""  # why it cannot be loaded, or what is missing in it


def main(args):
    selections = {split: select(args.dataset, split=split, **selection_values(args)) for split in ("train", "test")}
    row, class_names = selections["train"].row, selections["train"].class_names
    videos = pd.concat([selection.videos for selection in selections.values()], ignore_index=True)
    with concurrent.futures.ThreadPoolExecutor(args.workers or cores()) as pool:
        folders = mapped(pool, lambda folder: look_at(folder, row.elsewhere), videos.folder.tolist())
        folders = list(progress(folders, total=len(videos), desc="looking", unit="video"))
    found = pd.DataFrame(folders).assign(split=videos.split, label=videos.label, folder=videos.folder)
    good, wrong = found[found.wrong == ""], found[found.wrong != ""]

    out = args.out or ROOT / "results" / dataset_label(args)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "wrong_folders.txt", "w") as file:
        file.writelines(f"{reason}\n" for reason in wrong.wrong)
    if good.empty:
        raise ValueError(f"none of the {len(found)} folders can be loaded: {wrong.wrong.iloc[0]}")
    describe(args, selections, class_names, good)
    if len(wrong):
        print("\n".join(wrong.wrong[:10]))
        print(f"{len(wrong)} of {len(found)} folders are missing or broken: all in {out / 'wrong_folders.txt'}")
    else:
        print("no folder is missing or broken")
    drawn = draw(selections["train"], good, out / "contact_sheet.png")
    if len(wrong) or not drawn:
        sys.exit(1)


def describe(args, selections, class_names, good):
    """Print classes, videos, frames, sizes and bytes; `good` are the folders that can be loaded."""
    row = selections["train"].row
    listed = pd.concat([selection.videos for selection in selections.values()])
    print(f"{args.dataset}: {len(class_names)} classes; clips of {row.T} frames of {row.size}×{row.size} pixels, "
          + (f"{row.stride} apart where the video is long enough" if row.rule == "stride" else "evenly over the video"))
    print("\nvideos of each class")
    print(pd.crosstab(listed.label, listed.split, margins=True, margins_name="all").rename_axis(index=None, columns=None).to_string())
    print("\nframes of a video, quantiles")
    quantiles = good.groupby("split").frames.quantile(QUANTILES, interpolation="nearest").unstack()
    print(quantiles.rename(columns=lambda share: f"{share:.0%}").rename_axis(index=None).to_string())
    print(f"of fewer than {row.T}, which are stretched: {(good.frames < row.T).sum()} videos")
    print("\nsizes: " + ", ".join(f"{width}×{height} ({count} videos)" for (width, height), count in good["size"].value_counts().items()))
    print(f"frames on disk: {good.bytes.sum():,} bytes of {good.frames.sum():,} images")
    for split, selection in selections.items():
        pack = selection.pack(args.pack_path)
        print(f"pack, {split}: {selection.shape[0]} clips, {math.prod(selection.shape):,} bytes, {pack if pack.exists() else 'not built yet'}")


def look_at(folder, elsewhere):
    """A frame folder of the list as a Folder."""
    there = folder if os.path.isdir(folder) else neighbour(folder, elsewhere) or folder
    try:
        return inspect(there)
    except ValueError as error:
        return Folder(wrong=str(error))


def inspect(folder):
    """A frame folder as a Folder; ValueError where nothing can be loaded."""
    names = frame_names(folder)
    sizes = [os.path.getsize(os.path.join(folder, name)) for name in names]
    size, _ = [decoded_size(os.path.join(folder, name)) for name in (names[0], names[-1])]
    numbers = [frame_number(name) for name in names]
    wrong = ""
    if 0 in sizes:
        wrong = f"{folder}: {names[sizes.index(0)]} is empty"
    elif len(set(numbers)) < len(names):
        wrong = f"{folder}: two images have the same number"
    elif numbers[-1] - numbers[0] >= len(names):
        first = next(one + 1 for one, other in zip(numbers, numbers[1:]) if other > one + 1)
        wrong = f"{folder}: {numbers[-1] - numbers[0] + 1 - len(names)} frames are missing, of number {first} for example"
    return Folder(len(names), sum(sizes), size, wrong)


def decoded_size(path):
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.size
    except Exception as error:  # PIL's decoders raise errors of many kinds
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def draw(selection, good, path):
    """The first loadable clip of each class as a row of its frames, in columns of such rows about as wide as high; whether all could be drawn."""
    firsts = good[good.split == "train"].groupby("label").folder.first()
    chosen = np.flatnonzero(selection.videos.folder.isin(firsts))
    if not len(chosen):
        print("no training clip can be drawn")
        return False
    shown = dataclasses.replace(selection, videos=selection.videos.iloc[chosen], positions=selection.positions[chosen, :1])
    _, T, _, size, _ = shown.shape
    frames, names = FrameFolders(shown, None), shown.videos.label.tolist()
    wide, high = T * size + 8, size + 16
    columns = max(1, round(math.sqrt(len(names) * high / wide)))
    sheet = Image.new("RGB", (columns * wide, math.ceil(len(names) / columns) * high), "white")
    pen, drawn = ImageDraw.Draw(sheet), True
    for place, video in enumerate(sorted(range(len(names)), key=names.__getitem__)):
        left, top = place % columns * wide, place // columns * high
        pen.text((left + 2, top + 1), names[video], fill="black")
        try:
            clip = frames.decode(video)[0]
        except ValueError as error:  # a frame between the first and the last, which were looked at
            print(error)
            drawn = False
            continue
        for number, frame in enumerate(clip):
            sheet.paste(Image.fromarray(frame.transpose(1, 2, 0)), (left + number * size, top + 14))
    write(path, sheet)
    print(f"one clip of each class: {path}")
    return drawn


def parser():
    parser = argparse.ArgumentParser(prog="inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    add_data_options(parser, dataset=None)
    parser.add_argument("--seed", default=0, type=seed, help="of the clips' starts (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of contact_sheet.png and wrong_folders.txt (results/<data set>)")
    parser.set_defaults(validation=0.0)  # it shows the list as it is
    return parser


if __name__ == "__main__":
    run_script(main, parser())
