"""Class means of all real clips in the feature spaces of a pool of random networks (methods.md 13).

They are computed once and stored beside the packed clips.
"""
import contextlib
import os

import numpy as np
import torch

from distill_utils.packs import locked
from distill_utils.processes import broadcast, gather, progress, rank, world_size
from utils import check_space, code_digest, json_digest, with_path

POOL_FORMAT = 1  # change it to invalidate all stored pools


def pool_path(clips, *settings):
    """Return the path of the pool file of these packed clips; its name depends on what affects the means.

    This is: the pack and which of its clips are used; the shown frames; how often clips are mirrored; PyTorch's
    version, which decides the weights for a seed; the code of networks and augmentation; and `settings` of networks
    and matching.
    """
    pack, digest = clips.origin
    shown = clips.shown.tolist() if isinstance(clips.shown, torch.Tensor) else None
    content = [POOL_FORMAT, pack.name, pack.stat().st_mtime_ns, digest, shown, clips.mirror, torch.__version__,
               code_digest("networks/*.py", "distill_utils/augment.py"), *settings]
    return pack.with_name(f"pool_{pack.stem}_{json_digest(content)[:16]}.f32")


class Pool:
    """`pool.means(number)` returns the class means (K, F) float32 of network `number` of `count`.

    The file holds the means of one network after another, as raw float32. The constructor first computes missing means
    by `make(number)`, shared by all ranks. An interrupted pool continues, and a larger pool starts from a smaller
    one's file. Each network has its place in the file, so nothing goes wrong where a disk's lock holds on one machine
    only and two of them write.
    """

    def __init__(self, path, count, shape, make):
        self.path, self.count, self.shape = path, count, shape
        if broadcast(self.in_file() if rank() == 0 else None) < count:     # a complete file may be read-only
            with locked(path.with_suffix(".lock")) if rank() == 0 else contextlib.nullcontext():
                self.complete(make)
            broadcast(None)                                                # wait until rank 0 has written all means
        self.file = np.memmap(path, np.float32, "r", shape=(count, *shape))

    def __len__(self):
        return self.count

    def complete(self, make):
        done = broadcast(self.in_file() if rank() == 0 else None)
        if done >= self.count:
            return
        if rank() == 0:
            check_space(self.path.parent, (self.count - done) * self.size, "the pool's class means",
                        "lower --pool, or give another --pack_path")
        with progress(total=self.count, initial=done, desc="pool", unit="network") as bar:
            for start in range(done, self.count, world_size()):
                numbers = range(start, min(start + world_size(), self.count))
                found = gather([(number, make(number).cpu()) for number in numbers[rank():rank() + 1]])
                for number, means in found if rank() == 0 else ():
                    self.write(number, means)
                bar.update(len(numbers))

    @property
    def size(self):
        """Bytes per network."""
        return 4 * int(np.prod(self.shape))

    def in_file(self):
        """Return the number of networks whose means are complete in the file."""
        return self.path.stat().st_size // self.size if self.path.exists() else 0

    def write(self, number, means):
        try:
            self.path.touch()
            with open(self.path, "r+b") as file:
                file.seek(number * self.size)
                file.write(np.ascontiguousarray(means.numpy(), np.float32).data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise with_path(error, self.path) from error

    def means(self, number):
        return torch.from_numpy(self.file[number].copy())
