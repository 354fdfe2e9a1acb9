"""Which videos a data set has: the lists that it officially ships, or the folders of one's own; and our lists of what was prepared.

A table of videos has the columns video (its name in the official list), folder (of its frames, below the frames' directory), label and
split ("train", "validation" or "test").
"""
import fnmatch
import os
import pathlib
import re
import unicodedata

import numpy as np
import pandas as pd

from distill_utils.datasets import CLASS_LIST, GROUP, LIST_COLUMNS, SPLITS, check_together, checked, choose_groups, known_splits, read_kinetics, read_table
from distill_utils.frames import is_visible
from utils import atomic_write, read_json, save_json

TEST_RATIO = 0.3  # of one's own videos
SPLIT_FOLDERS = {**SPLITS, "trn": "train", "training": "train", "tst": "test", "testing": "test", "valid": "validation", "dev": "validation",
                 "eval": "validation", "evaluation": "validation"}
SUFFIXES = (".avi", ".divx", ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf",
            ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".ogg", ".unknown_video")  # of videos
PREPARED = "prepared.json"  # stands beside our own lists
FORMAT = 2  # of prepared frames: counted up when the same videos are stored otherwise
KINETICS_COLUMNS = ["label", "youtube_id", "time_start", "time_end", "split"]
MINI_UCF101 = (  # the 50 classes
    "ApplyEyeMakeup", "BalanceBeam", "BandMarching", "BaseballPitch", "Basketball", "BasketballDunk", "Biking", "Billiards",
    "BlowingCandles", "Bowling", "BreastStroke", "CleanAndJerk", "CliffDiving", "CricketShot", "Diving", "FloorGymnastics",
    "FrisbeeCatch", "GolfSwing", "HammerThrow", "HighJump", "HorseRace", "HorseRiding", "HulaHoop", "IceDancing", "JumpingJack",
    "Knitting", "MilitaryParade", "Mixing", "ParallelBars", "PlayingPiano", "PlayingViolin", "PoleVault", "PommelHorse", "Punch",
    "Rafting", "Rowing", "SkateBoarding", "Skiing", "Skijet", "SkyDiving", "SoccerPenalty", "StillRings", "SumoWrestling",
    "Surfing", "Swing", "TennisSwing", "TrampolineJumping", "UnevenBars", "VolleyballSpiking", "WritingOnBoard")


# ---------------------------------------------------------------- official lists: folder -> {name of our list: its videos}

def ucf101(lists, name="ucf101_splits{}.csv", classes=None):
    """trainlist0N.txt, testlist0N.txt, classInd.txt; `classes` are those to keep."""
    known = [line.split()[-1] for line in read_lines(find(lists, "classInd.txt"))]
    ours = {}
    for number in (1, 2, 3):
        if number > 1 and not find(lists, f"trainlist0{number}.txt", needed=False):
            continue
        parts = []
        for split in ("train", "test"):
            path = find(lists, f"{split}list0{number}.txt")
            names = [re.fullmatch(r"(.+?)(\s+\d+)?", line)[1] for line in read_lines(path)]  # the training list gives the class's number, too
            parts.append(table([(name, name.partition("/")[0], split) for name in names], path))
        videos = together(parts, f"{path.parent}, split {number}")
        unknown = videos.label[~videos.label.isin(known)]
        if len(unknown):
            raise ValueError(f"{path.parent}: classInd.txt does not name the class {unknown.iloc[0]!r} of split {number}")
        groups = videos.folder.str.extract(r"^(.+_g\d+)_c\d+$")[0]       # v_Biking_g01_c02: the same people in all clips of g01
        videos = videos.assign(group=groups.fillna(videos.folder))
        ours[name.format(number)] = videos if classes is None else videos[videos.label.isin(classes)]
    return ours


def mini_ucf101(lists):
    ours = ucf101(lists, "ucf50_splits{}.csv", MINI_UCF101)
    for name, videos in ours.items():
        if videos.empty:
            raise ValueError(f"{lists}: none of miniUCF101's 50 classes is in the lists for {name}")
    return ours


def hmdb51(lists, all_train=False):
    """<class>_test_split<N>.txt: 1 trains, 2 tests, 0 does neither, or trains with `all_train`."""
    splits = {"1": "train", "2": "test", **({"0": "train"} if all_train else {})}
    ours = {}
    for number, name in ((1, "hmdb51_splits.csv"), (2, "hmdb51_splits2.csv"), (3, "hmdb51_splits3.csv")):
        paths = official(lists, f"*_test_split{number}.txt")
        if number == 1 and not paths:
            raise ValueError(f"{lists} holds no <class>_test_split1.txt: give HMDB51's lists by --lists")
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
            ours[name] = together(parts, f"{lists}, split {number}")
    return ours


