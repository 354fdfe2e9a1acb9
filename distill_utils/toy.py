"""The toy set: four things that move up or down, told apart by no single frame.

    python -m distill_utils.toy [--out DIR]

The up and the down video of a pair are the same frames in opposite order, file for file: whatever does not see the order
of frames is right about the direction exactly half of the time. Motion is vertical, since training clips are mirrored
left-right, and cyclic (what leaves at the top comes in at the bottom), so that the height in any given frame is uniform
and tells nothing of the direction either.
"""
import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import lock

SIZE = 64          # pixels
FRAMES = 16        # of a video
VERSION = 6        # of the generator: counted up when its pixels or its list change
COLOURS = {"square": (250, 120, 110), "disc": (120, 240, 130), "cross": (130, 150, 250), "ring": (245, 230, 110)}
DIRECTIONS = ("up", "down")
SPLITS = ("train", "test")
DEFAULT_OUT = Path(__file__).resolve().parent / "data" / "toy"


def make_toy(out=DEFAULT_OUT, seed=0, train=24, test=12):
    """Writes the toy set to the folder `out`: jpegs_64/<video>/frame000001.jpg … and toy_splits1.csv; returns `out`.

    `train` and `test` are videos of each of the eight classes. The same settings give the same bytes. The folder appears
    only when all is written; a complete set of the same settings is left alone, anything else there is a ValueError.
    """
    out = Path(out).resolve()  # it may be a link to another disk
    settings = {"version": VERSION, "seed": seed, "train": train, "test": test}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".lock"), "w") as file:  # a second process waits, then finds the set complete
        lock(file)
        if out.exists():
            check_existing(out, settings)
            return out
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)              # of a killed process
        try:
            write_set(partial, settings)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return out


def check_existing(out, settings):
    try:
        found = json.loads((out / "toy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{out} exists and is not a complete toy set: remove it or name another folder by --out") from None
    if found != settings:
        raise ValueError(f"{out} is a toy set of other settings ({found}, not {settings}): "
                         "remove it or name another folder by --out")


def write_set(root, settings):
    pairs = [(split, shape, i) for split in SPLITS for shape in COLOURS for i in range(settings[split])]
    rows = ["folder_name,label,split,group"]
    for split, shape, i in tqdm(pairs, desc="toy set", unit="pair", leave=False):
        rng = np.random.default_rng([settings["seed"], SPLITS.index(split), list(COLOURS).index(shape), i])
        jpegs = [encode(frame) for frame in up_video(shape, rng)]
        for direction in DIRECTIONS:
            label = f"{shape}_{direction}"
            # The generator's version and seed are in the name: packs go by the list, and those of another set must not be taken.
            folder = root / f"jpegs_{SIZE}" / f"{label}_{split}{i:03d}_v{VERSION}s{settings['seed']}"
            folder.mkdir(parents=True)
            for number, jpeg in enumerate(jpegs if direction == "up" else reversed(jpegs), start=1):
                (folder / f"frame{number:06d}.jpg").write_bytes(jpeg)
            rows.append(f"{folder.name},{label},{split},{shape}_{split}{i:03d}")  # a pair is a group: its videos are the same frames
    (root / "toy_splits1.csv").write_text("\n".join(rows) + "\n")
    (root / "toy.json").write_text(json.dumps(settings) + "\n")


def encode(frame):
    """The JPEG file of a uint8 frame (H, W, 3), as bytes."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def up_video(shape, rng):
    """A video of the shape moving up, uint8 (T, H, W, 3), all that varies drawn from the NumPy generator `rng`."""
    radius = rng.uniform(11, 14)                                            # pixels, as everything here
    left = SIZE / 2 + 0.6 * rng.uniform(radius - SIZE / 2, SIZE / 2 - radius)
    heights = rng.uniform(0, SIZE) - rng.uniform(2.5, 4.5) * np.arange(FRAMES)
    colour = np.array(COLOURS[shape]) + rng.uniform(-20, 20, 3)
    mask = coverage(shape, left, heights, radius)[..., None]               # (T, H, W, 1)
    video = mask * colour + (1 - mask) * background(rng)                    # (T, H, W, 3)
    video += rng.normal(0, rng.uniform(2, 6), video.shape)
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def background(rng):
    """A smooth random picture of dark, muted colours, (H, W, 3) between 35 and 95."""
    grid = rng.uniform(45, 85, (5, 5, 1)) + rng.uniform(-10, 10, (5, 5, 3))
    small = Image.fromarray(np.rint(grid).astype(np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float64)


def coverage(shape, left, heights, radius):
    """How much of each pixel the shape covers, (T, H, W) in 0 … 1: half a pixel of blur on either side of its outline.

    `heights` (T,) are those of its centre, taken cyclically; `left` is the column of its centre.
    """
    pixels = np.arange(SIZE) + 0.5
    x = np.abs(pixels - left)[None, None, :]
    y = np.abs((pixels - heights[:, None] + SIZE / 2) % SIZE - SIZE / 2)[:, :, None]
    if shape == "square":
        outside = np.maximum(x, y) - radius                                 # pixels to the outline, negative inside
    elif shape == "disc":
        outside = np.sqrt(x * x + y * y) - radius
    elif shape == "ring":
        outside = np.abs(np.sqrt(x * x + y * y) - 0.75 * radius) - 0.25 * radius
    else:                                                                   # a cross: two bars
        outside = np.maximum(np.maximum(x, y) - radius, np.minimum(x, y) - radius / 3)
    return np.clip(0.5 - outside, 0, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=DEFAULT_OUT, help="folder of the set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that varies between videos (%(default)s)")
    flags = parser.parse_args()
    try:
        print(make_toy(flags.out, seed=flags.seed))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
