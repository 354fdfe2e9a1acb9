"""Real video files, small, made with PyAV: frame i is a grey of its own, with a bright left edge."""
import fractions
import os
import signal
import struct

import av
import numpy as np

CODECS = {".avi": "mpeg4", ".mp4": "h264", ".mov": "h264", ".mkv": "h264", ".webm": "vp8", ".wmv": "wmv2", ".flv": "flv"}

MILLISECOND = fractions.Fraction(1, 1000)


def grey(number):
    return 40 + 12 * (number % 16)


def write_video(path, frames=12, size=(48, 36), rate=25, paint=None, gop=None, title="", times=None, codec=None, **options):
    """A video file of that many frames of (width, height), in the codec that its suffix usually has. paint(pixels) changes what is shown; gop: frames from
    one key frame to the next, in the order of showing; times: when each is shown, in milliseconds; options: of the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w", options=options) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec or CODECS[path.suffix.lower()], rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000
        if times:
            stream.codec_context.time_base = MILLISECOND
        if gop:
            stream.gop_size, stream.max_b_frames = gop, 0
        for number in range(frames):
            pixels = np.full((height, width, 3), grey(number), np.uint8)
            pixels[:, :width // 4] = 250
            if paint:
                paint(pixels)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if times:
                frame.pts, frame.time_base = times[number], MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_streams(path, *streams):
    """A file of several video streams, each (size, frames, av's disposition)."""
    with av.open(str(path), "w") as container:
        added = []
        for (width, height), frames, disposition in streams:
            is_cover = disposition == av.stream.Disposition.attached_pic.value
            stream = container.add_stream("mjpeg" if is_cover else {".webm": "vp8"}.get(path.suffix, "mpeg4"), rate=25)
            stream.width, stream.height, stream.pix_fmt, stream.disposition = width, height, "yuvj420p" if is_cover else "yuv420p", disposition
            added.append((stream, frames))
        for number in range(max(frames for _, frames in added)):
            for stream, frames in added:
                if number < frames:
                    pixels = np.full((stream.height, stream.width, 3), grey(number), np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        for stream, _ in added:
            container.mux(stream.encode())
    return path


def turned(path, quarters):
    """The mp4 or mov file with a display matrix that turns it clockwise by so many quarters, as telephones write it."""
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    return with_matrix(path, cosine, sine, -sine, cosine)


def with_matrix(path, a, b, c, d, box=b"tkhd"):
    """The mp4 or mov file with the display matrix (a, b, c, d) of its track, or its movie: x' = ax + cy, y' = bx + dy."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + {b"tkhd": 44, b"mvhd": 40}[box]  # of the matrix in a version 0 box
    data[start:start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def edited(path, *edits):
    """The mov or mp4 file, its index at its end, with an edit list of (first frame, frames); first frame -1: nothing is shown. 25 frames a second."""
    entries = [struct.pack(">3i", frames * 40, -1 if first < 0 else first * 512, 1 << 16) for first, frames in edits]  # units of 1/1000 and 1/12800 s
    listed = box(b"edts", box(b"elst", struct.pack(">2I", 0, len(edits)) + b"".join(entries)))

    def changed(data):
        for kind, content in boxes(data):
            if kind == b"trak":
                first, *rest = [box(*each) for each in boxes(content) if each[0] != b"edts"]
                content = b"".join([first, listed, *rest])
            yield box(kind, b"".join(changed(content)) if kind == b"moov" else content)
    path.write_bytes(b"".join(changed(path.read_bytes())))
    return path


def boxes(data):
    while data:
        size, = struct.unpack(">I", data[:4])
        yield data[4:8], data[8:size]
        data = data[size:]


def box(kind, content):
    return struct.pack(">I", 8 + len(content)) + kind + content


def double(job):
    """Work for a process; "crash" kills it."""
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 2 * job
