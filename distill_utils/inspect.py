"""Check a data set: print classes, videos, frames, sizes, bytes, missing and broken folders; draw a clip per class.

    python -m distill_utils.inspect DATASET [--data_path DIR]

The program lists every frame folder and decodes its first and last image; packing decodes all other frames that the
scripts use. The exit code is 1 if a folder is missing or broken (the report names each one), or if class names look
like split names. The program also counts what is unusual: images that are not frames, images that are not upright or
not 8-bit RGB, videos of one frame, and videos that prepare left out.
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

from distill_utils.clips import FrameFolders, select
from distill_utils.datasets import DATASETS, warning_of_classes
from distill_utils.frames import as_rgb, choose_series, find_folder, image_names, numbered_frames, orientation
from distill_utils.identity import dataset_label
from distill_utils.lists import FORMAT, PREPARED, split_of
from distill_utils.machine import cores
from distill_utils.options import add_data_options, list_videos, seed, selection_values
from distill_utils.pictures import write
from distill_utils.processes import progress, run_script
from distill_utils.workers import mapped
from utils import ROOT, atomic_write, read_json

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


@dataclasses.dataclass(frozen=True)
class Folder:
    frames: int = 0
    bytes: int = 0
    size: tuple = ()  # (width, height) of the first image, upright
    others: tuple = ()  # name patterns of images that are not frames
    kinds: tuple = ()  # how the first and last image differ from upright 8-bit RGB
    wrong: str = ""  # why the folder cannot be loaded, or what is missing


def main(args):
    splits = set(list_videos(args)[0].split) | {"train", "test"}
    selections = {split: select(args.dataset, split=split, **selection_values(args))
                  for split in ("train", "validation", "test") if split in splits}
    row, class_names = selections["train"].row, selections["train"].class_names
    videos = pd.concat([selection.videos for selection in selections.values()], ignore_index=True)
    with concurrent.futures.ThreadPoolExecutor(args.workers or cores()) as pool:
        folders = mapped(pool, lambda folder: look_at(folder, row), videos.folder.tolist())
        folders = list(progress(folders, total=len(videos), desc="inspecting", unit="video"))
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
        print(f"{len(wrong)} of {len(found)} folders are missing or broken: see {out / 'wrong_folders.txt'} for all")
    else:
        print("no folder is missing or broken")
    drawn = draw(selections["train"], good, out / "contact_sheet.png")
    splits = [name for name in class_names if split_of(name)]
    if len(splits) > 1:
        print(f"the classes {', '.join(splits)} have names of splits: were split folders read as class folders?")
    if len(wrong) or not drawn or len(splits) > 1:
        sys.exit(1)


def describe(args, selections, class_names, good):
    """Print classes, videos, frames, sizes and bytes; `good` holds the folders that can be loaded."""
    row = selections["train"].row
    listed = pd.concat([selection.videos for selection in selections.values()])
    print(f"{args.dataset}: {len(class_names)} classes; clips of {row.T} frames of {row.size}×{row.size} pixels, "
          + (f"stride {row.stride} if the video is long enough" if row.rule == "stride" else "spread over the video"))
    if warning := warning_of_classes(row, len(class_names), "its list"):
        print(warning)
    print("\nvideos per class")
    counts = pd.crosstab(listed.label, listed.split).rename_axis(index=None, columns=None)
    counts = pd.concat([counts, counts.sum().to_frame("all").T])  # crosstab's margins refuse a class called "all"
    print(counts.assign(all=counts.sum(axis=1)).to_string())
    print("\nframes per video, quantiles")
    quantiles = good.groupby("split").frames.quantile(QUANTILES, interpolation="nearest").unstack()
    print(quantiles.rename(columns=lambda share: f"{share:.0%}").rename_axis(index=None).to_string())
    print(f"fewer than {row.T} frames (stretched): {(good.frames < row.T).sum()} videos, "
          f"{(good.frames == 1).sum()} of them with one frame")
    print("\nsizes: " + ", ".join(f"{width}×{height} ({count} videos)"
                                  for (width, height), count in good["size"].value_counts().items()))
    if small := sum(min(size) < row.size for size in good["size"]):
        print(f"{small} videos have frames smaller than {row.size} pixels, which are enlarged: give a smaller --size, "
              "or prepare larger frames")
    for found, what in ((good.others, "that are not frames (ignored)"),
                        (good.kinds, "that are not plain 8-bit RGB (converted)")):
        counts = found.explode().value_counts()
        if len(counts):
            print(f"images {what}: " + ", ".join(f"{name} ({count} videos)" for name, count in counts.items()))
    describe_preparation(pathlib.Path(good.folder.iloc[0]))
    print(f"frames on disk: {good.bytes.sum():,} bytes of {good.frames.sum():,} images")
    for split, selection in selections.items():
        try:
            pack = selection.pack(args.pack_path)
            where = pack if pack.exists() else "not built yet"
        except OSError:
            where = "not known, because a folder cannot be read"
        print(f"pack, {split}: {selection.shape[0]} clips, {math.prod(selection.shape):,} bytes, {where}")


def describe_preparation(folder):
    """Print what prepare recorded about the data set of this frame folder, if prepare made it."""
    root = next((above for above in folder.parents if (above / PREPARED).is_file()), None)
    if root is None:
        return
    made = read_json(root / PREPARED)
    if not isinstance(made, dict) or made.get("format") != FORMAT:
        print(f"prepared by an older version: mirrored or trimmed videos, and files with several video streams, may be "
              f"stored wrongly: prepare {root} again, with another --out")
    path = root / "broken_videos.txt"
    if path.is_file() and (lines := path.read_text(encoding="utf-8", errors="replace").splitlines()):
        print(f"left out of the lists as missing or broken: {len(lines)} videos: see {path}; "
              f"the first: {' '.join(lines[0].split())}")


def look_at(folder, row):
    """Return a Folder for a frame folder of the list; an unreadable one has a reason in `wrong`."""
    try:
        return inspect(find_folder(folder, row.elsewhere) or folder, row.frame_names)
    except ValueError as error:
        return Folder(wrong=str(error))
    except OSError as error:
        return Folder(wrong=f"the frame folder {folder} cannot be read: {error.strerror}")


def inspect(folder, pattern):
    """Return a Folder for a frame folder; ValueError if nothing can be loaded."""
    numbers, names = zip(*numbered_frames(folder, pattern))
    _, others = choose_series(image_names(folder, pattern), folder)
    sizes = [os.path.getsize(os.path.join(folder, name)) for name in names]
    (size, first), (_, last) = [decoded(os.path.join(folder, name)) for name in (names[0], names[-1])]
    gaps = [other - one for one, other in zip(numbers, numbers[1:])]
    wrong = ""
    if 0 in sizes:
        wrong = f"{folder}: {names[sizes.index(0)]} is empty"
    elif gaps and (step := min(gaps)) * 2 <= max(gaps):  # equal steps are deliberate, not missing frames
        number = next(one + step for one, gap in zip(numbers, gaps) if gap >= 2 * step)
        wrong = f"{folder}: {sum(gap // step - 1 for gap in gaps)} frames are missing, for example number {number}"
    return Folder(len(names), sum(sizes), size, tuple(others), tuple(sorted(first | last)), wrong)


def decoded(path):
    """Return the upright (width, height) of an image, and how it differs from upright 8-bit RGB."""
    try:
        with Image.open(path) as picture:
            kinds = {f"EXIF orientation {turned}"} if (turned := orientation(picture)) != 1 else set()
            kinds |= {f"mode {picture.mode}"} if picture.mode not in ("RGB", "L") else set()
            return as_rgb(picture).size, kinds
    except Exception as error:  # PIL's decoders raise many kinds of errors
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def draw(selection, good, path):
    """Draw the first loadable clip of each class as a row of frames; return whether all could be drawn.

    The rows are arranged in columns, so that the picture is about square.
    """
    firsts = good[good.split == "train"].groupby("label").folder.first()
    chosen = np.flatnonzero(selection.videos.folder.isin(firsts))
    if not len(chosen):
        print("no training clip can be drawn")
        return False
    shown = dataclasses.replace(selection, videos=selection.videos.iloc[chosen],
                                positions=selection.positions[chosen, :1])
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
        except ValueError as error:  # a middle frame: inspect() decodes the first and last only
            print(error)
            drawn = False
            continue
        for number, frame in enumerate(clip):
            sheet.paste(Image.fromarray(frame.transpose(1, 2, 0)), (left + number * size, top + 14))
    write(path, sheet)
    print(f"one clip of each class: {path}")
    return drawn


def parser():
    parser = argparse.ArgumentParser(prog="inspect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    add_data_options(parser, dataset=None)
    parser.add_argument("--seed", default=0, type=seed, help="seed of the clips' start frames (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR",
                        help="folder for contact_sheet.png and wrong_folders.txt (default: results/<data set>)")
    parser.set_defaults(validation=0.0)  # show the list unchanged
    return parser


if __name__ == "__main__":
    run_script(main, parser())
