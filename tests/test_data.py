"""Lists, the clip rule, decoding, the pack, and what is drawn from it."""
import builtins
import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import write_frames
from PIL import Image, ImageOps

from distill_DC import GradientMatching
from distill_DM import DistributionMatching
from distill_FRePo import FeatureRegression
from distill_utils import clips as clips_module
from distill_utils import packs as packs_module
from distill_utils.clips import copy_to, denormalize, draw_flips, load_clips, normalize, read_frame
from distill_utils.datasets import DATASETS, clip_frames, clip_positions, folders_are_clean, read_videos
from distill_utils.frames import content_digest, find_folders, frame_names
from distill_utils.packs import HOST, open_pack, remove_left
from distill_utils.protocol import RealSet
from distill_utils.synset import PixelSet, StillSet
from networks import ConvNet
from utils import ROOT

HEADER = "folder_name,label,split\n"


@pytest.fixture
def load(tiny, tmp_path):
    """load_clips of the tiny data set, T = 4 at 16 pixels, other settings by name."""
    def load(split="train", **settings):
        defaults = {"data_path": tiny, "T": 4, "size": 16, "pack_path": tmp_path / "packs"}
        return load_clips("custom", split=split, **{**defaults, **settings})
    return load


def packs(tmp_path, pattern="*.npy"):
    return sorted((tmp_path / "packs").glob(pattern))


# ---------------------------------------------------------------- the clip rule

def plain_starts(length, T, stride):
    """Every start whose last frame is still in the video, by trying them all."""
    return [start for start in range(length) if start + (T - 1) * stride < length]


def plain_stride(length, T, wanted):
    stride = wanted
    while stride > 1 and length < stride * T:
        stride -= 1
    return stride


