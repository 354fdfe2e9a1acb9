"""Data sets as frame folders and lists: the table of data sets, the list readers, the frames of a clip.

Letters: T frames of a clip. Nothing here opens an image. Reading a list does not read any frame folder.
"""
import collections
import csv
import dataclasses
import functools
import pathlib
import posixpath
import warnings
from typing import Callable

import numpy as np
import pandas as pd

from distill_utils.frames import is_visible
from utils import ROOT, read_json

DATA_PATH = ROOT / "distill_utils" / "data"
LIST_COLUMNS = ("folder_name", "label", "split")
GROUP = "group"  # optional column of a list: videos of one person or source; a hold-out keeps them together
SPLITS = {"train": "train", "test": "test", "val": "validation", "validate": "validation", "validation": "validation"}
LIST = "list"  # --validation: the list's own validation videos
CLASS_LIST = "class_list.json"  # of SSv2
OUTSIDE = r"^/|^\.?$|(?:^|/)\.\.(?:/|$)|\0"  # absolute, empty, or outside the directory of the frames


# ---------------------------------------------------------------- lists: path -> table of folder, label, split

def read_table(path, columns, optional=()):
    try:
        with warnings.catch_warnings(record=True) as lost:
            warnings.simplefilter("always", pd.errors.ParserWarning)  # pandas truncates rows longer than the header
            rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
        if lost:
            refuse_long_rows(path)
    except (ValueError, csv.Error) as error:  # not text, ragged rows, or no rows
        raise ValueError(f"{path} cannot be read as a csv list ({error})") from error
    missing = [column for column in columns if column not in rows]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}: its header must name {','.join(columns)}")
    columns = [*columns, *(column for column in optional if column in rows)]
    # fillna: rows may end early. Plain strings are read twice as fast as pandas' own.
    return rows[columns].fillna("").astype(object)


