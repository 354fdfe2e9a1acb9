"""Find video files: by their suffix, and by the names in the official lists."""
import os
import re
import unicodedata

from distill_utils.frames import files_below

SUFFIXES = (".avi", ".divx", ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".mpg", ".mpeg", ".vob", ".ts", ".mts",
            ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".ogg", ".unknown_video")  # of videos


def video_files(folder):
    """Return the files below `folder` with a video suffix; ValueError for a name that a list cannot hold."""
    paths = [path for path in files_below(folder) if path.name.lower().endswith(SUFFIXES)]
    for path in paths:
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # surrogates: bytes that are not UTF-8
            raise ValueError(f"{os.fsencode(path)!r} is not a valid UTF-8 name: rename it")
        if "\r" in str(path) or "\n" in str(path):
            raise ValueError(f"{str(path)!r} has a line break in its name: rename it")
    return paths


def find_files(videos, source):
    """Return {video: its files at any depth of `source`}, best first.

    Files match by plain_name. If several files match, the one in the listed folder is first; replacements are last. A
    file whose name differs in case is used only if no file matches exactly, and if no other video has that name.
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
        return lambda path: (not path.as_posix().endswith("/" + video),
                             is_replacement(path),
                             path.stem != os.path.basename(video), path)
    names = {video: plain_name(video) for video in videos.video}
    return {video: sorted(exact.get(name) or near.get(name.casefold(), ()), key=order(video))
            for video, name in names.items()}


def is_replacement(path):
    """Return whether a file lies in a folder of replacements, as in the CVD Foundation's copy of Kinetics."""
    return any("replacement" in part for part in path.parts)


def plain_name(path):
    """Return a video's name without suffixes, with times in six digits, as in Kinetics.

    Suffixes include those that downloaders add (abc.mp4.mkv, abc.f137.mp4).
    """
    name = unicodedata.normalize("NFC", os.path.basename(path))  # macOS stores accents as separate characters
    while (parts := os.path.splitext(name))[1].lower() in SUFFIXES or re.fullmatch(r"\.f\d+(-\w+)?", parts[1]):
        name = parts[0]
    return re.sub(r"_(\d{1,6})_(\d{1,6})$", lambda times: f"_{times[1]:0>6}_{times[2]:0>6}", name)