@pytest.mark.parametrize("wanted", (1, 2, 4))
@pytest.mark.parametrize("T", (1, 2, 8, 16))
def test_stride_rule_agrees_with_a_plain_loop(T, wanted):
    for length in range(1, 90):
        positions = np.linspace(0, 1, 400)
        clips = clip_frames(length, T, wanted, "stride", positions)
        if length < T:
            assert (clips == [int(i * length / T) for i in range(T)]).all()
            continue
        stride = plain_stride(length, T, wanted)
        assert stride == (wanted if length >= wanted * T else max(1, length // T))
        assert sorted(set(clips[:, 0].tolist())) == plain_starts(length, T, stride)  # first and last included
        assert clips.tolist() == [[start + i * stride for i in range(T)] for start in clips[:, 0]]


def test_rule_all_keeps_subsamples_and_stretches():
    assert clip_frames(8, 8, 4, "all", [0.7]).tolist() == [list(range(8))]
    assert clip_frames(16, 8, 4, "all", [0.7]).tolist() == [list(range(0, 16, 2))]
    assert clip_frames(3, 8, 4, "all", [0.7]).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert clip_frames(1, 8, 4, "all", [0.7]).tolist() == [[0] * 8]


def test_test_clips_are_evenly_spaced_from_the_first_to_the_last_start():
    for clips, starts in ((1, [6]), (2, [0, 12]), (3, [0, 6, 12]), (5, [0, 3, 6, 9, 12])):
        assert clip_frames(41, 8, 4, "stride", clip_positions("test", 1, clips, seed=0)[0])[:, 0].tolist() == starts


def test_training_starts_come_from_the_seed_and_cover_all_frames():
    assert (clip_positions("train", 5, 2, seed=3) == clip_positions("train", 5, 2, seed=3)).all()
    assert (clip_positions("train", 5, 2, seed=3) != clip_positions("train", 5, 2, seed=4)).all()
    frames = clip_frames(10, 1, 4, "stride", clip_positions("train", 1, 2000, seed=0)[0])[:, 0]
    counts = np.bincount(frames, minlength=10)  # T = 1: any frame, alike
    assert len(counts) == 10 and counts.min() > 150 and counts.max() < 250


# ---------------------------------------------------------------- frames

@pytest.mark.parametrize("names", (["1.jpg", "2.JPG", "10.jpg"], ["img_00009.jpeg", "img_00010.png"],
                                   ["v2_frame9.jpg", "v2_frame10.jpg"], ["frame000999.jpg", "frame001000.jpg"],
                                   ["frame999999.jpg", "frame1000000.jpg"]))
def test_frames_come_in_numeric_order(tmp_path, names):
    for name in [*reversed(names), "notes.txt", "._1.jpg"]:
        (tmp_path / name).touch()
    assert frame_names(tmp_path) == names


def numbered(*names, numbers=range(1, 13), size=2):
    """File names of each pattern, {} for the number."""
    return [name.format(number) for name in names for number in numbers]


SERIES = {  # names of images, and which of them are the frames, in order: a pattern, or the error's words
    "flow beside img": (numbered("img_{:05}.jpg", "flow_x_{:05}.jpg", "flow_y_{:05}.jpg"), "img_{:05}.jpg"),
    "flow beside image": (numbered("image_{:05}.jpg", "flow_x_{:05}.jpg"), "image_{:05}.jpg"),
    "x and y beside img": (numbered("x_{:05}.jpg", "y_{:05}.jpg", "img_{:05}.jpg"), "img_{:05}.jpg"),
    "flow beside plain numbers": (numbered("{:05}.jpg", "{:05}_flow.jpg", "flow{:05}.png"), "{:05}.jpg"),
    "depth beside rgb": (numbered("rgb_{}.png", "depth_{}.png", "ir_{}.png"), "rgb_{}.png"),
    "after the number": (numbered("frame-{:06}.color.jpg", "frame-{:06}.depth.png"), "frame-{:06}.color.jpg"),
    "flow beside frames of one stem": (numbered("v_Walk_g01_img_{}.jpg", "v_Walk_g01_flow_x_{}.jpg", "v_Walk_g01_flow_y_{}.jpg"), "v_Walk_g01_img_{}.jpg"),
    "flow of frames": (numbered("frame_{}.jpg", "frame_flow_{}.jpg"), "frame_{}.jpg"),
    "capitals": (numbered("Frame_{}.JPG", "FLOW_X_{}.JPG"), "Frame_{}.JPG"),
    "a cover": ([*numbered("frame{:06}.jpg"), "cover.jpg", "poster.png"], "frame{:06}.jpg"),
    "a thumbnail": ([*numbered("{}.jpg"), "thumb.jpg"], "{}.jpg"),
    "a copy": ([*numbered("frame{:03}.jpg"), "frame007 - Copy.jpg"], "frame{:03}.jpg"),
    "size behind": (numbered("frame{}_112x112.jpg", numbers=range(1, 21)), "frame{}_112x112.jpg"),
    "size before": (numbered("112x112_frame{}.jpg", numbers=range(1, 21)), "112x112_frame{}.jpg"),
    "rate behind": (numbered("clip7_{}_25fps.png"), "clip7_{}_25fps.png"),
    "version before and behind": (numbered("v2_f{}_q95.jpg"), "v2_f{}_q95.jpg"),
    "mp4 in the name": (numbered("video1.mp4_{}.jpg"), "video1.mp4_{}.jpg"),
    "ten and on": (numbered("{}.jpg", numbers=(8, 9, 10, 11, 99, 100)), "{}.jpg"),
    "flow alone": (numbered("flow_x_{}.jpg"), "flow_x_{}.jpg"),
    "one": (["still.jpg"], "still.jpg"),
    "flow alone, two": (numbered("flow_x_{}.jpg", "flow_y_{}.jpg"), "holds several series of images, flow_x_#.jpg (12), flow_y_#.jpg (12): choose one by --frame_names"),
    "left and right": (numbered("left{}.jpg", "right{}.jpg"), "several series"),
    "two kinds of RGB": (numbered("img_{}.jpg", "frame_{}.jpg"), "several series"),
    "two suffixes": (numbered("{}.jpg", "{}.png"), "holds several series of images, #.jpg (12), #.png (12)"),
    "a second format of some": ([*numbered("img_{}.jpg"), "img_3.png"], "several series"),
    "a copy in brackets": ([*numbered("frame{}.jpg"), "frame7 (1).jpg"], "several series"),
    "no numbers": (["a.jpg", "b.jpg"], "several series"),
    "two cameras": (numbered("cam1_{}.jpg", "cam2_{}.jpg"), "no number in names such as cam1_1.jpg and cam2_9.jpg gives the order of its 24 images"),
    "two parts": (numbered("part1_frame{:04}.jpg", "part2_frame{:04}.jpg"), "as 'part1_frame#.jpg'"),
    "times": (["0.5.jpg", "1.0.jpg", "1.5.jpg"], "no number in names"),
    "seconds and microseconds": ([f"13050311{second}.{micros}.png" for second, micros in ((10, 875304), (10, 975304), (11, 175304))], "no number in names"),
    "seconds and milliseconds": ([f"frame_{1001 * number // 30 / 1000:.3f}.jpg" for number in range(60)], "no number in names"),
    "times of the clock": ([f"cam_2024-01-01_10-{second // 60:02}-{second % 60:02}.jpg" for second in range(30, 75)], "no number in names"),
    "shots": (["shot1_5.jpg", "shot1_9.jpg", "shot2_1.jpg", "shot2_3.jpg"], "no number in names"),
    "shots that go on": (["shot1_5.jpg", "shot1_6.jpg", "shot2_7.jpg", "shot2_8.jpg"], ["shot1_5.jpg", "shot1_6.jpg", "shot2_7.jpg", "shot2_8.jpg"]),
    "decimals": (["0.1.jpg", "0.15.jpg", "0.2.jpg", "0.25.jpg"], "no number in names"),
    "decimals of one length": (numbered("t_0.{:02}.jpg", numbers=range(0, 90, 5)), "t_0.{:02}.jpg"),
    "frames of video 7": (numbered("7.{}.jpg", numbers=(1, 2, 10, 11)), "7.{}.jpg"),
    "a score behind": (["frame_1_0.93.jpg", "frame_2_0.93.jpg", "frame_10_0.87.jpg"], ["frame_1_0.93.jpg", "frame_2_0.93.jpg", "frame_10_0.87.jpg"]),
    "numbers that disagree": (["1_30.jpg", "2_20.jpg", "3_10.jpg"], "no number in names"),
    "the same number": (["frame1.jpg", "frame01.jpg"], "no number in names"),
    "many": ([f"{letter}.jpg" for letter in "abcdefgh"], "a.jpg (1), b.jpg (1), c.jpg (1), d.jpg (1), e.jpg (1), …"),
}


@pytest.mark.parametrize("kind", SERIES)
def test_one_series_of_images_is_the_video(tmp_path, kind):
    names, expected = SERIES[kind]
    for name in [*reversed(names), "._" + names[0], ".hidden.jpg", "Thumbs.db", "notes.txt"]:
        (tmp_path / name).touch()
    if isinstance(expected, list):
        assert frame_names(tmp_path) == expected
    elif "." not in expected or " " in expected:
        with pytest.raises(ValueError, match=re.escape(expected)) as caught:
            frame_names(tmp_path)
        assert str(tmp_path) in str(caught.value) and "--frame_names" in str(caught.value)
    else:
        numbers = sorted({int(number) for name in names for number in re.findall(r"\d+", name) if expected.format(int(number)) == name})
        assert frame_names(tmp_path) == [expected.format(number) for number in numbers or [0]]


@pytest.mark.parametrize("pattern, expected", (("flow_x_#.jpg", "flow_x_{:05}.jpg"), ("img_*", "img_{:05}.jpg"), ("IMG_#.JPG", "img_{:05}.jpg"),
                                               ("cam2_#.jpg", "cam2_{:05}.jpg"), ("#.png", "{:05}.png"), ("flow_[y]_*", "flow_y_{:05}.jpg")))
def test_a_flag_chooses_the_series(tmp_path, pattern, expected):
    for name in numbered("img_{:05}.jpg", "flow_x_{:05}.jpg", "flow_y_{:05}.jpg", "cam1_{:05}.jpg", "cam2_{:05}.jpg", "{:05}.jpg", "{:05}.png"):
        (tmp_path / name).touch()
    assert frame_names(tmp_path, pattern) == numbered(expected)
    for other, words in (("flow_*", "holds several series"), ("cam*", "no number in names"), ("film_#.jpg", "holds no image that matches --frame_names film_#.jpg")):
        with pytest.raises(ValueError, match=words):
            frame_names(tmp_path, other)


def test_clips_are_of_the_series_that_is_chosen(tiny, load, tmp_path):
    """Flow beside RGB, as two-stream networks are fed: the clips are those without flow, or flow where it is asked for, from a pack of its own."""
    plain = load().gather(torch.arange(7))
    for folder in (tiny / "jpegs").iterdir():
        for name in os.listdir(folder):
            for axis in "xy":
                Image.new("L", (16, 16), "xy".index(axis)).save(folder / name.replace("frame", f"flow_{axis}_").replace("jpg", "png"))
    for pack in (True, False):
        assert torch.equal(load(pack=pack).gather(torch.arange(7)), plain)
        assert (load(pack=pack, names="flow_y_#.png").gather(torch.arange(7)) == 1).all()
    assert len(packs(tmp_path)) == 2
    for folder in (tiny / "jpegs").iterdir():
        for name in os.listdir(folder):
            if name.startswith("frame"):
                (folder / name).unlink()
    with pytest.raises(ValueError, match="holds several series of images, flow_x_#.png"):
        load(pack=False)


def test_frames_in_the_directory_for_replacements(tmp_path):
    """Where the listed folder is missing, or empty as after a failed extraction."""
    for kind in ("train", "replacement"):
        write_frames(tmp_path / kind / "a", 2)
    write_frames(tmp_path / "replacement" / "b", 2)
    write_frames(tmp_path / "replacement" / "c", 2)
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "d").mkdir()
    folders = [str(tmp_path / "train" / name) for name in "abcd"]
    assert find_folders(folders, "replacement") == [folders[0], str(tmp_path / "replacement" / "b"), str(tmp_path / "replacement" / "c"), folders[3]]
    with pytest.raises(ValueError, match=r"train/b does not exist \(1 of 4"):
        find_folders(folders)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def picture():
    """Left red, right blue, with a black top and a white dot: no two of its positions look alike. (24, 16) pixels."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12, 0] = pixels[:, 12:, 2] = 200
    pixels[:4], pixels[12:, :4] = 0, 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", (".jpg", ".png"))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_exif_says(tmp_path, orientation, suffix):
    exif, places = Image.Exif(), [None, None, 0, 3, 1, 5, 2, 6, 4]  # of EXIF's numbers: how such a picture lies
    exif[0x0112] = orientation
    image = picture() if places[orientation] is None else picture().transpose(Image.Transpose(places[orientation]))
    lying = saved(image, tmp_path / f"a{suffix}", exif=exif, **({"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}))
    square = np.asarray(ImageOps.fit(picture(), (16, 16))).transpose(2, 0, 1)
    found = read_frame(lying, 16)
    assert np.abs(found.astype(int) - square).max() < 12
    assert np.abs(read_frame(saved(image, tmp_path / f"b{suffix}"), 16).astype(int) - square).max() > 90 or orientation == 1


GREY = np.linspace(0, 1, 256).reshape(16, 16)
PICTURES = {  # a picture of other pixels than 8-bit RGB, and the grey or colour that it shows
    "16-bit grey": (Image.fromarray((GREY * 65535).astype(np.uint16)), GREY * 255),
    "16-bit dark": (Image.fromarray((GREY * 5000).astype(np.uint16)), GREY * 5000 / 257),
    "8-bit grey": (Image.fromarray((GREY * 255).astype(np.uint8)), GREY * 255),
    "1-bit": (Image.fromarray(GREY > 0.5), (GREY > 0.5) * 255),
    "palette": (Image.fromarray((GREY * 255).astype(np.uint8)).convert("P"), GREY * 255),
    "alpha": (Image.merge("RGBA", [Image.new("L", (16, 16), 255)] * 3 + [Image.fromarray((GREY * 255).astype(np.uint8))]), GREY * 255),
    "grey and alpha": (Image.merge("LA", [Image.new("L", (16, 16), 255), Image.fromarray((GREY * 255).astype(np.uint8))]), GREY * 255),
    "opaque": (Image.fromarray((GREY * 255).astype(np.uint8)).convert("RGBA"), GREY * 255),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_that_are_not_8_bit_rgb(tmp_path, kind):
    image, expected = PICTURES[kind]
    found = read_frame(saved(image, tmp_path / "a.png"), 16)
    assert found.dtype == np.uint8 and found.shape == (3, 16, 16) and np.abs(found - np.broadcast_to(expected, (3, 16, 16))).max() <= 1.01


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_transparent_colours_of_a_palette_and_odd_exif(tmp_path):
    image = Image.fromarray((GREY * 255).astype(np.uint8)).convert("P")
    found = read_frame(saved(image, tmp_path / "a.png", transparency=image.getpixel((15, 15))), 16)
    assert found[:, 15, 15].max() == 0 and found[0, 10, 10] == read_frame(saved(image, tmp_path / "b.png"), 16)[0, 10, 10]
    for number, exif in enumerate((b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"")):
        path = saved(picture(), tmp_path / f"{number}.jpg", exif=exif)
        assert read_frame(path, 16).shape == (3, 16, 16)
    exif = Image.Exif()
    exif[0x0112] = 9  # no orientation
    assert (read_frame(saved(picture(), tmp_path / "9.png", exif=exif), 16) == read_frame(saved(picture(), tmp_path / "1.png"), 16)).all()


def test_frames_of_other_sizes_and_modes_become_rgb_squares(tiny, load):
    folder = tiny / "jpegs" / "v_fall_train_0"
    shutil.rmtree(folder)
    folder.mkdir()
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (200, 100, 50)  # the middle third is what remains
    Image.fromarray(wide).save(folder / "1.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(folder / "2.png")
    Image.fromarray(wide[:, 20:40]).convert("CMYK").save(folder / "3.jpg", quality=100)
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(folder / "4.png")
    clip = load().gather(torch.tensor([0]))[0]
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)
    assert (clip[:2, :, 2:-2, 2:-2] == colour).all()
    assert (clip[2].int() - colour).abs().max() < 8
    assert (clip[3] == 77).all()


def test_stored_pixels_are_those_of_the_chosen_frames_in_order(tiny, load):
    clips = load(stride=2, seed=5)
    videos, _ = read_videos("custom", tiny)
    folders = videos.folder[videos.split == "train"]
    for number, (folder, positions) in enumerate(zip(folders, clip_positions("train", 7, 1, seed=5))):
        names = frame_names(folder)
        chosen = clip_frames(len(names), 4, 2, "stride", positions)[0]
        images = [np.asarray(Image.open(os.path.join(folder, names[frame]))).transpose(2, 0, 1) for frame in chosen]
        assert (clips.gather(torch.tensor([number]))[0].numpy() == images).all()


# ---------------------------------------------------------------- lists

def test_table_of_data_sets():
    assert list(DATASETS) == ["UCF101", "miniUCF101", "HMDB51", "Kinetics400", "SSv2", "toy", "custom"]
    assert {name: (row.T, row.size, row.rule, row.stride) for name, row in DATASETS.items()} == {
        "UCF101": (16, 112, "stride", 4), "miniUCF101": (16, 112, "stride", 4), "HMDB51": (16, 112, "stride", 4),
        "Kinetics400": (8, 64, "all", 4), "SSv2": (8, 64, "all", 4), "toy": (8, 64, "stride", 1),
        "custom": (8, 64, "stride", 4)}


@pytest.mark.parametrize("name, path", (("UCF101", "UCF101/ucf101_splits1.csv"), ("HMDB51", "HMDB51/hmdb51_splits.csv"),
                                        ("miniUCF101", "UCF101/ucf50_splits1.csv")))
def test_csv_lists(tmp_path, name, path):
    write_list(tmp_path / path, HEADER + "v_b,Walk,train\nv_a,Run,test\nv_c,Run,train\n")
    videos, class_names = read_videos(name, tmp_path)
    assert class_names == ["Run", "Walk"]
    frames = (tmp_path / path).parent / "jpegs_112"
    assert videos.folder.tolist() == [f"{frames}/{video}" for video in ("v_b", "v_a", "v_c")]
    assert videos.label.tolist() == ["Walk", "Run", "Run"] and videos.split.tolist() == ["train", "test", "train"]


def write_list(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_kinetics(root):
    header = "label,youtube_id,time_start,time_end,split\n"
    write_list(root / "Kinetics" / "train.csv", header + "abseiling,-abc,5,15,train\nzumba,x_y,103,113,train\n")
    write_list(root / "Kinetics" / "validate.csv", header + "zumba,NA,0,10,val\nabseiling,q,1,11,validate\n")


def test_kinetics_lists_with_replacements(tmp_path):
    write_kinetics(tmp_path)
    for folder in ("train/-abc_000005_000015", "replacement/x_y_000103_000113",
                   "val/NA_000000_000010", "replacement/q_000001_000011"):
        write_frames(tmp_path / "Kinetics" / folder, 5)
    train = load_clips("Kinetics400", split="train", data_path=tmp_path, pack=False)
    test = load_clips("Kinetics400", split="test", data_path=tmp_path, pack=False)
    assert train.class_names == ["abseiling", "zumba"]
    assert train.labels.tolist() == [0, 1] and test.labels.tolist() == [1, 0]
    assert train.gather(torch.tensor([1, 0])).shape == test.gather(torch.tensor([0, 1])).shape == (2, 8, 3, 64, 64)
    shutil.rmtree(tmp_path / "Kinetics" / "replacement" / "x_y_000103_000113")
    with pytest.raises(ValueError, match=r"Kinetics/train/x_y_000103_000113 does not exist \(1 of 2 folders"):
        load_clips("Kinetics400", split="train", data_path=tmp_path, pack=False)


def test_ssv2_lists(tmp_path):
    root = tmp_path / "SSv2"
    write_list(root / "annot_train.json", json.dumps([{"id": 7, "class": "Pushing"}, {"id": "8", "class": "Holding"}]))
    write_list(root / "annot_val.json", json.dumps([{"id": "9", "class": "Pushing"}]))
    write_list(root / "class_list.json", json.dumps(["Pushing", "Holding"]))
    videos, class_names = read_videos("SSv2", tmp_path)
    assert class_names == ["Holding", "Pushing"]
    assert videos.folder.tolist() == [f"{root}/frame/{number}" for number in (7, 8, 9)]
    assert videos.split.tolist() == ["train", "train", "test"]
    write_list(root / "class_list.json", json.dumps(["Pushing"]))
    with pytest.raises(ValueError, match="annot_train.json has the class 'Holding'"):
        read_videos("SSv2", tmp_path)
    write_list(root / "annot_train.json", json.dumps([{"id": 7, "class": 1}, {"id": "8", "class": 0}]))
    write_list(root / "annot_val.json", json.dumps([{"id": "9", "class": 1}]))
    for classes in (["Holding", "Pushing"], {"Pushing": 1, "Holding": 0}):  # numbers of classes, as in the authors' files
        write_list(root / "class_list.json", json.dumps(classes))
        assert read_videos("SSv2", tmp_path)[0].label.tolist() == ["Pushing", "Holding", "Pushing"]
    for number in (2, -1, "1", 1.5, None):
        write_list(root / "annot_val.json", json.dumps([{"id": "9", "class": number}]))
        with pytest.raises(ValueError, match=f"annot_val.json has the class '{number}', which class_list.json beside it does not name"):
            read_videos("SSv2", tmp_path)
    write_list(root / "annot_val.json", json.dumps([{"id": "9", "class": ["Pushing"]}]))
    with pytest.raises(ValueError, match="annot_val.json is not a list of videos with an id and a class"):
        read_videos("SSv2", tmp_path)
    write_list(root / "annot_val.json", json.dumps([{"id": "9", "class": 1}]))
    write_list(root / "class_list.json", "7")
    with pytest.raises(ValueError, match="class_list.json is not a list of classes"):
        read_videos("SSv2", tmp_path)
    write_list(root / "class_list.json", json.dumps({"Pushing": 0, "Holding": 1}))
    write_list(root / "annot_val.json", "[{")
    with pytest.raises(ValueError, match="annot_val.json cannot be read as json"):
        read_videos("SSv2", tmp_path)
    write_list(root / "annot_train.json", '[{"id": 7}]')
    with pytest.raises(ValueError, match="annot_train.json is not a list of videos with an id and a class"):
        read_videos("SSv2", tmp_path)


def test_rule_all_stretches_and_counts(tmp_path, capsys):
    write_kinetics(tmp_path)
    for folder, count in (("-abc_000005_000015", 3), ("x_y_000103_000113", 8)):
        write_frames(tmp_path / "Kinetics" / "train" / folder, count, size=64)
    clips = load_clips("Kinetics400", split="train", data_path=tmp_path, pack_path=tmp_path / "packs", train_clips=2)
    assert len(clips) == 2  # one clip a video, however many are asked for
    told = "train: 1 of 2 videos have fewer than 8 frames and are stretched\n"
    assert told in capsys.readouterr().out
    load_clips("Kinetics400", split="train", data_path=tmp_path, pack_path=tmp_path / "packs", train_clips=2)
    assert capsys.readouterr().out == told  # of the finished pack too
    assert json.loads(packs(tmp_path, "*.json")[0].read_text())["stretched"] == 1
    short = clips.gather(torch.tensor([0]))[0]
    assert all((short[i] == short[j]).all() == (i * 3 // 8 == j * 3 // 8) for i in range(8) for j in range(8))
    stills = load_clips("Kinetics400", split="train", data_path=tmp_path, pack=False, T=1, train_clips=64)
    assert capsys.readouterr().out == "train: 117 of 128 clips repeat another clip of the same video\n"  # of 3 and 8 frames
    assert len(stills.gather(torch.arange(64, 128)).flatten(1).unique(dim=0)) == 8  # T = 1: every frame comes


@pytest.mark.parametrize("text", ("\ufeff" + HEADER + "a,NA,train\n", (HEADER + "a,NA,train\n").replace("\n", "\r\n"),
                                  "x,split,label,folder_name\n1,train,NA,a\n", HEADER + "a,NA,train,\n", HEADER + "./a/,NA,train\n"))
def test_csv_variants(tmp_path, text):
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode())
    (tmp_path / "frames").mkdir()
    videos, class_names = read_videos("custom", tmp_path)
    assert videos.folder.tolist() == [f"{tmp_path}/frames/a"] and class_names == ["NA"]


def test_folder_names_with_slashes(tmp_path):
    path = write_list(tmp_path / "list.csv", HEADER + "Run/a..b,Run,train\nRun/c,Run,test\n")
    videos, _ = read_videos("custom", tmp_path, path, tmp_path / "frames")
    assert videos.folder.tolist() == [f"{tmp_path}/frames/Run/a..b", f"{tmp_path}/frames/Run/c"]


@pytest.mark.parametrize("name", ("/a", "./a", "../a", "a/../b", "a/./b", "a//b", "a/", "a/.", "..", ".", "", ".hidden", "a\0b"))
def test_odd_names_are_seen_among_many(name):
    """Only where none is odd are the names taken as they stand."""
    names = ["v_a_1", "train/-_x_000001_000011", "a.b c", "..".join("ab")]
    assert folders_are_clean(names) and not any(folders_are_clean(names[:place] + [name] + names[place:]) for place in range(5))


@pytest.mark.parametrize("text, message", (
    ("", "list.csv cannot be read as a csv list"),
    ("a,b\x00\xff\n", "list.csv has no column"),
    ("folder_name,label\na,Run\n", "list.csv has no column split"),
    (HEADER, "list.csv lists no videos"),
    ("split,folder_name,label\ntrain,a,clap, loudly\n", r"list.csv cannot be read as a csv list \(row 1 has more fields than the header: put quotes"),
    (HEADER + "a,Run,train\nb,Run,dev\n", "list.csv, row 2: the split 'dev' is unknown: choose from train, test, val"),
    (HEADER + "a,Run,train\nb,Run\n", "list.csv, row 2: the split '' is unknown"),
    (HEADER + "../a,Run,train\n", "list.csv, row 1: the folder name '../a' leaves the directory of the frames"),
    (HEADER + "b/../../a,Run,train\n", "leaves the directory of the frames"),
    (HEADER + "b/..,Run,train\n", "leaves the directory of the frames"),
    (HEADER + "/etc,Run,train\n", "leaves the directory of the frames"),
    (HEADER + ".,Run,train\n", "leaves the directory of the frames"),
    (HEADER + ",Run,train\n", "leaves the directory of the frames"),
    (HEADER + "a,,train\n", "list.csv, row 1: a has no label"),
    (HEADER + "a,cat,train\nb,cat ,train\n", "list.csv, row 2: the label 'cat ' differs from another one only in blanks at its ends"),
    (HEADER + "a,Run,train\na,Run,train\n", "list.csv: a is listed more than once"),
    (HEADER + "a,Run,train\n./a,Run,test\n", "list.csv: a is listed more than once"),
    (HEADER + "a,Run,train\na,Walk,train\n", "list.csv: a is listed more than once"),
    (HEADER + "a,Run,train\nb,Walk,test\n", "list.csv: the class 'Walk' has no training videos"),
))
def test_bad_lists(tmp_path, text, message):
    path = write_list(tmp_path / "list.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        read_videos("custom", tmp_path, path, tmp_path)
    assert str(path) in str(caught.value)


def test_list_that_is_not_text(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"\xff\xd8\xff\xe0" * 40)
    with pytest.raises(ValueError, match="list.csv cannot be read as a csv list"):
        read_videos("custom", tmp_path, tmp_path / "list.csv", tmp_path)


def damaged(text, generator):
    """The text with bytes changed, its end cut off, a piece taken out, or another list's end."""
    data, (first, second) = bytearray(text.encode()), sorted(generator.integers(0, len(text), 2))
    kind = generator.integers(0, 4)
    if kind == 0:
        data[first:first + 3] = generator.bytes(3)
    elif kind == 1:
        del data[first:]
    elif kind == 2:
        del data[first:second]
    else:
        data[first:] = b'[{"id": 7, "class": 0}]\n,x"y",train\n'[second % 20:]
    return bytes(data)


@pytest.mark.parametrize("dataset", ("custom", "Kinetics400", "SSv2"))
def test_damaged_lists_are_read_or_refused_in_one_sentence(tmp_path, dataset):
    root, generator = tmp_path, np.random.default_rng(0)
    header = "label,youtube_id,time_start,time_end,split\n"
    files = {"custom": {"list.csv": HEADER + "".join(f"v{number},c{number % 3},{('train', 'val', 'test')[number // 4]}\n" for number in range(12))},
             "Kinetics400": {f"Kinetics/{name}.csv": header + "".join(f'"c{number % 2}, x",{name}{number},{number},11,{name}\n' for number in range(6))
                             for name in ("train", "validate")},
             "SSv2": {"SSv2/class_list.json": '["a b", "b", "c"]', **{
                 f"SSv2/annot_{name}.json": json.dumps([{"id": f"{name}{number}", "class": number % 3} for number in range(6)]) for name in ("train", "val")}}}[dataset]
    read = refused = 0
    for turn in range(100):
        hit = list(files)[turn % len(files)]
        for name, text in files.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(damaged(text, generator) if name == hit else text.encode())
        try:
            videos, class_names = read_videos(dataset, root, *((root / "list.csv", root) if dataset == "custom" else ()))
            assert len(videos) and sorted(set(videos.label)) == class_names
            read += 1
        except ValueError as error:
            assert str(root) in str(error)
            refused += 1
    assert refused > 20 and read + refused == 100


def test_custom_finds_its_frames_and_list(tiny):
    (tiny / "provenance.csv").write_text("folder_name,source\nx,y\n")  # not a list
    videos, class_names = read_videos("custom", tiny)
    assert len(videos) == 11 and class_names == ["fall", "rise"]
    (tiny / "other").mkdir()
    with pytest.raises(ValueError, match="one directory of frame folders, but holds jpegs, other: .* --frames_path"):
        read_videos("custom", tiny)
    assert len(read_videos("custom", tiny, frames_path=tiny / "jpegs")[0]) == 11
    (tiny / "second.csv").write_text(HEADER)
    with pytest.raises(ValueError, match="but holds list.csv, second.csv: choose one by --list_path"):
        read_videos("custom", tiny, frames_path=tiny / "jpegs")
    assert len(read_videos("custom", tiny, tiny / "list.csv", tiny / "jpegs")[0]) == 11


def test_missing_places(tiny, tmp_path):
    for arguments, message in (
        (("UCF", tmp_path), "--dataset UCF is unknown: choose from UCF101, miniUCF101"),
        (("custom",), "--dataset custom needs --data_path"),
        (("custom", tmp_path / "no"), "--data_path .*no is not a directory"),
        (("custom", tmp_path), "but holds none: choose one by --list_path"),
        (("custom", tiny, tiny / "no.csv"), "no.csv, the list of custom, does not exist"),
        (("UCF101", tmp_path), "ucf101_splits1.csv, the list of UCF101, does not exist: .*--data_path"),
        (("toy", tmp_path), "does not exist: make it by `python -m distill_utils.toy`"),
    ):
        with pytest.raises(ValueError, match=message):
            read_videos(*arguments)


# ---------------------------------------------------------------- bad frames and flags

def test_missing_and_empty_folders_are_found_before_decoding(tiny, load, tmp_path, monkeypatch):
    monkeypatch.setattr(clips_module, "read_frame", None)  # any decoding would fail otherwise
    shutil.rmtree(tiny / "jpegs" / "v_rise_train_1")
    for pack in (True, False):
        with pytest.raises(ValueError, match=r"v_rise_train_1 does not exist \(1 of 7 folders"):
            load(pack=pack)
    (tiny / "jpegs" / "v_rise_train_1").mkdir()
    for pack in (True, False):
        with pytest.raises(ValueError, match="v_rise_train_1 holds no .jpg"):
            load(pack=pack)
    assert not packs(tmp_path) and not packs(tmp_path, "*.tmp")


@pytest.mark.parametrize("content", ("nothing", "half", "text"))
def test_bad_frames_are_named_and_leave_no_pack(tiny, load, tmp_path, content):
    folder = tiny / "jpegs" / "v_rise_train_2"
    for path in folder.iterdir():  # any frame may be the chosen one
        whole = path.read_bytes()
        path.write_bytes({"nothing": b"", "half": whole[:len(whole) // 2], "text": b"no image"}[content])
    with pytest.raises(ValueError, match=r"v_rise_train_2/frame0000\d\d.jpg cannot be read as an image"):
        load()
    assert not packs(tmp_path) and not packs(tmp_path, "*.tmp")
    with pytest.raises(ValueError, match="v_rise_train_2/frame"):
        load(pack=False).gather(torch.arange(7))


def test_temporary_packs_of_killed_builds_are_removed(tmp_path):
    """Of ended processes of this machine, and any that nobody wrote to for a day; not those of others that may run."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = tmp_path / f"toy_train.{HOST}.{os.getpid()}.tmp"
    old, stale = tmp_path / "toy_train.other.7.tmp", tmp_path / "toy_train.tmp"
    gone, others = tmp_path / f"toy_train.{HOST}.{ended.pid}.tmp", [tmp_path / f"toy_train.{HOST}.1.tmp", tmp_path / "toy_train.other.node.9.tmp",
                                                                    tmp_path / f"toy_test.{HOST}.{ended.pid}.tmp"]
    for path in (mine, old, stale, gone, *others):
        path.touch()
    for path in (old, stale):
        os.utime(path, (time.time() - 90000,) * 2)
    remove_left(mine)
    assert {*tmp_path.iterdir()} == {mine, *others}


def test_two_builders_without_a_lock(tiny, load, tmp_path, monkeypatch):
    """The second one ends first; the first neither mixes its clips with that one's file nor replaces it."""
    def unlocked(path):
        path.parent.mkdir(exist_ok=True)
        return contextlib.nullcontext()

    monkeypatch.setattr("distill_utils.packs.locked", unlocked)
    plain = load(pack_path=tmp_path / "plain").draw(torch.arange(7))
    write, place = packs_module.write_clips, []

    def slow(file, *values):
        if not place:
            place.append(1)
            monkeypatch.setattr("os.getpid", lambda: 99999999)
            load()
            monkeypatch.undo()
            place.append(packs(tmp_path)[0].stat().st_ino)
        write(file, *values)
    monkeypatch.setattr("distill_utils.packs.write_clips", slow)
    assert torch.equal(load().draw(torch.arange(7)), plain)
    assert packs(tmp_path)[0].stat().st_ino == place[1] and not packs(tmp_path, "*.tmp")


def test_all_bad_frames_are_named_in_one_pass(tiny, load, tmp_path, monkeypatch, capsys):
    folders = [tiny / "jpegs" / name for name in ("v_fall_train_1", "v_rise_train_2", "v_rise_train_0")]
    for path in itertools.chain(*(folder.iterdir() for folder in folders)):
        path.write_bytes(b"")
    for most, count in ((100, "3"), (2, "at least 2")):
        monkeypatch.setattr("distill_utils.packs.MOST_BROKEN", most)
        with pytest.raises(ValueError, match=rf"frame0000\d\d.jpg cannot be read as an image .*; {count} videos cannot be read: see above$"):
            load()
        named = capsys.readouterr().out
        assert sum(folder.name in named for folder in folders) == min(most, 3) and not packs(tmp_path)


def test_bad_flags(load):
    for flag, settings in (("--frames 0", {"T": 0}), ("--size -1", {"size": -1}), ("--stride 0", {"stride": 0}),
                           ("--train_clips 0", {"train_clips": 0}), ("--test_clips 0", {"test_clips": 0}),
                           ("--seed -1", {"seed": -1}), ("--workers 0", {"workers": 0})):
        with pytest.raises(ValueError, match=flag):
            load(**settings)


def test_split_without_videos(tiny, load):
    (tiny / "list.csv").write_text(HEADER + "v_fall_train_0,fall,train\n")
    with pytest.raises(ValueError, match="no test videos"):
        load("test")


def test_full_disk(load, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(ValueError, match="0.0 GB free and the pack needs .*--pack_path, or --no_pack"):
            load()
    with monkeypatch.context() as patched:
        patched.setattr(clips_module.os, "pwrite", no_space)
        with pytest.raises(OSError) as caught:
            load()
        assert caught.value.filename.endswith(".npy")
    assert not packs(tmp_path) and not packs(tmp_path, "*.tmp")
    assert len(load()) == 7


@pytest.mark.parametrize("number", (errno.EACCES, errno.EROFS))
def test_a_folder_that_cannot_be_written(load, tmp_path, monkeypatch, number):
    def refuse(path, mode="r", *rest, **options):
        if str(path).endswith(".lock"):
            raise OSError(number, os.strerror(number), str(path))
        return real_open(path, mode, *rest, **options)

    real_open = builtins.open
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ValueError, match=f"{os.strerror(number)}: .*packs/.*: give another --pack_path"):
        load()


def no_space(*arguments):
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- the pack

@pytest.mark.parametrize("settings", ({}, {"T": 1}, {"size": 12, "train_clips": 3, "stride": 2}, {"T": 20, "seed": 1}))
@pytest.mark.parametrize("split", ("train", "test"))
def test_pack_equals_decoding_on_the_fly(load, split, settings):
    packed, plain = load(split, **settings), load(split, pack=False, **settings)
    index = torch.randperm(len(packed))
    assert torch.equal(packed.gather(index), plain.gather(index))
    for name in ("labels", "videos"):
        assert torch.equal(getattr(packed, name), getattr(plain, name))


def test_clips_are_copied_to_a_device_in_pieces(load, tmp_path):
    load(train_clips=2)
    path, = packs(tmp_path)
    pack = open_pack(path, (14, 4, 3, 16, 16), None)
    for numbers in ([13, 2, 5, 5, 0], list(range(14))):
        for at_once in (2, 5, 256):
            assert torch.equal(copy_to("cpu", pack, torch.tensor(numbers), at_once), pack.clips[torch.tensor(numbers)])


def test_clips_labels_and_videos(load):
    train, test = load(train_clips=2), load("test")
    assert len(train) == 14 and train.counts().tolist() == [8, 6]
    assert train.labels.tolist() == [0] * 8 + [1] * 6
    assert train.videos.tolist() == [video for video in range(7) for _ in range(2)]
    assert len(test) == 12 and test.labels.tolist() == [0] * 6 + [1] * 6
    assert test.videos.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert (train.K, train.T, train.size, train.dataset, train.class_names) == (2, 4, 16, "custom", ["fall", "rise"])
    assert train.labels.dtype == train.videos.dtype == torch.int64
    assert train.gather(torch.tensor([], dtype=torch.int64)).shape == (0, 4, 3, 16, 16)


def test_a_changed_setting_is_a_new_pack(tiny, load, tmp_path):
    before = load()
    variants = ({"T": 3}, {"size": 14}, {"stride": 2}, {"seed": 1}, {"train_clips": 2})
    for number, settings in enumerate(variants, start=2):
        load(**settings)
        assert len(packs(tmp_path)) == number
    load(test_clips=2)  # no matter of training clips
    assert len(packs(tmp_path)) == len(variants) + 1
    load("test"), load("test", seed=1), load("test", train_clips=2)  # one pack
    load("test", test_clips=2)
    assert len(packs(tmp_path)) == len(variants) + 3
    lines = (tiny / "list.csv").read_text().splitlines()
    (tiny / "list.csv").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    after = load()
    assert len(packs(tmp_path)) == len(variants) + 4
    assert not torch.equal(before.gather(torch.arange(7)), after.gather(torch.arange(7)))


def test_an_existing_pack_needs_no_frames(tiny, load, tmp_path):
    before, changed = load().gather(torch.arange(7)), packs(tmp_path)[0].stat().st_mtime_ns
    shutil.rmtree(tiny / "jpegs")
    after = load(frames_path=tiny / "jpegs")
    assert torch.equal(after.gather(torch.arange(7)), before) and packs(tmp_path)[0].stat().st_mtime_ns == changed
    with pytest.raises(ValueError, match="does not exist"):  # never packed: who knows what stood there
        load(frames_path=tiny / "other")


def test_without_frames_packs_of_two_versions_are_refused(tiny, load, tmp_path):
    """Training and test clips could be of different versions: nobody knows which one the deleted frames were."""
    load()
    shutil.rmtree(tiny / "jpegs" / "v_rise_train_1")
    write_frames(tiny / "jpegs" / "v_rise_train_1", 12, seed=99)
    load(T=2)
    load()
    shutil.rmtree(tiny / "jpegs")
    with pytest.raises(ValueError, match=r"are deleted, and the packs in .* are of several versions .*: delete all but one") as caught:
        load(frames_path=tiny / "jpegs")
    old, new = re.search(r"\*_(\w+)\.npy, \*_(\w+)\.npy:", str(caught.value)).groups()
    for path in [*packs(tmp_path), *packs(tmp_path, "*.json")]:
        if path.stem.endswith(old):
            path.unlink()
    assert packs(tmp_path)[0].stem.endswith(new)


def test_without_frames_packs_of_two_kinds_of_images_are_told_apart(tiny, load):
    for path in sorted((tiny / "jpegs").glob("*/*.jpg")):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path.with_name(f"flow_{path.name.rpartition('frame')[2]}"))
    kinds = {names: load(names=names).gather(torch.arange(7)) for names in (None, "flow_#.jpg")}
    assert not torch.equal(*kinds.values())
    shutil.rmtree(tiny / "jpegs")
    for names, pixels in kinds.items():
        assert torch.equal(load(names=names, frames_path=tiny / "jpegs").gather(torch.arange(7)), pixels)


def test_a_damaged_note_beside_a_pack_is_named_or_passed_over(tiny, load, tmp_path):
    load()
    note, = packs(tmp_path, "*.json")
    shutil.rmtree(tiny / "jpegs")
    same = {name: value for name, value in json.loads(note.read_text()).items() if name != "content"}
    for text, message in (("{", "cannot be read as json"), ("[" * 10 ** 5, "cannot be read as json"), ("[1]", "does not exist"),
                          ('{"listed": [], "place": {}}', "does not exist"), (json.dumps(same), "does not exist")):
        note.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(frames_path=tiny / "jpegs")


def test_moved_data_have_the_same_pack(tiny, load, tmp_path):
    before, changed = {split: load(split).gather(torch.arange(4)) for split in ("train", "test")}, {path: path.stat().st_mtime_ns for path in packs(tmp_path)}
    tiny.rename(tmp_path / "elsewhere")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "deep" / "er" / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in ("elsewhere", "deep/er/copy", "link"):
        for split, clips in before.items():
            assert torch.equal(load(split, data_path=tmp_path / place).gather(torch.arange(4)), clips)
    shutil.copy(tmp_path / "elsewhere" / "list.csv", tmp_path / "other.csv")  # the list elsewhere, the frames under another name
    (tmp_path / "elsewhere" / "jpegs").rename(tmp_path / "pictures")
    load(data_path=tmp_path, list_path=tmp_path / "other.csv", frames_path=tmp_path / "pictures")
    assert {path: path.stat().st_mtime_ns for path in packs(tmp_path)} == changed


def other_quality(folder):
    for path in folder.iterdir():
        Image.open(path).save(path, quality=40)


OTHER_DATA = {  # what makes a video's frames others, under the same names in the list
    "pixels": other_quality,
    "one frame more": lambda folder: shutil.copy(folder / "frame000001.jpg", folder / "frame000099.jpg"),
    "one frame less": lambda folder: (folder / "frame000001.jpg").unlink(),
    "other names": lambda folder: [path.rename(path.with_name(path.name.replace("frame", "img_"))) for path in list(folder.iterdir())],
    "another video's": lambda folder: (shutil.rmtree(folder), write_frames(folder, 20, seed=77)),
}


@pytest.mark.parametrize("where", ("moved", "in place"))
@pytest.mark.parametrize("kind", OTHER_DATA)
def test_other_data_of_the_same_list_have_a_pack_of_their_own(tiny, load, tmp_path, kind, where):
    mine, before = tiny, load().gather(torch.arange(7))
    if where == "moved":
        shutil.copytree(tiny, tmp_path / "other")
        mine = tmp_path / "other"
    OTHER_DATA[kind](mine / "jpegs" / "v_rise_train_1")
    found = load(data_path=mine).gather(torch.arange(7))
    assert torch.equal(found, load(data_path=mine, pack=False).gather(torch.arange(7))) and len(packs(tmp_path)) == 2
    if where == "moved":
        assert torch.equal(load().gather(torch.arange(7)), before)
        shutil.rmtree(mine / "jpegs")
        assert torch.equal(load(data_path=mine, frames_path=mine / "jpegs").gather(torch.arange(7)), found)  # each place has its own, also without frames
        assert torch.equal(load().gather(torch.arange(7)), before)


def test_a_sample_tells_large_sets_apart(tmp_path):
    for number in range(200):
        write_frames(tmp_path / "a" / str(number), 1, seed=number)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    folders = {place: [str(tmp_path / place / str(number)) for number in range(200)] for place in "ab"}
    digest = content_digest(folders["a"])
    assert digest == content_digest(folders["b"]) and digest != content_digest(folders["a"][::-1])
    for number in range(0, 200, 50):
        other_quality(tmp_path / "b" / str(number))
    assert digest != content_digest(folders["b"])
    assert content_digest([str(tmp_path / "c" / str(number)) for number in range(200)]) is None


def test_val_is_the_test_set_only_where_there_is_no_other(tmp_path):
    rows = [f"{split}{number},c{number},{split}" for split in ("train", "val", "validate", "validation") for number in range(2)]
    for extra, expected in (([], {"train": 2, "test": 6}), (["x,c0,test"], {"train": 2, "validation": 6, "test": 1})):
        path = write_list(tmp_path / "list.csv", HEADER + "\n".join([*rows, *extra, ""]))
        assert read_videos("custom", tmp_path, path, tmp_path)[0].split.value_counts().to_dict() == expected
    with pytest.raises(ValueError, match="--validation 0.5: the list has its own validation videos: give --validation list"):
        read_videos("custom", tmp_path, path, tmp_path, validation=0.5)
    assert read_videos("custom", tmp_path, path, tmp_path, validation="list")[0].split.value_counts().to_dict() == expected
    path = write_list(tmp_path / "list.csv", HEADER + "\n".join([*rows, ""]))
    with pytest.raises(ValueError, match="--validation list: the list has no validation videos besides the test videos: give a share"):
        read_videos("custom", tmp_path, path, tmp_path, validation="list")


def test_damaged_pack_is_named(load, tmp_path):
    load()
    path = packs(tmp_path)[0]
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", b"", whole[:50], b"PK\3\4" + whole[4:], whole.replace(b"(7, 4,", b"(4, 7,"), whole.replace(b"|u1", b"|i1"),
                    whole.replace(b"{", b"(", 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"the pack {path} is damaged: delete it"):
            load()


BUILD_IN_TWO_PARTS = """
import os, sys, time
sys.path.insert(0, {root!r})
from distill_utils import clips
read = clips.read_frame

def read_first_video_then_wait(path, size):
    while "fall_train_0" not in path and not os.path.exists({go!r}):
        time.sleep(0.01)
    return read(path, size)

clips.read_frame = read_first_video_then_wait
packed = clips.load_clips("custom", split="train", data_path={data!r}, T=4, size=16, pack_path={packs!r}, workers=1)
print(packed.gather(clips.torch.arange(7)).tolist())
"""


@pytest.fixture
def start_build(tiny, tmp_path):
    """Starts a process that builds the pack of `load` and stops after the first video until tmp_path/go exists."""
    code = BUILD_IN_TWO_PARTS.format(root=str(ROOT), go=str(tmp_path / "go"), data=str(tiny),
                                     packs=str(tmp_path / "packs"))
    children = []

    def start():
        children.append(subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL))
        return children[-1]
    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def wait_for_first_video(child, tmp_path):
    while not any(path.stat().st_size > 4 * 3 * 16 * 16 for path in packs(tmp_path, "*.tmp")):
        assert child.poll() is None
        time.sleep(0.01)


def test_a_killed_build_leaves_no_pack_and_the_next_is_right(load, tmp_path, start_build):
    child = start_build()
    wait_for_first_video(child, tmp_path)
    child.kill()
    child.wait()
    assert not packs(tmp_path) and packs(tmp_path, "*.tmp")
    assert torch.equal(load().gather(torch.arange(7)), load(pack=False).gather(torch.arange(7)))
    assert len(packs(tmp_path)) == 1 and not packs(tmp_path, "*.tmp")


def test_two_processes_build_the_same_pack(load, tmp_path, start_build):
    first = start_build()
    wait_for_first_video(first, tmp_path)
    second = start_build()
    assert "waiting for another process" in second.stdout.readline()
    (tmp_path / "go").touch()
    clips = load(pack=False).gather(torch.arange(7)).tolist()
    assert [json.loads(child.communicate()[0]) == clips for child in (first, second)] == [True, True]
    assert len(packs(tmp_path)) == 1 and not packs(tmp_path, "*.tmp")


# ---------------------------------------------------------------- drawing

def test_class_batch_is_balanced_and_without_replacement(load):
    clips = load(train_clips=3)  # 12 of one class and 9 of the other
    for per_class in (1, 5, 9, 12, 100):
        index = clips.class_batch(per_class)
        expected = [min(per_class, count) for count in clips.counts().tolist()]
        assert index.dtype == torch.int64 and len(index.unique()) == len(index)
        assert clips.labels[index].tolist() == [0] * expected[0] + [1] * expected[1]


def test_class_batch_is_random_and_repeatable(load):
    clips = load()
    torch.manual_seed(1)
    drawn = [clips.class_batch(1) for _ in range(600)]
    counts = torch.bincount(torch.cat(drawn), minlength=7)
    assert (counts[:4] - 150).abs().max() < 60 and (counts[4:] - 200).abs().max() < 60
    torch.manual_seed(1)
    assert all(torch.equal(clips.class_batch(1), index) for index in drawn)


def test_class_batch_of_an_unsorted_list(tiny, load):
    lines = (tiny / "list.csv").read_text().splitlines()
    (tiny / "list.csv").write_text("\n".join([lines[0], *sorted(lines[1:], key=lambda line: line[::-1])]))
    clips = load()
    index = clips.class_batch(3)
    assert sorted(clips.labels.tolist()) != clips.labels.tolist() and clips.labels[index].tolist() == [0, 0, 0, 1, 1, 1]


def test_draw_flips_only_when_asked(load):
    clips, index = load(), torch.arange(7).repeat(20)
    plain = normalize(clips.gather(index))
    state = torch.get_rng_state()
    assert torch.equal(clips.draw(index), plain) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    drawn = clips.draw(index, flip=draw_flips(len(index)))
    torch.manual_seed(0)
    flipped = torch.rand(len(index)) < 0.5
    assert torch.equal(drawn[flipped], plain[flipped].flip(-1)) and torch.equal(drawn[~flipped], plain[~flipped])
    assert 40 < flipped.sum() < 100


@pytest.mark.parametrize("probability", (0, 1))
def test_clips_are_mirrored_as_often_as_asked(load, probability):
    """In training on real clips and in every matching; a matching by trajectories sees none."""
    clips, given = load(T=8, size=43, mirror=probability), []
    clips.draw = lambda index, flip=None: given.append(flip) or type(clips).draw(clips, index, flip)
    stills = load(T=1, size=43, mirror=probability)
    stills.draw = lambda index, flip=None: given.append(flip) or type(clips).draw(stills, index, flip)
    synset = PixelSet(torch.randn(clips.K, clips.T, 3, clips.size, clips.size), clips.K)
    one = StillSet(torch.randn(clips.K, 1, 3, clips.size, clips.size), 1, clips.T)
    for work in (lambda: RealSet(clips)(torch.arange(3)), lambda: DistributionMatching(clips, 2, width=2)(synset),
                 lambda: DistributionMatching(clips, 2, width=2, pool=1), lambda: FeatureRegression(clips, 4, width=2, pool=1)(synset),
                 lambda: GradientMatching(stills, 2, 1, 1, 0.01, 2, "fp32").match(ConvNet(clips.K, clips.size), one)):
        given.clear()
        work()
        mirrored = torch.cat([flip for flip in given if flip is not None])
        assert len(mirrored) and (mirrored == bool(probability)).all()


def test_normalize_is_imagenets_and_denormalize_its_inverse():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    values = normalize(pixels)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert torch.allclose(values[:, channel], (pixels[:, channel] / 255 - mean) / std, atol=1e-6)
    assert values.dtype == torch.float32 and torch.equal(denormalize(values), pixels)
    assert denormalize(torch.full((3, 1, 1), 99.0)).tolist() == [[[255]]] * 3
    assert denormalize(torch.full((3, 1, 1), -99.0)).tolist() == [[[0]]] * 3
