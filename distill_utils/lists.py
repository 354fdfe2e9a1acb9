"""Read the official lists of a data set, or the user's own folders; write our lists of prepared videos.

A table of videos has the columns video (name in the official list), folder (of its frames, relative to the directory of
the frames), label and split ("train", "validation" or "test").
"""
import collections
import fnmatch
import os
import pathlib
import re

import numpy as np
import pandas as pd

from distill_utils.datasets import (
    CLASS_LIST,
    GROUP,
    LIST_COLUMNS,
    SPLITS,
    check_list,
    check_together,
    choose_groups,
    known_splits,
    read_csv,
    read_kinetics,
    read_table,
)
from distill_utils.frames import files_below, is_visible
from distill_utils.video_files import SUFFIXES, video_files
from utils import atomic_write, read_json, save_json

TEST_RATIO = 0.3  # of the user's own videos
SPLIT_FOLDERS = {**SPLITS, "trn": "train", "training": "train", "tst": "test", "testing": "test", "valid": "validation",
                 "dev": "validation", "eval": "validation", "evaluation": "validation"}
PREPARED = "prepared.json"  # lies beside our own lists
FORMAT = 2  # of prepared frames: increase it when the same videos are stored differently
KINETICS_COLUMNS = ["label", "youtube_id", "time_start", "time_end", "split"]
MINI_UCF101 = (  # the 50 classes
    "ApplyEyeMakeup", "BalanceBeam", "BandMarching", "BaseballPitch", "Basketball", "BasketballDunk", "Biking",
    "Billiards", "BlowingCandles", "Bowling", "BreastStroke", "CleanAndJerk", "CliffDiving", "CricketShot", "Diving",
    "FloorGymnastics", "FrisbeeCatch", "GolfSwing", "HammerThrow", "HighJump", "HorseRace", "HorseRiding", "HulaHoop",
    "IceDancing", "JumpingJack", "Knitting", "MilitaryParade", "Mixing", "ParallelBars", "PlayingPiano",
    "PlayingViolin", "PoleVault", "PommelHorse", "Punch", "Rafting", "Rowing", "SkateBoarding", "Skiing", "Skijet",
    "SkyDiving", "SoccerPenalty", "StillRings", "SumoWrestling", "Surfing", "Swing", "TennisSwing",
    "TrampolineJumping", "UnevenBars", "VolleyballSpiking", "WritingOnBoard")


# ---------------------------------------------------------------- official lists: folder -> {name of our list: videos}

def ucf101(lists, name="ucf101_splits{}.csv", classes=None):
    """Read trainlist0N.txt, testlist0N.txt and classInd.txt; keep only `classes`, if given."""
    known = [line.split()[-1] for line in read_lines(find(lists, "classInd.txt"))]
    ours = {}
    for number in (1, 2, 3):
        if number > 1 and not find(lists, f"trainlist0{number}.txt", needed=False):
            continue
        parts = []
        for split in ("train", "test"):
            path = find(lists, f"{split}list0{number}.txt")
            # The training list also gives the class number.
            names = [re.fullmatch(r"(.+?)(\s+\d+)?", line)[1] for line in read_lines(path)]
            parts.append(table([(name, name.partition("/")[0], split) for name in names], path))
        videos = concat_checked(parts, f"{path.parent}, split {number}")
        unknown = videos.label[~videos.label.isin(known)]
        if len(unknown):
            raise ValueError(f"{path.parent}: classInd.txt does not name the class {unknown.iloc[0]!r} "
                             f"of split {number}")
        # v_Biking_g01_c02: all clips of g01 show the same people.
        groups = videos.folder.str.extract(r"^(.+_g\d+)_c\d+$")[0]
        videos = videos.assign(group=groups.fillna(videos.folder))
        ours[name.format(number)] = videos if classes is None else videos[videos.label.isin(classes)]
    return ours


def mini_ucf101(lists):
    ours = ucf101(lists, "ucf50_splits{}.csv", MINI_UCF101)
    for name, videos in ours.items():
        if videos.empty:
            raise ValueError(f"{lists}: the lists for {name} contain none of miniUCF101's 50 classes")
    return ours


