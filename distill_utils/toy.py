"""Generate the toy set: four shapes that move up or down; a single frame does not show the direction.

    python -m distill_utils.toy [--out DIR]

The up and the down video of a pair have the same frame files in opposite order. A model that ignores the order of
frames therefore gets the direction right exactly half of the time. The motion is vertical, because training clips are
mirrored left-right. It is cyclic (a shape that leaves at the top enters at the bottom), so that the height in any frame
is uniform and does not show the direction either.
"""
import argparse
import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from distill_utils.processes import run_script
from utils import lock

SIZE = 64          # pixels
FRAMES = 16        # per video
VERSION = 6        # of the generator: increase it when pixels or list change
COLOURS = {"square": (250, 120, 110), "disc": (120, 240, 130), "cross": (130, 150, 250), "ring": (245, 230, 110)}
DIRECTIONS = ("up", "down")
SPLITS = ("train", "test")
DEFAULT_OUT = Path(__file__).resolve().parent / "data" / "toy"


def make_toy(out=DEFAULT_OUT, seed=0, train=24, test=12):
    """Write the toy set to the folder `out`: jpegs_64/<video>/frame000001.jpg … and toy_splits1.csv; return `out`.

    `train` and `test` are numbers of videos in each of the eight classes. The same settings give the same bytes. The
    folder appears only when it is complete. An existing complete set with the same settings is kept; ValueError for
    anything else.
    """
    out = Path(out).resolve()  # it may be a link to another disk
    settings = {"version": VERSION, "seed": seed, "train": train, "test": test}
    if out.exists():  # perhaps on a disk that is read-only
        check_existing(out, settings)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".lock"), "w") as file:  # a second process waits, then finds the set complete
        lock(file)
        if out.exists():
            check_existing(out, settings)
            return out
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)              # left by a killed process
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
        raise ValueError(f"{out} exists and is not a complete toy set: "
                         "remove it, or give another folder by --out") from None
    if found != settings:
        raise ValueError(f"{out} is a toy set with other settings ({found}, not {settings}): "
                         "remove it, or give another folder by --out")


def write_set(root, settings):
    pairs = [(split, shape, i) for split in SPLITS for shape in COLOURS for i in range(settings[split])]
    rows = ["folder_name,label,split,group"]
    for split, shape, i in tqdm(pairs, desc="toy set", unit="pair", leave=False):
        rng = np.random.default_rng([settings["seed"], SPLITS.index(split), list(COLOURS).index(shape), i])
        jpegs = [encode(frame) for frame in up_video(shape, rng)]
        for direction in DIRECTIONS:
            label = f"{shape}_{direction}"
            # Packs are identified by the list: version and seed in the names exclude the packs of other sets.
            folder = root / f"jpegs_{SIZE}" / f"{label}_{split}{i:03d}_v{VERSION}s{settings['seed']}"
            folder.mkdir(parents=True)
            for number, jpeg in enumerate(jpegs if direction == "up" else reversed(jpegs), start=1):
                (folder / f"frame{number:06d}.jpg").write_bytes(jpeg)
            # A pair forms a group, because its videos have the same frames.
            rows.append(f"{folder.name},{label},{split},{shape}_{split}{i:03d}")
    (root / "toy_splits1.csv").write_text("\n".join(rows) + "\n")
    (root / "toy.json").write_text(json.dumps(settings) + "\n")


def encode(frame):
    """Encode a uint8 frame (H, W, 3) as JPEG; return its bytes."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def up_video(shape, rng):
    """Return a video of the shape moving up, uint8 (T, H, W, 3); all variation comes from the generator `rng`."""
    radius = rng.uniform(11, 14)                                            # all lengths are in pixels
    left = SIZE / 2 + 0.6 * rng.uniform(radius - SIZE / 2, SIZE / 2 - radius)
    heights = rng.uniform(0, SIZE) - rng.uniform(2.5, 4.5) * np.arange(FRAMES)
    colour = np.array(COLOURS[shape]) + rng.uniform(-20, 20, 3)
    mask = coverage(shape, left, heights, radius)[..., None]               # (T, H, W, 1)
    video = mask * colour + (1 - mask) * background(rng)                    # (T, H, W, 3)
    video += rng.normal(0, rng.uniform(2, 6), video.shape)
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def background(rng):
    """Return a smooth random picture of dark, muted colours, (H, W, 3), values 35 to 95."""
    grid = rng.uniform(45, 85, (5, 5, 1)) + rng.uniform(-10, 10, (5, 5, 3))
    small = Image.fromarray(np.rint(grid).astype(np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float64)


def coverage(shape, left, heights, radius):
    """Return the share of each pixel that the shape covers, (T, H, W) in 0 … 1, with a blur of 1 pixel on outlines.

    heights: (T,), of the centre, taken modulo SIZE; left: the column of the centre.
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
    else:                                                                   # cross: two bars
        outside = np.maximum(np.maximum(x, y) - radius, np.minimum(x, y) - radius / 3)
    return np.clip(0.5 - outside, 0, 1)


def main(args):
    print(make_toy(args.out, seed=args.seed))


def parser():
    parser = argparse.ArgumentParser(prog="toy", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=DEFAULT_OUT, help="output folder of the set (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of everything that varies between videos (default: %(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
