"""The toy set: four things that move up or down, told apart by no single frame.

    python -m distill_utils.toy [--out DIR]

The up and the down video of a pair are the same frames in opposite order, file for file: whatever does not see the order
of frames is right about the direction exactly half of the time. Motion is vertical, since training clips are mirrored
left-right, and cyclic (what leaves at the top comes in at the bottom), so that the height in any given frame is uniform
and tells nothing of the direction either.
"""
import argparse
import fcntl
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SIZE = 64          # pixels
FRAMES = 16        # of a video
VERSION = 2        # of the generator: counted up when its pixels change
COLOURS = {"square": (220, 60, 50), "disc": (60, 200, 70), "cross": (70, 90, 230), "ring": (235, 210, 60)}
DIRECTIONS = ("up", "down")
SPLITS = ("train", "test")
DEFAULT_OUT = Path(__file__).resolve().parent / "data" / "toy"


def make_toy(out=DEFAULT_OUT, seed=0, train=24, test=12):
    """Writes the toy set to the folder `out`: jpegs_64/<video>/frame000001.jpg … and toy_splits1.csv; returns `out`.

    `train` and `test` are videos of each of the eight classes. The same settings give the same bytes. The folder appears
    only when all is written; a complete set of the same settings is left alone, anything else there is a ValueError.
    """
    out = Path(out).absolute()
    settings = {"version": VERSION, "seed": seed, "train": train, "test": test}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".lock"), "w") as lock:  # a second process waits, then finds the set complete
        fcntl.flock(lock, fcntl.LOCK_EX)
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
        found = json.loads((out / "toy.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{out} exists and is not a complete toy set: remove it or name another folder by --out") from None
    if found != settings:
        raise ValueError(f"{out} is a toy set of other settings ({found}, not {settings}): "
                         "remove it or name another folder by --out")


def write_set(root, settings):
    pairs = [(split, shape, i) for split in SPLITS for shape in COLOURS for i in range(settings[split])]
    rows = ["folder_name,label,split"]
    for split, shape, i in tqdm(pairs, desc="toy set", unit="pair", leave=False):
        rng = np.random.default_rng([settings["seed"], SPLITS.index(split), list(COLOURS).index(shape), i])
        jpegs = [encode(frame) for frame in up_video(shape, rng)]
        for direction in DIRECTIONS:
            label = f"{shape}_{direction}"
            folder = root / f"jpegs_{SIZE}" / f"{label}_{split}{i:03d}"
            folder.mkdir(parents=True)
            for number, jpeg in enumerate(jpegs if direction == "up" else reversed(jpegs), start=1):
                (folder / f"frame{number:06d}.jpg").write_bytes(jpeg)
            rows.append(f"{folder.name},{label},{split}")
    (root / "toy_splits1.csv").write_text("\n".join(rows) + "\n")
    (root / "toy.json").write_text(json.dumps(settings) + "\n")


def encode(frame):
    """The JPEG file of a uint8 frame (H, W, 3), as bytes."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def up_video(shape, rng):
    """A video of the shape moving up, uint8 (T, H, W, 3), all that varies drawn from the NumPy generator `rng`."""
    radius = rng.uniform(12, 16)                                            # pixels, as everything here
    left = SIZE / 2 + 0.7 * rng.uniform(radius - SIZE / 2, SIZE / 2 - radius)
    heights = rng.uniform(0, SIZE) - rng.uniform(2.5, 4) * np.arange(FRAMES)
    colour = np.array(COLOURS[shape]) + rng.uniform(-20, 20, 3)
    x = np.arange(SIZE) + 0.5 - left                                        # (W,), from the shape's centre
    y = (np.arange(SIZE) + 0.5 - heights[:, None] + SIZE / 2) % SIZE - SIZE / 2     # (T, H), cyclic
    mask = coverage(shape, np.abs(x), np.abs(y)[:, :, None], radius)[..., None]     # (T, H, W, 1)
    paint = stripes(y)[:, :, None, None] * colour                           # (T, H, 1, 3)
    video = mask * paint + (1 - mask) * background(rng)                     # (T, H, W, 3)
    video += rng.normal(0, rng.uniform(2, 8), video.shape)
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def background(rng):
    """A smooth random picture of muted colours, (H, W, 3) between 40 and 170."""
    grid = rng.uniform(50, 150, (5, 5, 1)) + rng.uniform(-20, 20, (5, 5, 3))
    small = Image.fromarray(np.rint(grid).astype(np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float64)


def stripes(y):
    """Brightness of the shapes' bars at `y` pixels from the centre, 0.15 … 1 with a period of 12 pixels.

    Moving bars make the direction learnable from five videos of a class (without them: 75%), and a network trained at
    learning rate 0.01 on one video of each stays finite. At up to 4 pixels a frame, a third of the period, they never
    seem to run backwards.
    """
    dark_to_bright = np.clip(12 * np.abs((y / 12) % 1 - 0.5) - 2.5, 0, 1)   # one pixel wide from dark to bright
    return 0.15 + 0.85 * dark_to_bright


def coverage(shape, x, y, radius):
    """How much of each pixel the shape covers, 0 … 1, half a pixel of blur on either side of its outline.

    x, y ≥ 0: distances from the shape's centre, arrays that broadcast to the result.
    """
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