def refuse_long_rows(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    for number, row in enumerate(rows, start=1):
        if any(row[len(header):]):
            raise ValueError(f"row {number} has more fields than the header: put quotes around a field with a comma")


def read_csv(path):
    return read_table(path, LIST_COLUMNS, [GROUP]).rename(columns={"folder_name": "folder"})


def read_kinetics(path):
    rows = read_table(path, ("label", "youtube_id", "time_start", "time_end", "split"))
    for times in (rows.time_start, rows.time_end):
        if len(wrong := times[~times.str.fullmatch(r"[0-9]{1,6}")]):
            raise ValueError(f"{path}, row {wrong.index[0] + 1}: {times.name} is {wrong.iloc[0]!r}, not whole seconds")
    columns = rows.split.tolist(), rows.youtube_id.tolist(), rows.time_start.tolist(), rows.time_end.tolist()
    folders = [f"{'train' if split == 'train' else 'val'}/{video}_{start:0>6}_{end:0>6}"
               for split, video, start, end in zip(*columns)]
    return pd.DataFrame({"folder": folders, "label": rows.label, "split": rows.split})


def read_ssv2(path):
    """Read annot_<split>.json and class_list.json beside it, which names the classes.

    Videos that give class numbers (the authors' files) count in the order of class_list.json.
    """
    videos, classes = read_json(path), read_json(path.with_name(CLASS_LIST))
    if not isinstance(classes, (list, dict)):
        raise ValueError(f"{path.with_name(CLASS_LIST)} is not a list of classes")
    try:
        named = ({number: name for name, number in classes.items()} if isinstance(classes, dict)
                 else dict(enumerate(classes)))
        rows = pd.DataFrame({"folder": [str(video["id"]) for video in videos],
                             "label": [str(named.get(video["class"], video["class"])) for video in videos]},
                            dtype=object)
    except (TypeError, KeyError):
        raise ValueError(f"{path} is not a list of videos with an id and a class") from None
    unknown = rows.label[~rows.label.isin(list(map(str, classes)))]
    if len(unknown):
        raise ValueError(f"{path} has the class {unknown.iloc[0]!r}, which {CLASS_LIST} beside it does not name")
    return rows.assign(split=path.stem.removeprefix("annot_"))


# ---------------------------------------------------------------- the table

@dataclasses.dataclass(frozen=True)
class DataSet:
    name: str
    root: str  # below the data path
    frames: str  # directory of the frame folders, below root
    lists: tuple  # files, below root; A|B means A, or else B
    T: int
    size: int  # pixels
    rule: str = "stride"  # or "all": the clip is spread over all stored frames
    stride: int = 4  # frames between two frames of a clip, if the video is long enough
    reader: Callable = read_csv
    K: int | None = None  # classes of the official lists
    elsewhere: str = ""  # directory to search for folders that are not where the list puts them
    frame_names: str | None = None  # glob that selects the frames among a folder's images, if names are ambiguous
    headline: str = "top1"  # or "top5": the accuracy to report
    directed: bool = False  # classes distinguish left from right: `--dsa flip` is refused
    remedy: str = "put it there, or give --data_path"


TABLE = (
    DataSet("UCF101", "UCF101", "jpegs_112", ("ucf101_splits1.csv",), T=16, size=112, K=101),
    DataSet("miniUCF101", "UCF101", "jpegs_112", ("ucf50_splits1.csv|miniucf_splits1.csv",), T=16, size=112,
            K=50),
    DataSet("HMDB51", "HMDB51", "jpegs_112", ("hmdb51_splits.csv",), T=16, size=112, K=51),
    DataSet("Kinetics400", "Kinetics", "", ("train.csv", "validate.csv"), T=8, size=64, K=400, rule="all",
            reader=read_kinetics, elsewhere="replacement", headline="top5"),
    DataSet("SSv2", "SSv2", "frame", ("annot_train.json", "annot_val.json"), T=8, size=64, K=174,
            rule="all", reader=read_ssv2, elsewhere="jpegs_112", headline="top5", directed=True),
    DataSet("toy", "toy", "jpegs_64", ("toy_splits1.csv",), T=8, size=64, K=8, stride=1,
            remedy="make it by `python -m distill_utils.toy`"),
    DataSet("custom", "", "", (), T=8, size=64),  # the user's own folder: frames and list are found in it
)
DATASETS = {dataset.name: dataset for dataset in TABLE}


def warning_of_classes(row, count, where) -> str | None:
    """Return a warning if a list has another number of classes than the DataSet `row`."""
    if row.K in (None, count):
        return None
    return f"warning: {row.name} has {row.K} classes, but {where} has {count}: is it this data set's complete list?"


def find_dataset(name):
    if name not in DATASETS:
        raise ValueError(f"--dataset {name} is unknown: choose from {', '.join(DATASETS)}")
    return DATASETS[name]


# ---------------------------------------------------------------- videos of a data set

def read_videos(dataset, data_path=None, list_path=None, frames_path=None,
                validation=0.0) -> tuple[pd.DataFrame, list[str]]:
    """Return the videos of a data set in list order, and its class names, sorted.

    The videos are a table with the columns folder (path of the frames), label (class name), split and, if the list has
    it, group. The split is "train", "test" or "validation". Validation videos are the list's own, or a share
    `validation` of each class's training videos. ValueError for a list that is missing or breaks a rule.
    """
    dataset = find_dataset(dataset)
    if dataset.name == "custom" and data_path is None:
        raise ValueError("--dataset custom needs --data_path: give the folder of its frames and its list")
    root = pathlib.Path(data_path or DATA_PATH).absolute() / dataset.root
    if list_path:
        lists = [pathlib.Path(list_path).absolute()]
    else:
        lists = [find_list(root, names.split("|")) for names in dataset.lists] or [only_list(root)]
    for path in lists:
        if not path.is_file():
            raise ValueError(f"{path}, the list of {dataset.name}, does not exist: {dataset.remedy}")
    if frames_path:
        frames = pathlib.Path(frames_path).absolute()
    else:
        frames = only_directory(root) if dataset.name == "custom" else root / dataset.frames
    beside = [path.with_name(CLASS_LIST) for path in lists]
    written = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in (*lists, *beside) if path.is_file())
    videos, class_names = read_lists(dataset, tuple(lists), frames, written, validation)
    return videos.copy(deep=False), list(class_names)


