"""The toy set: its files, what no still frame can tell, and what ConvNet3D learns from it."""
import collections
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from distill_utils import toy
from networks import ConvNet3D

CLASSES = sorted(f"{shape}_{direction}" for shape in toy.COLOURS for direction in toy.DIRECTIONS)


def files(root):
    """Contents of all files below a folder, by relative name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def frames_of(root, folder):
    return [path.read_bytes() for path in sorted((root / "jpegs_64" / folder).iterdir())]


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The toy set as users get it."""
    return toy.make_toy(tmp_path_factory.mktemp("data") / "toy")


# ---------------------------------------------------------------- files

def test_counts_and_list(full):
    videos = pd.read_csv(full / "toy_splits1.csv")
    assert list(videos) == ["folder_name", "label", "split", "group"]
    assert sorted(videos.label.unique()) == CLASSES
    counts = videos.groupby(["split", "label"]).size()
    assert len(counts) == 16 and (counts["train"] == 24).all() and (counts["test"] == 12).all()
    assert sorted(videos.folder_name) == sorted(path.name for path in (full / "jpegs_64").iterdir())
    for folder in videos.folder_name:
        names = sorted(path.name for path in (full / "jpegs_64" / folder).iterdir())
        assert names == [f"frame{number:06d}.jpg" for number in range(1, 17)]
    with Image.open(full / "jpegs_64" / videos.folder_name[0] / "frame000001.jpg") as frame:
        assert (frame.format, frame.mode, frame.size) == ("JPEG", "RGB", (64, 64))


def test_no_two_pairs_share_a_frame(full):
    videos = [path.name for path in (full / "jpegs_64").iterdir()]
    owners = collections.Counter(jpeg for folder in videos for jpeg in set(frames_of(full, folder)))
    assert set(owners.values()) == {2}                                      # the up and the down video of one pair


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    sets = [files(toy.make_toy(tmp_path / str(i), seed=seed, train=1, test=1)) for i, seed in enumerate((3, 3, 4))]
    assert sets[0] == sets[1]
    assert not set(sets[0].values()) & set(sets[2].values())
    assert not sets[0].keys() & {name for name in sets[2] if name.endswith(".jpg")}     # other pixels, another list


def test_more_videos_leave_the_first_as_they_are(tmp_path):
    few, many = (toy.make_toy(tmp_path / str(train), train=train, test=1) for train in (1, 2))
    assert files(few / "jpegs_64").items() <= files(many / "jpegs_64").items()


def test_a_complete_set_is_left_alone(tmp_path, monkeypatch):
    """Nothing is written, since its disk may be read-only."""
    root = toy.make_toy(tmp_path / "toy", train=1, test=1)
    (tmp_path / "toy.lock").unlink()
    monkeypatch.setattr(toy, "lock", None)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert toy.make_toy(tmp_path / "toy", train=1, test=1) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "toy").symlink_to(tmp_path / "disk" / "toy")
    for _ in range(2):
        toy.make_toy(tmp_path / "toy", train=1, test=1)
        assert (tmp_path / "toy").is_symlink() and (tmp_path / "disk" / "toy" / "toy.json").is_file()


def test_what_is_not_this_set_is_neither_used_nor_touched(tmp_path):
    root = toy.make_toy(tmp_path / "toy", train=1, test=1)
    before = files(root)
    with pytest.raises(ValueError, match="with other settings.*--out"):
        toy.make_toy(root, seed=1, train=1, test=1)
    assert files(root) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "toy_splits1.csv").write_text("mine")
    with pytest.raises(ValueError, match="not a complete toy set.*--out"):
        toy.make_toy(tmp_path / "mine")
    assert files(tmp_path / "mine") == {"toy_splits1.csv": b"mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    encode, made = toy.encode, []

    def fail_later(frame):
        made.append(frame)
        if len(made) > 100:
            raise error
        return encode(frame)

    monkeypatch.setattr(toy, "encode", fail_later)
    with pytest.raises(error):
        toy.make_toy(tmp_path / "toy", train=1, test=1)
    assert leftovers(tmp_path) == []


def test_a_killed_run_leaves_nothing_that_looks_complete_and_the_next_one_cleans_up(tmp_path):
    script = ("import os, signal; from distill_utils import toy\n"
              "encode, made = toy.encode, []\n"
              "def kill_later(frame):\n"
              "    made.append(frame)\n"
              "    if len(made) > 100: os.kill(os.getpid(), signal.SIGKILL)\n"
              "    return encode(frame)\n"
              "toy.encode = kill_later\n"
              f"toy.make_toy({str(tmp_path / 'toy')!r}, train=1, test=1)\n")
    root = toy.DEFAULT_OUT.parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True).returncode == -9
    assert leftovers(tmp_path) == ["toy.partial"]
    after, other = (toy.make_toy(tmp_path / name, train=1, test=1) for name in ("toy", "other"))
    assert files(after) == files(other)
    assert leftovers(tmp_path) == ["other", "toy"]


def test_command_and_its_error(tmp_path):
    def run(*flags):
        return subprocess.run([sys.executable, "-m", "distill_utils.toy", *flags], cwd=toy.DEFAULT_OUT.parents[2],
                              capture_output=True, text=True)

    (tmp_path / "file").write_text("")
    failed = run("--out", str(tmp_path / "file"))
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"toy: error: {tmp_path / 'file'} ") and failed.stderr.count("\n") == 1
    made = run("--out", str(tmp_path / "toy"), "--seed", "5")
    assert made.returncode == 0 and made.stdout.strip() == str(tmp_path / "toy")
    assert json.loads((tmp_path / "toy" / "toy.json").read_text())["seed"] == 5


