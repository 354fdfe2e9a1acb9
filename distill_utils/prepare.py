"""Decode raw videos into frame folders and write the lists that the scripts read.

    python -m distill_utils.prepare DATASET --videos DIR [--lists DIR] [--out DIR]

Video files are found by name at any depth of --videos. Names and splits come from the official lists; these are
searched below --lists, by default below --videos. A custom data set has one folder per class. If it is split, folders
called train, val and test lie above or below the class folders.

The same command resumes an interrupted run. broken_videos.txt and short_videos.txt, beside the lists, name every video
that is missing, cannot be decoded, or has fewer frames than a clip, with the reason. Broken videos are left out of the
lists; the same command tries them again.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
from typing import Callable

import pandas as pd

from distill_utils import lists
from distill_utils.datasets import DATA_PATH, DATASETS, warning_of_classes
from distill_utils.decode import Picture, is_made, make_folder
from distill_utils.frames import files_below, is_visible
from distill_utils.machine import cores
from distill_utils.options import count, number, positive, seed
from distill_utils.processes import progress, run_script
from distill_utils.sources import tell_what_changed
from distill_utils.untimed import take_untimed
from distill_utils.video_files import find_files, video_files
from distill_utils.workers import in_processes, in_threads
from utils import atomic_write, lock_folder, read_json, save_json


@dataclasses.dataclass(frozen=True)
class Recipe:
    read: Callable | None  # official lists -> {name of our list: its videos}; custom has none
    write: Callable = lists.write_csv
    resize: tuple | int = (160, 120)
    crop: int | None = 112
    frames: int | None = None  # None: all


RECIPES = {
    "UCF101": Recipe(lists.ucf101),
    "miniUCF101": Recipe(lists.mini_ucf101),
    "HMDB51": Recipe(lists.hmdb51),
    "Kinetics400": Recipe(lists.kinetics, lists.write_kinetics, resize=(64, 64), crop=None, frames=8),
    "SSv2": Recipe(lists.ssv2, lists.write_ssv2, resize=(64, 64), crop=None, frames=8),
    "custom": Recipe(None, resize=120),
}


def main(args):
    recipe, dataset = RECIPES[args.dataset], DATASETS[args.dataset]
    picture = Picture(args.resize or recipe.resize, recipe.crop if args.crop is None else args.crop or None,
                      args.quality)
    T, custom = args.frames or recipe.frames, args.dataset == "custom"
    for flag, given, only in (
            ("--all_train", args.all_train, "HMDB51"), ("--groups", args.groups, "custom"),
            ("--test_ratio", args.test_ratio != lists.TEST_RATIO, "custom"), ("--seed", args.seed, "custom")):
        if given and args.dataset != only:
            raise ValueError(f"{flag} is for {only} only: remove it")
    if args.lists and custom:
        raise ValueError("--lists is for data sets with official lists: custom is split by --test_ratio and --groups")
    if not args.videos.is_dir():
        raise ValueError(f"--videos {args.videos} is not a directory")
    root, frames, ours = read_lists(args, recipe, dataset, picture)
    videos = pd.concat(ours.values()).drop_duplicates("folder")

    check_links(root, frames)
    root.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(root, ".prepare.lock", "prepares videos")
    settings = {"resize": picture.resize, "crop": picture.crop, "quality": picture.quality, "frames": T}
    check_settings(root, frames, ours,
                   settings | ({"videos": str(args.videos.resolve())} if custom else {}))
    if custom:
        files, unlisted = {name: [args.videos / name] for name in videos.video}, 0
        tell_what_changed(root, videos, files, frames)
    else:
        files, present = find_files(videos, args.videos), video_files(args.videos)
        if args.dataset == "Kinetics400":
            take_untimed(files, videos, frames, present)
        unlisted = len(set(present).difference(*files.values()))
        tell_what_is_absent(ours, files, frames, args.videos)
    broken = prepare(videos, files, args.videos, frames, picture, T, args.workers or cores())
    least = min(T or dataset.T, dataset.T)
    short = find_short(videos, frames, least)
    repaired = report(root / "broken_videos.txt", broken, videos.folder, custom)
    report(root / "short_videos.txt", short, videos.folder, custom)
    lists.record_split(root, None)  # if the run is killed now, nobody knows which flags the list is of
    kept = write_lists(root, ours, broken, dataset, recipe.write)
    if custom:
        lists.record_split(root, split_flags(args))
    prepared = len(videos) - len(broken)
    print(f"{len(videos)} videos: {prepared} prepared in {frames} "
          f"({len(short)} have fewer than {least} frames: see short_videos.txt), "
          f"{len(broken)} missing or broken: see broken_videos.txt"
          + (f"; {unlisted} other files in {args.videos} are not used" if unlisted else ""))
    for name, rows in kept.items():
        if warning := warning_of_classes(dataset, ours[name].label.nunique(), name):
            print(warning)
        counts = rows.split.value_counts()
        validation = f", {counts['validation']} validation" if "validation" in counts else ""
        print(f"{root / name}: {counts.get('train', 0)} training{validation} and {counts.get('test', 0)} test videos "
              f"in {rows.label.nunique()} classes")
    others = sorted(path.name for path in root.glob("*_splits*.csv") if path.name not in kept)
    if repaired and others:
        print(f"{len(repaired)} videos that were broken before are prepared now; {', '.join(others)} beside these lists "
              "may lack them: prepare their data set again")
    if not any((rows.split == "test").any() for rows in kept.values()):
        print("there are no test videos: the scripts need some for evaluation")
    where = ["custom", "--data_path", str(root)] if custom else [
        args.dataset, *(["--data_path", str(args.out)] if args.out else [])]
    print(f"next, check the result: python -m distill_utils.inspect {shlex.join(where)}")
    lock.close()


def read_lists(args, recipe, dataset, picture):
    """Return the folder of the data set, the directory of its frames, and {name of our list: its videos}."""
    if args.dataset == "custom":
        root = (args.out or DATA_PATH / args.videos.resolve().name).absolute()
        name = f"{root.name}_splits1.csv"
        ours = lists.custom(args.videos, name, args.groups, args.test_ratio, args.seed, root,
                            lists.earlier_sides(root, name, split_flags(args)))
        return root, root / f"jpegs_{picture.crop or 'frames'}", ours
    folder = args.lists or args.videos
    if not folder.is_dir():
        raise ValueError(f"--lists {folder} is not a directory")
    root = (args.out or DATA_PATH).absolute() / dataset.root
    read = functools.partial(recipe.read, all_train=True) if args.all_train else recipe.read
    return root, root / dataset.frames, read(folder)


def split_flags(args):
    """Return the flags that decide the split of a custom set."""
    return {"test_ratio": args.test_ratio, "groups": args.groups, "seed": args.seed}


def check_settings(root, frames, ours, settings):
    """Record the settings of the frames, and `ours`, the names of the lists that prepare writes there.

    ValueError if the frames there have other settings or another maker, or a list there has another maker: frames are
    never mixed, and foreign lists are never overwritten.
    """
    path = root / lists.PREPARED
    made = read_json(path) if path.is_file() else {}
    if not isinstance(made, dict):
        raise ValueError(f"{path} was not made by prepare: give another --out, or move it away")
    of_older_version = [*ours, *(file.name for file in root.glob("*.csv"))] if made else []
    written, split = made.pop("lists", of_older_version), made.pop("split", None)
    foreign = [root / name for name in ours if name not in written and (root / name).exists()]
    filled = any(any(folder.iterdir()) for folder in visible_folders(frames))
    if foreign := foreign + ([frames] if filled and not made else []):
        raise ValueError(f"{foreign[0]} was not made by prepare: give another --out, or move it away")
    if made and filled and made not in json.loads(json.dumps([settings, settings | {"format": lists.FORMAT}])):
        raise ValueError(f"the frames in {frames} have other settings, {path.read_text()}: "
                         "give another --out, or delete them")
    others = [folder for folder in visible_folders(root) if folder != frames]
    if others and "videos" in settings:  # custom: the loader takes the only folder
        raise ValueError(f"{root} may hold frames and lists only, but has the folder {others[0].name}: "
                         "give another --out")
    if not filled:
        made = settings | {"format": lists.FORMAT}  # existing frames keep the recorded format
    save_json(made | {"lists": sorted({*written, *ours})} | ({"split": split} if split else {}), path)


def check_links(*places):
    for place in sorted({above for place in places for above in (place, *place.parents)}):
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{place} is a link to {os.readlink(place)}, which does not exist: is a disk unmounted?")


def visible_folders(path):
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:  # knows most kinds of entries without asking the disk again
        return sorted(pathlib.Path(entry) for entry in entries if is_visible(entry.name) and entry.is_dir())


# ---------------------------------------------------------------- videos -> frame folders

def prepare(videos, files, source, frames, picture, T, workers):
    """Make the missing frame folders from {video: its files}; return {folder: why it could not be made}."""
    there = in_threads(lambda folder: is_made(frames / folder), videos.folder)
    jobs, broken = [], {}
    for video, folder in videos.loc[[not done for done in there], ["video", "folder"]].itertuples(index=False):
        if paths := files[video]:
            path = frames / folder
            # The partial folder lies beside the final one, because links may lead to other disks.
            jobs.append((paths, path, path.with_name(f"{PARTIAL}{len(jobs)}"), picture, T))
        else:
            broken[folder] = f"no file with this name below {source}"
    if not sum(there) and not jobs:
        archives = sorted(path.name for path in files_below(source) if path.name.lower().endswith(ARCHIVES))
        raise ValueError(f"none of the {len(videos)} listed videos is below {source}: check --videos and --lists"
                         + (f", or unpack archives such as {archives[0]}" if archives else ""))
    directories = {path.parent for _, path, *_ in jobs}
    check_links(*directories)
    remove_partial(directories)  # left by a killed process
    try:
        with progress(total=len(videos), initial=sum(there) + len(broken), desc="preparing", unit="video") as bar:
            for (_, folder, *_), reason in in_processes(make_folder, jobs, workers):
                if reason is not None:
                    broken[folder.relative_to(frames).as_posix()] = reason
                bar.update()
                bar.set_postfix(broken=len(broken), refresh=False)
    finally:
        remove_partial(directories)
    whole = [folder for folder in videos.folder if folder not in broken]
    made = in_threads(lambda folder: is_made(frames / folder), whole)
    lost = [folder for folder, there in zip(whole, made) if not there]
    if lost:
        raise ValueError(f"{lost[0]} and {len(lost) - 1} other folders disappeared from {frames} during the run: "
                         "run the same command again")
    return broken


PARTIAL = ".preparing-"
ARCHIVES = (".rar", ".zip", ".tar", ".gz", ".tgz", ".7z")


def remove_partial(directories):
    """Remove partial frame folders in these directories, then directories that are empty."""
    for directory in directories:
        for path in directory.glob(PARTIAL + "*"):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.removedirs(directory)


# ---------------------------------------------------------------- reports and lists

def find_short(videos, frames, least):
    """Return {folder: message} for videos stored with fewer than `least` frames; the loader stretches these."""
    def count(folder):
        return sum(map(is_visible, os.listdir(frames / folder))) if os.path.isdir(frames / folder) else least
    return {folder: f"{number} frames, fewer than {least}"
            for folder, number in zip(videos.folder, in_threads(count, videos.folder)) if number < least}


def tell_what_is_absent(ours, files, frames, source):
    """Print each list without any file or prepared folder, before days of decoding."""
    for name, videos in ours.items():
        # A list may spell the path of a video in another way than the list before: then `files` lacks it.
        if not any(files.get(row.video, True) or is_made(frames / row.folder) for row in videos.itertuples()):
            print(f"warning: none of the {len(videos)} videos of {name} is below {source}")


def report(path, reasons, folders, alone=False):
    """Write the reasons; return the folders that had one before and have none now.

    Existing lines about other videos are kept, because UCF101 and miniUCF101 share a folder; not where the data set
    has its folder `alone`, because these videos are gone.
    """
    kept, ours = (path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else [],
                  set(folders))
    lines = [] if alone else [line for line in kept if line.partition("\t")[0] not in ours]
    lines += [f"{folder}\t{' '.join(str(reason).split())}" for folder, reason in reasons.items()]
    with atomic_write(path, "w") as file:
        file.writelines(f"{line}\n" for line in sorted(lines))
    return {line.partition("\t")[0] for line in kept} & ours - set(reasons)


def write_lists(root, ours, broken, dataset, write):
    """Write our lists without broken videos and without classes that lost all training videos; return them."""
    kept = {name: videos[~videos.folder.isin(broken)] for name, videos in ours.items()}
    everything = pd.concat(kept.values())
    for name, videos in kept.items():
        together = everything if len(dataset.lists) > 1 else videos  # several lists: read together, or one split each
        trained = set(together.label[together.split == "train"])
        if not trained:
            raise ValueError(f"{root / name}: no training video could be prepared: see broken_videos.txt beside it")
        if untrained := set(videos.label) - trained:
            print(f"{name}: {len(untrained)} classes have no training video left, for example {min(untrained)}: "
                  f"their {videos.label.isin(untrained).sum()} test videos are left out")
        kept[name] = videos[videos.label.isin(trained)]
        write(kept[name], root / name)
    return kept


def parser():
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=RECIPES, metavar="DATASET", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--videos", type=pathlib.Path, required=True, metavar="DIR", help="folder of the video files")
    parser.add_argument("--lists", type=pathlib.Path, metavar="DIR",
                        help="folder of the official lists (default: the folder of --videos)")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR",
                        help="folder to write to, the scripts' --data_path (default: distill_utils/data); "
                             "for custom: the data set's own folder (default: distill_utils/data/<name of --videos>)")
    parser.add_argument("--workers", type=positive, help="videos decoded in parallel (default: the number of cores)")
    group = parser.add_argument_group("frames")
    group.add_argument("--resize", type=resize, metavar="WxH",
                       help="frame size in pixels, or one number for the shorter side "
                            "(default: 160x120; Kinetics400, SSv2: 64x64; custom: 120)")
    group.add_argument("--crop", type=count, metavar="N",
                       help="crop the middle N x N pixels; 0: no crop (default: 112; Kinetics400, SSv2: 0)")
    group.add_argument("--frames", type=positive, metavar="T",
                       help="store T evenly spaced frames per video (default: all; Kinetics400, SSv2: 8)")
    group.add_argument("--quality", type=quality, default=95, help="JPEG quality, 1 to 100 (default: %(default)s)")
    group = parser.add_argument_group("splits")
    group.add_argument("--all_train", action="store_true",
                       help="HMDB51: train on every video that is not a test video, as in the paper's released list, "
                            "instead of 70 per class")
    group.add_argument("--test_ratio", type=share, default=lists.TEST_RATIO,
                       help="custom, if no folders give the split: approximate share of test videos in each class "
                            "(default: %(default)s)")
    group.add_argument("--groups", type=pattern, metavar="REGEX",
                       help="custom: regular expression for the part of a file name (or its first group) that names "
                            "the person or source; videos of one group stay in one split (default: each video alone)")
    group.add_argument("--seed", type=seed, default=0, help="custom: seed of the split (default: %(default)s)")
    return parser


def resize(text):
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither WxH, such as 160x120, nor a number of pixels")
    sides = tuple(map(int, text.split("x")))
    return sides if len(sides) == 2 else sides[0]


def quality(text):
    return number(text, int, 1, 100, "a whole number from 1 to 100")


def share(text):
    return number(text, float, 0, 0.9, "a number from 0 to 0.9")


def pattern(text):
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from None
    return text


if __name__ == "__main__":
    run_script(main, parser())
