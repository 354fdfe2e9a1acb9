"""A distilled set as videos that a player shows, or as arrays.

    python -m distill_utils.export RUN --format mp4|gif|npz|pt [--out DIR]

Every video that the set can show is written, of a static-dynamic set each pair of memories. mp4 and gif are a file each,
<class>_<number>; npz and pt are one file: videos uint8 (n, T, H, W, 3), or float32 (n, T, 3, H, W) in normalised pixels; labels, class_names, and
soft_labels float32 (n, K) where the set's labels were learned.
"""
import argparse
import io
import pathlib
import re
import unicodedata

import av
import numpy as np
import torch
from PIL import Image

from distill_utils.clips import denormalize
from distill_utils.options import positive
from distill_utils.processes import run_script
from distill_utils.synset import load_set
from utils import atomic_write, save


@torch.no_grad()
def main(args):
    synset, content = load_set(args.run)
    videos, labels = synset.every()
    names = content["class_names"]
    learned = {} if synset.soft_labels is None else {"soft_labels": synset.scores().repeat_interleave(len(videos) // len(synset), 0)}
    folder = (args.out or (args.run if args.run.is_dir() else args.run.parent) / f"export_{args.format}")
    folder.mkdir(parents=True, exist_ok=True)
    pixels = denormalize(videos).permute(0, 1, 3, 4, 2).numpy()            # (n, T, H, W, 3) uint8
    if args.format == "pt":
        save({"videos": videos.clone(), "labels": labels, "class_names": names, **learned}, folder / "distilled.pt")
    elif args.format == "npz":
        with atomic_write(folder / "distilled.npz") as file:
            np.savez_compressed(file, videos=pixels, labels=labels.numpy(), class_names=np.array(names), **{name: values.numpy() for name, values in learned.items()})
    else:
        numbers = [int((labels[:place] == label).sum()) for place, label in enumerate(labels)]
        files = file_names(names)
        for video, label, number in zip(pixels, labels.tolist(), numbers):
            with atomic_write(folder / f"{files[label]}_{number}.{args.format}") as file:
                file.write(WRITERS[args.format](video.repeat(args.scale, 1).repeat(args.scale, 2), args.fps))
    print(f"{len(videos)} videos of {len(names)} classes: {folder}")


def file_names(labels):
    """What the files of each class begin with: its name without signs, as long as any file system takes; numbered where case alone tells two apart, or
    nothing."""
    names = [re.sub(r"^\.|[^\w.-]", "_", unicodedata.normalize("NFC", label)).encode()[:200].decode(errors="ignore") for label in labels]
    if len({name.casefold() for name in names}) < len(names):
        return [f"{number}_{name}" for number, name in enumerate(names)]
    return names


def mp4(video, fps):
    """An H.264 file, as bytes, of uint8 (T, H, W, 3)."""
    height, width = (side // 2 * 2 for side in video.shape[1:3])           # the format needs even sides
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def gif(video, fps):
    """An animated GIF, as bytes, that repeats for ever."""
    first, *others = map(Image.fromarray, video)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return file.getvalue()


WRITERS = {"mp4": mp4, "gif": gif}


def parser():
    parser = argparse.ArgumentParser(prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="a run's folder, or the file of a set")
    parser.add_argument("--format", required=True, choices=(*WRITERS, "npz", "pt"), help="of the files")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of the files (RUN/export_<format>)")
    parser.add_argument("--fps", type=positive, default=8, help="frames per second of mp4 and gif (%(default)s)")
    parser.add_argument("--scale", type=positive, default=1, help="enlarges mp4 and gif so many times (%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
