"""Export a distilled set as videos that a player shows, or as arrays.

    python -m distill_utils.export RUN --format mp4|gif|npz|pt [--out DIR]

Every video of the set is written; for a static-dynamic set, every pair of memories. mp4 and gif: one file per video,
<class>_<number>. npz and pt: one file with videos, labels and class_names, and soft_labels float32 (n, K) if the set's
labels were learned. videos are uint8 (n, T, H, W, 3) in npz, and float32 (n, T, 3, H, W) in normalised pixels in pt.

With --memories, one mp4 or gif shows each class's first video in a row: static memory, dynamic memory, together.
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
from distill_utils.pictures import memories, side_by_side
from distill_utils.processes import run_script
from distill_utils.synset import load_set
from utils import atomic_write, save

FPS = 8
GIF_SIDE = 65535   # pixels, the format's limit
MP4_SIDE = 16384   # of H.264's encoder


@torch.no_grad()
def main(args):
    for flag in ("beside", "classes"):
        if getattr(args, flag) and not args.memories:
            raise ValueError(f"--{flag} needs --memories: add it, or leave out --{flag}")
    if args.format == "gif" and args.fps > 50:
        raise ValueError(f"--fps {args.fps} is more than 50, the most that gif viewers show: give less, or --format mp4")
    synset, content = load_set(args.run)
    names = content["class_names"]
    folder = (args.out or (args.run if args.run.is_dir() else args.run.parent) / f"export_{args.format}")
    if args.memories:
        return write_memories(args, synset, names, folder)
    if args.format not in WRITERS and (args.fps, args.scale) != (FPS, 1):
        raise ValueError(f"--fps and --scale are for {' and '.join(WRITERS)}: leave them out, or give such a --format")
    folder.mkdir(parents=True, exist_ok=True)
    count = (write_videos if args.format in WRITERS else write_arrays)(args, synset, names, folder)
    print(f"{count} videos of {len(names)} classes: {folder}")


def write_videos(args, synset, names, folder):
    """Write a file for each video, one class in memory at a time; return the number of videos."""
    count = 0
    for label, name in enumerate(file_names(names)):
        videos, _ = synset.every(slice(label, label + 1))
        for number, video in enumerate(as_pixels(videos)):
            with atomic_write(folder / f"{name}_{number}.{args.format}") as file:
                file.write(WRITERS[args.format](video.repeat(args.scale, 1).repeat(args.scale, 2), args.fps))
        count += len(videos)
    return count


def write_arrays(args, synset, names, folder):
    """Write all videos to one file, with their labels; return the number of videos."""
    videos, labels = synset.every()
    learned = {} if synset.soft_labels is None else {
        "soft_labels": synset.scores().repeat_interleave(len(videos) // len(synset), 0)}
    if args.format == "pt":
        save({"videos": videos.clone(), "labels": labels, "class_names": names, **learned}, folder / "distilled.pt")
    else:
        with atomic_write(folder / "distilled.npz") as file:
            np.savez_compressed(file, videos=as_pixels(videos), labels=labels.numpy(), class_names=np.array(names),
                                **{name: values.numpy() for name, values in learned.items()})
    return len(videos)


def as_pixels(videos):
    """Return videos (n, T, 3, H, W) as uint8 (n, T, H, W, 3)."""
    return denormalize(videos).permute(0, 1, 3, 4, 2).numpy()


def write_memories(args, synset, names, folder):
    """Write `memories.<format>`: a row per class, with the memories of its first video and that of the set --beside."""
    if args.format not in WRITERS:
        raise ValueError(f"--memories needs --format {' or '.join(WRITERS)}, not {args.format}")
    shown = memories(synset)
    if args.beside:
        other, content = load_set(args.beside)
        if content["class_names"] != names or other.of_class(0).shape[1:] != synset.of_class(0).shape[1:]:
            raise ValueError(f"{args.beside} differs from {args.run} in classes, number of frames or size: "
                             "give a run of the same data")
        *_, shown[f"videos of {args.beside.name}"] = memories(other).values()
    classes = args.classes or 8
    video = side_by_side([videos[:classes] for videos in shown.values()])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"memories.{args.format}"
    with atomic_write(path) as file:
        file.write(WRITERS[args.format](video.repeat(args.scale, 1).repeat(args.scale, 2), args.fps))
    print(f"{min(len(names), classes)} classes; columns: {', '.join(shown)}: {path}")


def file_names(labels):
    """Return the beginning of the file names of each class.

    It is the class name without special characters, cut to a length that any file system accepts. All names get a
    number if two are the same or differ in case only.
    """
    names = [re.sub(r"^\.|[^\w.-]", "_", unicodedata.normalize("NFC", label)).encode()[:200].decode(errors="ignore")
             for label in labels]
    if len({name.casefold() for name in names}) < len(names):
        return [f"{number}_{name}" for number, name in enumerate(names)]
    return names


def check_side(video, kind, most):
    if max(video.shape[1:3]) > most:
        raise ValueError(f"{kind} files have at most {most} pixels a side, and this one would have "
                         f"{max(video.shape[1:3])}: give a lower --scale, or fewer --classes")


def mp4(video, fps):
    """Encode uint8 (T, H, W, 3) as an H.264 file; return its bytes."""
    check_side(video, "mp4", MP4_SIDE)
    height, width = (side // 2 * 2 for side in video.shape[1:3])  # the format requires even sides
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in video:
            container.mux(stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def gif(video, fps):
    """Encode uint8 (T, H, W, 3) as an animated GIF that loops forever; return its bytes."""
    check_side(video, "gif", GIF_SIDE)
    first, *others = map(Image.fromarray, video)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return file.getvalue()


WRITERS = {"mp4": mp4, "gif": gif}


def parser():
    parser = argparse.ArgumentParser(prog="export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="a run folder, or the file of a set")
    parser.add_argument("--format", required=True, choices=(*WRITERS, "npz", "pt"), help="file format")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="output folder (default: RUN/export_<format>)")
    parser.add_argument("--fps", type=positive, default=FPS,
                        help="frames per second of mp4 and gif (default: %(default)s)")
    parser.add_argument("--scale", type=positive, default=1,
                        help="integer factor that enlarges mp4 and gif (default: %(default)s)")
    parser.add_argument("--memories", action="store_true",
                        help="write one file memories.<format> with a row per class: static memory, dynamic memory, "
                        "together")
    parser.add_argument("--beside", type=pathlib.Path, metavar="RUN",
                        help="with --memories: also show the videos of this set of the same data, such as real clips "
                        "of a random selection")
    parser.add_argument("--classes", type=positive, metavar="N",
                        help="with --memories: number of classes shown (default: 8)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
