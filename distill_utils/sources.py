"""Which of the user's own videos have changed since `prepare` made their frames."""
from distill_utils.decode import is_made
from distill_utils.workers import in_threads
from utils import atomic_write, read_json, save_json

SOURCES = "sources.json"  # {frame folder: [size, time of change in ns] of the video that its frames were made of}


class Sources:
    """The state of each video when its frames were made; `root` is the folder of the data set.

    videos: a table with the columns video and folder. files: {video: [its path]}. Frames of an older version have no
    record: their video has changed if it is newer than they are.
    """

    def __init__(self, root, videos, files, frames):
        self.path, self.root, self.frames = root / SOURCES, root, frames
        self.recorded = dict(read_json(self.path)) if self.path.is_file() else {}
        rows = list(videos.itertuples())
        states = in_threads(lambda row: state(files[row.video][0]), rows)
        made = in_threads(lambda row: is_made(frames / row.folder), rows)
        self.states = {row.folder: found for row, found in zip(rows, states) if found}
        self.made = [row.folder for row, there in zip(rows, made) if there]
        self.changed = [folder for folder in self.made if self.has_changed(folder)]

    def has_changed(self, folder):
        if folder not in self.states:  # its disk may be unmounted
            return False
        if folder in self.recorded:
            return self.recorded[folder] != self.states[folder]
        return self.states[folder][1] > (self.frames / folder).stat().st_mtime_ns

    def tell(self):
        """Write changed_videos.txt, or remove it if no video changed."""
        path = self.root / "changed_videos.txt"
        if not self.changed:
            path.unlink(missing_ok=True)
            return
        with atomic_write(path, "w") as file:
            file.writelines(f"{self.frames / folder}\n" for folder in self.changed)
        print(f"videos that changed after their frames were made: {len(self.changed)}; the old frames are kept: to "
              f"replace them, delete the folders listed in {path} and this data set's packs, and run this command again")

    def record(self):
        """Record the videos of the frames that this run made, and of older frames whose video has not changed."""
        kept = {folder: self.recorded.get(folder) for folder in self.changed}
        save_json({folder: found for folder in {**self.recorded, **self.states}
                   if (found := kept.get(folder) if folder in kept else
                       self.states.get(folder) or self.recorded.get(folder))}, self.path)


def state(path):
    """Return the size of a file in bytes, and when its content changed in ns; None if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]