def hmdb51(lists, all_train=False):
    """Read <class>_test_split<N>.txt: 1 is training, 2 is test, 0 is unused, or training with `all_train`."""
    splits = {"1": "train", "2": "test", **({"0": "train"} if all_train else {})}
    ours = {}
    for number, name in ((1, "hmdb51_splits.csv"), (2, "hmdb51_splits2.csv"), (3, "hmdb51_splits3.csv")):
        paths = official(lists, f"*_test_split{number}.txt")
        if number == 1 and not paths:
            raise ValueError(f"{lists} holds no <class>_test_split1.txt: give HMDB51's lists by --lists")
        if len({path.name for path in paths}) < len(paths):
            raise ValueError(f"{lists} holds several copies of HMDB51's lists: give the folder of one by --lists")
        parts = []
        for path in paths:
            rows = []
            for line in read_lines(path):
                video, _, use = line.rpartition(" ")
                if use not in ("0", "1", "2"):
                    raise ValueError(f"{path}: the line {line!r} does not end in 0, 1 or 2")
                if use in splits:
                    rows.append((video.rstrip(), path.name.removesuffix(f"_test_split{number}.txt"), splits[use]))
            parts.append(table(rows, path))
        if parts:
            ours[name] = concat_checked(parts, f"{lists}, split {number}")
    return ours


def kinetics(lists):
    ours = {}
    for name, names in (("train.csv", ("train.csv", "kinetics_train.csv")),
                        ("validate.csv", ("validate.csv", "val.csv", "kinetics_val.csv"))):
        path = find(lists, *names)
        videos, official = check_list(read_kinetics(path), path), read_table(path, KINETICS_COLUMNS)
        ours[name] = videos.assign(video=[os.path.basename(folder) for folder in videos.folder],
                                   official_split=official.split,
                                   **{column: official[column] for column in KINETICS_COLUMNS[1:4]})
    concat_checked(ours.values(), str(path.parent))
    return ours


def ssv2(lists):
    """Read something-something-v2-{train,validation,labels}.json, or {train,validation,labels}.json (newer release)."""
    prefix = "something-something-v2-"
    path = find(lists, f"{prefix}labels.json", "labels.json")
    classes = read_json(path)
    if not isinstance(classes, (dict, list)):
        raise ValueError(f"{path} is not a list of classes")
    ours = {}
    for name, split in (("annot_train.json", "train"), ("annot_val.json", "validation")):
        path = find(lists, f"{prefix}{split}.json", f"{split}.json")
        try:
            videos = pd.DataFrame([(str(video["id"]), re.sub(r"[\[\]]", "", video["template"]))
                                   for video in read_json(path)],
                                  columns=["folder", "label"])
        except (TypeError, KeyError):
            raise ValueError(f"{path} is not a list of videos with an id and a template") from None
        unknown = videos.label[~videos.label.isin(list(classes))]
        if len(unknown):
            raise ValueError(f"{path} has the class {unknown.iloc[0]!r}, which the labels beside it do not name")
        ours[name] = check_list(videos.assign(split=split, video=videos.folder), path)
    concat_checked(ours.values(), str(path.parent))
    return ours


def table(rows, path):
    """Return checked videos from rows of (name in the official list, label, split)."""
    videos = check_list(pd.DataFrame(rows, columns=["folder", "label", "split"]), path)
    return videos.assign(video=videos.folder, folder=[pathlib.PurePosixPath(name).stem for name in videos.folder])


def concat_checked(parts, where):
    videos = pd.concat(parts, ignore_index=True)
    check_together(videos, where)
    return videos


def find(lists, *names, needed=True):
    """Return the only file with the first of these names that occurs at any depth below the folder `lists`.

    If none occurs: ValueError, or None without `needed`.
    """
    for name in names:
        paths = official(lists, name)
        if len(paths) > 1:
            raise ValueError(f"several files are called {name}: give the folder of one of them by --lists: "
                             f"{', '.join(map(str, paths))}")
        if paths:
            return paths[0]
    if needed:
        raise ValueError(f"{lists} holds no {' or '.join(names)}: give the folder of the official lists by --lists")


