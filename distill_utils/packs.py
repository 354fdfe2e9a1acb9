"""Packs: all clips of a split in one file, a memory map of uint8 (n, T, 3, H, W), built once from the frame folders."""
import concurrent.futures
import contextlib
import errno
import io
import math
import mmap
import os
import socket
import time
import warnings

import numpy as np
import torch
from tqdm import tqdm

from distill_utils.processes import progress
from distill_utils.workers import mapped
from utils import check_space, lock, read_json, save_json, with_path

HOST = socket.gethostname()
MOST_BROKEN = 100  # videos that cannot be read, after which a pack is given up


class Pack:
    """All clips of a pack as a memory map: uint8 (n, T, 3, H, W), read from disk on use."""

    def __init__(self, array):
        self.array = array
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is never written
            self.clips = torch.from_numpy(array)

    def take(self, index, batch):
        """Copy the clips `index` (B,) into batch (B, T, 3, H, W)."""
        # Request all clips together: the disk then reads in parallel, 15 times as fast as one page after another.
        size, first = self.clips[0].numel(), self.array.offset
        for number in index.tolist():
            start = (first + number * size) // mmap.PAGESIZE * mmap.PAGESIZE
            self.array.base.madvise(mmap.MADV_WILLNEED, start, first + (number + 1) * size - start)
        torch.index_select(self.clips, 0, index, out=batch)


def open_pack(path, shape, open_frames):
    """Return the Pack at `path`; if it is missing, build it first from open_frames()."""
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                build_pack(path, shape, open_frames())
    header = pack_header(shape)
    with open(path, "rb") as file:
        whole = file.read(len(header)) == header and path.stat().st_size == len(header) + math.prod(shape)
    if not whole:
        raise ValueError(f"the pack {path} is damaged: delete it, and the next run builds it again")
    return Pack(np.memmap(path, np.uint8, "r", len(header), shape))


def pack_counts(path):
    """Return how many videos of a pack are stretched, and how many clips repeat another; 0 where that is not stored."""
    stored = {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # the file beside the pack may be deleted
        stored = dict(read_json(path.with_suffix(".json")))
    return stored.get("stretched", 0), stored.get("repeated", 0)


def pack_header(shape):
    """Return the header of a pack, which is a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


@contextlib.contextmanager
def locked(path):
    """Hold a lock on `path` within the block, waiting for another process; the lock ends with its process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(f"{error.strerror}: {error.filename}: give another --pack_path") from error
        raise
    with file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            print(f"waiting for another process that builds {path.with_suffix('.npy').name}", flush=True)
            lock(file)
        yield


def build_pack(path, shape, frames):
    """Decode all videos into `path` by way of a temporary file, which is renamed when complete.

    Each process has its own temporary file, because on some shared disks locks hold on one machine only, or not at all.
    """
    temporary, start, size = path.with_suffix(f".{HOST}.{os.getpid()}.tmp"), time.monotonic(), math.prod(shape)
    try:
        with open(temporary, "wb") as file:
            remove_left(temporary)
            check_space(path.parent, size, "the pack", "give another --pack_path, or --no_pack")
            file.write(pack_header(shape))
            file.flush()
            write_clips(file.fileno(), file.tell(), frames, shape[0], path.stem)
            os.fsync(file.fileno())
        save_json({"clips": shape[0], "videos": len(frames.folders), "stretched": frames.stretched,
                   "repeated": frames.repeated, "bytes": size, "seconds": round(time.monotonic() - start, 2),
                   "listed": frames.selection.listed, "content": path.stem.rpartition("_")[2],
                   "place": frames.selection.videos.folder.iloc[0], "frame_names": frames.selection.row.frame_names},
                  path.with_suffix(".json"))
        if not path.exists():  # else another machine was faster, and its pack may be in use
            os.replace(temporary, path)
    except OSError as error:
        raise with_path(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_left(temporary):
    """Remove what killed builds of this pack left: files of ended processes of this machine, and any a day old."""
    now = temporary.stat().st_mtime  # by the clock of the disk
    for left in {*temporary.parent.glob(f"{temporary.name.partition('.')[0]}.*tmp")} - {temporary}:
        host, _, process = left.name.removesuffix(".tmp").partition(".")[2].rpartition(".")
        with contextlib.suppress(OSError):
            if host == HOST and not is_running(process) or now - left.stat().st_mtime > 86400:
                left.unlink()


def is_running(process):
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_clips(file, offset, frames, clips, name):
    """Decode in threads; each writes its video's clips at their offset, so that memory stays constant.

    ValueError after the last video, or after MOST_BROKEN unreadable ones; each is printed with its first bad image.
    """
    per_video, broken = clips // len(frames.folders), []

    def write(video):
        try:
            data = memoryview(np.ascontiguousarray(frames.decode(video))).cast("B")
        except ValueError as error:
            return error
        place = offset + video * len(data)
        while data:  # a nearly full disk accepts only a part at first
            written = os.pwrite(file, data, place)
            data, place = data[written:], place + written

    # Use a separate pool: after an error it waits for its threads, so that none writes after the file is closed.
    bar = progress(total=clips, desc=f"packing {name}", unit="clip")
    with bar, concurrent.futures.ThreadPoolExecutor(frames.workers) as pool:
        for error in mapped(pool, write, range(len(frames.folders))):
            bar.update(per_video)
            if error:
                broken.append(error)
                tqdm.write(str(error))
            if len(broken) == MOST_BROKEN:
                break
    if broken:
        least = "at least " if len(broken) == MOST_BROKEN else ""
        raise ValueError(f"{broken[0]}" + (f"; {least}{len(broken)} videos cannot be read: see above"
                                           if len(broken) > 1 else ""))