@functools.lru_cache(maxsize=1)  # a script asks several times; a list of 240,000 videos takes one second
def read_lists(dataset, lists, frames, written, validation):
    """Do the work of read_videos on these files; `written` (times, sizes) invalidates the cache when a file changes."""
    videos = pd.concat([check_list(dataset.reader(path), path) for path in lists], ignore_index=True)
    class_names = check_together(videos, " and ".join(str(path) for path in lists))
    has_own = (videos.split == "validation").any()
    if has_own and validation not in (0, LIST):
        raise ValueError(f"--validation {validation:g}: the list has its own validation videos: "
                         f"give --validation {LIST}")
    if validation == LIST and not has_own:
        raise ValueError(f"--validation {LIST}: the list has no validation videos besides the test videos: "
                         "give a share of the training videos")
    if validation and validation != LIST:
        videos = videos.assign(split=hold_out(videos, validation))
    return videos.assign(folder=f"{frames}/" + videos.folder), class_names


def hold_out(videos, share):
    """Return the splits with about a share of each class's training videos moved to "validation" (methods.md 12).

    Whole groups are moved if the list names them, else single videos. The result depends on the list and the share
    only, so that runs of any seed hold out the same videos.
    """
    train = videos[videos.split == "train"]
    groups = train[GROUP].where(train[GROUP] != "", train.folder) if GROUP in train else train.folder
    chosen = choose_groups(train.label, groups, share, seed=0)
    if not chosen:
        raise ValueError(f"--validation {share:g}: no group of training videos can be held out: the share is too "
                         "small, or a class would be left without training videos")
    return videos.split.mask(groups.isin(chosen).reindex(videos.index, fill_value=False), "validation")


def choose_groups(labels, groups, share, seed, known=None):
    """Return the names of the groups of videos to set aside; labels, groups: of each video.

    Groups are visited in random order. A group is chosen if it brings the classes closer to `share`, and if it leaves
    some videos in each of its classes. known: {group: whether it was chosen before}; these groups come first and are
    chosen again.
    """
    known = known or {}
    members, left = {}, collections.Counter(labels)
    for label, group in zip(labels, groups):
        members.setdefault(group, collections.Counter())[label] += 1
    wanting = {label: share * count for label, count in left.items()}
    chosen = set()
    for name in sorted(np.random.default_rng(seed).permutation(sorted(members)), key=lambda name: name not in known):
        counts = members[name]
        nearer = sum(abs(wanting[label] - count) - abs(wanting[label]) for label, count in counts.items())
        if known.get(name, nearer < 0) and all(left[label] > count for label, count in counts.items()):
            chosen.add(name)
            left -= counts
            wanting |= {label: wanting[label] - count for label, count in counts.items()}
    return chosen


def check_list(videos, path):
    """Return one list's videos with clean folder and split names; ValueError for a row that breaks a rule."""
    def refuse(wrong, why):
        if wrong.any():
            row = videos[wrong].iloc[0]
            raise ValueError(f"{path}, row {wrong.to_numpy().argmax() + 1}: {why.format(**row)}")

    if videos.empty:
        raise ValueError(f"{path} lists no videos")
    folders = videos.folder.tolist()
    if not folders_are_clean(folders):
        refuse(videos.folder.str.contains(OUTSIDE, regex=True),
               "the folder name {folder!r} leaves the directory of the frames")
        folders = [posixpath.normpath(name) for name in folders]
    refuse(videos.label == "", "{folder} has no label")
    plain = videos.label.str.strip()
    if (plain != videos.label).any():
        refuse((plain != videos.label) & (videos.label.groupby(plain).transform("nunique") > 1),
               "the label {label!r} differs from another one only in blanks at its ends")
    refuse(~videos.split.isin(list(SPLITS)), "the split {split!r} is unknown: choose from " + ", ".join(SPLITS))
    return videos.assign(folder=pd.Series(folders, videos.index, object), split=known_splits(videos.split))