def kinetics(lists):
    ours = {}
    for name, names in (("train.csv", ("train.csv",)), ("validate.csv", ("validate.csv", "val.csv"))):
        path = find(lists, *names)
        videos, official = checked(read_kinetics(path), path), read_table(path, KINETICS_COLUMNS)
        ours[name] = videos.assign(video=[os.path.basename(folder) for folder in videos.folder], official_split=official.split,
                                   **{column: official[column] for column in KINETICS_COLUMNS[1:4]})
    together(ours.values(), str(path.parent))
    return ours


def ssv2(lists):
    """something-something-v2-{train,validation,labels}.json, or the newer release's {train,validation,labels}.json."""
    prefix = "something-something-v2-"
    path = find(lists, f"{prefix}labels.json", "labels.json")
    classes = read_json(path)
    if not isinstance(classes, (dict, list)):
        raise ValueError(f"{path} is not a list of classes")
    ours = {}
    for name, split in (("annot_train.json", "train"), ("annot_val.json", "validation")):
        path = find(lists, f"{prefix}{split}.json", f"{split}.json")
        try:
            videos = pd.DataFrame([(str(video["id"]), re.sub(r"[\[\]]", "", video["template"])) for video in read_json(path)],
                                  columns=["folder", "label"])
        except (TypeError, KeyError):
            raise ValueError(f"{path} is not a list of videos with an id and a template") from None
        unknown = videos.label[~videos.label.isin(list(classes))]
        if len(unknown):
            raise ValueError(f"{path} has the class {unknown.iloc[0]!r}, which the labels beside it do not name")
        ours[name] = checked(videos.assign(split=split, video=videos.folder), path)
    together(ours.values(), str(path.parent))
    return ours


def table(rows, path):
    """Checked videos from (name in the official list, label, split)."""
    videos = checked(pd.DataFrame(rows, columns=["folder", "label", "split"]), path)
    return videos.assign(video=videos.folder, folder=[pathlib.PurePosixPath(name).stem for name in videos.folder])


def together(parts, where):
    videos = pd.concat(parts, ignore_index=True)
    check_together(videos, where)
    return videos


def find(lists, *names, needed=True):
    """The one file of one of these names below the folder `lists`, however deep."""
    for name in names:
        paths = official(lists, name)
        if len(paths) > 1:
            raise ValueError(f"several files are called {name}: name one of their folders by --lists: {', '.join(map(str, paths))}")
        if paths:
            return paths[0]
    if needed:
        raise ValueError(f"{lists} holds no {' or '.join(names)}: give the folder of the official lists by --lists")


def official(lists, name):
    """Files of this name at any depth, without those that were written beside prepared frames."""
    return [path for path in sorted(files_below(lists)) if fnmatch.fnmatchcase(path.name, name) and not path.with_name(PREPARED).exists()]


def read_lines(path):
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error})") from error


# ---------------------------------------------------------------- a folder of one's own

def custom(folder, name, pattern=None, ratio=TEST_RATIO, seed=0):
    """A folder per class, of video files at any depth: {name: videos}. Split as folders train, test and val above or below the classes say, or by groups.

    pattern: a regular expression whose first group, or else its whole match, in a file's name names the video's group, so that clips of
    one person or source stay on one side; without it each video is a group. ratio: the share of test videos of each class, about.
    """
    paths = [path.relative_to(folder) for path in video_files(folder)]
    if not paths:
        raise ValueError(f"{folder} holds no video file ({', '.join(SUFFIXES)}) below a folder per class")
    level = split_level(paths, folder)
    rows = []
    for path in paths:
        if len(path.parts) == 1:
            raise ValueError(f"{folder / path} is in no class: {folder} should hold a folder per class")
        split = "train" if level is None else split_of(path.parts[level])
        rows.append((path.as_posix(), path.with_suffix("").as_posix(), path.parts[int(level == 0)], group(path, pattern), split))
    videos = pd.DataFrame(rows, columns=["video", "folder", "label", "group", "split"])
    twice = videos[videos.folder.duplicated(keep=False)].video.tolist()
    if twice:
        raise ValueError(f"{twice[0]} and {twice[1]} differ in their suffix only: rename one")
    folders = set(videos.folder)
    for inner in videos.folder:
        if above := folders & {parent.as_posix() for parent in pathlib.PurePosixPath(inner).parents}:
            raise ValueError(f"the video {min(above)} and the folder of the video {inner} have the same name: rename one")
    if videos.label.nunique() == 1:
        raise ValueError(f"{folder} holds one class only, {rows[0][2]!r}: give the folder that holds a folder per class")
    if (videos.split != "train").any():
        if (ratio, seed) != (TEST_RATIO, 0):
            raise ValueError(f"--test_ratio and --seed are for folders that are not split: {folder} is, by folders called {' and '.join(sorted(set(videos.split)))}")
        videos = videos.assign(split=known_splits(videos.split))
    else:
        test = choose_groups(videos.label, videos.group, ratio, seed)
        if ratio and not test:
            raise ValueError("no group of videos can be set apart for testing without leaving a class untrained")
        videos = videos.assign(split=np.where(videos.group.isin(test), "test", "train"))
    return {name: videos if pattern else videos.drop(columns=GROUP)}


