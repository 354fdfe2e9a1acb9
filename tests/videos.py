"""Real video files, small, made with PyAV: frame i is a grey of its own, with a bright left edge."""
import os
import signal

import av
import numpy as np

CODECS = {".avi": "mpeg4", ".mp4": "h264", ".mov": "h264", ".mkv": "h264", ".webm": "vp8", ".wmv": "wmv2", ".flv": "flv"}


def grey(number):
    return 40 + 12 * (number % 16)


def write_video(path, frames=12, size=(48, 36), rate=25):
    """A video file of that many frames of (width, height), in the codec that its suffix usually has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix.lower()], rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000
        for number in range(frames):
            pixels = np.full((height, width, 3), grey(number), np.uint8)
            pixels[:, :width // 4] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def turned(path, quarters):
    """The mp4 or mov file with a display matrix that turns it clockwise by so many quarters, as telephones write it."""
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # of the matrix in a version 0 box
    data[start:start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    return path


def double(job):
    """Work for a process; "crash" kills it."""
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 2 * job
