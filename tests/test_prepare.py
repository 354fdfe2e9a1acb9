"""From video files to frame folders and lists: decoding, the official lists, resuming, and what bad files and lists give."""
import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from videos import CODECS, box, boxes, double, edited, grey, turned, with_matrix, write_streams, write_video

from distill_utils import decode, inspect, lists, prepare, untimed, video_files, workers
from distill_utils.clips import load_clips
from distill_utils.datasets import choose_groups, clip_frames, read_videos
from distill_utils.decode import Broken, Picture, extract, frames
from distill_utils.frames import frame_names
from distill_utils.processes import run_script
from utils import ROOT

PLAIN = Picture((48, 36))


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The server that processes are forked from has imported what the first of them asked for: the slow libraries."""
    list(workers.in_processes(decode.reason, [ValueError("none")], 1))


@pytest.fixture
def command(tmp_path, capfd, monkeypatch):
    """command(DATASET, *flags) runs prepare with one worker and gives (exit code, what it printed)."""
    monkeypatch.setattr("sys.argv", ["prepare"])

    def command(dataset, *flags, module=prepare):
        arguments = [dataset, *map(str, flags)]
        if module is prepare:
            arguments += ["--workers", "1"] if "--workers" not in flags else []
            arguments += ["--out", str(tmp_path / "out")] if "--out" not in flags else []
        capfd.readouterr()
        try:
            run_script(module.main, module.parser(), arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + (printed.err.splitlines() or [""])[-1]
    return command


def refused(command, *arguments):
    code, printed = command(*arguments)
    assert code == 2, printed
    return printed.partition("error: ")[2]


def report(path):
    return dict(line.split("\t") for line in path.read_text().splitlines())


def greys(folder):
    """The numbers of the frames that a folder's images show."""
    values = [np.asarray(Image.open(os.path.join(folder, name)))[:, -8:].mean() for name in frame_names(folder)]
    numbers = [int(np.abs(value - [grey(number) for number in range(16)]).argmin()) for value in values]
    assert all(abs(value - grey(number)) < 4 for value, number in zip(values, numbers))
    return numbers


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("suffix", list(CODECS)[:5])
def test_every_frame_in_order(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}")
    assert extract(path, tmp_path / "frames", PLAIN) == (12, 12)
    assert greys(tmp_path / "frames") == list(range(12))
    assert sorted(os.listdir(tmp_path / "frames"))[0] == "frame000001.jpg"


@pytest.mark.parametrize("length", (1, 5, 8, 9, 16))
@pytest.mark.parametrize("packets", (1, 5, 40, None))
def test_evenly_spaced_frames_are_those_of_the_clip_rule(tmp_path, monkeypatch, length, packets):
    """Also where the container's packets are not its frames."""
    path = write_video(tmp_path / "a.mp4", length)
    assert decode.count_packets(path) == length
    if packets:
        monkeypatch.setattr(decode, "count_packets", lambda path: packets)
    written = min(length, 8)
    assert extract(path, tmp_path / "frames", PLAIN, T=8) == (written, length)
    assert greys(tmp_path / "frames") == sorted(set(clip_frames(length, 8, 1, "all", [0])[0].tolist()))


@pytest.mark.parametrize("quarters", range(4))
def test_rotated_videos_stand_upright(tmp_path, quarters):
    path = turned(write_video(tmp_path / "a.mov", 2), quarters)
    picture = next(frames(path, Picture(36))).mean(2)
    edges = [picture[:, :4], picture[:4], picture[:, -4:], picture[-4:]]  # left, top, right, bottom: clockwise
    assert picture.shape == ((36, 48), (48, 36))[quarters % 2]
    assert [edge.mean() > 200 for edge in edges] == [edge == quarters for edge in range(4)]
    assert next(frames(path, Picture((50, 20)))).shape == (20, 50, 3)  # whatever the shape


def corners(pixels):
    """A bright left edge and a dark top: no two of a picture's eight positions look alike."""
    pixels[:len(pixels) // 3] //= 4


def shown(pixels, a, b, c, d):
    """The pixels (H, W, 3) where the matrix puts them, one by one: x' = ax + cy, y' = bx + dy, moved to where none is negative."""
    places = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(pixels.shape[0]) for x in range(pixels.shape[1])}
    left, top = min(x for x, _ in places), min(y for _, y in places)
    result = np.zeros((max(y for _, y in places) - top + 1, max(x for x, _ in places) - left + 1, 3), np.uint8)
    for (x, y), colour in places.items():
        result[y - top, x - left] = colour
    return result


MATRICES = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("suffix, box", ((".mov", b"tkhd"), (".mp4", b"tkhd"), (".mov", b"mvhd")))
def test_every_display_matrix(tmp_path, suffix, box, matrix):
    path = write_video(tmp_path / f"a{suffix}", 2, size=(24, 16), paint=corners)
    plain = next(frames(path, Picture(16)))
    found = next(frames(with_matrix(path, *matrix, box=box), Picture(16)))
    assert (found == shown(plain, *matrix)).all()
    assert (next(frames(with_matrix(path, *(3 * value for value in matrix), box=box), Picture(16))) == found).all()  # matrices may scale, too