def split_level(paths, folder):
    """Whether the folders below `folder` are splits (0), those below them (1), or none (None); ValueError where that is not certain."""
    for level in (0, 1):
        names = {path.parts[level] for path in paths if len(path.parts) > level + 1}
        splits, others = {name for name in names if split_of(name)}, sorted(name for name in names if not split_of(name))
        odd = [*(path for path in paths if len(path.parts) < 3), *others]
        if set(map(split_of, splits)) == {"train"} and not odd:
            return level
        if len(set(map(split_of, splits))) > 1:
            if odd or "train" not in map(split_of, splits):
                raise ValueError(f"{folder} seems to be split by folders called {' and '.join(sorted(splits))}, but "
                                 + (f"{odd[0]} has no place in that: move it away, or rename" if odd else "none is for training"))
            return level


def split_of(name):
    """The split that a folder of this name is for, or None."""
    return SPLIT_FOLDERS.get(re.sub(r"[ _-]*(set|data|split|videos|clips)$", "", name.lower()))


def group(path, pattern):
    if pattern is None:
        return path.as_posix()
    found = re.search(pattern, path.name)
    name = found and found[1 if found.re.groups else 0]
    if not name:
        raise ValueError(f"--groups {pattern} finds no group in the file name {path.name}")
    return name


def video_files(folder):
    """Those of files_below with a video's suffix. ValueError for a name that no list can hold."""
    paths = [path for path in files_below(folder) if path.name.lower().endswith(SUFFIXES)]
    for path in paths:
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # bytes that are no UTF-8, as Python holds them
            raise ValueError(f"{os.fsencode(path)!r} is no name in UTF-8: rename it")
    return paths


def find_files(videos, source):
    """{video: its files at any depth of `source`}: where several have the name, first one in the listed folder, last those of replacements.

    Files go by their plain_name; one whose name differs in capitals is taken where no other fits and it is no other video's.
    """
    wanted = set(map(plain_name, videos.video))
    exact, near = {}, {}
    for path in files_below(source):
        name = plain_name(path.name)
        if name in wanted:
            exact.setdefault(name, []).append(path)
        elif path.name.lower().endswith(SUFFIXES):
            near.setdefault(name.casefold(), []).append(path)

    def order(video):
        return lambda path: (not path.as_posix().endswith("/" + video), any("replacement" in part for part in path.parts),
                             path.stem != os.path.basename(video), path)
    names = {video: plain_name(video) for video in videos.video}
    return {video: sorted(exact.get(name) or near.get(name.casefold(), ()), key=order(video)) for video, name in names.items()}


def plain_name(path):
    """A video's name: without suffixes, also those that downloaders add (abc.mp4.mkv, abc.f137.mp4), and with times in six digits as Kinetics' own."""
    name = unicodedata.normalize("NFC", os.path.basename(path))  # macOS takes letters and their accents apart
    while (parts := os.path.splitext(name))[1].lower() in SUFFIXES or re.fullmatch(r"\.f\d+(-\w+)?", parts[1]):
        name = parts[0]
    return re.sub(r"_(\d{1,6})_(\d{1,6})$", lambda times: f"_{times[1]:0>6}_{times[2]:0>6}", name)


def files_below(folder):
    """Yield the paths of the visible files below `folder`, sorted; links are followed. OSError for a folder that cannot be read."""
    def refuse(error):
        raise error

    seen = set()
    for directory, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(filter(is_visible, folders))
        if (real := os.path.realpath(directory)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        yield from (pathlib.Path(directory, name) for name in sorted(filter(is_visible, names)))


# ---------------------------------------------------------------- our lists

def write_csv(videos, path):
    rows = videos.assign(folder_name=videos.folder)[[*LIST_COLUMNS, *([GROUP] if GROUP in videos else [])]]
    with atomic_write(path, "w") as file:
        rows.to_csv(file, index=False)


def write_kinetics(videos, path):
    with atomic_write(path, "w") as file:
        videos.assign(split=videos.official_split)[KINETICS_COLUMNS].to_csv(file, index=False)


def write_ssv2(videos, path):
    """The list, and class_list.json beside it: the classes of the training list, which is written first."""
    save_json([{"id": folder, "class": label} for folder, label in zip(videos.folder, videos.label)], path)
    if path.name == "annot_train.json":
        save_json(sorted(videos.label.unique()), path.with_name(CLASS_LIST))