# ---------------------------------------------------------------- what a still frame tells

def test_down_videos_are_the_up_videos_backwards(full):
    for folder in pd.read_csv(full / "toy_splits1.csv").folder_name:
        if "_up_" in folder:
            assert frames_of(full, folder) == frames_of(full, folder.replace("_up_", "_down_"))[::-1]


def heights(video):
    """Height of what moves in each frame of a video (T, H, W, 3), in pixels, cyclic: (T,).

    Angle of the first Fourier coefficient over rows, of what differs from the median over time (the background).
    """
    moving = np.abs(video - np.median(video, axis=0)).sum((2, 3))           # (T, H)
    angle = np.angle((moving * np.exp(2j * np.pi * np.arange(64) / 64)).sum(1))
    return angle / (2 * np.pi) * 64 % 64


def test_what_moves_up_moves_up_and_is_anywhere_at_any_moment():
    videos = [toy.up_video(shape, np.random.default_rng([seed, 7])) for shape in toy.COLOURS for seed in range(50)]
    tops = np.stack([heights(video.astype(float)) for video in videos])     # (200, T)
    steps = (np.diff(tops, axis=1) + 32) % 64 - 32
    # A slow shape is partly in the median itself, so the estimate is rough; its sign is what counts.
    assert -5 < np.median(steps, axis=1).min() and np.median(steps, axis=1).max() < -1
    # Uniform at each moment, so that nothing tells first from last: under the 0.1% bound of Rayleigh's test.
    assert np.abs(np.exp(2j * np.pi * tops / 64).mean(0)).max() < np.sqrt(np.log(1000 * 16) / len(videos))


# ---------------------------------------------------------------- what a network learns

SIDE = 48   # pixels that are enough for two of the shapes
LEARNED = [f"{shape}_{direction}" for shape in ("disc", "square") for direction in toy.DIRECTIONS]
APPEARANCE = torch.tensor([0, 0, 1, 1])


@pytest.fixture(scope="module")
def videos(full):
    """{split: its videos of two shapes in normalised pixels, (n, T, 3, H, W), and their classes (n,)}."""
    def load(split):
        rows = listed[(listed.split == split) & listed.label.isin(LEARNED)]
        pixels = np.stack([[np.asarray(Image.open(path)) for path in sorted((full / "jpegs_64" / folder).iterdir())] for folder in rows.folder_name])
        pixels = (torch.from_numpy(pixels).float() / 255 - mean) / std
        small = F.interpolate(pixels.movedim(-1, 2).flatten(0, 1), (SIDE, SIDE), mode="area").unflatten(0, pixels.shape[:2])
        return small, torch.tensor([LEARNED.index(label) for label in rows.label])

    listed = pd.read_csv(full / "toy_splits1.csv")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return {split: load(split) for split in toy.SPLITS}


def cut(videos, starts):
    """Clips of 8 frames, (n, 8, 3, H, W)."""
    return torch.stack([video[start:start + 8] for video, start in zip(videos, starts.tolist())])


def still(videos, moments):
    """One frame of each video, eight times."""
    return videos[torch.arange(len(videos)), moments][:, None].expand(-1, 8, -1, -1, -1)


def train(draw, labels, epochs=12, batch_size=8):
    """A narrow network, trained on the clips that draw() gives, other ones in each epoch."""
    torch.set_num_threads(1)
    net = ConvNet3D(len(LEARNED), 8, SIDE, dropout=0.2, width=32)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.002, total_steps=epochs * -(-len(labels) // batch_size))  # no start without a warm-up
    for _ in range(epochs):
        clips = draw()
        for batch in torch.randperm(len(clips)).split(batch_size):
            mirrored = torch.where(torch.rand(len(batch), 1, 1, 1, 1) < 0.5, clips[batch], clips[batch].flip(-1))
            loss = F.cross_entropy(net(mirrored), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def predict(net, clips):
    return torch.cat([net(batch).argmax(1) for batch in clips.split(48)])


def percent(right):
    return 100 * right.float().mean().item()


@pytest.mark.slow
def test_clips_are_learned(videos):
    torch.manual_seed(0)
    (clips, labels), (test_clips, test_labels) = videos["train"], videos["test"]
    net = train(lambda: cut(clips, torch.randint(0, 9, labels.shape)), labels)
    assert percent(predict(net, cut(test_clips, torch.full_like(test_labels, 4))) == test_labels) > 85


@pytest.mark.slow
def test_stills_show_the_appearance_and_toss_a_coin_for_the_direction(videos):
    torch.manual_seed(0)
    (clips, labels), (test_clips, test_labels) = videos["train"], videos["test"]
    net = train(lambda: still(clips, torch.randint(0, 16, labels.shape)), labels)
    moments = torch.randint(0, 16, test_labels.shape)
    for shown in (still(test_clips, moments), cut(test_clips, torch.full_like(test_labels, 4))):
        predicted = predict(net, shown)
        assert percent(APPEARANCE[predicted] == APPEARANCE[test_labels]) > 85
        assert 30 < percent(predicted == test_labels) < 70              # 48 clips: 2.8 standard deviations
    # Both videos of a pair hold the same frames: over first and last frames exactly half of the directions are right.
    predicted = predict(net, test_clips[:, ::15].reshape(-1, 1, 3, SIDE, SIDE).expand(-1, 8, -1, -1, -1))
    truth = test_labels.repeat_interleave(2)
    appearance_right = APPEARANCE[predicted] == APPEARANCE[truth]
    right = predicted[appearance_right] == truth[appearance_right]
    assert percent(right) == pytest.approx(50, abs=1.1)                 # a near tie may round either way: one of 96 is 1.04