def official(lists, name):
    """Return the files with this name at any depth, except lists that were written beside prepared frames.

    Only csv lists are skipped: no official file has the name of another file that is written (SSv2's json).
    """
    return [path for path in sorted(files_below(lists)) if fnmatch.fnmatchcase(path.name, name)
            and not (path.suffix == ".csv" and path.with_name(PREPARED).exists())]


def read_lines(path):
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error})") from error


# ---------------------------------------------------------------- the user's own folders

def custom(folder, name, pattern=None, ratio=TEST_RATIO, seed=0, out=None, sides=None):
    """Return {name: videos} for one folder per class, with video files at any depth.

    Folders called train, test and val, above or below the class folders, give the split. Without them, groups are
    drawn at random for testing.
    pattern: a regular expression on file names. Its first group, or else its whole match, names the group of a video,
    so that clips of one person or source stay in one split. Without a pattern each video is a group.
    ratio: the approximate share of test videos in each class.
    out: folder of prepared frames, if it may lie in `folder`.
    sides: {folder of frames: its split in an earlier list}, which is kept, so that no video changes sides when others
    are added.
    """
    paths = [path.relative_to(folder) for path in video_files(folder)]
    if not paths:
        raise ValueError(f"{folder} holds no video files ({', '.join(SUFFIXES)}): "
                         "give a folder that holds one folder per class")
    level = split_level(paths, folder)
    rows = []
    for path in paths:
        if len(path.parts) == 1:
            raise ValueError(f"{folder / path} belongs to no class: {folder} should hold one folder per class")
        split = "train" if level is None else split_of(path.parts[level])
        rows.append((path.as_posix(), path.with_suffix("").as_posix(), path.parts[int(level == 0)],
                     group(path, pattern), split))
    tell_what_is_left_out(folder, level, {label for _, _, label, _, _ in rows}, out)
    videos = pd.DataFrame(rows, columns=["video", "folder", "label", "group", "split"])
    twice = videos[videos.folder.duplicated(keep=False)].video.tolist()
    if twice:
        raise ValueError(f"{twice[0]} and {twice[1]} differ only in their suffix: rename one")
    folders = set(videos.folder)
    for inner in videos.folder:
        if above := folders & {parent.as_posix() for parent in pathlib.PurePosixPath(inner).parents}:
            raise ValueError(f"the video {min(above)} and the folder of the video {inner} have the same name: "
                             "rename one")
    if videos.label.nunique() == 1:
        raise ValueError(f"{folder} holds only one class, {rows[0][2]!r}: "
                         "give the folder that holds one folder per class")
    if (videos.split != "train").any():
        if (ratio, seed) != (TEST_RATIO, 0):
            raise ValueError("--test_ratio and --seed are for folders that are not split: "
                             f"{folder} is split by folders called {' and '.join(sorted(set(videos.split)))}")
        videos = videos.assign(split=known_splits(videos.split))
    else:
        sides = sides or {}
        tested = {row.label for row in videos.itertuples() if sides.get(row.folder) == "test"}
        known = {row.group: sides[row.folder] == "test" for row in videos.itertuples()
                 if row.folder in sides and row.label in tested}  # a class without test videos is drawn anew
        test = choose_groups(videos.label, videos.group, ratio, seed, known)
        if ratio and not test:
            raise ValueError("no group of videos can be set aside for testing without leaving a class without "
                             "training videos")
        videos = videos.assign(split=np.where(videos.group.isin(test), "test", "train"))
        moved = [row.folder for row in videos.itertuples() if sides.get(row.folder, row.split) != row.split]
        if moved:
            print(f"{len(moved)} videos are on the other side of the split now, the first: {moved[0]}: sets that were "
                  "learned before may know test videos")
    return {name: videos if pattern else videos.drop(columns=GROUP)}


