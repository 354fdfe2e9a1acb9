"""Frame folders: find the images that are a video's frames, order them, read them as RGB, and digest them."""
import fnmatch
import glob
import hashlib
import os
import pathlib
import re
import string
import warnings

import numpy as np
from PIL import Image, ImageOps

from distill_utils.workers import in_threads
from utils import json_digest

IMAGES = (".jpg", ".jpeg", ".png")
RGB = {"img", "image", "images", "frame", "frames", "rgb", "color", "colour"}  # words in names; not flow, depth, masks
METADATA = {"__macosx", "lost+found", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
            "@eadir", "#recycle", "@recycle", "@recently-snapshot"}  # of macOS, Linux, Windows; Synology, QNAP storage
SAMPLE = 64  # videos
ORIENTATION = 0x0112  # EXIF tag

warnings.filterwarnings("ignore", "Corrupt EXIF data")  # the image is readable nevertheless


def is_visible(name):
    """Return whether a file or folder name is user data: not hidden, and not metadata of an operating system."""
    return not name.startswith(".") and name.lower() not in METADATA


def files_below(folder, strict=True):
    """Yield the paths of visible files below `folder`, sorted; follow links.

    strict: OSError for an unreadable folder; otherwise it is left out.
    """
    def refuse(error):
        raise error

    seen = set()
    for directory, folders, names in os.walk(folder, followlinks=True, onerror=refuse if strict else None):
        folders[:] = sorted(filter(is_visible, folders))
        if (real := os.path.realpath(directory)) in seen:  # by a link, which may lead to a folder above
            folders.clear()
            continue
        seen.add(real)
        yield from (pathlib.Path(directory, name) for name in sorted(filter(is_visible, names)))


# ---------------------------------------------------------------- where the frames are

def find_folders(folders, elsewhere=""):
    """Return the folders as on disk, some in the sibling directory `elsewhere`; ValueError if one is missing."""
    found = in_threads(lambda folder: find_folder(folder, elsewhere), folders)
    missing = [folder for folder, there in zip(folders, found) if there is None]
    if missing:
        raise ValueError(f"the frame folder {missing[0]} does not exist "
                         f"({len(missing)} of {len(found)} folders of the list are missing)")
    return found


def find_folder(folder, elsewhere=""):
    """Return the folder, or its namesake in `elsewhere` if it is missing or empty; None if both are missing."""
    if elsewhere and not (os.path.isdir(folder) and os.listdir(folder)):
        directory, name = os.path.split(folder)
        other = os.path.join(os.path.dirname(directory), elsewhere, name)
        if os.path.isdir(other):
            return other
    return folder if os.path.isdir(folder) else None


# ---------------------------------------------------------------- which files, in which order

def frame_names(folder, pattern=None) -> list[str]:
    """Return a folder's frame names in order; ValueError if there are none, or if the names are ambiguous."""
    return [name for _, name in numbered_frames(folder, pattern)]


def numbered_frames(folder, pattern=None):
    """Return the frames in order as (number, name); the number is unique to each name: 7 in frame7_112x112.jpg."""
    names = image_names(folder, pattern)
    if numbers := only_difference(names):
        rows = [(number,) for number in numbers]
    else:
        files, _ = choose_series(names, folder)
        rows, names = [numbers or (0,) for numbers, _ in files], [name for _, name in files]
    own = [column for column in zip(*rows) if len(set(column)) == len(names)]
    # The numbers before it must not say otherwise: 10-59-59 is before 11-00-00.
    orders = {tuple(sorted(range(len(names)), key=column.__getitem__)) for column in [*own, rows]}
    frames = sorted(zip(own[0], names)) if own and len(orders) == 1 else None
    if frames is None or own[0] == tuple(row[-1] for row in rows) and are_decimal([name for _, name in frames]):
        shown = re.sub(r"\d+(?=\D*$)", "#", glob.escape(names[0]))
        raise ValueError(f"{folder}: no number in names such as {names[0]} and {names[-1]} gives the order of its "
                         f"{len(names)} images: select some of them by --frame_names, such as {shown!r}, or rename "
                         "them to frame1, frame2, …")
    return frames


def are_decimal(names):
    """Return whether names, in the order of their last number, end in fractions of another order: 0.2, 0.15."""
    found = list(map(LAST_FRACTION.search, names)) if LAST_FRACTION.search(names[0]) else [None]
    return all(found) and (values := [float(each[0]) for each in found]) != sorted(values)


LAST_FRACTION = re.compile(r"(?<![^\W_])0+\.\d+(?=\D*\.\w+$)")  # not 7.12, which may be frame 12 of video 7


