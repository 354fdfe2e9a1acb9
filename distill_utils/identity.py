"""The identity of a run: the hash of its settings, list and frames. Finished runs are found by the same."""
import csv
import glob
import hashlib
import io
import itertools
import os
import pathlib
import shlex

from distill_utils.augment import NONE
from distill_utils.clips import pack_folder, relative, select
from distill_utils.datasets import DATASETS, LIST, only_directory
from distill_utils.frames import is_visible
from distill_utils.options import (
    LR_NET,
    add_temporal_options,
    add_width,
    clip_shape,
    list_videos,
    script_parser,
    selection_values,
)
from distill_utils.run import Run, read_config
from networks import WIDTH
from utils import ROOT

# Flags that do not change the result, and so do not change the run's folder.
DATA_PATHS = ("data_path", "list_path", "frames_path")
WITHOUT_EFFECT = ("save_path", "pack_path", "pack", "device", "workers", "wandb", "checkpoint_seconds", "bytes",
                  "no_test", *DATA_PATHS, "path_static", "buffer_path")  # of these paths, the content counts instead


def dataset_label(args):
    """Return the data set's name in run folders; a custom set is named after its folder."""
    return f"custom-{args.data_path.resolve().name}" if args.dataset == "custom" and args.data_path else args.dataset


def start_run(args, name, *files) -> Run:
    """Return the Run in <save_path>/<data set>/<name>_<hash of the settings, the list, the frames and `files`>."""
    check_places(args)
    settings = {key: as_setting(value) for key, value in vars(args).items()}
    settings |= {"list_digest": list_digest(args), "content_digest": content_digest(args),
                 "digest": digest(map(file_fingerprint, files))}
    return Run(settings, args.save_path / dataset_label(args), name, WITHOUT_EFFECT, args.wandb,
               args.checkpoint_seconds, args.device)


def check_places(args):
    """ValueError if packs or runs would lie beside the frames of a custom set, whose folder may hold no other."""
    if args.dataset != "custom" or args.frames_path:
        return
    frames = only_directory(args.data_path.absolute())
    root = frames.parent.resolve()
    for flag, place in (("save_path", args.save_path / dataset_label(args)),
                        ("pack_path", args.pack and pack_folder(args.pack_path))):
        if place and place.resolve().is_relative_to(root):
            first = place.resolve().relative_to(root).parts[:1]
            if first and is_visible(first[0]) and first[0] != frames.name:
                raise ValueError(f"--{flag}: {place} would lie in --data_path, which may hold no folder besides that of "
                                 f"the frames: give another --{flag}, or --frames_path {frames}")


def as_setting(value):
    return str(value.resolve()) if isinstance(value, pathlib.Path) else value


def digest(contents):
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def list_digest(args):
    """Digest of the list's labels, splits and folders, independent of where the folders are."""
    videos, _ = list_videos(args)
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows([
        videos.columns, *zip(relative(videos.folder), *(videos[name] for name in videos.columns[1:]))])
    return digest([rows.getvalue().encode()])


def content_digest(args):
    """Digest of the training and test frames, and of the list's validation frames if the run uses them.

    It distinguishes data sets with the same list.
    """
    splits = list_videos(args)[0].split.unique()
    return "-".join(select(args.dataset, split=split, **selection_values(args)).content(args.pack_path)
                    for split in ("train", "test", *(["validation"] if args.validation == LIST else []))
                    if split in splits)


def file_fingerprint(path, size=2 ** 20):
    """Return bytes that identify a large file quickly: its size and last MB, where torch.save puts the checksums."""
    with open(path, "rb") as file:
        file.seek(max(0, os.stat(path).st_size - size))
        return str(os.stat(path).st_size).encode() + file.read()


def find_run(args, name, same, wanted, launcher, flag) -> pathlib.Path:
    """Return the folder of the finished run `name`_<hash> with the same list, frames and settings `same`.

    If there is none, ValueError gives the command that makes it, including the data paths, which do not change the
    data.
    Of several runs that learned by the same settings and differ in their evaluation only, the one most like this run
    is taken.

    wanted: description of the run; launcher: first words of its command; flag: the flag that gives a folder or file
    instead.
    """
    folder, mine, defaults = args.save_path / dataset_label(args), vars(args), script_parser("")
    digests = {"list_digest": list_digest(args), "content_digest": content_digest(args)}
    add_temporal_options(defaults)
    add_width(defaults)
    places = (args.save_path, ROOT / "results")  # a study has its own folder, but uses the experts of all
    labels = (glob.escape(folder.name), *(["custom-*"] if args.dataset == "custom" else []))  # it may have been renamed
    for place, label in itertools.product(places, labels):
        found = [path.parent for path in sorted(place.glob(f"{label}/{name}_*/result.json"))
                 if not differing_settings(args, path.parent, same, digests)]
        if found:
            break
    if not found:
        given = [word for key in (*same, "save_path") if mine[key] != defaults.get_default(key)
                 for word in (f"--{key}", str(mine[key]))]
        raise ValueError(f"no finished {wanted} for these data in {folder}: "
                         f"run `{shlex.join(launcher + given)}` first, or give {flag}")
    chosen = [read_config(each / "config.json")["chosen"] for each in found]
    names, own = set().union(*chosen) - {*EVALUATION_SETTINGS}, default_settings(args.dataset)
    learned = [[own.get(name) if each.get(name) is None else each[name] for name in sorted(names)] for each in chosen]
    differing = [len(differing_settings(args, each, EVALUATION_SETTINGS, digests)) for each in found]
    nearest = [each for each, number in zip(found, differing) if number == min(differing)]
    if any(each != learned[0] for each in learned) or len(nearest) > 1:
        raise ValueError(f"several finished runs have a matching {wanted}: choose one by {flag}: "
                         f"{', '.join(map(str, found))}")
    if len(found) > 1:
        print(f"{len(found)} finished runs have a matching {wanted}; the one most like this run is {nearest[0]}")
    return nearest[0]


# Settings that change the evaluation of experts and static memories, but hardly what these learn.
EVALUATION_SETTINGS = ("precision", "compile", "width", "test_clips", "network", "num_eval", "epoch_eval_train",
                       "eval_it", "eval_protocol", "ipc", "frames")  # the last two: of static memories


def default_settings(dataset):
    """Return the defaults of settings that are missing or null in a config.json."""
    row = DATASETS[dataset]
    return {"frames": row.T, "size": row.size, "stride": row.stride, "segments": 1, "width": WIDTH, "validation": 0.0,
            "dsa": NONE, "mirror": 0.5, "network": "ConvNet3D", "lr_net": LR_NET, "eval_protocol": "standard"}


def differing_settings(args, folder, same, digests=None) -> list[str]:
    """Return which of the settings `same`, "list" and, if known, "content" differ from those of the run in `folder`.

    None stands for the data set's default. Data paths count only if the run is of an older version without a content
    digest. digests: of the list and of the content; None: only that of the list is compared.
    """
    made, (_, size) = read_config(folder / "config.json")["settings"], clip_shape(args)
    mine = vars(args) | (digests or {"list_digest": list_digest(args)})
    own = default_settings(args.dataset) | {"static_size": size}

    def value(settings, key):
        return own.get(key) if settings.get(key) is None else as_setting(settings[key])
    left_out = DATA_PATHS if digests and "content_digest" in made else ("content_digest",)
    return [key.removesuffix("_digest") for key in (*same, "list_digest", "content_digest")
            if key not in left_out and value(mine, key) != value(made, key)]
