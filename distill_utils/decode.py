"""Videos to frame folders: any file that FFmpeg reads, by way of PyAV.

Files are untrusted: only containers of video files are opened, no playlist or URL that names other files, and a file whose
end is missing is refused, which FFmpeg by itself passes over in Matroska and AVI. What is stored is what a player shows: the
container's best video stream, the frames that its edit list leaves, turned and mirrored as its display matrix says.
"""
import collections
import dataclasses
import io
import logging
import math
import os
import pathlib
import shutil

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from PIL import Image

from distill_utils.datasets import clip_frames

CONTAINERS = {"format_whitelist": "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts,flv,asf,ogg", "protocol_whitelist": "file"}
MOST_PIXELS = 100_000_000  # of a frame: about 12K; decoders keep sixteen and more of them
MOST_SIDE = 65_500  # of a JPEG, pixels
PICTURES = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails  # streams that are none of the video
LEAST = 0.9  # share of the frames that a header promises: encoders' own counts are off by a few

av.logging.set_level(av.logging.ERROR)  # so that errors carry FFmpeg's reason
logging.getLogger("libav").setLevel(logging.CRITICAL + 1)  # and it is not printed as well
# A frame's side data cannot be read where it has a kind that FFmpeg knows and PyAV does not, as EXIF: they pass for one that is not looked at.
SideData._missing_ = classmethod(lambda kinds, number: kinds.SEI_UNREGISTERED)


class Broken(ValueError):
    """A video that cannot be decoded to its end; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """How a frame is stored. resize: (width, height), whatever the video's, or the pixels of the shorter side; crop: the middle square."""
    resize: tuple | int
    crop: int | None = None
    quality: int = 95  # of the JPEG

    def __post_init__(self):
        sides = (self.resize,) if isinstance(self.resize, int) else self.resize
        if min(sides) < (self.crop or 1):
            raise ValueError(f"--crop {self.crop} does not fit into frames resized to {'x'.join(map(str, sides))}")

    def scaled(self, width, height):
        """The (width, height) that frames of this size on the screen are resized to."""
        if not isinstance(self.resize, int):
            return self.resize
        factor = self.resize / min(width, height)
        return max(self.resize, round(width * factor)), max(self.resize, round(height * factor))

    def cropped(self, pixels):
        """The middle square of (H, W, 3)."""
        if self.crop is None:
            return pixels
        top, left = (pixels.shape[0] - self.crop) // 2, (pixels.shape[1] - self.crop) // 2
        return pixels[top:top + self.crop, left:left + self.crop]

    def jpeg(self, pixels):
        """The file of uint8 RGB (H, W, 3), as bytes."""
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.cropped(pixels))).save(file, "JPEG", quality=self.quality)
        return file.getvalue()


def make_folder(job):
    """The frame folder of a video, whole or not at all, from the first of its files that can be decoded. Returns why there is none, or None.

    job: (files, folder, a folder of its own to write in, Picture, T), as one value for a process to take.
    """
    paths, folder, partial, picture, T = job
    if folder.is_dir():  # made just before another job's crash took the answer
        return None
    reasons = []
    for path in paths:
        try:
            extract(path, partial, picture, T)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(partial, folder)
            return None
        except Broken as error:
            reasons.append(f"{path}: {error}")
    shutil.rmtree(partial, ignore_errors=True)
    return "; ".join(reasons)


def extract(path, folder, picture, T=None):
    """Write a video's frames, or T evenly spaced ones (all of a video that has fewer), as frame000001.jpg … of a new folder.

    Returns (frames written, frames of the video). Broken says why a video cannot be decoded; an OSError is that of writing.
    """
    length = None if T is None else count_packets(path)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        wanted = None if T is None else set(clip_frames(length, T, 1, "all", [0])[0].tolist())
        written, number = 0, -1
        for number, pixels in enumerate(frames(path, picture, wanted)):
            if pixels is not None:
                written += 1
                pathlib.Path(folder, f"frame{written:06d}.jpg").write_bytes(picture.jpeg(pixels))
        if T is None or number + 1 == length:
            return written, number + 1
        length = number + 1  # packets are not always frames: now it is known


def frames(path, picture, wanted=None):
    """Yield the frames in the order of showing, upright and resized, uint8 RGB (H, W, 3); None for one whose number is not `wanted`."""
    reformatter = VideoReformatter()  # one for all: it keeps its tables
    for number, (frame, aspect) in enumerate(decoded(path)):
        if wanted is not None and number not in wanted:
            yield None
            continue
        transposed, mirrored = orientation(frame)
        width, height = frame.width * aspect, frame.height
        if not 1 / MOST_SIDE < width / height < MOST_SIDE:
            raise Broken(f"has frames of {width:g}×{height} square pixels")
        width, height = picture.scaled(*((height, width) if transposed else (width, height)))
        if max(width, height) > MOST_SIDE:
            raise Broken(f"has frames that become {width}×{height} pixels, more than a JPEG can hold")
        if transposed:
            width, height = height, width
        try:
            small = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        except av.FFmpegError as error:
            raise Broken(f"{reason(error)} in resizing") from error
        pixels = small.to_ndarray()
        yield (pixels.swapaxes(0, 1) if transposed else pixels)[::-1 if mirrored[1] else 1, ::-1 if mirrored[0] else 1]