def image_names(folder, pattern=None):
    """Return the image names of a folder, optionally those that match the glob `pattern`, where # is a number."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGES) and is_visible(name))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"the frame folder {folder} does not exist") from None
    if not names:
        raise ValueError(f"the frame folder {folder} holds no .jpg, .jpeg or .png file")
    if pattern is not None:
        wanted = re.compile(fnmatch.translate(pattern).replace(r"\#", r"\d+"), re.IGNORECASE)
        if not (names := list(filter(wanted.match, names))):
            raise ValueError(f"{folder} holds no image that matches --frame_names {pattern}")
    return names


def only_difference(names):
    """Return the numbers if the sorted names differ in one number only, else None.

    This is a shortcut: choose_series finds the same, at a tenth of the speed.
    """
    before = len(os.path.commonprefix([names[0], names[-1]]).rstrip(string.digits))
    after = len(os.path.commonprefix([name[::-1] for name in names]).rstrip(string.digits))
    middles = [name[before:len(name) - after] for name in names]
    if not all(middle.isascii() and middle.isdigit() for middle in middles):
        return None
    numbers = list(map(int, middles))
    return numbers if len(set(numbers)) == len(names) else None


def choose_series(names, folder):
    """Return the frames among a folder's images, [(numbers in the name, name)], and the other series' name patterns.

    Names that differ in their numbers only form a series. Of several series, the frames are the one that has a word for
    RGB pictures in its names, or no words at all. Words that are in all names are ignored; any other word excludes a
    series. ValueError if this does not leave exactly one series.
    """
    found = all_series(names)
    words = {key: set(re.findall(r"[^\W\d_]+", key[0])) for key in found}
    common = set.intersection(*words.values())
    chosen = ([key for key in found if words[key] - common <= RGB and (words[key] & RGB or not words[key])]
              if len(found) > 1 else list(found))
    if len(chosen) != 1:
        shown = [f"{''.join(key)} ({len(files)})" for key, files in found.items()]
        raise ValueError(f"{folder} holds several series of images, {', '.join(shown[:5])}{', …' * (len(shown) > 5)}: "
                         f"choose one by --frame_names, such as {''.join(next(iter(found)))!r}")
    return found[chosen[0]], sorted("".join(key) for key in found if key != chosen[0])


def all_series(names):
    """Return {(name with # for each number, suffix): [(numbers, name)]}; suffixes separate only if numbers repeat."""
    found, series = {}, {}
    for name in names:
        stem, suffix = os.path.splitext(name.lower())
        parts = re.split(r"(\d+)", stem)
        shape = "#".join(map(glob.escape, parts[::2]))
        found.setdefault(shape, []).append((tuple(map(int, parts[1::2])), name, suffix.replace("jpeg", "jpg")))
    for shape, files in found.items():
        apart = len({numbers for numbers, _, _ in files}) < len(files)
        suffixes = {suffix for _, _, suffix in files}
        for numbers, name, suffix in files:
            series.setdefault((shape, suffix if apart or len(suffixes) == 1 else ".*"), []).append((numbers, name))
    return series


# ---------------------------------------------------------------- pixels

def as_rgb(image):
    """Convert an image to 8-bit RGB: upright per EXIF orientation, 16 bits scaled to 8, transparency over black."""
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL alone would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 2 ** 16 - 1) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def orientation(image):
    """Return the EXIF orientation, 1 (upright) to 8; 1 if EXIF cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL's parser raises many kinds of errors
        return 1


# ---------------------------------------------------------------- identity of the data

def content_digest(folders, elsewhere="", pattern=None):
    """Return a digest of the frames, independent of their location, to distinguish data sets with the same list.

    It covers the frame names of evenly spaced folders, and the bytes of each folder's middle frame. None if no folder
    can be read.
    """
    sample = ([describe(folders[number * len(folders) // SAMPLE], elsewhere, pattern) for number in range(SAMPLE)]
              if len(folders) > SAMPLE else [describe(folder, elsewhere, pattern) for folder in folders])
    return json_digest(sample)[:16] if any(sample) else None


def describe(folder, elsewhere, pattern):
    try:
        there = find_folder(folder, elsewhere) or folder
        names = frame_names(there, pattern)
        with open(os.path.join(there, names[len(names) // 2]), "rb") as file:
            return [names, hashlib.sha256(file.read()).hexdigest()]
    except (ValueError, FileNotFoundError, NotADirectoryError):  # another error may pass, and would change the digest
        return None