def known_splits(splits):
    """Map the lists' split names to "train", "validation" and "test"; without test videos, validation becomes test."""
    splits = splits.map(SPLITS).astype(object)
    return splits if (splits == "test").any() else splits.replace("validation", "test")


def folders_are_clean(folders):
    """Return whether no name has an empty, hidden, `.` or `..` part; in one pass, for lists of a million names."""
    text = "\n".join(["", *folders, ""])
    return not any(odd in text for odd in ("//", "/\n", "\n/", "\n\n", "/.", "\n.", "\0"))


def check_together(videos, where):
    """Return the sorted class names; ValueError if a video is listed twice or a class has no training videos."""
    twice = videos.folder[videos.folder.duplicated()]
    if len(twice):
        raise ValueError(f"{where}: {twice.iloc[0]} is listed more than once "
                         "(a video belongs to one class and one split)")
    class_names = sorted(videos.label.unique())
    untrained = set(class_names) - set(videos.label[videos.split == "train"])
    if untrained:
        raise ValueError(f"{where}: the class {min(untrained)!r} has no training videos")
    return class_names


def find_list(root, names):
    """Return the list with one of these names, or the first name if none exists; ValueError if two differ."""
    found = [root / name for name in names if (root / name).is_file()]
    if len(found) > 1 and len({path.read_bytes() for path in found}) > 1:
        raise ValueError(f"{found[0]} and {found[1].name} beside it are different lists of one data set: "
                         "choose one by --list_path")
    return found[0] if found else root / names[0]


def only_list(root):
    check_directory(root)
    paths = [path for path in sorted(root.glob("*.csv"))
             if is_visible(path.name) and set(LIST_COLUMNS) <= header(path)]
    return single_path(paths, f"list (a csv with the columns {','.join(LIST_COLUMNS)})", root, "--list_path")


def only_directory(root):
    check_directory(root)
    paths = [path for path in sorted(root.iterdir()) if path.is_dir() and is_visible(path.name)]
    return single_path(paths, "directory of frame folders", root, "--frames_path")


def single_path(paths, what, root, flag):
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise ValueError(f"{root} should hold one {what}, but holds {found}: choose one by {flag}")
    return paths[0]


def check_directory(root):
    if not root.is_dir():
        raise ValueError(f"--data_path {root} is not a directory")


def header(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return {name.strip().strip('"') for name in file.readline().split(",")}


# ---------------------------------------------------------------- frames of a clip

def clip_positions(split, videos, clips, seed):
    """Return the start of each clip, from 0 (first valid start) to 1 (last valid start): (videos, clips) float64.

    Training: random, in list order, from a separate random stream. Testing: evenly spaced; one clip is in the middle.
    """
    if split == "train":
        return np.random.default_rng(seed).random((videos, clips))
    return np.tile(np.linspace(0, 1, clips) if clips > 1 else [0.5], (videos, 1))


def clip_frames(length, T, stride, rule, positions):
    """Return the frame numbers (n, T) of n clips of a video of `length` frames, at n `positions` in [0, 1].

    A video shorter than T frames is stretched. Rule "all" spreads the clip over the video and ignores the position.
    """
    positions = np.asarray(positions)
    if rule == "all" or length < T:
        return np.tile(np.arange(T) * length // T, (len(positions), 1))
    stride = max(1, min(stride, length // T))
    starts = length - (T - 1) * stride
    first = np.minimum(np.floor(positions * starts), starts - 1).astype(np.int64)
    return first[:, None] + stride * np.arange(T)