def earlier_sides(root, name, flags):
    """Return {folder: split} of the list `name` if prepare made it by the same flags, else {}."""
    made = read_json(root / PREPARED) if (root / PREPARED).is_file() else None
    if not isinstance(made, dict) or not (root / name).is_file():
        return {}
    if "split" not in made:
        print(f"{root / name} is of an older version, or of a killed run: the split is drawn anew")
    if made.get("split") != flags:
        return {}
    rows = read_csv(root / name)
    return dict(zip(rows.folder, rows.split))


def record_split(root, flags):
    """Record by which flags the list beside it was split; None: not known."""
    made = {name: value for name, value in read_json(root / PREPARED).items() if name != "split"}
    save_json(made | ({"split": flags} if flags else {}), root / PREPARED)


def tell_what_is_left_out(folder, level, classes, out):
    """Print the class folders without videos and the number of other files; ValueError for a link to nothing.

    out: the folder of the prepared frames, which is left out without a word.
    """
    folder, out = pathlib.Path(os.path.realpath(folder)), out and pathlib.Path(os.path.realpath(out))
    prepared = (out, *out.parents) if out else ()
    above = [folder] if level != 0 else [path for path in folder.iterdir() if path.is_dir() and split_of(path.name)]
    empty = sorted({path.name for place in above for path in place.iterdir() if path.is_dir() and is_visible(path.name)
                    and path not in prepared and not (level == 1 and split_of(path.name))} - classes)
    if empty:
        print(f"class folders without videos, left out: {len(empty)} ({', '.join(empty[:10])}"
              f"{' …' if len(empty) > 10 else ''})")
    others = [path for path in files_below(folder)
              if not path.name.lower().endswith(SUFFIXES) and out not in path.parents]
    for path in others:
        if path.is_symlink() and not path.exists() and not re.fullmatch(r"\.[A-Za-z]\w{1,4}", path.suffix):
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist: mount its disk, or "
                             "delete the link")
    if others:
        counts = collections.Counter(path.suffix.lower() or path.name for path in others).most_common(5)
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in counts)
        print(f"files other than videos, left out: {len(others)} ({kinds})")


def split_level(paths, folder):
    """Return the level of the split folders: 0 directly in `folder`, 1 below those, or None; ValueError if unclear."""
    for level in (0, 1):
        names = {path.parts[level] for path in paths if len(path.parts) > level + 1}
        splits, others = ({name for name in names if split_of(name)},
                          sorted(name for name in names if not split_of(name)))
        odd = [*(path for path in paths if len(path.parts) < 3), *others]
        if set(map(split_of, splits)) == {"train"} and not odd:
            return level
        if len(set(map(split_of, splits))) > 1:
            if odd or "train" not in map(split_of, splits):
                raise ValueError(f"{folder} seems to be split by folders called {' and '.join(sorted(splits))}, but "
                                 + (f"{odd[0]} does not fit: move it away, or rename it" if odd
                                    else "none of them is for training"))
            return level


def split_of(name):
    """Return the split that this folder name stands for, or None."""
    return SPLIT_FOLDERS.get(re.sub(r"[ _-]*(set|data|split|videos|clips)$", "", name.lower()))


def group(path, pattern):
    if pattern is None:
        return path.as_posix()
    found = re.search(pattern, path.name)
    name = found and found[1 if found.re.groups else 0]
    if not name:
        raise ValueError(f"--groups {pattern} does not match the file name {path.name}")
    return name


# ---------------------------------------------------------------- our lists

def write_csv(videos, path):
    rows = videos.assign(folder_name=videos.folder)[[*LIST_COLUMNS, *([GROUP] if GROUP in videos else [])]]
    with atomic_write(path, "w") as file:
        rows.to_csv(file, index=False)


def write_kinetics(videos, path):
    with atomic_write(path, "w") as file:
        videos.assign(split=videos.official_split)[KINETICS_COLUMNS].to_csv(file, index=False)


def write_ssv2(videos, path):
    """Write the list, and class_list.json beside it with the classes of the training list, which is written first."""
    save_json([{"id": folder, "class": label} for folder, label in zip(videos.folder, videos.label)], path)
    if path.name == "annot_train.json":
        save_json(sorted(videos.label.unique()), path.with_name(CLASS_LIST))
