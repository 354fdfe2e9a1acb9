"""Decode videos into frame folders: any file that FFmpeg reads, through PyAV.

Files are untrusted. Only containers of video files are opened, no playlist or URL that names other files. A file whose
end is missing is refused; FFmpeg alone accepts one in Matroska and AVI. The stored frames are those that a player
shows: from the container's best video stream, within its edit list, rotated and mirrored by its display matrix.
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
from distill_utils.frames import is_visible
from utils import with_path

CONTAINERS = {"format_whitelist": "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts,flv,asf,ogg",
              "protocol_whitelist": "file"}
MOST_PIXELS = 100_000_000  # per frame: about 12K; decoders hold sixteen frames and more
MOST_SIDE = 65_500  # pixels, the limit of JPEG
PICTURES = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails  # streams of other pictures
RESERVED, UNSPECIFIED = 3, 2  # values of a frame's colorspace
UNFINISHED = 2 ** 30  # frames in the header of an AVI file that was written to a pipe, or never finished
LEAST = 0.9  # required share of the frames that the header states: encoders' counts are off by a few

av.logging.set_level(av.logging.ERROR)  # so that errors contain FFmpeg's reason
logging.getLogger("libav").setLevel(logging.CRITICAL + 1)  # and FFmpeg does not print it too
# PyAV fails to read side data of kinds that only FFmpeg knows, such as EXIF: map these to a kind that is not used here.
SideData._missing_ = classmethod(lambda kinds, number: kinds.SEI_UNREGISTERED)


class Broken(ValueError):
    """A video that cannot be decoded to its end; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """How to store frames. resize: (width, height), or the shorter side in pixels; crop: side of the middle square."""
    resize: tuple | int
    crop: int | None = None
    quality: int = 95  # of the JPEG

    def __post_init__(self):
        sides = (self.resize,) if isinstance(self.resize, int) else self.resize
        if min(sides) < (self.crop or 1):
            raise ValueError(f"--crop {self.crop} does not fit into frames resized to {'x'.join(map(str, sides))}")

    def scaled(self, width, height):
        """Return the (width, height) to which frames of this display size are resized."""
        if not isinstance(self.resize, int):
            return self.resize
        factor = self.resize / min(width, height)
        return max(self.resize, round(width * factor)), max(self.resize, round(height * factor))

    def cropped(self, pixels):
        """Return the middle square of (H, W, 3)."""
        if self.crop is None:
            return pixels
        top, left = (pixels.shape[0] - self.crop) // 2, (pixels.shape[1] - self.crop) // 2
        return pixels[top:top + self.crop, left:left + self.crop]

    def jpeg(self, pixels):
        """Encode uint8 RGB (H, W, 3) as JPEG; return its bytes."""
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.cropped(pixels))).save(file, "JPEG", quality=self.quality)
        return file.getvalue()


def make_folder(job):
    """Make a video's frame folder, complete or not at all; return None, or the reason why there is none.

    The frames come from the first of the video's files that can be decoded. job: (files, folder, temporary folder to
    write in, Picture, T), as one value to send to a process.
    """
    paths, folder, partial, picture, T = job
    if is_made(folder):  # another job's crash lost the answer after the folder was made
        return None
    reasons = []
    for path in paths:
        try:
            extract(path, partial, picture, T)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)  # one whose frames were deleted; it may hold hidden files
            os.rename(partial, folder)
            return None
        except Broken as error:
            reasons.append(f"{path}: {error}")
    shutil.rmtree(partial, ignore_errors=True)
    return "; ".join(reasons)


def is_made(folder):
    """Return whether a frame folder exists and holds anything: folders appear complete, but files may be deleted."""
    return os.path.isdir(folder) and any(map(is_visible, os.listdir(folder)))