def orientation(frame):
    """What brings a frame upright: whether its rows and columns change places, and then (left and right, top and bottom) whether these do."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return False, (False, False)
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()  # of AVFrame: x' = ax + cy, y' = bx + dy
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    return transposed, ((c < 0, b < 0) if transposed else (a < 0, d < 0))


def decoded(path):
    """Yield (frame, aspect of its pixels), PyAV's; Broken where that ends early."""
    with opened(path) as (container, stream):
        packets, number, begin, end, aspect = 0, 0, math.inf, 0, float(stream.sample_aspect_ratio or 1)
        for packet in container.demux():
            if packet.pts is not None:
                begin = min(begin, float((packet.pts if packet.dts is None else min(packet.pts, packet.dts)) * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream:
                packets += packet.size > 0
                try:
                    shown = packet.decode()
                except av.FFmpegError as error:
                    raise Broken(f"{reason(error)} after {number} frames") from error
                for frame in shown:
                    number += 1
                    yield frame, aspect
        if not number:
            raise Broken("holds no frames")
        seconds, lasted = (container.duration or 0) / av.time_base, max(0, end - begin)
        reached = max(packets, lasted * float(stream.average_rate or 0))  # AVI leaves out frames that repeat the last one
        if reached < LEAST * stream.frames and (packets := count_all_packets(path)) < LEAST * stream.frames:
            raise Broken(f"ends after {packets} of {stream.frames} frames")
        frame = 1.5 / float(stream.average_rate or 1)  # seconds: some containers do not say how long the last one is shown
        if begin < seconds:  # of pieces cut out of a longer recording Matroska may count from the recording's start
            seconds -= max(0, begin)
        if not stream.frames and lasted + frame < LEAST * seconds:  # Matroska counts seconds only
            raise Broken(f"ends after {lasted:.1f} of {seconds:.1f} seconds")


def count_packets(path):
    """About the number of frames, without decoding any; at least 1."""
    with opened(path) as (container, stream):
        return max(1, sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream)))


def count_all_packets(path):
    """As count_packets, also those that the edit list of an mp4 or mov file leaves out: what is there of its stream.frames."""
    with opened(path, ignore_editlist="1") as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


class opened:
    """A video file as (container, video stream); all that FFmpeg refuses within is Broken. `options` are those of its demuxer."""

    def __init__(self, path, **options):
        self.path, self.options = path, options

    def __enter__(self):
        try:
            if not os.path.getsize(self.path):
                raise Broken("is empty")
            self.container = open_container(self.path, **self.options)
        except (av.FFmpegError, OSError) as error:
            raise Broken(reason(error)) from error
        try:
            return self.container, video_stream(self.container, self.path)
        except BaseException:
            self.container.close()
            raise

    def __exit__(self, kind, error, trace):
        self.container.close()
        if isinstance(error, (av.FFmpegError, MemoryError)):
            raise Broken(reason(error)) from error


def open_container(path, **options):
    return av.open(os.fspath(path), container_options=CONTAINERS | options, metadata_errors="replace")  # titles may be in any encoding


def video_stream(container, path):
    """The video: not a picture beside it. Of several streams FFmpeg's choice (the default one, the one of more frames), if it holds more than one frame."""
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    if not streams:
        raise Broken("has no video stream")
    streams = [stream for stream in streams if stream.codec_context is not None] or streams
    if len(streams) > 1:
        lengths = packets_of_streams(path)
        streams = [stream for stream in streams if lengths[stream.index] > 1] or streams
    best = container.streams.best("video")
    stream = best if best in streams else max(streams, key=lambda stream: stream.disposition & av.stream.Disposition.default)
    if stream.codec_context is None:
        raise Broken("has a video stream of an unknown codec")
    if not 0 < stream.width * stream.height <= MOST_PIXELS:
        raise Broken(f"has frames of {stream.width}×{stream.height} pixels (1 to {MOST_PIXELS:,} in all can be decoded)")
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # of any frame, whatever the header says
    stream.codec_context.thread_count = 1  # the cores take a video each
    return stream


def packets_of_streams(path):
    """{index of a stream: its packets}."""
    try:
        with open_container(path) as container:
            return collections.Counter(packet.stream.index for packet in container.demux() if packet.size)
    except av.FFmpegError as error:
        raise Broken(reason(error)) from error


def reason(error):
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    if log and "not on whitelist" in log[2]:
        return "is no container of videos"
    return " ".join(f"{text} ({log[2].strip()})".split()) if log else text
