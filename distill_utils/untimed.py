"""Kinetics files that are named by the id only, `<id>` instead of `<id>_<start>_<end>`.

The validation files of the academic torrent are named so. A whole YouTube video may have such a name, too.
"""
from distill_utils.decode import is_made, seconds_of
from distill_utils.video_files import is_replacement, plain_name

LONGEST = 1.5  # times the listed seconds


def take_untimed(files, videos, frames, paths):
    """Add such files to `files`, {video: its files}, for videos that have neither a file nor a folder in `frames`.

    paths: all video files. A file is taken if its id is listed once, and if it lasts at most 1.5 times the listed
    seconds. Prints how many are taken, and how many are not.
    """
    once = videos[~videos.youtube_id.duplicated(keep=False)]
    wanted = {plain_name(row.youtube_id): row for row in once.itertuples()
              if not files[row.video] and not is_made(frames / row.folder)}
    taken, left = [], []
    for path in paths:
        if row := wanted.get(plain_name(path.name)):
            short = seconds_of(path) <= LONGEST * (int(row.time_end) - int(row.time_start))
            (taken if short else left).append(path)
            if short:
                files[row.video] = sorted([*files[row.video], path], key=lambda path: (is_replacement(path), path))
    if taken:
        print(f"files named by the id only: {len(taken)} taken, such as {taken[0]}; each lasts at most {LONGEST} times "
              "the listed seconds")
    if left:
        print(f"files named by the id only: {len(left)} not taken, such as {left[0]}; they last longer, or cannot be "
              "read: cut them to the listed seconds")
