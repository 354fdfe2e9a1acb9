"""Which of the user's own videos have changed since `prepare` made their frames."""
from distill_utils.decode import is_made
from distill_utils.workers import in_threads
from utils import atomic_write, read_json, save_json

SOURCES = "sources.json"  # {frame folder: [size, time of change in ns] of the video that its frames are made of}


def tell_what_changed(root, videos, files, frames):
    """Print how many prepared videos have changed since, and name their folders in changed_videos.txt.

    root: folder of the data set. videos: a table with the columns video and folder. files: {video: [its path]}. The
    size and time of every other video are recorded, before its frames are made. Frames of an older version have no
    record: their video has changed if it is newer than they are.
    """
    recorded = read_json(root / SOURCES) if (root / SOURCES).is_file() else {}
    if not isinstance(recorded, dict):
        raise ValueError(f"{root / SOURCES} is damaged: delete it")

    def has_changed(row):
        now = state(files[row.video][0])
        if now is None or not is_made(frames / row.folder):  # a missing file may lie on an unmounted disk
            return now, False
        before = recorded.get(row.folder)
        return now, now != before if before else now[1] > (frames / row.folder).stat().st_mtime_ns

    rows = list(videos.itertuples())
    found = dict(zip(videos.folder, in_threads(has_changed, rows)))
    changed = [folder for folder, (_, yes) in found.items() if yes]
    save_json(recorded | {folder: now for folder, (now, yes) in found.items() if now and not yes}, root / SOURCES)
    path = root / "changed_videos.txt"
    if not changed:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path, "w") as file:
        file.writelines(f"{frames / folder}\n" for folder in changed)
    print(f"videos that changed after their frames were made: {len(changed)}; the old frames are kept: to replace them, "
          f"delete the folders listed in {path} and this data set's packs, and run this command again")


def state(path):
    """Return the size of a file in bytes, and when its content changed in ns; None if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]