def extract(path, folder, picture, T=None):
    """Write all frames of a video, or T evenly spaced ones, as frame000001.jpg … into a new folder.

    A video with fewer than T frames is written completely. Returns (frames written, frames of the video). Broken gives
    the reason why a video cannot be decoded; an OSError comes from writing.
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
                file = pathlib.Path(folder, f"frame{written:06d}.jpg")
                try:
                    file.write_bytes(picture.jpeg(pixels))
                except OSError as error:
                    raise with_path(error, file) from error
        if T is None or number + 1 == length:
            return written, number + 1
        length = number + 1  # packets are not always frames: now the number of frames is known


def frames(path, picture, wanted=None):
    """Yield frames in display order, upright and resized, uint8 RGB (H, W, 3); None if the number is not `wanted`."""
    reformatter = VideoReformatter()  # shared by all frames: it keeps its tables
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
        if frame.colorspace == RESERVED:  # a wrong header: the matrix exists in no standard, FFmpeg would refuse it
            frame.colorspace = UNSPECIFIED
        try:
            small = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        except av.FFmpegError as error:
            raise Broken(f"{reason(error)} during resizing") from error
        pixels = small.to_ndarray()
        yield (pixels.swapaxes(0, 1) if transposed else pixels)[::-1 if mirrored[1] else 1, ::-1 if mirrored[0] else 1]


def orientation(frame):
    """Return how to make a frame upright: (transpose, (mirror left-right, mirror top-bottom)), in this order."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return False, (False, False)
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()  # AVFrame: x' = ax + cy, y' = bx + dy
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    return transposed, ((c < 0, b < 0) if transposed else (a < 0, d < 0))


def decoded(path):
    """Yield (frame, pixel aspect ratio) of PyAV; Broken if the video ends early."""
    with opened(path) as (container, stream):
        packets, number, begin, end, aspect = 0, 0, math.inf, 0, float(stream.sample_aspect_ratio or 1)
        for packet in container.demux():
            if packet.pts is not None:
                begin = min(begin, float((packet.pts if packet.dts is None else min(packet.pts, packet.dts))
                                         * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream:
                if packet.size == 0 and packet.dts is not None:  # a dropped frame; the last, empty packet has no time
                    continue
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
        reached = max(packets, lasted * float(stream.average_rate or 0))  # AVI omits repeated frames
        promised = 0 if stream.frames == UNFINISHED else stream.frames
        if reached < LEAST * promised and (packets := count_all_packets(path)) < LEAST * promised:
            raise Broken(f"ends after {packets} of {promised} frames")
        frame = 1.5 / float(stream.average_rate or 1)  # seconds: some containers omit the last frame's duration
        if begin < seconds:  # in clips of a longer recording, Matroska may count from the recording's start
            seconds -= max(0, begin)
        if not stream.frames and lasted + frame < LEAST * seconds:  # Matroska states seconds only
            raise Broken(f"ends after {lasted:.1f} of {seconds:.1f} seconds")


def count_packets(path):
    """Return the approximate number of frames without decoding, at least 1."""
    with opened(path) as (container, stream):
        return max(1, sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream)))


def count_all_packets(path):
    """Like count_packets, including packets that the edit list of an mp4 or mov file excludes, as in stream.frames."""
    with opened(path, ignore_editlist="1") as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


class opened:
    """Open a video file as (container, video stream); FFmpeg's errors inside become Broken; options: the demuxer's."""

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


def seconds_of(path):
    """Return a video's duration as its container states it; inf if it states none, or cannot be read."""
    try:
        with opened(path) as (container, _):
            return (container.duration or math.inf) / av.time_base
    except Broken:
        return math.inf


def open_container(path, **options):
    # Titles may have any encoding.
    # An absolute path, because FFmpeg takes `12:30/a.mp4` for an address.
    return av.open(os.path.abspath(path), container_options=CONTAINERS | options, metadata_errors="replace")


def video_stream(container, path):
    """Return the video stream, not a stream of cover pictures.

    Of several streams this is FFmpeg's choice (the default one, the one with more frames) if it has more than one
    frame.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    if not streams:
        raise Broken("has no video stream")
    streams = [stream for stream in streams if stream.codec_context is not None] or streams
    if len(streams) > 1:
        lengths = packets_of_streams(path)
        streams = [stream for stream in streams if lengths[stream.index] > 1] or streams
    best = container.streams.best("video")
    stream = best if best in streams else max(
        streams, key=lambda stream: stream.disposition & av.stream.Disposition.default)
    if stream.codec_context is None:
        raise Broken("has a video stream of an unknown codec")
    if not 0 < stream.width * stream.height <= MOST_PIXELS:
        raise Broken(f"has frames of {stream.width}×{stream.height} pixels: "
                     f"a frame can be decoded if it has 1 to {MOST_PIXELS:,} pixels")
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # for every frame, whatever the header says
    stream.codec_context.thread_count = 1  # each core decodes another video
    return stream


def packets_of_streams(path):
    """Return {stream index: number of its packets}."""
    try:
        with open_container(path) as container:
            return collections.Counter(packet.stream.index for packet in container.demux() if packet.size)
    except av.FFmpegError as error:
        raise Broken(reason(error)) from error


def reason(error):
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    if log and "not on whitelist" in log[2]:
        return "is not a video container"
    return " ".join(f"{text} ({log[2].strip()})".split()) if log else text