@pytest.mark.parametrize("matrix", ((0, 0, 0, 0), (1, 1, -1, 1)))
def test_matrices_of_no_right_angle_and_no_sense_leave_a_frame_whole(tmp_path, matrix):
    path = with_matrix(write_video(tmp_path / "a.mov", 2), *matrix)
    assert extract(path, tmp_path / "frames", PLAIN) == (2, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", (".avi", ".mov", ".mkv"))
def test_motion_jpeg_of_cameras_stands_as_its_exif_says(tmp_path, suffix, orientation):
    """Its frames carry what PyAV has no name for."""
    pixels = np.full((16, 24, 3), 128, np.uint8)
    pixels[:, :6] = 250
    corners(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with av.open(str(tmp_path / f"a{suffix}"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuvj420p"
        for number in range(2):
            packet = av.Packet((tmp_path / "a.jpg").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base, packet.is_keyframe = stream, number, number, 1 / stream.average_rate, True
            container.mux(packet)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    found = next(frames(tmp_path / f"a{suffix}", Picture(16)))
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).max() < 40


NONE, DEFAULT, COVER = 0, 1, av.stream.Disposition.attached_pic.value  # dispositions
THUMBNAIL, VIDEO, SMALL, COVERED = (32, 24), (48, 36), (24, 18), (320, 320)


@pytest.mark.parametrize("suffix, streams, chosen", [
    *((suffix, [(THUMBNAIL, 1, NONE), (VIDEO, 20, DEFAULT)], 1) for suffix in (".mkv", ".mp4", ".mov", ".webm", ".avi", ".ts", ".wmv")),
    *((suffix, [(VIDEO, 20, DEFAULT), (THUMBNAIL, 1, NONE)], 0) for suffix in (".mkv", ".mp4", ".mov", ".webm", ".avi", ".ts", ".wmv")),
    *((suffix, [(THUMBNAIL, 1, NONE), (VIDEO, 20, NONE)], 1) for suffix in (".mkv", ".mp4", ".avi", ".ts")),  # none is the default, or the thumbnail
    *((suffix, [(THUMBNAIL, 1, DEFAULT), (VIDEO, 20, NONE)], 1) for suffix in (".mkv", ".mp4", ".mov")),  # is: a picture is no video
    *((suffix, [(THUMBNAIL, 1, NONE), (SMALL, 20, DEFAULT), (VIDEO, 20, NONE)], 1) for suffix in (".mkv", ".mov")),
    *((suffix, [(VIDEO, 20, NONE), (SMALL, 20, DEFAULT)], 1) for suffix in (".mkv", ".mov", ".webm")),
    (".mkv", [(VIDEO, 1, NONE), (THUMBNAIL, 1, DEFAULT)], 1),
    *((suffix, [(COVERED, 1, COVER), (VIDEO, count, NONE)], 1) for suffix, count in ((".mkv", 20), (".mp4", 20), (".mov", 20), (".mp4", 1), (".mov", 1))),
    *((suffix, [(VIDEO, 20, NONE), (COVERED, 1, COVER)], 0) for suffix in (".mkv", ".mp4", ".mov")),
])
def test_the_best_video_stream_is_the_video(tmp_path, suffix, streams, chosen):
    path = write_streams(tmp_path / f"a{suffix}", *streams)
    size, count, _ = streams[chosen]
    assert extract(path, tmp_path / "all", Picture(size[1])) == (count, count)
    assert Image.open(tmp_path / "all" / "frame000001.jpg").size == size
    assert extract(path, tmp_path / "some", Picture(size[1]), T=8) == (min(8, count), count)


EDITS = {  # an edit list of 50 frames with a key frame every ten, and the frames that a player shows
    "the middle": ([(11, 20)], range(11, 31)),
    "from a key frame": ([(10, 20)], range(10, 30)),
    "to the end": ([(31, 19)], range(31, 50)),
    "past the end": ([(11, 60)], range(11, 50)),
    "the first frames": ([(0, 20)], range(20)),
    "one frame": ([(7, 1)], [7]),
    "after a pause": ([(-1, 5), (11, 20)], range(11, 31)),
    "two pieces": ([(5, 10), (30, 10)], [*range(5, 15), *range(30, 40)]),
    "the same twice": ([(5, 10), (5, 10)], [*range(5, 15), *range(5, 15)]),
    "pieces in another order": ([(30, 5), (5, 5)], [*range(30, 35), *range(5, 10)]),
}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("suffix", (".mov", ".mp4"))
def test_of_a_trimmed_file_what_a_player_shows(tmp_path, suffix, kind):
    edits, numbers = EDITS[kind]
    path = edited(write_video(tmp_path / f"a{suffix}", 50, gop=10), *edits)
    assert decode.count_packets(path) == len(numbers)
    assert extract(path, tmp_path / "all", PLAIN) == (len(numbers), len(numbers))
    assert greys(tmp_path / "all") == [number % 16 for number in numbers]
    extract(path, tmp_path / "some", PLAIN, T=8)
    chosen = sorted(set(clip_frames(len(numbers), 8, 1, "all", [0])[0].tolist()))
    assert greys(tmp_path / "some") == [numbers[number] % 16 for number in chosen]


@pytest.mark.parametrize("edits", ([(11, 20)], [(0, 50)], [(11, 39)]))
def test_a_trimmed_file_without_its_end_is_a_truncated_one(tmp_path, edits):
    """The index at its front, as in files for the web: what is cut off are frames."""
    path = edited(write_video(tmp_path / "a.mov", 50, gop=10, size=(480, 360)), *edits)
    data = path.read_bytes()
    parts = dict(boxes(data))
    front, moved = box(b"ftyp", parts[b"ftyp"]), len(parts[b"moov"]) + 8
    place = parts[b"moov"].index(b"stco") + 12  # of the chunks: behind the index now
    chunks = np.frombuffer(parts[b"moov"], ">u4", int.from_bytes(parts[b"moov"][place - 4:place], "big"), place)
    moov = parts[b"moov"][:place] + (chunks + moved).astype(">u4").tobytes() + parts[b"moov"][place + chunks.nbytes:]
    whole = front + box(b"moov", moov) + data[len(front):data.index(b"moov") - 4]
    path.write_bytes(whole)
    expected = sum(count for _, count in edits)
    assert extract(path, tmp_path / "frames", PLAIN) == (expected, expected)
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(Broken, match="ends after|Invalid data"):
        extract(path, tmp_path / "frames", PLAIN)


def test_sizes():
    assert Picture((160, 120), 112).scaled(33, 999) == (160, 120)
    for size, expected in (((320, 240), (160, 120)), ((240, 320), (120, 160)), ((321, 241), (160, 120)), ((100, 100), (120, 120)),
                           ((1920, 1080), (213, 120)), ((7, 5), (168, 120))):
        assert Picture(120).scaled(*size) == expected
    pixels = np.arange(120 * 160 * 3).reshape(120, 160, 3)
    assert (Picture((160, 120), 112).cropped(pixels) == pixels[4:116, 24:136]).all()
    assert Picture((160, 120)).cropped(pixels) is pixels
    with pytest.raises(ValueError, match="--crop 121 does not fit into frames resized to 160x120"):
        Picture((160, 120), 121)


def test_odd_sizes_and_pixels_that_are_not_square(tmp_path):
    path = write_video(tmp_path / "a.avi", 3, size=(45, 35))
    assert [frame.shape for frame in frames(path, Picture(20))] == [(20, 26, 3)] * 3
    path = tmp_path / "wide.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv420p"
        stream.sample_aspect_ratio = 2
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((36, 48, 3), 99, np.uint8), "rgb24")))
        container.mux(stream.encode())
    assert next(frames(path, Picture(36))).shape == (36, 96, 3)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


BAD_FILES = {  # what stands in the file `a.mp4` (or with the suffix given), and the reason
    "nothing": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("no video\n" * 99), "Invalid data found when processing input"),
    "picture": (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), "is not a video container"),
    "playlist": (lambda path: path.write_text(f"#EXTM3U\n#EXTINF:9,\n{path.with_name('other.mp4')}\n"), "Invalid data found"),
    "half an mp4": (lambda path: cut(write_video(path, 16), 0.5), r"Invalid data found .*moov atom not found"),
    "half an avi": (lambda path: cut(write_video(path, 50, size=(480, 360)), 0.5), r"ends after \d+ of 50 frames"),
    "half a webm": (lambda path: cut(write_video(path, 50), 0.5), r"ends after \d\.\d of 2\.0 seconds"),
    "half an mkv": (lambda path: cut(write_video(path, 50, size=(480, 360)), 0.5), r"ends after \d\.\d of 2\.0 seconds"),
    "sound in an mkv": (sound, "has no video stream"),
    "a cover in an mp4": (lambda path: write_streams(path, (COVERED, 1, COVER)), "has no video stream"),
    "a folder.mp4": (lambda path: path.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_broken_files_say_why(tmp_path, kind):
    suffix = re.search(r"(mp4|avi|webm|mkv)?$", kind)[0] or "mp4"
    path = tmp_path / f"a.{suffix}"
    BAD_FILES[kind][0](path)
    for T in (None, 8):
        with pytest.raises(Broken, match=BAD_FILES[kind][1]):
            extract(path, tmp_path / "frames", PLAIN, T)


def test_an_avi_may_leave_out_frames_that_repeat_the_last(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv420p"
        for number in (0, 3, 4, 8):
            frame = av.VideoFrame.from_ndarray(np.full((36, 48, 3), grey(number), np.uint8), "rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].frames == 9
    assert extract(tmp_path / "a.avi", tmp_path / "frames", PLAIN) == (4, 4)


ODD_TIMES = [0, 10, 40, 41, 200, 400, 410, 900, 1500, 1510, 2600, 2700]  # milliseconds, of a variable rate
LATE = [5000 + 40 * number for number in range(12)]  # of a piece of a longer recording


@pytest.mark.parametrize("times", (ODD_TIMES, LATE), ids=("variable rate", "late"))
@pytest.mark.parametrize("suffix, codec", ((".mkv", "h264"), (".webm", "vp8"), (".flv", "h264"), (".ts", "h264"), (".mp4", "h264"), (".mov", "h264")))
def test_whenever_frames_are_shown(tmp_path, suffix, codec, times):
    path = write_video(tmp_path / f"a{suffix}", times=times, codec=codec)
    assert extract(path, tmp_path / "frames", PLAIN) == (12, 12)
    assert greys(tmp_path / "frames") == list(range(12))


@pytest.mark.parametrize("suffix", (".mkv", ".webm", ".flv"))  # the last one's duration does not count from the recording's start
def test_half_of_a_late_piece(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", 50, size=(480, 360), times=[5000 + 40 * number for number in range(50)])
    cut(path, 0.5)
    with pytest.raises(Broken, match=r"ends after [01]\.\d of (2\.0|1\.9) seconds"):
        extract(path, tmp_path / "frames", PLAIN)


@pytest.mark.parametrize("codec", ("mpeg4", "h264"))
def test_an_avi_that_was_written_to_a_pipe(tmp_path, codec):
    """Its header was never finished, and states 2^30 frames."""
    class Pipe:
        def write(self, data):
            (tmp_path / "a.avi").open("ab").write(data)

    with av.open(Pipe(), "w", format="avi") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv420p"
        for number in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((36, 48, 3), 10 * number, np.uint8), "rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].frames == decode.UNFINISHED
    assert extract(tmp_path / "a.avi", tmp_path / "frames", PLAIN) == (12, 12)


@pytest.mark.parametrize("suffix", (".avi", ".mp4", ".mkv"))
def test_titles_in_other_encodings(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", title="a title to change")
    data = path.read_bytes()
    assert b"a title to change" in data
    path.write_bytes(data.replace(b"a title to change", b"\xfcberall \xe4hnlich "))
    assert extract(path, tmp_path / "frames", PLAIN) == (12, 12)


def test_frames_too_large_are_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MOST_PIXELS", 48 * 36 - 1)
    with pytest.raises(Broken, match="has frames of 48×36 pixels"):
        extract(write_video(tmp_path / "a.mp4"), tmp_path / "frames", PLAIN)


def test_shapes_that_no_jpeg_holds(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2, size=(600, 2))
    assert next(frames(path, Picture(20))).shape == (20, 6000, 3)
    with pytest.raises(Broken, match="become 90000×300 pixels, more than a JPEG can hold"):
        next(frames(path, Picture(300)))


@pytest.mark.parametrize("count, rate", ((1, 25), (3, 25), (10, 25), (8, 1)))
@pytest.mark.parametrize("suffix", (".wmv", ".flv", ".mkv", ".webm"))
def test_short_files_are_not_truncated_ones(tmp_path, suffix, count, rate):
    path = write_video(tmp_path / f"a{suffix}", count, rate=rate)
    assert extract(path, tmp_path / "frames", PLAIN) == (count, count)


def test_damage_in_the_middle(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40, size=(480, 360))
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) * 3 // 4] = b"\xff" * (len(data) * 3 // 4 - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(Broken, match=r"after \d+ frames|moov"):
        extract(path, tmp_path / "frames", PLAIN)


def test_a_colour_matrix_that_does_not_exist_is_ignored(tmp_path, monkeypatch):
    path, plain = write_video(tmp_path / "a.mp4"), list(frames(tmp_path / "a.mp4", PLAIN))
    real = decode.decoded

    def reserved(path):
        for frame, aspect in real(path):
            frame.colorspace = 3
            yield frame, aspect
    monkeypatch.setattr(decode, "decoded", reserved)
    assert all((found == expected).all() for found, expected in zip(frames(path, PLAIN), plain, strict=True))


def test_dropped_frames_are_empty_samples(tmp_path):
    path = tmp_path / "a.mov"
    picture = PLAIN.jpeg(np.full((36, 48, 3), 128, np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuvj420p"
        for number in range(20):
            packet = av.Packet(picture + bytes(1 + number % 2))             # of two sizes, so that the file lists each
            packet.stream, packet.pts, packet.dts, packet.time_base, packet.is_keyframe = stream, number, number, 1 / stream.average_rate, True
            container.mux(packet)
    data = bytearray(path.read_bytes())
    sizes = data.index(b"stsz") + 16
    data[sizes + 4 * 5:sizes + 4 * 7] = bytes(8)
    path.write_bytes(data)
    assert extract(path, tmp_path / "frames", PLAIN) == (18, 18)


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    video, folder = write_video(tmp_path / "a.mp4"), tmp_path / "frames" / "a"
    written = pathlib.Path.write_bytes

    def full(path, data):
        if path.name == "frame000007.jpg":
            raise OSError(28, "No space left on device")
        return written(path, data)
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as error:  # not the video's fault
        decode.make_folder(([video], folder, tmp_path / "partial", PLAIN, None))
    assert error.value.filename == str(tmp_path / "partial" / "frame000007.jpg")
    assert not folder.exists()
    monkeypatch.undo()
    assert decode.make_folder(([video], folder, tmp_path / "partial", PLAIN, None)) is None
    assert greys(folder) == list(range(12)) and not (tmp_path / "partial").exists()


# ---------------------------------------------------------------- processes

@pytest.mark.parametrize("count", (1, 2))
def test_a_crash_takes_no_other_job_with_it(count):
    jobs = [1, 2, "crash", 3, 4, "crash", *range(5, 60)]
    assert list(workers.in_processes(double, jobs, count)) == [(job, workers.CRASHED if job == "crash" else 2 * job) for job in jobs]


def test_jobs_are_taken_as_they_are_needed():
    taken = []
    answers = workers.in_processes(double, (taken.append(job) or job for job in range(1000)), 1)
    assert [next(answers)[1] for _ in range(3)] == [0, 2, 4] and len(taken) < 30
    answers.close()


# ---------------------------------------------------------------- official lists

def write(path, *lines, end="\n", encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode(encoding))


def names(*, label="Walk", groups=(1, 2), clips=(1, 2)):
    return [f"{label}/v_{label}_g{group:02}_c{clip:02}.avi" for group in groups for clip in clips]


@pytest.fixture
def ucf(tmp_path):
    """UCF101's folders and lists, of two classes, one of them among miniUCF101's; splits 1 and 2."""
    folder = tmp_path / "UCF 101"
    for label in ("Biking", "Walk"):
        for name in names(label=label):
            write_video(folder / "UCF-101" / name, 20)
    for split, (train, test) in ((1, (1, 2)), (2, (2, 1))):
        end, encoding = (("\n", "utf-8"), ("\r\n", "utf-8-sig"))[split - 1]
        both = [(name, number) for number, label in ((1, "Biking"), (2, "Walk")) for name in names(label=label, groups=(train,))]
        write(folder / "lists" / f"trainlist0{split}.txt", *(f"{name} {number}" for name, number in both), end=end, encoding=encoding)
        write(folder / "lists" / f"testlist0{split}.txt", *names(label="Biking", groups=(test,)), *names(groups=(test,)), "",
              end=end, encoding=encoding)
    write(folder / "lists" / "classInd.txt", "1 Biking", "2 Walk")
    return folder


def test_ucf101(ucf, tmp_path, command):
    (tmp_path / "out" / "UCF101" / "raw").mkdir(parents=True)  # other folders beside the frames do no harm
    code, printed = command("UCF101", "--videos", ucf)
    assert code == 0 and "8 videos: 8 prepared in " in printed and "0 missing or broken" in printed
    root = tmp_path / "out" / "UCF101"
    assert (root / "ucf101_splits1.csv").read_text().splitlines() == [
        "folder_name,label,split,group", *(f"v_{label}_g{group}_c0{clip},{label},{split},v_{label}_g{group}" for split, group in (("train", "01"), ("test", "02"))
                                           for label in ("Biking", "Walk") for clip in (1, 2))]
    assert "v_Walk_g02_c01,Walk,train" in (root / "ucf101_splits2.csv").read_text()
    assert not (root / "ucf101_splits3.csv").exists() and not list(root.rglob(".preparing*"))
    assert greys(root / "jpegs_112" / "v_Walk_g01_c02") == [*range(16), 0, 1, 2, 3]
    assert Image.open(root / "jpegs_112" / "v_Walk_g01_c02" / "frame000001.jpg").size == (112, 112)
    for split, clips in (("train", 4), ("test", 12)):
        assert len(load_clips("UCF101", split=split, data_path=tmp_path / "out", size=16, pack=False)) == clips
    assert len(load_clips("UCF101", split="train", data_path=tmp_path / "out", list_path=root / "ucf101_splits2.csv", pack=False)) == 4


def test_mini_ucf101_takes_its_classes_and_what_is_there(ucf, tmp_path, command):
    assert command("miniUCF101", "--videos", ucf)[0] == 0
    root = tmp_path / "out" / "UCF101"
    assert sorted(os.listdir(root / "jpegs_112")) == [name[7:-4] for name in names(label="Biking")]
    before = (root / "jpegs_112" / "v_Biking_g01_c01").stat()
    assert command("UCF101", "--videos", ucf)[0] == 0
    assert (root / "jpegs_112" / "v_Biking_g01_c01").stat() == before  # not decoded again
    assert set(pd.read_csv(root / "ucf50_splits1.csv").label) == {"Biking"}
    assert set(pd.read_csv(root / "ucf101_splits1.csv").label) == {"Biking", "Walk"}


def test_classes_of_mini_ucf101():
    shared = ROOT.parent / "shared" / "data" / "miniUCF101_classes.txt"
    assert len(set(lists.MINI_UCF101)) == 50
    if shared.exists():
        assert shared.read_text().split() == list(lists.MINI_UCF101)


def test_hmdb51_and_all_train(tmp_path, command):
    odd = ["a b (1) #2_clap_u_nm.avi", "ünï;[&]!_clap.avi", "c.d_clap.avi", "unused_clap.avi"]
    for name in odd:
        write_video(tmp_path / "videos" / "clap" / name, 3)
    write_video(tmp_path / "videos" / "run" / "1_run.avi", 3)
    folder = tmp_path / "videos" / "testTrainMulti_7030_splits"
    write(folder / "clap_test_split1.txt", f"{odd[0]} 1 ", f"{odd[1]} 2 ", f"{odd[2]} 1", f"{odd[3]} 0")
    write(folder / "run_test_split1.txt", "1_run.avi 1")
    for flags, unused in (((), []), (("--all_train",), [("unused_clap", "clap", "train")])):
        assert command("HMDB51", "--videos", tmp_path / "videos", *flags)[0] == 0
        rows = pd.read_csv(tmp_path / "out" / "HMDB51" / "hmdb51_splits.csv").itertuples(index=False, name=None)
        assert sorted(rows) == sorted([("a b (1) #2_clap_u_nm", "clap", "train"), ("ünï;[&]!_clap", "clap", "test"),
                                       ("c.d_clap", "clap", "train"), ("1_run", "run", "train"), *unused])
    assert len(load_clips("HMDB51", split="train", data_path=tmp_path / "out", size=16, pack=False)) == 4
    assert len(report(tmp_path / "out" / "HMDB51" / "short_videos.txt")) == 5  # of fewer than 16 frames


KINETICS = "label,youtube_id,time_start,time_end,split"


@pytest.mark.parametrize("second, bom", (("validate.csv", ""), ("val.csv", "\ufeff")))
def test_kinetics_with_replacements(tmp_path, command, second, bom):
    videos = tmp_path / "k400"
    for path, count in (("train/abc_000001_000011.mp4", 20), ("replacement/replacement_for_corrupted_k400/def_000002_000012.mp4", 9),
                        ("train/ghi_000003_000013.mp4", 3), ("val/-_x_000004_000014.webm", 20), ("train/extra_000000_000010.mp4", 1)):
        write_video(videos / path, count)
    write(videos / "train" / "def_000002_000012.mp4", "corrupted")
    write(videos / "train.csv", bom + KINETICS, '"clap, loudly",abc,1,11,train', "run,def,2,12,train", "run,ghi,3,13,train",
          "run,gone,5,15,train", end="\r\n")
    write(videos / second, bom + KINETICS, "run,-_x,4,14,validate")
    code, printed = command("Kinetics400", "--videos", videos)
    root = tmp_path / "out" / "Kinetics"
    assert code == 0 and "5 videos: 4 prepared in " in printed and "; 1 other files in " in printed
    assert report(root / "broken_videos.txt") == {"train/gone_000005_000015": f"no file with this name below {videos}"}
    assert report(root / "short_videos.txt") == {"train/ghi_000003_000013": "3 frames, fewer than 8"}
    assert (root / "train.csv").read_text().splitlines() == [KINETICS, '"clap, loudly",abc,1,11,train', "run,def,2,12,train",
                                                             "run,ghi,3,13,train"]
    assert (root / "validate.csv").read_text().splitlines() == [KINETICS, "run,-_x,4,14,validate"]
    assert greys(root / "train" / "abc_000001_000011") == [i * 20 // 8 % 16 for i in range(8)]
    assert greys(root / "train" / "def_000002_000012") == [i * 9 // 8 for i in range(8)]
    assert Image.open(root / "val" / "-_x_000004_000014" / "frame000001.jpg").size == (64, 64)
    train = load_clips("Kinetics400", split="train", data_path=tmp_path / "out", pack_path=tmp_path / "packs")
    assert train.class_names == ["clap, loudly", "run"] and len(train) == 3


@pytest.mark.parametrize("prefix", ("something-something-v2-", ""))
def test_something_something(tmp_path, command, prefix):
    videos = tmp_path / "20bn"
    for number in (1, 22, 333):
        write_video(videos / f"{number}.webm", 10)
    items = [{"id": "1", "label": "putting a cup on a table", "template": "Putting [something] on [something]", "placeholders": ["cup"]},
             {"id": "22", "template": "Lifting [something]"}, {"id": 333, "template": "Lifting [something]"}]
    labels = {"Putting something on something": "0", "Lifting something": "1", "Never seen": "2"}
    for name, content in (("train", items[:2]), ("validation", items[2:]), ("labels", labels)):
        write(videos / f"{prefix}{name}.json", json.dumps(content))
    assert command("SSv2", "--videos", videos)[0] == 0
    root = tmp_path / "out" / "SSv2"
    assert json.loads((root / "annot_train.json").read_text()) == [{"id": "1", "class": "Putting something on something"},
                                                                  {"id": "22", "class": "Lifting something"}]
    assert json.loads((root / "annot_val.json").read_text()) == [{"id": "333", "class": "Lifting something"}]
    assert json.loads((root / "class_list.json").read_text()) == ["Lifting something", "Putting something on something"]
    assert len(load_clips("SSv2", split="test", data_path=tmp_path / "out", pack=False)) == 1


BAD_LISTS = {  # file, what is written there, the sentence
    "listed twice": ("trainlist01.txt", names(groups=(1,)) + names(groups=(1,)), "v_Walk_g01_c01 is listed more than once"),
    "on both sides": ("testlist01.txt", names(groups=(1,)), "v_Walk_g01_c01 is listed more than once"),
    "climbing out": ("trainlist01.txt", ["Walk/../../v_Walk_g01_c01.avi 2"], "leaves the directory of the frames"),
    "absolute": ("trainlist01.txt", ["/Walk/v_Walk_g01_c01.avi 2"], "leaves the directory of the frames"),
    "empty": ("trainlist01.txt", [], "trainlist01.txt lists no videos"),
    "unknown class": ("classInd.txt", ["1 Biking"], "classInd.txt does not name the class 'Walk' of split 1"),
    "no training": ("trainlist01.txt", names(label="Biking", groups=(1,)), "the class 'Walk' has no training videos"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_bad_lists_are_refused_before_any_work(ucf, tmp_path, command, kind):
    file, lines, sentence = BAD_LISTS[kind]
    write(ucf / "lists" / file, *lines)
    assert sentence in refused(command, "UCF101", "--videos", ucf)
    assert not (tmp_path / "out").exists()


def test_lists_that_are_not_there(ucf, tmp_path, command):
    (ucf / "lists" / "classInd.txt").unlink()
    assert refused(command, "UCF101", "--videos", ucf).startswith(f"{ucf} holds no classInd.txt: give the folder of the official lists by --lists")
    write(ucf / "lists" / "classInd.txt", "1 Biking", "2 Walk")
    write(ucf / "again" / "classInd.txt", "1 Biking", "2 Walk")
    assert "several files are called classInd.txt: give the folder of one of them by --lists" in refused(command, "UCF101", "--videos", ucf)
    assert command("UCF101", "--videos", ucf, "--lists", ucf / "lists")[0] == 0
    for dataset, missing in (("HMDB51", "<class>_test_split1.txt"), ("Kinetics400", "train.csv"), ("SSv2", "something-something-v2-labels.json")):
        assert missing in refused(command, dataset, "--videos", ucf)
    (ucf / "lists" / "trainlist01.txt").write_bytes(b"\xff\xfe\x00")
    assert "trainlist01.txt is not a text file" in refused(command, "UCF101", "--videos", ucf, "--lists", ucf / "lists")


# ---------------------------------------------------------------- a folder of one's own

@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "my videos"
    for label in ("füll", "rise up"):
        for person in "abcd":
            write_video(folder / label / "day one" / f"{person}_1.mp4", 9)
    return folder


def test_custom(own, tmp_path, command):
    write(own / "füll" / "notes.txt", "not a video")
    write_video(own / ".hidden" / "x.mp4", 1)
    code, printed = command("custom", "--videos", own, "--groups", r"^(\w)_")
    assert code == 0 and "8 videos: 8 prepared in " in printed and "are not used" not in printed
    videos, class_names = read_videos("custom", tmp_path / "out")
    assert class_names == ["füll", "rise up"]
    people = videos.folder.str.extract(r"(\w)_1$")[0]
    sides = videos.groupby(people).split.nunique()
    assert (sides == 1).all() and (videos.split == "test").sum() == 2  # one of four people, in both classes
    assert len(load_clips("custom", split="train", data_path=tmp_path / "out", pack=False)) == 6
    again = (tmp_path / "out" / "out_splits1.csv").read_text()
    assert command("custom", "--videos", own, "--groups", r"^(\w)_")[0] == 0
    assert (tmp_path / "out" / "out_splits1.csv").read_text() == again
    folders = {command("custom", "--videos", own, "--seed", seed) and (tmp_path / "out" / "out_splits1.csv").read_text() for seed in range(3)}
    assert len(folders) > 1


def test_a_longer_list_keeps_the_sides(own, tmp_path, command):
    """Else a set that was learned from a video would be tested on it."""
    def sides():
        return dict(pd.read_csv(tmp_path / "out" / "out_splits1.csv").set_index("folder_name").split)

    assert command("custom", "--videos", own, "--test_ratio", 0.5)[0] == 0
    before = sides()
    for label in ("füll", "rise up"):
        for person in "0ABCxyz":
            write_video(own / label / f"{person}_2.mp4", 1)
    assert command("custom", "--videos", own, "--test_ratio", 0.5)[0] == 0
    after = sides()
    assert len(after) == len(before) + 14 and {folder: after[folder] for folder in before} == before
    assert 6 <= sum(split == "test" for folder, split in after.items() if folder not in before) <= 8
    assert command("custom", "--videos", own, "--test_ratio", 0.5, "--seed", 4)[0] == 0  # wanted anew
    redrawn = sides()
    for label in ("füll", "rise up"):  # a class that has lost its test videos gets others
        for folder, split in redrawn.items():
            if split == "test" and folder.startswith(label):
                (own / f"{folder}.mp4").unlink()
        break
    code, printed = command("custom", "--videos", own, "--test_ratio", 0.5, "--seed", 4)
    assert code == 0 and "videos are on the other side of the split now, the first: " in printed
    left = sides()
    assert "test" in {split for folder, split in left.items() if folder.startswith("füll")}
    assert all(left[folder] == split for folder, split in redrawn.items() if folder.startswith("rise up"))
    made = json.loads((tmp_path / "out" / "prepared.json").read_text())
    (tmp_path / "out" / "prepared.json").write_text(json.dumps({name: value for name, value in made.items() if name != "split"}))
    assert "is of an older version, or of a killed run: the split is drawn anew" in command("custom", "--videos", own, "--test_ratio", 0.5, "--seed", 4)[1]
    assert command("custom", "--videos", own, "--test_ratio", 0.5)[0] == 0
    assert redrawn != after and sides() != redrawn


@pytest.mark.parametrize("seed", range(5))
def test_known_groups_are_chosen_again(seed):
    labels, groups = [f"class {number % 3}" for number in range(60)], [f"group {number // 2}" for number in range(60)]
    known = {f"group {number}": number % 4 == 0 for number in range(20)}
    chosen = choose_groups(labels, groups, 0.3, seed, known)
    assert {name for name in known if name in chosen} == {name for name, side in known.items() if side}
    assert 0.2 <= sum(name in chosen for name in groups) / 60 <= 0.4
    assert choose_groups(labels, groups, 0.3, seed, {}) == choose_groups(labels, groups, 0.3, seed)


def test_custom_says_what_it_leaves_out(own, tmp_path, command):
    """Folders without videos, files that are none, and videos that changed; a link to nowhere is an unmounted disk."""
    for _ in range(2):
        _, printed = command("custom", "--videos", own)
        assert "left out" not in printed and "changed after" not in printed
    write(own / "gifs" / "a.gif", "")
    write(own / "füll" / "b.GIF", "")
    write(own / "füll" / "notes.txt", "")
    code, printed = command("custom", "--videos", own)
    assert code == 0 and "class folders without videos, left out: 1 (gifs)\n" in printed
    assert "files other than videos, left out: 3 (2 .gif, 1 .txt)\n" in printed
    frames, = (path for path in (tmp_path / "out").rglob("a_1") if "füll" in path.parts)
    os.utime(own / "füll" / "day one" / "a_1.mp4", (time.time() + 99,) * 2)
    code, printed = command("custom", "--videos", own)
    assert code == 0 and "videos that changed after their frames were made: 1; the old frames are kept" in printed
    assert (tmp_path / "out" / "changed_videos.txt").read_text() == f"{frames}\n"
    other = write_video(tmp_path / "recorded before.mp4", 3)
    os.utime(other, (10 ** 9,) * 2)
    os.rename(other, own / "füll" / "day one" / "b_1.mp4")  # which keeps its time
    assert "videos that changed after their frames were made: 2; the old" in command("custom", "--videos", own)[1]
    shutil.rmtree(frames.with_name("b_1"))
    record = tmp_path / "out" / "sources.json"
    kept = record.read_text()
    record.write_text("[]")
    assert f"{record} is damaged: delete it" in refused(command, "custom", "--videos", own)
    record.write_text(kept)
    for path in own.rglob("c_1.mp4"):  # neither the content of a file
        path.chmod(0o600)
    assert "videos that changed after their frames were made: 1; the old" in command("custom", "--videos", own)[1]
    (own / "old.txt").symlink_to(tmp_path / "nowhere")  # a file, which is left out anyway
    assert command("custom", "--videos", own)[0] == 0
    shutil.rmtree(frames)
    code, printed = command("custom", "--videos", own)
    assert code == 0 and "changed after" not in printed and frames.is_dir() and not (tmp_path / "out" / "changed_videos.txt").exists()
    (own / "No.1").symlink_to(tmp_path / "nowhere")
    assert f"{own / 'No.1'} is a link to" in refused(command, "custom", "--videos", own)
    (own / "No.1").rename(own / "unmounted")
    assert f"{own / 'unmounted'} is a link to {tmp_path / 'nowhere'}, which does not exist: mount its disk" in refused(command, "custom", "--videos", own)


def test_frames_below_the_videos_are_not_reported(own, command):
    for _ in range(2):
        code, printed = command("custom", "--videos", own, "--out", own / "frames")
        assert code == 0 and "left out" not in printed


def test_a_prepared_video_whose_link_leads_nowhere_now(own, tmp_path, command):
    """Its disk is not there today: its frames are."""
    (tmp_path / "disk").mkdir()
    (own / "füll" / "day one" / "a_1.mp4").rename(tmp_path / "disk" / "a.mp4")
    (own / "füll" / "day one" / "a_1.mp4").symlink_to(tmp_path / "disk" / "a.mp4")
    assert command("custom", "--videos", own)[0] == 0
    (tmp_path / "disk").rename(tmp_path / "away")
    code, printed = command("custom", "--videos", own)
    assert code == 0 and "8 videos: 8 prepared in " in printed


def test_custom_with_split_folders_says_which_classes_are_empty(own, tmp_path, command):
    for split in ("train", "test"):
        shutil.copytree(own, tmp_path / "split" / split)
    (tmp_path / "split" / "test" / "another").mkdir()
    code, printed = command("custom", "--videos", tmp_path / "split")
    assert code == 0 and "class folders without videos, left out: 1 (another)\n" in printed


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_on_one_side_and_classes_keep_training_videos(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 200))
    videos = pd.DataFrame({"label": [f"c{k}" for k in rng.integers(0, 5, size)], "group": [f"g{k}" for k in rng.integers(0, 30, size)]})
    tested = videos.group.isin(choose_groups(videos.label, videos.group, 0.3, seed))
    assert set(videos.label) == set(videos.label[~tested])
    if size > 60:
        assert 0.15 < tested.mean() < 0.45


def test_without_groups_every_class_is_split_alike():
    videos = pd.DataFrame({"label": ["a"] * 10 + ["b"] * 40 + ["c"], "group": [str(number) for number in range(51)]})
    tested = videos.group.isin(choose_groups(videos.label, videos.group, 0.3, 0))
    assert videos[tested].label.value_counts().to_dict() == {"a": 3, "b": 12}


def test_bad_folders_of_ones_own(own, tmp_path, command):
    assert "--groups (x_) does not match the file name a_1.mp4" in refused(command, "custom", "--videos", own, "--groups", "(x_)")
    assert "'(' is not a regular expression" in refused(command, "custom", "--videos", own, "--groups", "(")
    assert "no group of videos can be set aside" in refused(command, "custom", "--videos", own, "--groups", "_1")
    write_video(own / "füll" / "day one" / "a_1.avi", 1)
    assert "differ only in their suffix" in refused(command, "custom", "--videos", own)
    assert "does not match the file name" in refused(command, "custom", "--videos", own, "--groups", r"(x\d+)?_")
    (own / "füll" / "day one" / "a_1.avi").unlink()
    write_video(own / "füll" / "b\r.mp4", 1)
    assert "b\\r.mp4' has a line break in its name: rename it" in refused(command, "custom", "--videos", own)
    (own / "füll" / "b\r.mp4").unlink()
    write_video(own / "stray.mp4", 1)
    assert "stray.mp4 belongs to no class" in refused(command, "custom", "--videos", own)
    assert "is not a directory" in refused(command, "custom", "--videos", own / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no video file" in refused(command, "custom", "--videos", tmp_path / "empty")
    assert "--all_train is for HMDB51" in refused(command, "custom", "--videos", own, "--all_train")
    for flag, value in (("--groups", "x"), ("--seed", "1"), ("--test_ratio", "0.5")):
        assert f"{flag} is for custom" in refused(command, "UCF101", "--videos", own, flag, value)
    assert "--lists is for data sets with official lists" in refused(command, "custom", "--videos", own, "--lists", own)
    assert "invalid choice: 'toy'" in refused(command, "toy", "--videos", own)
    for flag, value in (("--resize", "160*120"), ("--resize", "0"), ("--crop", "-1"), ("--quality", "101"), ("--frames", "0"),
                        ("--test_ratio", "1"), ("--workers", "0")):
        assert refused(command, "custom", "--videos", own, flag, value).startswith(f"argument {flag}: '{value}' is n")
    assert "--crop 112 does not fit" in refused(command, "custom", "--videos", own, "--resize", "100")
    assert not (tmp_path / "out").exists()


SPLIT_TREES = {  # files, and the (class, split) of each; None: an error that says
    "split above class": (["train/run/a", "train/walk/b", "val/run/c", "val/walk/d", "test/run/e", "test/walk/f"],
                          [("run", "train"), ("walk", "train"), ("run", "validation"), ("walk", "validation"), ("run", "test"), ("walk", "test")]),
    "class above split": (["run/train/a", "run/test/b", "run/validation/c", "walk/train/d", "walk/test/e"],
                          [("run", "train"), ("run", "test"), ("run", "validation"), ("walk", "train"), ("walk", "test")]),
    "other words": (["Training/run/x/a", "Training/walk/b", "Valid/run/c", "TEST_SET/walk/d"],
                    [("run", "train"), ("walk", "train"), ("run", "validation"), ("walk", "test")]),
    "words with more": (["trainset/run/a", "Train_Data/walk/b", "val-split/run/c", "test videos/walk/d"],
                        [("run", "train"), ("walk", "train"), ("run", "validation"), ("walk", "test")]),
    "eval": (["train/run/a", "train/walk/b", "eval/run/c"], [("run", "train"), ("walk", "train"), ("run", "test")]),
    "no test: tested on val": (["train/run/a", "train/walk/b", "val/run/c"], [("run", "train"), ("walk", "train"), ("run", "test")]),
    "no val": (["train/run/a", "train/walk/b", "test/run/c"], [("run", "train"), ("walk", "train"), ("run", "test")]),
    "train alone: split here": ([f"train/{label}/{number}" for label in ("run", "walk") for number in range(4)], [("run", "train"), ("walk", "train"),
                                                                                                             ("run", "test"), ("walk", "test")]),
    "vehicles": (["train/a", "train/b", "bus/c", "bus/d"], [("train", "train"), ("bus", "train"), ("train", "test"), ("bus", "test")]),
    "much the same words": (["data/a", "data/b", "set/c", "testify/d", "set/e", "testify/f"], [("data", "train"), ("set", "train"), ("testify", "train"),
                                                                                              ("data", "test"), ("set", "test"), ("testify", "test")]),
    "a class beside": (["train/run/a", "test/run/b", "walk/c"], "seems to be split by folders called test and train, but walk/c.mp4 does not fit"),
    "a folder beside": (["train/run/a", "test/run/b", "old/walk/c"], "split by folders called test and train, but old does not fit"),
    "no classes": (["train/a", "train/b", "test/c"], "split by folders called test and train, but test/c.mp4 does not fit"),
    "no training": (["val/run/a", "test/run/b"], "split by folders called test and val, but none of them is for training"),
    "split in one class": (["run/train/a", "run/test/b", "walk/c"], "split by folders called test and train, but walk/c.mp4 does not fit"),
    "a folder too high": (["mine/run/a", "mine/run/b", "mine/walk/c"], "holds only one class, 'mine': give the folder that holds one folder per class"),
    "splits a folder too high": (["mine/train/run/a", "mine/test/run/b"], "holds only one class, 'mine'"),
}


@pytest.mark.parametrize("kind", SPLIT_TREES)
def test_folders_that_are_already_split(tmp_path, kind):
    names, expected = SPLIT_TREES[kind]
    for name in names:
        (tmp_path / f"{name}.mp4").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.mp4").touch()
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            lists.custom(tmp_path, "list")
        return
    videos = lists.custom(tmp_path, "list")["list"].set_index("folder")
    assert set(zip(videos.label, videos.split)) == set(expected)
    if len(names) == len(expected) and kind not in ("vehicles", "much the same words"):
        assert [tuple(videos.loc[name, ["label", "split"]]) for name in names] == expected


def test_a_given_split_is_kept_and_validated_on(tmp_path, command):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for label in ("run", "walk"):
            for number in range(count):
                write_video(tmp_path / "videos" / split / label / f"{number}.mp4", 9)
    code, printed = command("custom", "--videos", tmp_path / "videos")
    assert code == 0 and "8 training, 4 validation and 6 test videos in 2 classes" in printed
    settings = {"data_path": tmp_path / "out", "size": 16, "pack_path": tmp_path / "packs"}
    for validation in (0, "list"):
        for split, clips in (("train", 8), ("validation", 4 * 3), ("test", 6 * 3)):
            found = load_clips("custom", split=split, validation=validation, **settings)
            assert found.class_names == ["run", "walk"] and len(found) == clips
    assert len(list((tmp_path / "packs").glob("*.npy"))) == 3
    with pytest.raises(ValueError, match="--validation 0.2: the list has its own validation videos: give --validation list"):
        load_clips("custom", split="train", validation=0.2, **settings)
    assert "--test_ratio and --seed are for folders that are not split" in refused(command, "custom", "--videos", tmp_path / "videos", "--seed", 1)
    code, printed = command("custom", "--data_path", tmp_path / "out", "--out", tmp_path / "look", module=inspect)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert code == 0 and rows["run"] == ["3", "4", "2", "9"], printed


JUNK = ("._clap_test_split1.txt", "._1_run.avi", ".DS_Store", "__MACOSX/clap_test_split1.txt", "__MACOSX/._x/clap_test_split1.txt", "__MACOSX/1_run.avi",
        "@eaDir/1_run.avi", "@eaDir/clap_test_split1.txt", "$RECYCLE.BIN/1_run.avi", "System Volume Information/1_run.avi", "lost+found/1_run.avi",
        ".Trash-1000/files/1_run.avi", "#recycle/clap_test_split1.txt", ".snapshot/1_run.avi", "Thumbs.db", "desktop.ini", ".directory")


@pytest.mark.parametrize("place", ("", "videos", "videos/run", "lists"))
def test_other_systems_files_are_not_anybodys_data(tmp_path, command, place):
    for name, count in (("clap/x_clap.avi", 3), ("clap/y_clap.avi", 3), ("run/1_run.avi", 3)):
        write_video(tmp_path / "all" / "videos" / name, count)
    write(tmp_path / "all" / "lists" / "clap_test_split1.txt", "x_clap.avi 1", "y_clap.avi 2")
    write(tmp_path / "all" / "lists" / "run_test_split1.txt", "1_run.avi 1")
    for name in JUNK:
        write(tmp_path / "all" / place / name, "\0\5\26\7\0Mac OS X\xff", encoding="latin-1")
    code, printed = command("HMDB51", "--videos", tmp_path / "all")
    assert code == 0 and "3 videos: 3 prepared in " in printed and "0 missing or broken" in printed and "are not used" not in printed, printed


def test_other_systems_files_beside_frames_and_lists(tmp_path, command):
    """A folder of one's own that was copied by a Mac: frames, folder and list have companions."""
    for label in ("run", "walk"):
        for number in range(4):
            write_video(tmp_path / "videos" / label / f"{number}.mp4", 9)
    out = tmp_path / "out"
    assert command("custom", "--videos", tmp_path / "videos")[0] == 0
    folder = out / "jpegs_112" / "run" / "0"
    before = load_clips("custom", split="train", data_path=out, pack=False).gather(torch.arange(4))
    for path in (out / "._out_splits1.csv", out / "._jpegs_112", folder / "._frame000001.jpg", folder / ".frame000010.jpg", folder / "Thumbs.db"):
        path.write_bytes((out / "out_splits1.csv").read_bytes())
    for name in ("__MACOSX", "@eaDir", "lost+found"):
        (out / name).mkdir()
        (folder / name).mkdir()
    assert torch.equal(load_clips("custom", split="train", data_path=out, pack=False).gather(torch.arange(4)), before)
    code, printed = command("custom", "--data_path", out, "--out", tmp_path / "look", module=inspect)
    assert code == 0 and "no folder is missing or broken" in printed
    assert command("custom", "--videos", tmp_path / "videos")[0] == 0 and not (out / "short_videos.txt").read_text()


DOWNLOADED = {  # names that downloaders give the clip abc_000001_000011, and those that are not it
    True: ("abc_000001_000011.mp4", "abc_000001_000011.mkv", "abc_000001_000011.webm", "abc_000001_000011.MP4", "abc_000001_000011.mp4.mkv",
           "abc_000001_000011.mp4.webm", "abc_000001_000011.mkv.mp4", "abc_000001_000011.mp4.mp4", "abc_000001_000011.MP4.mkv", "abc_000001_000011.f137.mp4",
           "abc_000001_000011.f248.webm", "abc_000001_000011.f137-1.mp4", "abc_000001_000011", "abc_000001_000011.unknown_video", "abc_1_11.mp4",
           "abc_1_11.mp4.mkv", "abc_0001_0011.webm", "ABC_000001_000011.mp4", "sub/folder/abc_000001_000011.flv"),
    False: ("abc_000001_000012.mp4", "abc_000001_000011.mp4.part", "abc_000001_000011.temp.mp4", "abc_000001_000011.mp4.ytdl", "abc_000001_000011.jpg",
            "abc.mp4", "xabc_000001_000011.mp4", "abc_000001_000011.mp4.txt", "._abc_000001_000011.mp4", "abc_000001_0000110.mp4"),
}


@pytest.mark.parametrize("fits, name", [(fits, name) for fits, names in DOWNLOADED.items() for name in names])
def test_downloaders_names(tmp_path, fits, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert video_files.find_files(pd.DataFrame({"video": ["abc_000001_000011"]}), tmp_path) == {"abc_000001_000011": [path] if fits else []}


def test_a_downloaded_file_is_decoded_by_what_is_in_it(tmp_path, command):
    for name, other in (("abc_000001_000011", ".mkv"), ("-_x_000004_000014", ".webm")):
        write_video(tmp_path / f"a{other}", 9).rename(tmp_path / f"{name}.mp4{other}")
    write(tmp_path / "train.csv", KINETICS, "run,abc,1,11,train")
    write(tmp_path / "validate.csv", KINETICS, "run,-_x,4,14,validate")
    code, printed = command("Kinetics400", "--videos", tmp_path)
    assert code == 0 and "2 videos: 2 prepared in " in printed and "are not used" not in printed


@pytest.mark.parametrize("listed, files, found", (
    (["abc_000001_000011"], ["replacement/abc_000001_000011.mp4", "train/abc_000001_000011.mp4.mkv"], [1, 0]),
    (["abc_000001_000011"], ["abc_000001_000011.f137.mp4", "abc_000001_000011.mp4", "abc_1_11.mp4"], [1, 0, 2]),
    (["Walk/v_HandStand_g01_c01.avi"], ["Walk/v_Handstand_g01_c01.avi"], [0]),
    (["Walk/v_HandStand_g01_c01.avi"], ["v_HandStand_g01_c01.mp4", "v_Handstand_g01_c01.avi"], [0]),
    (["Walk/v_a_g01_c01.avi"], ["v_a_g01_c01.avi.mp4"], [0]),
    (["u\u0308n_clap.avi"], ["\u00fcn_clap.avi"], [0]),  # the same letter in one piece and in two
    (["\u00fcn_clap.avi"], ["u\u0308n_clap.avi"], [0]),
    (["c.d_clap.avi"], ["c.e_clap.avi"], []),
    (["7"], ["7.webm", "17.webm", "07.webm"], [0]),
))
def test_which_files_are_a_videos(tmp_path, listed, files, found):
    paths = [tmp_path / name for name in files]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert video_files.find_files(pd.DataFrame({"video": listed}), tmp_path) == {listed[0]: [paths[number] for number in found]}


def test_kinetics_files_that_are_called_by_their_id(tmp_path, command):
    """As the academic torrent's validation files: taken if they are not longer than listed, and the id is listed once."""
    write_video(tmp_path / "train" / "t_000001_000011.mp4", 9)
    for name, count in (("short", 40), ("long", 80), ("twice", 9), ("-_000001", 9)):
        write_video(tmp_path / "val" / f"{name}.mp4", count)
    write(tmp_path / "val" / "broken.mp4", "no video")
    write(tmp_path / "train.csv", KINETICS, "run,t,1,11,train")
    write(tmp_path / "validate.csv", KINETICS, *(f"run,{name},{start},{start + 2},validate"
                                                 for name, start in (("short", 1), ("long", 1), ("twice", 1), ("twice", 5), ("broken", 1), ("-_000001", 3))))
    code, printed = command("Kinetics400", "--videos", tmp_path)
    assert code == 0 and f"files named by the id only: 2 taken, such as {tmp_path / 'val' / '-_000001.mp4'}; each" in printed, printed
    assert f"files named by the id only: 2 not taken, such as {tmp_path / 'val' / 'broken.mp4'}; they" in printed
    assert {path.name for path in (tmp_path / "out" / "Kinetics" / "val").iterdir()} == {"short_000001_000003", "-_000001_000003_000005"}
    assert len(report(tmp_path / "out" / "Kinetics" / "broken_videos.txt")) == 4
    assert "2 taken" not in command("Kinetics400", "--videos", tmp_path)[1]      # their folders are made


def test_untimed_files_of_replacements_are_last(tmp_path):
    for folder in ("a_replacement", "val"):
        write_video(tmp_path / folder / "x_12_345.mp4", 9)
    videos = pd.DataFrame({"video": ["x_12_345_000001_000003"], "folder": ["val/x_12_345_000001_000003"], "youtube_id": ["x_12_345"], "time_start": ["1"], "time_end": ["3"]})
    files = {"x_12_345_000001_000003": []}
    untimed.take_untimed(files, videos, tmp_path / "frames", video_files.video_files(tmp_path))
    assert list(files.values()) == [[tmp_path / folder / "x_12_345.mp4" for folder in ("val", "a_replacement")]]


def test_lists_that_spell_a_path_differently(tmp_path, command):
    for number in (1, 2):
        write_video(tmp_path / "videos" / f"v_Biking_g0{number}_c01.avi")
    for number, folder in ((1, "Biking"), (2, "biking")):
        write(tmp_path / "lists" / f"trainlist0{number}.txt", f"{folder}/v_Biking_g01_c01.avi 1")
        write(tmp_path / "lists" / f"testlist0{number}.txt", f"{folder}/v_Biking_g02_c01.avi")
    write(tmp_path / "lists" / "classInd.txt", "1 Biking", "2 biking")
    code, printed = command("UCF101", "--videos", tmp_path / "videos", "--lists", tmp_path / "lists")
    assert code == 0 and "2 videos: 2 prepared" in printed and "none of" not in printed, printed


def test_a_list_without_any_file_is_named_before_decoding(tmp_path, command):
    write_video(tmp_path / "train" / "t_000001_000011.mp4", 9)
    write(tmp_path / "kinetics_train.csv", KINETICS, "run,t,1,11,train")
    write(tmp_path / "kinetics_val.csv", KINETICS, "run,v,1,11,validate", "run,w,1,11,validate")
    code, printed = command("Kinetics400", "--videos", tmp_path)
    warning = f"warning: none of the 2 videos of validate.csv is below {tmp_path}\n"
    assert code == 0 and printed.startswith(warning)
    (tmp_path / "train" / "t_000001_000011.mp4").unlink()
    (tmp_path / "out" / "Kinetics" / "val" / "v_000001_000011").mkdir(parents=True)
    (tmp_path / "out" / "Kinetics" / "val" / "v_000001_000011" / "frame000001.jpg").touch()
    code, printed = command("Kinetics400", "--videos", tmp_path)     # the frames of both lists are there
    assert code == 0 and warning not in printed, printed


def test_lists_with_another_number_of_classes(tmp_path, command):
    for video in ("a", "b"):
        write_video(tmp_path / "videos" / f"{video}.avi")
    write(tmp_path / "lists" / "run_test_split1.txt", "a.avi 1", "b.avi 2")
    code, printed = command("HMDB51", "--videos", tmp_path / "videos", "--lists", tmp_path / "lists")
    assert code == 0 and "warning: HMDB51 has 51 classes, but hmdb51_splits.csv has 1: is it this data set's complete list?" in printed
    code, printed = command("HMDB51", "--data_path", tmp_path / "out", "--out", tmp_path / "look", module=inspect)
    assert code == 0 and "warning: HMDB51 has 51 classes, but its list has 1: is" in printed


def test_packed_archives_and_copies_of_lists(tmp_path, command):
    write(tmp_path / "videos" / "run.rar", "")
    write(tmp_path / "lists" / "run_test_split1.txt", "a.avi 1", "b.avi 2")
    assert ": check --videos and --lists, or unpack archives such as run.rar" in refused(command, "HMDB51", "--videos", tmp_path / "videos",
                                                                                                       "--lists", tmp_path / "lists")
    write(tmp_path / "lists" / "copy" / "run_test_split1.txt", "a.avi 1", "b.avi 2")
    assert "several copies of HMDB51's lists" in refused(command, "HMDB51", "--videos", tmp_path / "videos", "--lists", tmp_path / "lists")


@pytest.mark.parametrize("times", ("1.0,11", "1,", "x,11", "1,1234567"))
def test_kinetics_times_are_whole_seconds(tmp_path, command, times):
    write(tmp_path / "train.csv", KINETICS, "run,t,1,11,train", f"run,u,{times},train")
    write(tmp_path / "validate.csv", KINETICS, "run,v,1,11,validate")
    sentence = refused(command, "Kinetics400", "--videos", tmp_path)
    assert re.search(r"train.csv, row 2: time_(start|end) is '.*', not whole seconds$", sentence.strip()), sentence


def test_another_listed_videos_file_is_not_taken(tmp_path):
    (tmp_path / "aBc_000001_000011.mp4").touch()
    found = video_files.find_files(pd.DataFrame({"video": ["abc_000001_000011", "aBc_000001_000011"]}), tmp_path)
    assert [len(paths) for paths in found.values()] == [0, 1]


@pytest.fixture(params=("another disk", "a renaming that refuses other folders"))
def disk(request, tmp_path, monkeypatch):
    """A folder on another file system, or where there is none one that stands for it."""
    if request.param == "another disk":
        shared = pathlib.Path("/dev/shm")
        if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("no second file system")
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            yield pathlib.Path(folder)
        return
    rename = os.rename

    def only_beside(source, target):
        if os.path.realpath(os.path.dirname(source)) != os.path.realpath(os.path.dirname(target)):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        rename(source, target)
    monkeypatch.setattr(os, "rename", only_beside)
    monkeypatch.setattr(os, "replace", only_beside)
    monkeypatch.setattr(prepare, "in_processes", lambda function, jobs, workers: ((job, function(job)) for job in jobs))
    yield tmp_path / "disk"


@pytest.mark.parametrize("linked", ("out", "out/jpegs_112", "out/jpegs_112/run"))
def test_links_to_other_disks(own, disk, tmp_path, command, linked):
    (own / "füll").rename(own / "run")
    disk.mkdir(exist_ok=True)
    (tmp_path / linked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / linked).symlink_to(disk)
    code, printed = command("custom", "--videos", own)
    assert code == 0 and "8 videos: 8 prepared in " in printed, printed
    assert (tmp_path / linked).is_symlink() and any(disk.iterdir()) and not list(disk.rglob(".preparing*"))
    assert len(load_clips("custom", split="train", data_path=tmp_path / "out", pack=False)) == 6


def test_links_to_disks_that_are_not_there(own, tmp_path, command):
    for linked in ("out", "out/jpegs_112", "out/jpegs_112/füll"):
        path = tmp_path / linked
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tmp_path / "gone")
        assert f"{path} is a link to {tmp_path / 'gone'}, which does not exist" in refused(command, "custom", "--videos", own)
        path.unlink()


def test_a_video_is_made_of_its_own_file_only(tmp_path, command):
    """Others of the same name in other classes are no replacements."""
    for label, length in (("run", 20), ("walk", 6)):
        write_video(tmp_path / "videos" / label / "001.mp4", length)
        write_video(tmp_path / "videos" / label / "002.mp4", 3)
    write_video(tmp_path / "videos" / "a" / "run" / "001.mp4", 9)
    write_video(tmp_path / "videos" / "a" / "2.mp4", 9)
    cut(tmp_path / "videos" / "walk" / "001.mp4", 0.5)
    code, printed = command("custom", "--videos", tmp_path / "videos")
    assert code == 0 and set(report(tmp_path / "out" / "broken_videos.txt")) == {"walk/001"}
    (tmp_path / "videos" / "walk" / "001.mp4").unlink()
    code, printed = command("custom", "--videos", tmp_path / "videos")
    assert code == 0 and "0 missing or broken" in printed and not report(tmp_path / "out" / "broken_videos.txt")  # it is no video of the set now
    assert len(os.listdir(tmp_path / "out" / "jpegs_112" / "run" / "001")) == 20
    assert len(os.listdir(tmp_path / "out" / "jpegs_112" / "a" / "run" / "001")) == 9


def test_what_would_be_mixed_up_is_refused(own, tmp_path, command):
    assert command("custom", "--videos", own)[0] == 0
    moved = tmp_path / "elsewhere" / own.name
    moved.parent.mkdir()
    own.rename(moved)
    assert "have other settings" in refused(command, "custom", "--videos", moved)  # other videos, for all that is known
    moved.rename(own)
    assert "has the folder jpegs_112" in refused(command, "custom", "--videos", own, "--crop", "64")
    write_video(own / "füll" / "day one.mp4")
    assert "the video füll/day one and the folder of the video füll/day one/a_1 have the same name" in refused(command, "custom", "--videos", own)
    (own / "füll" / "day one.mp4").unlink()
    with open(os.fsencode(own / "füll") + b"/caf\xe9.avi", "w"):
        pass
    assert "is not a valid UTF-8 name" in refused(command, "custom", "--videos", own)


def test_official_lists_are_not_written_over(tmp_path, command):
    root = tmp_path / "out" / "Kinetics"
    write_video(tmp_path / "videos" / "abc_000001_000011.mp4")
    write_video(tmp_path / "videos" / "def_000001_000011.mp4")
    write(root / "train.csv", KINETICS, "run,abc,1,11,train", "run,gone,1,11,train")
    write(root / "val.csv", KINETICS, "run,def,1,11,val")
    before = (root / "train.csv").read_text()
    assert f"{root / 'train.csv'} was not made by prepare" in refused(command, "Kinetics400", "--videos", tmp_path / "videos", "--lists", root)
    assert (root / "train.csv").read_text() == before
    root.rename(tmp_path / "videos" / "lists")
    out = tmp_path / "videos" / "frames"  # below the videos: our own lists are not taken for official ones
    for _ in range(2):
        code, printed = command("Kinetics400", "--videos", tmp_path / "videos", "--out", out)
        assert code == 0 and "1 missing or broken" in printed, printed


def test_official_lists_beside_the_frames(ucf, tmp_path, command):
    """Where the data set's own folder holds them, the command can be repeated."""
    root = tmp_path / "out" / "UCF101"
    shutil.copytree(ucf / "lists", root)
    for _ in range(2):
        code, printed = command("UCF101", "--videos", ucf / "UCF-101", "--lists", root)
        assert code == 0, printed


def test_reports_of_sets_that_share_a_folder_keep_each_others_lines(ucf, tmp_path, command):
    (ucf / "UCF-101" / "Walk" / "v_Walk_g01_c01.avi").unlink()
    (ucf / "UCF-101" / "Biking" / "v_Biking_g01_c01.avi").unlink()
    for dataset in ("UCF101", "miniUCF101"):
        assert command(dataset, "--videos", ucf)[0] == 0
        assert set(report(tmp_path / "out" / "UCF101" / "broken_videos.txt")) == {"v_Walk_g01_c01", "v_Biking_g01_c01"}


def test_links_are_followed_but_not_in_circles(own, tmp_path):
    (tmp_path / "links").mkdir()
    os.symlink(own / "füll", tmp_path / "links" / "linked")
    os.symlink(tmp_path / "links", own / "füll" / "circle")
    assert len(video_files.video_files(tmp_path / "links")) == 4


# ---------------------------------------------------------------- what goes wrong on the way

def test_broken_videos_are_named_left_out_and_tried_again(ucf, tmp_path, command):
    video = ucf / "UCF-101" / "Walk" / "v_Walk_g01_c01.avi"
    good = video.read_bytes()
    cut(video, 0.5)
    (ucf / "UCF-101" / "Walk" / "v_Walk_g02_c02.avi").unlink()
    write_video(ucf / "UCF-101" / "Walk" / "unlisted.avi", 1)
    root = tmp_path / "out" / "UCF101"
    code, printed = command("UCF101", "--videos", ucf)
    assert code == 0 and "8 videos: 6 prepared in " in printed and "2 missing or broken" in printed and "1 other files in" in printed
    reasons = report(root / "broken_videos.txt")
    assert set(reasons) == {"v_Walk_g01_c01", "v_Walk_g02_c02"}
    assert re.search(r"v_Walk_g01_c01.avi: (ends after|Invalid data)", reasons["v_Walk_g01_c01"])
    assert not (root / "jpegs_112" / "v_Walk_g01_c01").exists()
    assert len(pd.read_csv(root / "ucf101_splits1.csv")) == 6
    video.write_bytes(good)
    assert command("UCF101", "--videos", ucf)[0] == 0
    assert set(report(root / "broken_videos.txt")) == {"v_Walk_g02_c02"} and len(pd.read_csv(root / "ucf101_splits1.csv")) == 7


def test_a_repaired_video_that_other_lists_may_lack_is_named(ucf, tmp_path, command):
    video = ucf / "UCF-101" / "Biking" / "v_Biking_g01_c01.avi"
    good = video.read_bytes()
    cut(video, 0.5)
    assert "broken before" not in command("UCF101", "--videos", ucf)[1]
    video.write_bytes(good)
    code, printed = command("miniUCF101", "--videos", ucf)
    assert code == 0 and "1 videos that were broken before are prepared now; ucf101_splits1.csv" in printed
    assert "broken before" not in command("UCF101", "--videos", ucf)[1]


def test_a_frame_folder_that_was_emptied_is_made_again(own, tmp_path, command):
    assert command("custom", "--videos", own)[0] == 0
    folder = sorted((tmp_path / "out").glob("jpegs_*/*/*/*"))[0]
    images = sorted(os.listdir(folder))
    for name in images:
        (folder / name).unlink()
    (folder / ".DS_Store").touch()
    assert command("custom", "--videos", own)[0] == 0
    assert sorted(os.listdir(folder)) == images


def test_a_class_without_training_videos_leaves_the_list(ucf, tmp_path, command):
    for name in names(groups=(1,)):
        (ucf / "UCF-101" / name).unlink()
    code, printed = command("UCF101", "--videos", ucf)
    assert code == 0 and "ucf101_splits1.csv: 1 classes have no training video left, for example Walk: their 2 test videos are left out" in printed
    root = tmp_path / "out" / "UCF101"
    assert set(pd.read_csv(root / "ucf101_splits1.csv").label) == {"Biking"}
    assert set(pd.read_csv(root / "ucf101_splits2.csv").label) == {"Biking", "Walk"}  # trains on what is there


def test_nothing_found_leaves_nothing(ucf, tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert "none of the 8 listed videos is below" in refused(command, "UCF101", "--videos", tmp_path / "empty", "--lists", ucf / "lists")
    assert command("UCF101", "--videos", ucf, "--quality", 80)[0] == 0  # whatever the settings of the failed attempt


def test_what_is_stored_has_the_size_and_quality_that_were_asked_for(ucf, tmp_path, command):
    """methods.md 1: UCF101 is resized to 160 × 120 and its middle 112 × 112 pixels are kept, at JPEG quality 95."""
    def stored(*flags):
        assert command("UCF101", "--videos", ucf, "--out", tmp_path / "-".join(["out", *flags]), *flags)[0] == 0
        folder, = (tmp_path / "-".join(["out", *flags]) / "UCF101").glob("jpegs_*")
        with Image.open(folder / "v_Walk_g01_c01" / "frame000001.jpg") as image:
            return image.size, image.quantization, np.asarray(image).astype(float)

    (size, plain, pixels), (_, rough, _) = stored(), stored("--quality", "30")
    assert size == (112, 112) and plain[0][0] < rough[0][0]  # coefficients are rounded to coarser steps
    video = next(path for path in (ucf / "UCF-101").rglob("*") if "Walk_g01_c01" in path.name)
    first = next(frames(video, Picture((160, 120))))[4:116, 24:136].astype(float)
    assert np.abs(pixels - first).mean() < 3


def test_frames_of_other_settings_or_makers_are_not_mixed(ucf, tmp_path, command):
    assert command("UCF101", "--videos", ucf)[0] == 0
    assert "have other settings" in refused(command, "UCF101", "--videos", ucf, "--quality", "80")
    (tmp_path / "out" / "UCF101" / "prepared.json").unlink()
    assert "was not made by prepare" in refused(command, "UCF101", "--videos", ucf)


def test_lists_of_other_makers_are_not_written_over_beside_our_own(ucf, tmp_path, command):
    root = tmp_path / "out" / "UCF101"
    assert command("UCF101", "--videos", ucf)[0] == 0
    write(root / "ucf50_splits1.csv", "theirs")
    assert f"{root / 'ucf50_splits1.csv'} was not made by prepare" in refused(command, "miniUCF101", "--videos", ucf)
    assert (root / "ucf50_splits1.csv").read_text().split() == ["theirs"]
    (root / "ucf50_splits1.csv").unlink()
    for _ in range(2):  # and our own can be written again
        assert command("miniUCF101", "--videos", ucf)[0] == 0
    made = json.loads((root / "prepared.json").read_text())
    assert made["lists"] == ["ucf101_splits1.csv", "ucf101_splits2.csv", "ucf50_splits1.csv", "ucf50_splits2.csv"]
    (root / "prepared.json").write_text(json.dumps({name: value for name, value in made.items() if name != "lists"}))
    assert command("UCF101", "--videos", ucf)[0] == 0  # as older versions left it
    assert json.loads((root / "prepared.json").read_text()) == made


def test_two_at_once_are_refused(ucf, tmp_path, command):
    from utils import lock_folder
    root = tmp_path / "out" / "UCF101"
    root.mkdir(parents=True)
    with lock_folder(root, ".prepare.lock"):
        assert f"another process prepares videos in {root}" in refused(command, "UCF101", "--videos", ucf)


STUCK = """
import pathlib, time
write = pathlib.Path.write_bytes
def stuck(path, content):
    while path.parent.name == ".preparing-6" and path.name == "frame000020.jpg":
        time.sleep(0.1)
    return write(path, content)
pathlib.Path.write_bytes = stuck
"""


@pytest.mark.slow
def test_kill_and_go_on(tmp_path, command):
    """kill -9 while it writes: what stands in the frames' directory is whole, no process is left, and the same command completes the rest.

    The last of seven videos never gets beyond its 19th frame before the kill.
    """
    videos, out, site = (tmp_path / name for name in ("videos", "out", "site"))
    for number in range(7):
        write_video(videos / "ab"[number // 4] / f"{number}.mp4", 30)
    site.mkdir()
    (site / "sitecustomize.py").write_text(STUCK)
    line = [sys.executable, "-m", "distill_utils.prepare", "custom", "--videos", str(videos), "--out", str(out), "--workers", "2"]
    first = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                             env={**os.environ, "PYTHONPATH": str(site)})
    try:
        while len(list(out.glob("jpegs_112/*/[!.]*"))) < 6 or not (out / "jpegs_112" / "b" / ".preparing-6" / "frame000019.jpg").exists():
            assert first.poll() is None
            time.sleep(0.01)
    finally:
        first.kill()
        first.wait()
    done = list(out.glob("jpegs_112/*/[!.]*"))
    assert len(done) == 6 and all(len(os.listdir(folder)) == 30 for folder in done)
    assert not list(out.glob("*.csv"))
    while processes_of(first.pid):
        time.sleep(0.05)
    before = {folder: folder.stat().st_mtime_ns for folder in done}
    code, printed = command("custom", "--videos", videos, "--workers", "2")
    assert code == 0, printed
    folders = list(out.glob("jpegs_112/*/*"))
    assert len(folders) == 7 and all(len(os.listdir(folder)) == 30 for folder in folders)
    assert all(folder.stat().st_mtime_ns == changed for folder, changed in before.items())
    assert not list(out.rglob(".preparing*")) and len(pd.read_csv(out / "out_splits1.csv")) == 7


def processes_of(session):
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, belongs = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(belongs) == session and state != "Z":
            found.append(stat.parent.name)
    return found


# ---------------------------------------------------------------- inspect

def test_inspect(ucf, tmp_path, command):
    assert command("UCF101", "--videos", ucf)[0] == 0
    look = ("UCF101", "--data_path", tmp_path / "out", "--out", tmp_path / "look", "--size", 32, "--pack_path", tmp_path / "packs")
    code, printed = command(*look, module=inspect)
    assert code == 0 and "no folder is missing or broken" in printed
    assert "UCF101: 2 classes; clips of 16 frames of 32×32 pixels" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert rows["Biking"] == rows["Walk"] == ["2", "2", "4"] and rows["all"] == ["4", "4", "8"]
    assert "sizes: 112×112 (8 videos)" in printed and "of 160 images" in printed
    images = list((tmp_path / "out").glob("UCF101/jpegs_112/*/*.jpg"))
    assert f"frames on disk: {sum(path.stat().st_size for path in images):,} bytes" in printed
    assert f"pack, train: 4 clips, {4 * 16 * 3 * 32 * 32:,} bytes, not built yet" in printed
    load_clips("UCF101", split="train", data_path=tmp_path / "out", size=32, pack_path=tmp_path / "packs")
    assert str(next((tmp_path / "packs").glob("*.npy"))) in command(*look, module=inspect)[1]
    sheet = np.asarray(Image.open(tmp_path / "look" / "contact_sheet.png"))
    assert sheet.shape == (2 * (32 + 16), 16 * 32 + 8, 3)
    shown = sheet[14 + 8:14 + 24, 24:16 * 32:32].mean((0, 2))  # the right part of each of the first row's frames
    first = [grey(number) for number in greys(tmp_path / "out" / "UCF101" / "jpegs_112" / "v_Biking_g01_c01")]
    assert any(np.abs(shown - first[start:start + 16]).max() < 6 for start in range(5))


def test_inspect_with_damage_that_only_drawing_finds(ucf, tmp_path, command):
    assert command("UCF101", "--videos", ucf)[0] == 0
    folder = tmp_path / "out" / "UCF101" / "jpegs_112" / "v_Biking_g01_c01"
    for name in os.listdir(folder)[1:-1]:
        if name not in ("frame000001.jpg", "frame000020.jpg"):
            (folder / name).write_bytes(b"not an image")
    (folder / "frame9999999999999.jpg").write_bytes((folder / "frame000001.jpg").read_bytes())  # the gap is counted, not listed
    (folder / "frame000000.jpg").write_bytes((folder / "frame000001.jpg").read_bytes())
    look = ("UCF101", "--data_path", tmp_path / "out", "--out", tmp_path / "look")
    code, printed = command(*look, module=inspect)
    assert code == 1 and "9999999999978 frames are missing, for example number 21" in printed
    (folder / "frame9999999999999.jpg").unlink()
    code, printed = command(*look, module=inspect)
    assert code == 1 and "cannot be read as an image" in printed and "one clip of each class" in printed


@pytest.fixture
def look(command, tmp_path):
    """look() is what inspect says of the data in tmp_path/data: (exit code, lines, wrong_folders.txt)."""
    def look(*flags):
        code, printed = command("custom", "--data_path", tmp_path / "data", "--out", tmp_path / "look", "--size", "16", *flags, module=inspect)
        return code, printed, (tmp_path / "look" / "wrong_folders.txt").read_text()
    return look


def change(tiny, name, function):
    """function(path) for each image of a video of the tiny set."""
    for path in sorted((tiny / "jpegs" / name).iterdir()):
        function(path)


def lying(path):
    image, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6
    image.crop((0, 0, 16, 12)).save(path, exif=exif)


def of_another_mode(mode):
    def convert(path):
        image = Image.open(path).convert("L" if mode == "I;16" else mode)
        path.unlink()
        (Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image).save(path.with_suffix(".png"))
    return convert


FOREIGN = {  # what may be the matter with a foreign set's images; what inspect says, and whether that is an error
    "flow": (lambda path: shutil.copy(path, path.with_name(path.name.replace("frame", "flow_x_"))),
             "images that are not frames (ignored): flow_x_#.jpg (1 videos)", False),
    "flow alone": (lambda path: (shutil.copy(path, path.with_name(path.name.replace("frame", "flow_x_"))), path.rename(path.with_name("flow_y_" + path.name[5:]))),
                   "holds several series of images, flow_x_#.jpg (16), flow_y_#.jpg (16): choose one by --frame_names", True),
    "two cameras": (lambda path: (shutil.copy(path, path.with_name("cam1_" + path.name[5:])), path.rename(path.with_name("cam2_" + path.name[5:]))),
                    "no number in names such as cam1_000001.jpg", True),
    "size behind the number": (lambda path: path.rename(path.with_name(f"f{int(path.name[5:11])}_16x16.jpg")), "no folder is missing or broken", False),
    "EXIF": (lying, "images that are not plain 8-bit RGB (converted): EXIF orientation 6 (1 videos)", False),
    "16 bits": (of_another_mode("I;16"), "images that are not plain 8-bit RGB (converted): mode I", False),
    "alpha": (of_another_mode("RGBA"), "(converted): mode RGBA (1 videos)", False),
    "palette": (of_another_mode("P"), "(converted): mode P (1 videos)", False),
    "one frame": (lambda path: path.unlink() if path.name != "frame000001.jpg" else None, "1 videos, 1 of them with one frame", False),
    "a gap": (lambda path: path.unlink() if path.name == "frame000004.jpg" else None,
              "1 frames are missing, for example number 4", True),
    "every third": (lambda path: path.unlink() if int(path.name[5:11]) % 3 else None, "no folder is missing or broken", False),
    "two of five": (lambda path: path.unlink() if int(path.name[5:11]) % 5 not in (0, 3) else None, "no folder is missing or broken", False),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_inspect_finds_what_is_odd_in_a_foreign_set(tiny, look, kind):
    function, sentence, is_error = FOREIGN[kind]
    change(tiny, "v_fall_train_0", function)
    code, printed, wrong = look()
    assert sentence in (wrong if is_error else printed) and code == is_error, printed
    assert ("(ignored)" in printed, "not plain" in printed) == (kind == "flow", "(converted)" in sentence)


def test_inspect_takes_the_flag_that_chooses(tiny, look):
    change(tiny, "v_fall_train_0", lambda path: shutil.copy(path, path.with_name(path.name.replace("frame", "img_"))))
    assert look()[0] == 1
    code, printed, wrong = look("--frame_names", "frame#.jpg")
    assert code == 0 and not wrong and "(ignored)" not in printed


def test_inspect_sees_splits_that_were_taken_for_classes(tiny, look):
    text = (tiny / "list.csv").read_text()
    (tiny / "list.csv").write_text(text.replace(",fall,", ",train,").replace(",rise,", ",val,"))
    code, printed, _ = look()
    assert code == 1 and "the classes train, val have names of splits: were split folders read as class folders?" in printed
    (tiny / "list.csv").write_text(text.replace(",fall,", ",train,").replace(",rise,", ",bus,"))
    assert look()[0] == 0


def test_inspect_sees_what_prepare_left_out_and_sets_of_older_versions(own, tmp_path, command, look):
    cut(own / "füll" / "day one" / "a_1.mp4", 0.5)
    write_video(own / "füll" / "short.mp4", 1)
    assert command("custom", "--videos", own, "--out", tmp_path / "data")[0] == 0
    code, printed, _ = look()
    assert code == 0 and "left out of the lists as missing or broken: 1 videos: see" in printed and "the first: füll/day one/a_1" in printed
    assert "1 of them with one frame" in printed and "older version" not in printed
    path = tmp_path / "data" / "prepared.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "format"}))
    assert "prepared by an older version" in look()[1]
    assert command("custom", "--videos", own, "--out", tmp_path / "data")[0] == 0  # goes on, and is not called new by that
    assert "prepared by an older version" in look()[1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert "have other settings" in refused(command, "custom", "--videos", own, "--out", tmp_path / "data")


def test_foreign_reports_stay(ucf, tmp_path, command):
    """broken_videos.txt as other makers write it, without reasons."""
    root = tmp_path / "out" / "UCF101"
    write(root / "broken_videos.txt", "train/x.mp4", "a,3", "")
    assert command("UCF101", "--videos", ucf)[0] == 0
    assert (root / "broken_videos.txt").read_text().split() == ["a,3", "train/x.mp4"]


def test_inspect_goes_on_after_a_folder_that_it_may_not_read(tiny, look, monkeypatch):
    (tiny / "list.csv").write_text((tiny / "list.csv").read_text().replace(",fall,", ",all,"))  # and a class may be called so
    listdir = os.listdir

    def refuse(path):
        if str(path).endswith("rise_train_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)
    monkeypatch.setattr(os, "listdir", refuse)
    code, printed, wrong = look()
    assert code == 1 and wrong.splitlines() == [f"the frame folder {tiny / 'jpegs' / 'v_rise_train_1'} cannot be read: Permission denied"]
    assert re.search(r"^all +\d+ +\d+ +\d+$", printed, re.MULTILINE)


def test_inspect_names_what_is_missing_or_broken(ucf, tmp_path, command):
    assert command("UCF101", "--videos", ucf)[0] == 0
    frames = tmp_path / "out" / "UCF101" / "jpegs_112"
    (frames / "v_Walk_g01_c01" / "frame000007.jpg").unlink()
    (frames / "v_Walk_g01_c02" / "frame000020.jpg").write_bytes(b"not an image")
    (frames / "v_Walk_g02_c01" / "frame000003.jpg").write_bytes(b"")
    (frames / "v_Walk_g02_c02").rename(frames / "elsewhere")
    code, printed = command("UCF101", "--data_path", tmp_path / "out", "--out", tmp_path / "look", module=inspect)
    assert code == 1 and "4 of 8 folders are missing or broken" in printed
    wrong = (tmp_path / "look" / "wrong_folders.txt").read_text().splitlines()
    for line, sentence in zip(wrong, ("v_Walk_g01_c01: 1 frames are missing, for example number 7", "frame000020.jpg cannot be read as an image",
                                      "v_Walk_g02_c01: frame000003.jpg is empty", "v_Walk_g02_c02 does not exist")):
        assert sentence in line
    for folder in frames.iterdir():
        folder.rename(tmp_path / folder.name)
    code, printed = command("UCF101", "--data_path", tmp_path / "out", "--out", tmp_path / "look", module=inspect)
    assert code == 2 and "none of the 8 folders can be loaded" in printed
