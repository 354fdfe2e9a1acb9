"""The paper's study: temporal compression, reference selections, other networks, class dynamics; and what is made of finished runs."""
import base64
import csv
import html
import importlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import av
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_frames
from fakes import TinyNet, random_clips
from matplotlib.colors import to_hex
from PIL import Image
from test_trajectories import assert_same_gradients, matching_of

import distill_DM
import distill_s2d
import networks
from distill_utils import coreset, dynamics, evaluate, export, pictures, plots, report, table
from distill_utils.clips import denormalize, draw_flips, load_clips
from distill_utils.processes import run_script
from distill_utils.starts import initial_pixels
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet, load, load_set
from distill_utils.temporal import kept_frames, random_segment, repeated_frames
from networks import Hallucinator, Interpolation
from utils import ROOT, save, save_json

K = 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------- interpolation

@pytest.mark.parametrize("n, T", ((1, 8), (2, 8), (3, 8), (4, 8), (8, 8), (5, 16)))
def test_interpolations_are_their_plain_formulas(n, T):
    videos = torch.randn(2, n, 3, 4, 4)
    duplicate = Interpolation("duplicate", n, T)(videos)
    assert torch.equal(duplicate, torch.stack([videos[:, t * n // T] for t in range(T)], 1))
    linear = Interpolation("linear", n, T)(videos)
    for t in range(T):
        position = min(max((t + 0.5) * n / T - 0.5, 0), n - 1)
        low = int(position)
        high = min(low + 1, n - 1)
        plain = (1 - (position - low)) * videos[:, low] + (position - low) * videos[:, high]
        assert torch.allclose(linear[:, t], plain, atol=1e-6)
    parametric = Interpolation("parametric", n, T)
    assert torch.equal(parametric(videos), linear)
    assert [parameter.shape for parameter in parametric.parameters()] == [(T, n)]
    assert not list(Interpolation("linear", n, T).parameters()) and not Interpolation("linear", n, T).state_dict()


def test_unknown_interpolations():
    with pytest.raises(ValueError, match="'cubic': choose one of duplicate, linear, parametric"):
        Interpolation("cubic", 2, 8)
    with pytest.raises(ValueError, match="9 frames cannot be stretched to 8"):
        Interpolation("linear", 9, 8)


def test_frames_that_are_kept():
    assert kept_frames(8, 1).tolist() == [4] and kept_frames(8, 2).tolist() == [2, 6] and kept_frames(8, 8).tolist() == list(range(8))
    assert repeated_frames(8, 2).tolist() == [2, 2, 2, 2, 6, 6, 6, 6] and repeated_frames(8, 8).tolist() == list(range(8))
    for T in range(1, 20):
        for n in range(1, T + 1):
            assert sorted(set(repeated_frames(T, n).tolist())) == kept_frames(T, n).tolist() and len(kept_frames(T, n).unique()) == n


def test_segments_are_pieces_of_the_clip():
    assert random_segment(8, 1, 4) == slice(None)
    pieces = {tuple(random_segment(8, 2, 4).tolist()) for _ in range(50)}
    assert pieces == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert {tuple(random_segment(8, 4, 4).tolist()) for _ in range(99)} == {(0, 0, 1, 1), (2, 2, 3, 3), (4, 4, 5, 5), (6, 6, 7, 7)}
    assert random_segment(16, 2, 4).shape == (8,)


def test_clips_of_fewer_frames():
    clips = random_clips([0, 1, 2], K, T=8)
    index = torch.arange(3)
    assert torch.equal(clips.reduced(2).draw(index), clips.draw(index)[:, repeated_frames(8, 2)])
    assert torch.equal(clips.reduced(None).draw(index), clips.draw(index)) and torch.equal(clips.reduced(8).draw(index), clips.draw(index))


@pytest.mark.parametrize("kind", networks.INTERPOLATIONS)
def test_sets_of_few_frames(kind):
    clips = random_clips([0, 1, 2] * 2, K, T=8)
    torch.manual_seed(1)
    synset = initial_pixels(clips, 2, "real", 2, kind)
    torch.manual_seed(1)
    whole = initial_pixels(clips, 2, "real")
    assert torch.equal(synset.videos, whole.videos[:, kept_frames(8, 2)]) and whole.interpolation is None
    videos, labels = synset(torch.arange(6))
    assert videos.shape == whole.videos.shape and labels.tolist() == [0, 0, 1, 1, 2, 2]
    learned = 8 * 2 if kind == "parametric" else 0
    assert synset.bytes() == 4 * (synset.videos.numel() + learned)
    assert len(synset.param_groups(1.0, 0.1)) == (2 if learned else 1)
    videos.sum().backward()
    assert torch.allclose(synset.videos.grad.sum(1), torch.full((6, 3, 8, 8), 8.0))  # the shares of each moment add up to one


# ---------------------------------------------------------------- matching few frames and segments

@pytest.mark.parametrize("segments, n_real, kind", ((1, 2, "linear"), (2, None, "duplicate"), (4, 4, "parametric")))
def test_dm_of_the_study_is_the_plain_formula(monkeypatch, segments, n_real, kind):
    nets = []

    def build(name, num_classes, frames, size, width=None, compile=False):
        nets.append(networks.ConvNet3D(num_classes, 8, 43))
        return nets[-1]
    monkeypatch.setattr(networks, "build", build)
    clips = random_clips([0, 1, 2] * 2, K, T=8, size=43)
    synset = initial_pixels(clips, 1, "real", 2, kind)
    matching = distill_DM.DistributionMatching(clips.reduced(n_real), 64, segments=segments)
    torch.manual_seed(7)
    loss = matching(synset)
    loss.backward()
    torch.manual_seed(7)
    build("", K, 8, 43)  # draws what the matching's network drew
    frames = random_segment(8, segments, 4)
    net, plain = nets[0], 0
    index = clips.class_batch(64)
    real = clips.draw(index, flip=draw_flips(len(index)))[:, repeated_frames(8, n_real or 8)][:, frames]
    videos = synset(torch.arange(K))[0][:, frames]
    for label in range(K):
        plain = plain + (net.embed(real[clips.labels[index] == label]).mean(0) - net.embed(videos[label][None])[0]).square().sum()
    found = {name: parameter.grad.clone() for name, parameter in synset.named_parameters()}
    synset.zero_grad()
    plain.backward()
    assert abs(loss - plain) < 1e-4 * plain
    for name, parameter in synset.named_parameters():
        assert (found[name] - parameter.grad).norm() < 1e-3 * parameter.grad.norm(), name


class Patient(TinyNet):
    """Takes what segments are stretched to."""

    def __init__(self):
        super().__init__(K, 8, 8)


@pytest.mark.parametrize("segments, kind", ((1, "parametric"), (2, "linear"), (4, "parametric")))
def test_replay_of_the_study_is_the_unrolled_graph(segments, kind):
    """In float64, pixels and matrix; a step's segment is the same on the way there and back."""
    synset = PixelSet(torch.randn(K * 2, 2, 3, 8, 8), K, Interpolation(kind, 2, 8)).double()
    matching = matching_of(Patient().double(), random_clips([0, 1, 2], K, T=8))
    matching.segments = segments

    found, _ = assert_same_gradients(matching, synset)
    assert set(found) == {"videos"} | ({"interpolation.matrix"} if kind == "parametric" else set())


# ---------------------------------------------------------------- selections

def brute_herding(features, count):
    taken = []
    for _ in range(count):
        rest = [row for row in range(len(features)) if row not in taken]
        taken.append(min(rest, key=lambda row: (features[[*taken, row]].mean(0) - features.mean(0)).norm().item()))
    return taken


def brute_k_center(features, count):
    taken = [min(range(len(features)), key=lambda row: (features[row] - features.mean(0)).norm().item())]
    while len(taken) < count:
        rest = [row for row in range(len(features)) if row not in taken]
        taken.append(max(rest, key=lambda row: min((features[row] - features[other]).norm().item() for other in taken)))
    return taken


@pytest.mark.parametrize("seed", range(5))
def test_selections_agree_with_brute_force(seed):
    features = torch.randn(17, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for count in (1, 5, 17):
        assert coreset.herding(features, count) == brute_herding(features, count)
        assert coreset.k_center(features, count) == brute_k_center(features, count)


def test_selections_of_equal_clips_take_each_once():
    for method in (coreset.herding, coreset.k_center):
        assert sorted(method(torch.ones(4, 3), 4)) == [0, 1, 2, 3]


def test_selection_is_by_class():
    clips = random_clips([2, 0, 1, 0, 2, 1, 0], K)
    features = torch.randn(7, 4)
    chosen = coreset.select_per_class(clips, 2, "herding", features)
    assert clips.labels[chosen].tolist() == [0, 0, 1, 1, 2, 2]
    zeros = torch.tensor([1, 3, 6])
    assert chosen[:2].tolist() == zeros[brute_herding(features[zeros], 2)].tolist()


# ---------------------------------------------------------------- other networks

@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_map_clips_to_logits_whatever_their_batch(name):
    net = networks.build(name, 5, 8, 48).eval()
    clips = torch.randn(3, 8, 3, 48, 48)
    with torch.no_grad():
        logits = net(clips)
        assert logits.shape == (3, 5) and torch.allclose(net(clips[1:2] * 3 + 1), logits[1:2], atol=1e-4)  # standardised, each by itself
        backwards = net(clips.flip(1))
    assert torch.allclose(backwards, logits, atol=1e-4) == (name == "CNN+mean")  # which alone does not see the order
    networks.build(name, 2, 16, 112)


def test_names_of_networks():
    assert {"ConvNet3D", "CNN+mean", "CNN+RNN", "CNN+GRU", "CNN+LSTM", "r3d_18", "mc3_18", "r2plus1d_18"} == set(networks.NETWORKS)
    with pytest.raises(ValueError, match="at least 17 pixels"):
        networks.build("r3d_18", 2, 8, 16)


# ---------------------------------------------------------------- sets in files

def sets():
    torch.manual_seed(3)
    still = torch.randn(K, 4, 3, 8, 8)
    dynamic = StaticDynamicSet(torch.randn(K, 4, 3, 8, 8), torch.randn(K, 6, 5, 1, 8, 8), Hallucinator(), 2)
    return {"pixels": PixelSet(torch.randn(K * 2, 5, 3, 8, 8), K), "still": StillSet(still, 2, 5), "dynamic": dynamic,
            **{kind: PixelSet(torch.randn(K * 2, 2, 3, 8, 8), K, Interpolation(kind, 2, 5)) for kind in networks.INTERPOLATIONS}}


def written(synset, path, **other):
    save({"kind": type(synset).__name__, **synset.content(), "ipc": synset.N, "class_names": list("abc"), "dataset": "custom", "frames": 5,
          "iteration": 1, "lr": 0.01, **other}, path)
    return path


@pytest.mark.parametrize("kind", ("pixels", "still", "dynamic", *networks.INTERPOLATIONS))
def test_a_set_comes_back_from_its_file(tmp_path, kind):
    synset = sets()[kind]
    again, content = load_set(written(synset, tmp_path / "distilled.pt"))
    index = torch.arange(K * 2)
    with torch.no_grad():
        torch.manual_seed(5)
        videos, labels = synset(index)
        torch.manual_seed(5)
        assert torch.equal(again(index)[0], videos) and torch.equal(again(index)[1], labels)
    assert again.bytes() == synset.bytes()
    data = load(tmp_path)  # of the run's folder
    torch.manual_seed(5)
    video, label = data[3]
    assert isinstance(data, torch.utils.data.Dataset) and video.shape == (5, 3, 8, 8) and label == 1 and not video.requires_grad
    assert len(data) == 6 and data.class_names == ["a", "b", "c"] and [label for _, label in data] == [0, 0, 1, 1, 2, 2]
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=6)))
    assert batch[0].shape == (6, 5, 3, 8, 8) and batch[1].tolist() == [0, 0, 1, 1, 2, 2]
    if kind != "still":
        synset.soft_labels = torch.nn.Parameter(torch.randn(6, K))
        batch = next(iter(torch.utils.data.DataLoader(load(written(synset, tmp_path / "distilled.pt")), batch_size=6)))
        assert torch.equal(batch[1], synset.soft_labels.detach().half().float().softmax(1))
    with pytest.raises(IndexError):
        data[6]


def test_every_video_of_a_set():
    """Of a static-dynamic set all pairs within a slot, and none across slots."""
    synset = sets()["dynamic"]  # slots of 2 static and 3 dynamic memories
    with torch.no_grad():
        videos, labels = synset.every()
        assert videos.shape == (K * 2 * 2 * 3, 5, 3, 8, 8) and labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
        place = 0
        for c in range(K):
            for slot in range(2):
                for s in range(2):
                    for d in range(3):
                        pair = synset.static[c, slot * 2 + s][None], synset.dynamic[c, slot * 3 + d][None]
                        assert torch.allclose(videos[place], synset.hallucinator(*pair)[0], atol=1e-5)
                        place += 1
        assert sets()["still"].every()[0].shape == (12, 5, 3, 8, 8) and sets()["pixels"].every()[0].shape == (6, 5, 3, 8, 8)
        for each in sets().values():
            videos, labels = each.every()
            parts = [each.every(slice(label, label + 1)) for label in range(K)]
            assert torch.equal(torch.cat([part[0] for part in parts]), videos) and torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_files_that_hold_no_set(tmp_path):
    path = written(sets()["pixels"], tmp_path / "distilled.pt")
    content = torch.load(path)
    for change in ({"kind": "Unknown"}, {"kind": "StillSet"}, {"class_names": ["a"]}, {"videos": None}, {"ipc": 0}, {"ipc": 4},
                   {"videos": torch.zeros(6, 3)}, {"class_names": [1, 2, 3]}, {"lr": None}):
        try:
            save(content | change, path)
            load(path)
        except ValueError as error:
            assert "is not a distilled set of these scripts" in str(error)
        except ZeroDivisionError:
            pytest.fail(f"{change} is no sentence")
        else:
            pytest.fail(f"{change} passed")
    save([1, 2], path)
    with pytest.raises(ValueError, match="is not a distilled set"):
        load(path)
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("change, sentence", (
    ({"frames": "many"}, "'many' is not a whole number of at least 1"), ({"frames": -8}, "'-8' is not a whole number"), ({"precision": "fp7"}, "--precision 'fp7' is unknown: choose one of"),
    ({"validation": [1]}, "is not a share"), (None, "is damaged: delete its folder")))
def test_settings_of_a_run_that_are_none(tmp_path, capsys, change, sentence):
    """They are taken as if they were given on the command line."""
    settings = {"frames": 5, "seed": 3, "data_path": "/a", "precision": "fp32", "validation": 0.0}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"settings": settings, "chosen": {}}))
    args = evaluate.parser().parse_args([str(tmp_path)])
    assert (args.frames, args.seed, str(args.data_path), args.precision, args.validation) == (5, 3, "/a", "fp32", 0)
    for arguments in (["--seed", "0", "--frames", "7", str(tmp_path)], [str(tmp_path), "--seed", "0", "--frames", "7"]):
        args = evaluate.parser().parse_args(arguments)                     # what is given counts, also where it is a default
        assert (args.seed, args.frames, args.precision, args.run) == (0, 7, "fp32", tmp_path)
    path.write_text(json.dumps({"settings": settings | {"network": "CNN+mean"}, "chosen": {}}))
    assert evaluate.parser().parse_args([str(tmp_path)]).network == "CNN+mean"
    path.write_text(json.dumps({"settings": settings | change, "chosen": {}}) if change else "{")
    with pytest.raises(SystemExit) as stop:
        run_script(evaluate.main, evaluate.parser(), [str(tmp_path)])
    printed = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and str(path) in printed and sentence in printed


# ---------------------------------------------------------------- export

@pytest.mark.parametrize("kind, learned", (("pixels", False), ("pixels", True), ("dynamic", True)))
def test_export(tmp_path, capsys, kind, learned):
    synset = sets()[kind]
    if learned:
        synset.soft_labels = torch.nn.Parameter(torch.randn(6, K))
    written(synset, tmp_path / "distilled.pt", class_names=["a b", "ü/../x", "c"])
    with torch.no_grad():
        videos, labels = synset.every()
    pixels = denormalize(videos).permute(0, 1, 3, 4, 2).numpy()
    for form, flags in (("mp4", ["--scale", "2"]), ("gif", ["--scale", "2"]), ("npz", []), ("pt", [])):
        run_script(export.main, export.parser(), [str(tmp_path), "--format", form, *flags])
    for form, flags in (("npz", ["--scale", "2"]), ("pt", ["--fps", "4"])):
        with pytest.raises(SystemExit, match="2"):
            run_script(export.main, export.parser(), [str(tmp_path), "--format", form, *flags])
        assert "--fps and --scale are for mp4 and gif" in capsys.readouterr().err
    arrays = np.load(tmp_path / "export_npz" / "distilled.npz")
    assert (arrays["videos"] == pixels).all() and arrays["labels"].tolist() == labels.tolist() and arrays["class_names"].tolist() == ["a b", "ü/../x", "c"]
    assert torch.equal(torch.load(tmp_path / "export_pt" / "distilled.pt")["videos"], videos)
    count = len(videos) // 3
    assert labels.tolist() == [0] * count + [1] * count + [2] * count == torch.load(tmp_path / "export_pt" / "distilled.pt")["labels"].tolist()
    names = [f"{name}_{number}" for name in ("a_b", "c", "ü_.._x") for number in range(count)]
    for form in ("mp4", "gif"):
        assert sorted(os.listdir(tmp_path / f"export_{form}")) == sorted(f"{name}.{form}" for name in names)
    with av.open(str(tmp_path / "export_mp4" / "c_1.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.shape(frames) == (5, 16, 16, 3)
    grey = np.array(frames).reshape(5, 8, 2, 8, 2, 3).mean((2, 4, 5))
    assert np.corrcoef(grey.ravel(), pixels[-count + 1].mean(-1).ravel())[0, 1] > 0.9
    with Image.open(tmp_path / "export_gif" / "c_1.gif") as image:
        assert image.n_frames == 5 and image.size == (16, 16)


def test_export_of_memories(tmp_path, capsys):
    """A row per class, a column each for static memory, dynamic memory, their sum by the hallucinator, and another set."""
    names, made = ["a", "b", "c"], sets()
    synset = made["dynamic"]
    for kind in ("pixels", "dynamic"):
        (tmp_path / kind).mkdir()
        written(made[kind], tmp_path / kind / "distilled.pt", class_names=names)
    flags = [str(tmp_path / "dynamic"), "--format", "gif", "--memories", "--classes", "2", "--scale", "3"]
    run_script(export.main, export.parser(), [*flags, "--beside", str(tmp_path / "pixels")])
    assert "2 classes; columns: static memory, dynamic memory, together, videos of pixels: " in capsys.readouterr().out
    with Image.open(tmp_path / "dynamic" / "export_gif" / "memories.gif") as image:
        assert image.n_frames == synset.of_class(0).shape[1] and image.size == (3 * 4 * 10, 3 * 2 * 10)
    shown = pictures.memories(synset)
    with torch.no_grad():
        still, moved = synset.decode_static(synset.static[:, 0]), synset.decode_dynamic(synset.dynamic[:, 0])
        assert torch.equal(shown["static memory"][:, 0], denormalize(still))
        assert torch.equal(shown["together"], denormalize(synset.hallucinator(still, moved)))
    zero = shown["dynamic memory"].float() - 127.5
    assert (zero.sign() * moved >= -0.01).all() and zero.abs().amax((1, 2, 3, 4)).min() > 127   # grey is zero, each class uses the range
    grid = pictures.side_by_side(list(shown.values()), padding=1)
    assert grid.shape == (moved.shape[1], 3 * 9, 3 * 9, 3)
    assert (grid[2, 9:17, 18:26] == shown["together"][1, 2].permute(1, 2, 0).numpy()).all()
    for wrong, sentence in ((["--format", "npz"], "--memories needs --format mp4 or gif, not npz"),
                            (["--format", "gif", "--fps", "60"], "--fps 60 is more than 50"),
                            (["--beside", str(tmp_path / "nothing")], "nothing")):
        with pytest.raises(SystemExit) as stop:
            run_script(export.main, export.parser(), [*flags, *wrong])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run_script(export.main, export.parser(), [*(flag for flag in flags if flag != "--memories"), "--classes", "2"])
    assert stop.value.code == 2 and "--classes needs --memories" in capsys.readouterr().err


@pytest.mark.parametrize("labels, files", (
    (["a b", "c/d", "../e", ".f"], ["a_b", "c_d", "_._e", "_f"]), (["a b", "a_b"], ["0_a_b", "1_a_b"]), (["Walk", "walk", "run"], ["0_Walk", "1_walk", "2_run"]),
    (["\u00e9", "e\u0301"], ["0_\u00e9", "1_\u00e9"]), (["\u00e9", "E\u0301"], ["0_\u00e9", "1_\u00c9"]), (["日" * 100], ["日" * 66]),
    (["x" * 300 + "1", "x" * 300 + "2"], ["0_" + "x" * 200, "1_" + "x" * 200]), (["=1+1", "$#$", "%s"], ["_1_1", "___", "_s"])))
def test_names_of_exported_files(labels, files):
    assert export.file_names(labels) == files


# ---------------------------------------------------------------- runs, tables, dynamics, report

@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capfd):
    """command(module, *flags) runs a program on the tiny data and gives (exit code, what it printed)."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def command(module, *flags, data=True):
        arguments = ["--dataset", "custom", "--data_path", tiny, "--save_path", tmp_path / "results", "--pack_path", tmp_path / "packs",
                     *"--frames 8 --size 43 --width 8 --test_clips 1 --device cpu --num_eval 2 --epoch_eval_train 1".split()] if data else []
        capfd.readouterr()
        try:
            run_script(module.main, module.parser(), list(map(str, [*arguments, *flags])))
            code = 0
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err
    return command


def run_folder(tmp_path, pattern):
    folder, = (tmp_path / "results").glob(f"*/{pattern}")
    return folder


def test_a_run_does_not_depend_on_whether_its_feature_network_exists(command, tmp_path):
    sets = []
    for _ in range(2):
        code, printed = command(distill_DM, "--select", "herding", "--feature_epochs", 1, "--Iteration", 1, "--batch_real", 2, "--lr_img", 100)
        assert code == 0, printed
        sets.append(torch.load(run_folder(tmp_path, "DM*") / "distilled.pt")["videos"])
        shutil.rmtree(run_folder(tmp_path, "DM*"))                         # the network's file stays beside it
    assert torch.equal(*sets)


def test_the_chosen_clips_start_the_set(command, tiny, tmp_path, monkeypatch):
    """Pixels, and the stills of --static real, with --select."""
    chosen = torch.tensor([2, 5])
    monkeypatch.setattr(coreset, "feature_network", lambda *values: None)
    monkeypatch.setattr(coreset, "embed_all", lambda *values: None)
    monkeypatch.setattr(coreset, "select_per_class", lambda clips, ipc, method, features: chosen)
    clips = load_clips("custom", split="train", data_path=tiny, T=8, size=43, pack_path=tmp_path / "packs").draw(chosen)
    code, printed = command(distill_DM, "--select", "herding", "--Iteration", 0)
    assert code == 0, printed
    assert torch.equal(torch.load(run_folder(tmp_path, "DM*") / "distilled.pt")["videos"], clips)
    code, printed = command(distill_s2d, "--select", "herding", "--Iteration", 0, "--static", "real", "--static_frame", "middle", "--init_dynamic", "residual")
    assert code == 0, printed
    assert torch.equal(torch.load(run_folder(tmp_path, "s2d*") / "distilled.pt")["static"].flatten(0, 1), clips[:, 4])
    code, printed = command(evaluate, run_folder(tmp_path, "DM*"), "--pack_path", tiny / "mine", "--device", "cpu", data=False)
    assert code == 2 and f"--pack_path: {tiny / 'mine'} would lie in --data_path" in printed and not (tiny / "mine").exists()


def result_count(result):
    return len(result["networks"])


def test_a_set_that_its_run_replaces_while_it_is_loaded(command, tmp_path, monkeypatch):
    """The figures in networks.json are of the set that they name."""
    assert command(coreset, "--method", "random")[0] == 0
    folder = run_folder(tmp_path, "coreset_random*")
    result = {"settings": {}, **json.loads((folder / "result.json").read_text())}
    sets, shown = [], []

    def load_meanwhile(path):
        sets.append(load_set(path))
        if len(sets) == 1:
            save(torch.load(path) | {"lr": 0.5}, path)
        return sets[-1]
    monkeypatch.setattr(evaluate, "load_set", load_meanwhile)
    monkeypatch.setattr(evaluate, "evaluate", lambda synset, *_, **__: shown.append(synset) or result)
    assert command(evaluate, folder, "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)[0] == 0
    assert len(sets) == 2 and shown == [sets[1][0]]


def test_coreset_and_other_networks_end_to_end(command, tiny, tmp_path):
    for method in ("random", "herding", "k-center"):
        code, printed = command(coreset, "--method", method, "--ipc", 2, "--feature_epochs", 2)
        assert code == 0, printed
        assert ("the feature network has" in printed) == (method == "herding")  # k-center finds herding's
    folder = run_folder(tmp_path, "coreset_herding*")
    result = json.loads((folder / "result.json").read_text())
    assert 4 * result["bytes"] == result["bytes_fp32"] == 4 * 4 * 8 * 3 * 43 * 43 and result["class_names"] == ["fall", "rise"]
    assert np.sum(result["confusion"]) == 2 * 4 and np.trace(result["confusion"]) == round(sum(result["networks"]) / 100 * 4)
    assert "confusion" not in (folder / "metrics.jsonl").read_text()

    code, printed = command(evaluate, folder, "--networks", "ConvNet3D,CNN+GRU", "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)
    assert code == 0 and "CNN+GRU" in printed and "not finished" not in printed, printed
    table = json.loads((folder / "networks.json").read_text())
    ours, other = table.values()
    assert ours["networks"] == result["networks"]  # the run's own settings and random numbers
    assert ours["settings"]["network"] == "ConvNet3D" and other["settings"]["network"] == "CNN+GRU"
    other["top1"] = 12.3  # seen again: not computed again
    save_json(table, folder / "networks.json")
    for flags in ((), ("--seed", 1), ()):  # another seed's networks are added, and replace none
        code, printed = command(evaluate, folder, "--networks", "CNN+GRU", "--pack_path", tmp_path / "packs", "--device", "cpu", *flags, data=False)
        assert code == 0 and ("12.3 ±" in printed) == (not flags) and "not finished" not in printed
    assert len(json.loads((folder / "networks.json").read_text())) == 3
    config = json.loads((folder / "config.json").read_text())
    save_json(config | {"settings": config["settings"] | {"Iteration": 5}}, folder / "config.json")  # as a run that was killed at iteration 0
    code, printed = command(evaluate, folder, "--networks", "CNN+GRU", "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)
    assert code == 0 and "is not finished: this is its set after 0 of 5 iterations" in printed
    save_json(config, folder / "config.json")
    again = command(evaluate, folder, "--networks", "CNN+GRU", "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)[1]
    assert "warning: the list of videos is not the one of" not in again
    rows = (tiny / "list.csv").read_text().replace("train_0,fall,train", "train_0,fall,test")  # a training video became a test video
    (tmp_path / "other.csv").write_text(rows)
    code, printed = command(evaluate, folder, "--list_path", tmp_path / "other.csv", "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)
    assert code == 0 and "warning: the list of videos is not the one of" in printed
    code, printed = command(evaluate, folder / "distilled.pt", "--network", "ConvNet3D")  # a file: the data come from the flags
    assert code == 0 and (folder / "distilled.networks.json").exists()
    code, printed = command(evaluate, folder, "--frames", 9, "--device", "cpu", "--pack_path", tmp_path / "packs", data=False)
    assert code == 2 and "differ in classes, number of frames or size" in printed
    code, printed = command(evaluate, folder, "--networks", "VGG", data=False)
    assert code == 2 and "unknown network 'VGG': choose from ConvNet3D, " in printed
    kept = sorted((folder / "scores").rglob("network*.pt"))
    code, printed = command(evaluate, folder, "--networks", "CNN+GRU", "--num_eval", 3, "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)
    assert code == 0 and len(set((folder / "scores").rglob("network*.pt")) - set(kept)) == 3 - result_count(other)
    more = list(json.loads((folder / "networks.json").read_text()).values())[-1]
    assert more["networks"][:result_count(other)] == other["networks"] and result_count(more) == 3
    shutil.rmtree(folder / "scores")
    save_json({}, folder / "networks.json")
    assert command(evaluate, folder, "--networks", "CNN+GRU", "--num_eval", 3, "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)[0] == 0
    again, = json.loads((folder / "networks.json").read_text()).values()
    assert again | {"seconds": 0} == more | {"seconds": 0}                   # as if all three were trained together
    save_json(table, folder / "networks.json")
    content = torch.load(folder / "distilled.pt")
    content["videos"]["pixels"] ^= 1
    save(content, folder / "distilled.pt")  # the run went on: computed again
    code, printed = command(evaluate, folder, "--networks", "CNN+GRU", "--pack_path", tmp_path / "packs", "--device", "cpu", data=False)
    assert code == 0 and "12.3 ±" not in printed
    for flags, sentence in (((), "give a RUN, or --dataset"), ((tmp_path / "nowhere",), "nowhere does not exist"),
                            ((folder / "distilled.pt",), "a set's file needs --dataset"), ((folder, "--n_real", 1), "--n_real applies only to the full set")):
        code, printed = command(evaluate, *flags, data=False)
        assert code == 2 and sentence in printed
    code, printed = command(coreset, "--method", "herding", "--feature_lr", "1e30", "--feature_epochs", 2)
    assert code == 2 and "lower --feature_lr" in printed


def test_dynamics_and_report(command, tmp_path):
    """Runs of several kinds; the page holds them all and names nothing outside itself."""
    for flags in ((), ("--n_real", 1)):
        assert command(evaluate, *flags)[0] == 0
    assert command(distill_DM, "--ipc", 1, "--Iteration", 2, "--eval_it", 1, "--batch_real", 2, "--n_syn", 2, "--interpolation", "linear")[0] == 0
    assert command(coreset, "--ipc", 1)[0] == 0
    results = tmp_path / "results"
    static = StaticDynamicSet(torch.randn(2, 1, 3, 43, 43), torch.randn(2, 1, 8, 1, 43, 43), Hallucinator(), 1)
    folder = run_folder(tmp_path, "coreset*")
    other = folder.with_name("s2d_DM_ipc1_lr1_00000000")
    other.mkdir()
    for name in ("config.json", "result.json", "metrics.jsonl"):
        (other / name).write_text((folder / name).read_text())
    written(static, other / "distilled.pt", class_names=["fall", "rise"], frames=8)

    rows = table.read_results([results])
    assert len(rows) == 5 and set(rows.run.str.split("_").str[0]) == {"full", "DM", "coreset", "s2d"}
    classes = dynamics.class_dynamics(rows)
    full, = rows[rows.run.str.startswith("full_") & rows.n_real.isna()].per_class
    still, = rows[rows.run.str.startswith("full_1frames")].per_class
    assert classes.dynamics.to_dict() == {name: full[k] - still[k] for k, name in enumerate(("fall", "rise"))}
    assert classes.dynamic.tolist() == [True, False] and classes.dynamics.is_monotonic_decreasing
    code, printed = command(dynamics, results, data=False)
    assert code == 0 and "static" in printed
    code, printed = command(table, results, "--csv", tmp_path / "all" / "table.csv", data=False)
    csv = pd.read_csv(tmp_path / "all" / "table.csv")
    assert code == 0 and csv.n_syn.dropna().tolist() == [2] and csv.interpolation.dropna().tolist() == ["linear"] and len(csv) == 5

    code, printed = command(report, results, "--out", tmp_path / "report", data=False)
    assert code == 0, printed
    page = (tmp_path / "report" / "index.html").read_text()
    for method in ("full data", "full data, one frame", "DM, n_syn 2, linear", "random", "static-dynamic DM"):
        assert f"<td>{method}</td>" in page
    runs = re.findall("<tr( class=best)?>(.*?)</tr>", page[page.index("<table>"):page.index("</table>")], re.DOTALL)
    lines = {cells[0]: (bold, cells) for bold, line in runs if (cells := re.findall("<td>(.*?)</td>", line))}
    marked = rows.assign(mark="").assign(method=lambda rows: [report.method_name(row) for row in rows.itertuples()])
    best = marked[~marked.method.str.startswith("full")].top1.max()
    for row in marked.itertuples():
        bold, cells = lines[row.method]
        assert cells[-2:] == [f"{value:.1f}" for value in row.per_class] and cells[2].startswith(f"{row.top1:.1f} ±")  # fall is the dynamic class, rise the static one
        assert bool(bold) == (row.top1 == best and not row.method.startswith("full"))
    figure = plots.plot_confusion(marked.head(1).assign(confusion=[[[3, 1], [0, 4]]]))
    assert figure.axes[0].images[0].get_array().tolist() == [[75, 25], [0, 100]]  # percent of each true class
    sources = re.findall(r"src='([^']*)'", page)
    assert all(source.startswith("data:image/") for source in sources) and "http" not in re.sub(r"base64,[^']*", "", page)
    films = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources if source.startswith("data:image/webp")]
    assert sorted(film.size for film in films) == [(45, 90), (45, 90), (135, 90)] and all(film.n_frames > 1 for film in films)  # memories: three columns
    assert page.index("Accuracy against bytes") < page.index("<table>") and "static memory, dynamic memory, together" in page
    assert {path.name.split("_")[-1] for path in (tmp_path / "report").glob("*.png")} == {"frontier.png", "iterations.png", "classes.png", "confusion.png"}
    third = folder.with_name("coreset_random_ipc1_11111111")  # other classes under the same name of a data set
    third.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (third / name).write_text((folder / name).read_text())
    result = json.loads((folder / "result.json").read_text())
    save_json(result | {"class_names": ["a", "b", "c"], "per_class": [1.0, 2.0, 3.0], "confusion": None}, third / "result.json")
    code, printed = command(report, results, "--out", tmp_path / "report", data=False)
    assert code == 0 and re.search("[23] classes, 2</h2>", (tmp_path / "report" / "index.html").read_text()), printed
    save_json({"experts_top1": 50.0, "bytes": 9}, third / "result.json")  # a buffer is no row
    assert command(report, results, "--out", tmp_path / "report", data=False)[0] == 0
    save_json({"storage": 1}, third / "result.json")
    code, printed = command(report, results, "--out", tmp_path / "report", data=False)
    assert code == 2 and "result.json is not a result of these scripts" in printed
    code, printed = command(report, tmp_path / "packs", data=False)
    assert code == 2 and "no finished run below" in printed


MARKUP = ("$#$ shop", r"$\frac{", r"a\b_c^d", "_hidden", "<b>&amp;'\"</b>", "=1+1", "@x", "%s %d {0} {", "日本 é", "two\nlines")
MARKUP_FOLDER = "=1 $x$ <i>'%s' {0} [a] é"


def test_names_that_are_markup(command, tmp_path):
    """To matplotlib, html, a spreadsheet: of classes, and of the data set's folder. They are shown as they are, whatever a notebook's backend, a
    matplotlibrc that wants LaTeX or a plain screen are inherited."""
    data, lines = tmp_path / MARKUP_FOLDER, io.StringIO()
    csv.writer(lines).writerows([("folder_name", "label", "split"), *((f"{number}_{split}", name, split) for number, name in enumerate(MARKUP) for split in ("train", "test"))])
    for number, split in itertools.product(range(len(MARKUP)), ("train", "test")):
        write_frames(data / "jpegs" / f"{number}_{split}", 2)
    (data / "list.csv").write_text(lines.getvalue(), encoding="utf-8", newline="")
    code, printed = command(coreset, "--data_path", data)
    assert code == 0, printed

    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: nonsense\n")
    inherited = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "distill_utils.report", tmp_path / "results", "--out", tmp_path / "é"], cwd=ROOT, env=os.environ | inherited,
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"1 runs: {tmp_path}/\\xe9/index.html" in done.stdout, done.stderr
    page = (tmp_path / "é" / "index.html").read_text(encoding="utf-8")
    assert all(f">{html.escape(name)}</span>" in page for name in MARKUP) and f"<h2>custom-{html.escape(MARKUP_FOLDER)}</h2>" in page
    assert "<b>" not in page and "<i>" not in page
    assert {path.name for path in (tmp_path / "é").glob("*.png")} == {f"custom-{MARKUP_FOLDER}_{name}.png" for name in ("frontier", "classes", "confusion")}

    code, printed = command(table, tmp_path / "results", "--csv", tmp_path / "table.csv", data=False)
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert code == 0 and f"custom-{MARKUP_FOLDER}" in cells and not [cell for cell in cells if cell[:1] in tuple("=+-@")]


def test_plots_show_class_names_as_they_are():
    rows = pd.DataFrame({"class_names": [MARKUP], "per_class": [[1.0] * len(MARKUP)], "method": ["DM"], "number": [0], "ipc": [1], "headline": ["top1"], "top1": [1.0], "top1_std": [0.0],
                         "confusion": [np.eye(len(MARKUP)).tolist()]})
    for figure in (plots.plot_classes(rows, None), plots.plot_confusion(rows)):
        figure.savefig(io.BytesIO(), format="png")
        ticks = figure.axes[0].get_xticklabels()
        assert [tick.get_text() for tick in ticks] == list(MARKUP) and not any(tick.get_parse_math() or tick.get_usetex() for tick in ticks)


def test_a_method_has_one_colour():
    """In both plots, whatever its number of videos; full data have none."""
    rows = pd.DataFrame({"class_names": [("a", "b")] * 6, "per_class": [[1.0, 2.0]] * 6, "run": ["full_a", *["DM"] * 5], "n_real": None, "mark": "",
                         "method": ["full data", "DM", "MTT", "DM", "MTT", "random"], "ipc": [0, 1, 1, 5, 5, 1], "headline": "top1", "top1": 1.0, "top1_std": 0.0, "bytes": 9})
    rows = report.numbered(rows)
    points = {each.get_label(): each.lines[0].get_color() for each in plots.plot_frontier(rows).axes[0].containers}
    bars = [each.patches[0] for each in plots.plot_classes(rows, None).axes[0].containers]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [to_hex(colour) for colour in ("0.3", *(points[method] for method in rows.method[1:]))]
    assert len(points) == len(set(points.values())) == 3 and bars[1].get_hatch() != bars[3].get_hatch()
    later = plots.plot_frontier(rows[rows.method != "DM"]).axes[0].containers     # the plot of the less accurate methods
    assert {each.get_label(): each.lines[0].get_color() for each in later}.items() <= points.items()


def test_many_classes_are_a_heat_map():
    """A figure of a width that a page can show, with the means of the ten most accurate methods, and full data."""
    names = tuple(f"class {number}" for number in range(400))
    rows = pd.DataFrame({"class_names": [names] * 24, "per_class": [[float(number)] * 400 for number in range(24)], "top1": [float(number) for number in range(24)],
                         "method": ["full data", *(f"method {number // 2}" for number in range(1, 24))], "ipc": 1, "headline": "top1", "number": 0})
    shown = plots.means_of_classes(rows)
    assert shown.method.tolist() == ["full data", *(f"method {number}" for number in range(3, 12))] and shown.per_class.iloc[-1] == [22.5] * 400
    axes = plots.plot_classes(shown, None).axes[0]
    assert axes.images[0].get_array().shape == (10, 400) and axes.images[0].get_array()[-1].tolist() == [22.5] * 400
    assert axes.figure.get_size_inches()[0] * 110 < 8000 and len(axes.get_xticklabels()) == 400


def test_curves_on_validation_are_told(tmp_path):
    for name, split in (("a", "validation"), ("b", "test")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps({"iteration": step, "split": split, "top1": 10.0 + step, "top1_std": 1.0}) + "\n" for step in (0, 5)))
    rows = pd.DataFrame({"path": [tmp_path / "a", tmp_path / "b"], "method": ["DM", "MTT"], "ipc": 1, "headline": "top1"})
    held_out, tested = plots.plot_iterations(rows).axes[0].containers
    assert (held_out.get_label(), tested.get_label()) == ("DM, IPC 1 (on validation)", "MTT, IPC 1")
    assert (held_out.lines[0].get_linestyle(), tested.lines[0].get_linestyle()) == ("--", "-")


def test_dynamic_classes_are_the_upper_half():
    rows = pd.DataFrame({"run": ["full_a", "full_1frames_b"], "n_real": [None, 1], "per_class": [[50., 90, 70, 20, 5], [40., 20, 70, 30, 5]],
                         "class_names": [tuple("vwxyz")] * 2, "chosen": [{"network": "a", "n_real": None}, {"network": "a", "n_real": 1}]})
    classes = dynamics.class_dynamics(rows)
    assert classes.dynamics.to_dict() == {"w": 70, "v": 10, "x": 0, "z": 0, "y": -10} and classes.index[classes.dynamic].tolist() == ["w", "v"]
    groups = dynamics.by_group(rows, classes)
    assert groups.dynamic.tolist() == [70, 30] and groups.static.tolist() == [pytest.approx(95 / 3), 35]
    unseen = rows.assign(per_class=[[50., float("nan"), 70, 20, 5], [40., float("nan"), 70, 30, 5]])  # no test videos: in neither half
    found = dynamics.class_dynamics(unseen)
    assert found.index[found.dynamic].tolist() == ["v", "x"] and dynamics.by_group(unseen, found).static.tolist() == [12.5, 17.5]
    assert dynamics.class_dynamics(rows[:1]) is None
    older = rows.assign(chosen=[{"network": "0", "n_real": None}, {"network": "0", "n_real": 1}], per_class=[[0.0] * 5, [1.0] * 5])
    both = pd.concat([older, rows], ignore_index=True)                     # the latest pair counts, in whatever order a page shows them
    assert dynamics.class_dynamics(both).equals(classes) and dynamics.class_dynamics(both.iloc[::-1]).equals(classes)
    other = rows[:1].assign(chosen=[{"network": "b", "n_real": None}], per_class=[[0.0] * 5])  # a later run of another network has no partner
    assert dynamics.class_dynamics(pd.concat([rows, other])).equals(classes)


@pytest.mark.parametrize("iteration, select, name", ((0, "random", "random"), (0, "herding", "herding"), (0, None, "random"), (5, "random", "DM"),
                                                     (5, "k-center", "DM, select k-center"), (5, float("nan"), "DM")))
def test_a_method_is_named_after_its_selection(iteration, select, name):
    settings = dict.fromkeys(table.SETTINGS) | {"ipc": 1, "init": "real", "select": select, "Iteration": iteration}
    row = pd.Series({"run": "DM_ipc1_lr1_00000000", "mark": "", **settings})
    assert report.method_name(row) == name


@pytest.mark.parametrize("run, learned", (("DC_spc2_00000000", "static memory, 2 frames"), ("MTT_ipc1_lr1_00000000", "MTT"),
                                          ("s2d_MTT_ipc1_lr1_00000000", "static-dynamic MTT")))
def test_a_set_that_was_not_learned_is_named_so(run, learned):
    for iteration, name in ((3, learned), (0, f"{learned.removesuffix(' MTT') if 's2d' in run else learned}, not learned")):
        row = pd.Series({"run": run, "mark": "", **dict.fromkeys(table.SETTINGS), "spc": 2, "Iteration": iteration})
        assert report.method_name(row) == name


def test_the_frontier_shows_every_method_by_a_mark_of_its_own():
    count = 37
    rows = pd.DataFrame({"run": "DM", "method": [f"m{number}" for number in range(count)], "headline": "top1", "top1": 1.0, "top1_std": 0.0,
                         "bytes": range(1, count + 1), "mark": "", "n_real": None})
    axes = plots.plot_frontier(report.numbered(rows)).axes[0]
    lines = {each.get_label(): each.lines[0] for each in axes.containers}
    assert list(lines) == rows.method.tolist()
    assert len({(line.get_marker(), line.get_color()) for line in lines.values()}) == count


def test_a_gif_too_tall_for_its_format():
    with pytest.raises(ValueError, match="^gif files have at most 65535 pixels a side, and this one would have 66000: give a lower --scale, or fewer --classes$"):
        export.gif(np.zeros((1, 66000, 2, 3), dtype=np.uint8), 8)


def test_an_mp4_too_tall_for_its_format():
    with pytest.raises(ValueError, match="^mp4 files have at most 16384 pixels a side, and this one would have 26400: give a lower --scale, or fewer --classes$"):
        export.mp4(np.zeros((1, 26400, 2, 3), dtype=np.uint8), 8)


def test_a_picture_too_tall_for_its_format():
    with pytest.raises(ValueError, match="^the videos of 300 classes make a picture of .* pixels, and the limit of its format is 16383: give fewer --classes$"):
        report.moving([torch.zeros(300, 1, 3, 64, 64, dtype=torch.uint8)])


def test_a_plot_has_the_ten_most_accurate_methods_and_full_data():
    methods = ["full data", *(f"method {number}" for number in range(12))]
    rows = pd.DataFrame({"method": methods * 2, "headline": "top1", "top1": [1.0, *range(12), 1.0, *range(11, -1, -1)]})
    rows.loc[13 + 5, "top1"] = 99.0                                       # a method counts by its best run
    first, others = report.most_accurate(rows)
    best = {method: rows[rows.method == method].top1.max() for method in methods[1:]}
    assert set(first.method) == {"full data", *sorted(best, key=best.get)[-9:]} and set(others.method) == set(methods) - set(first.method)
    assert len(first) + len(others) == 26 and report.folded("more", "") == "" and "<details>" in report.folded("more", "x")


def test_frontier_is_what_nothing_smaller_exceeds():
    rows = pd.DataFrame({"headline": "top1", "bytes": [5, 1, 3, 3, 9, 4], "top1": [50., 10, 30, 40, 45, 40]})
    assert plots.frontier_of(rows)["bytes"].tolist() == [1, 3, 5] and plots.frontier_of(rows).top1.tolist() == [10, 40, 50]


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize("flags, sentence", (
    (("--n_syn", 9), "--n_syn 9 does not fit clips of 8 frames"), (("--n_real", 9), "--n_real 9 does not fit clips of 8 frames"),
    (("--segments", 3), "--segments 3 does not fit clips of 8 frames"), (("--segments", 16), "--segments 16 does not fit"),
    (("--interpolation", "cubic"), "invalid choice: 'cubic'")))
def test_impossible_settings_are_refused(command, tmp_path, flags, sentence):
    code, printed = command(importlib.import_module("distill_DM"), *flags)
    assert code == 2 and sentence in printed and not (tmp_path / "results").exists()


def test_the_table_over_seeds():
    """Runs that differ in the seed, and in the digest of the files they read, are one row, whose std is that over seeds; of one seed the latest counts, and
    older ones are told. Runs of several seeds that have read the same file are rows of their own beside those of another file."""
    def row(run, seed, top1, **chosen):
        return {"data": "toy", "run": f"{run}_{seed:08x}", "steps": 10, "seed": seed, "headline": "top1", "top1": top1, "bytes": 1000, "bytes_fp32": 1000,
                "seconds_per_iteration": 2.0, "seconds": 3.0, "over_random": top1 - 40, "of_full": None, "mark": "", "chosen": {"dataset": "toy", "seed": seed, "digest": f"{seed}", "lr_img": 1.0} | chosen}
    rows = pd.DataFrame([row("DM_ipc1", 0, 50.0), row("DM_ipc1", 1, 60.0), row("DM_ipc1", 0, 40.0, lr_img=2.0), row("MTT_ipc1", 0, 30.0),
                         row("DM_ipc1", 0, 70.0, digest="made later")], dtype=object)
    found = table.over_seeds(rows)[["run", "seeds", "top1", "bytes", "over random", "of full", "distilled in s", "evaluated in s"]].values.tolist()
    assert found == [["DM_ipc1 [lr_img 1.0]", "0, 1 (1 older left out)", "65.0 ± 5.0", "1,000", "+25.0", "", "40", "6"],
                     ["DM_ipc1 [lr_img 2.0]", "0", "40.0 ± 0.0", "1,000", "+0.0", "", "20", "3"],
                     ["MTT_ipc1", "0", "30.0 ± 0.0", "1,000", "-10.0", "", "20", "3"]]
    experts = pd.DataFrame([row("MTT_ipc1", seed, top1, digest=digest) for digest, runs in (("weak", (20., 22., 21.)), ("strong", (50., 52.)), ("third", (90.,)))
                            for seed, top1 in enumerate(runs)], dtype=object)
    assert table.over_seeds(experts)[["run", "seeds", "top1"]].values.tolist() == [
        ["MTT_ipc1 [experts or static memory weak]", "0, 1, 2", "21.0 ± 0.8"], ["MTT_ipc1 [experts or static memory strong]", "0, 1", "51.0 ± 1.0"], ["MTT_ipc1 [experts or static memory third]", "0", "90.0 ± 0.0"]]
    copied = pd.concat([experts[:3], experts[:3]])                         # the same runs below two folders
    assert table.over_seeds(copied)[["run", "seeds", "top1"]].values.tolist() == [["MTT_ipc1", "0, 1, 2", "21.0 ± 0.8"]]
    mixed = experts.iloc[[0, 4]].assign(seed=[0, 1])                       # one seed with other experts
    assert len(table.over_seeds(pd.concat([mixed, experts.iloc[[1]].assign(seed=2)]))) == 2
    best = experts[:3].assign(best_iteration=5, best_top1=[30., 31., 32.])
    assert table.over_seeds(best)["top1 at best on validation"].tolist() == ["31.0 ± 0.8"] and "top1 at best on validation" not in table.over_seeds(experts)


def finished(results, name, top1, stored, **chosen):
    """A run's folder as scripts leave it, as far as tables read it."""
    folder = results / "toy" / f"{name}_{len(list(results.glob('*/*'))):08x}"
    folder.mkdir(parents=True)
    chosen = {"dataset": "toy", "list_digest": "a", "content_digest": "b", "frames": None, "size": 48, "network": "ConvNet3D", "width": 32, "epoch_eval_train": 100,
              "lr_net": 0.01, "batch_train": 256, "seed": 0, "ipc": 1} | chosen
    figures = {name: 1.0 for name in table.FIGURES} | {"top1": top1, "bytes": stored, "bytes_fp32": 4 * stored, "per_class": [top1] * 2, "class_names": ["a", "b"], "steps": 0}
    save_json({"settings": chosen, "chosen": chosen}, folder / "config.json")
    save_json(figures, folder / "result.json")
    return folder


def test_runs_behind_a_link_are_found(tmp_path):
    """A data set's runs on another disk; a link to a folder above, and two ways to a run, change nothing."""
    run = finished(tmp_path / "disk", "DM_ipc1_lr1", 20.0, 1000)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "toy").symlink_to(run.parent)
    (run.parent / "above").symlink_to(run.parent)
    (run.parent / "lost+found").mkdir(mode=0)  # nobody's but root's
    rows = table.read_results([tmp_path / "results", run.parent])
    assert rows.path.tolist() == [run] and rows.best_on_test.tolist() == [None]
    result = json.loads((run / "result.json").read_text())
    save_json(result | {"best_on_test": {"value": 21.5, "iteration": 3}}, run / "result.json")
    table.main(table.parser().parse_args([str(tmp_path / "results"), "--csv", str(tmp_path / "csv")]))
    assert pd.read_csv(tmp_path / "csv").best_on_test.tolist() == [21.5]


def test_runs_of_other_networks_or_clips_are_told_apart(tmp_path):
    finished(tmp_path, "DM_ipc1_lr1", 20.0, 1000)
    assert table.over_seeds(table.read_results([tmp_path])).run.tolist() == ["DM_ipc1_lr1"]
    finished(tmp_path, "DM_ipc1_lr1", 30.0, 1000, width=8)
    finished(tmp_path, "MTT_ipc1_lr1", 40.0, 1000, width=8, eval_protocol="frepo")
    finished(tmp_path, "DC_spc2", 50.0, 1000, ipc=None, spc=2)
    rows = table.read_results([tmp_path])
    assert table.over_seeds(rows).run.tolist() == ["DM_ipc1_lr1 [width 32]", "DM_ipc1_lr1 [width 8]", "MTT_ipc1_lr1 [width 8, frepo protocol]", "DC_spc2 [width 32]"]
    assert [name.partition("_000")[0] for name in table.shown(rows).run] == ["DM_ipc1_lr1", "DM_ipc1_lr1", "MTT_ipc1_lr1", "DC_spc2"]
    assert rows.ipc.tolist() == [1, 1, 1, 2]


def test_runs_of_other_frames_or_settings_are_told_apart(tmp_path):
    for settings in ({}, {"content_digest": "f" * 16, "frame_names": "flow_#.jpg"}, {"epoch_eval_train": 5}, {"init": "mean"}, {"seed": 1}):
        (finished(tmp_path, "DM_ipc1_lr1", 20.0, 1000, **{"init": "real"} | settings) / "metrics.jsonl").touch()
    rows = table.read_results([tmp_path])
    assert table.over_seeds(rows).run.tolist() == [
        "DM_ipc1_lr1 [content b] [epoch_eval_train 100, init real]", "DM_ipc1_lr1 [content ffffff, frame_names flow_#.jpg]",
        "DM_ipc1_lr1 [content b] [epoch_eval_train 5, init real]", "DM_ipc1_lr1 [content b] [epoch_eval_train 100, init mean]"]
    table.main(table.parser().parse_args([str(tmp_path), "--csv", str(tmp_path / "csv")]))
    assert pd.read_csv(tmp_path / "csv").frame_names.dropna().tolist() == ["flow_#.jpg"]
    report.main(report.parser().parse_args([str(tmp_path), "--out", str(tmp_path / "page")]))
    page = (tmp_path / "page" / "index.html").read_text()
    assert all(f"<td>DM{other}</td>" in page for other in (" [content b] [init real, epoch_eval_train 100]", " [content b] [init real, epoch_eval_train 5]",
                                                          " [content b] [init mean, epoch_eval_train 100]", " [content ffffff, frame_names flow_#.jpg]"))


def test_runs_of_other_splits_validation_or_precision_are_told_apart(tmp_path):
    for digest, top1, other in (("a", 20.0, {}), ("b", 30.0, {"list_path": "/lists/two.csv"}), ("b", 40.0, {"validation": 0.25, "precision": "bf16"})):
        finished(tmp_path, "coreset_random_ipc1", top1, 1000, list_digest=digest, **{"validation": 0.0, "precision": "fp32"} | other)
    name = "coreset_random_ipc1"
    assert table.over_seeds(table.read_results([tmp_path])).run.tolist() == [
        f"{name} [list a, validation 0.0, precision fp32]", f"{name} [list two.csv b, validation 0.0, precision fp32]", f"{name} [list b, validation 0.25, precision bf16]"]
    other = tmp_path / "other"  # the digest of a list contains what --validation holds out
    for digest, validation in (("c", 0.0), ("d", 0.25)):
        finished(other, "coreset_random_ipc1", 20.0, 1000, list_digest=digest, validation=validation)
    assert table.over_seeds(table.read_results([other])).run.tolist() == [f"{name} [validation 0.0]", f"{name} [validation 0.25]"]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "result.json").write_text("{}")  # not of these scripts: it has no config.json
    assert len(table.read_results([tmp_path, tmp_path / "toy"])) == 5


def comparisons(results, *names):
    rows = table.read_results([results]).set_index(["run"])
    return rows.loc[list(names), ["over_random", "of_full"]].astype(float).values.tolist()


def test_random_selection_at_the_same_bytes(tmp_path):
    """By hand: 20 and 30 at 1,000 bytes over two seeds are 25, and 45 at 100,000: half-way in log(bytes), at 10,000, random would have 35."""
    for size, top1, seed in ((1000, 20.0, 0), (1000, 30.0, 1), (100_000, 45.0, 0)):
        random = finished(tmp_path, "coreset_random_ipc1", top1, size, seed=seed, ipc=size // 1000)
    found = {top1: finished(tmp_path, "DM_ipc1_lr1", top1, size, lr_img=top1).name for top1, size in ((40.0, 10_000), (21.0, 1000), (50.0, 99_999.9), (60.0, 999), (61.0, 100_001))}
    values = comparisons(tmp_path, *found.values(), random.name)
    assert [value for value, _ in values[:2]] == [pytest.approx(5.0), pytest.approx(-4.0)] and values[2][0] == pytest.approx(5.0, abs=1e-3)
    assert np.isnan(values[3][0]) and np.isnan(values[4][0])  # nothing below the smallest, nothing above the largest
    assert values[5][0] == pytest.approx(0)
    assert np.isnan([share for _, share in values]).all()  # no full set
    rows = table.read_results([tmp_path])
    assert table.shown(rows)["over random"].tolist() == ["+0.0" if run == random.name else f"{value:+.1f}" if value == value else ""
                                                         for run, value in zip(rows.run, rows.over_random.astype(float))]
    assert sorted(table.over_seeds(rows)["over random"]) == sorted(["+0.0", "+0.0", "+5.0", "-4.0", "+5.0", "", ""])


@pytest.mark.parametrize("other", ({"list_digest": "c"}, {"content_digest": "c"}, {"frames": 4}, {"size": 64}, {"test_clips": 1}, {"width": 128}, {"network": "r3d_18"},
                                   {"epoch_eval_train": 500}, {"lr_net": 0.005}, {"dsa": "flip"}, {"batch_train": 8}, {"eval_protocol": "frepo"}))
def test_only_like_is_compared(tmp_path, other):
    """Random runs of other data, networks or protocols are no measure; data set's own values may be given or not, and a learned step size be in --lr_net's place."""
    finished(tmp_path, "coreset_random_ipc1", 10.0, 1000, **other)
    finished(tmp_path, "full", 80.0, 99_000, **other)
    plain = finished(tmp_path, "DM_ipc1_lr1", 40.0, 1000, frames=8, lr_net=None, dsa="none").name
    (over, share), = comparisons(tmp_path, plain)
    assert np.isnan(over) and (share == pytest.approx(50.0)) == (next(iter(other)) in table.PROTOCOL)
    finished(tmp_path, "coreset_random_ipc1", 30.0, 1000)
    finished(tmp_path, "coreset_herding_ipc1", 90.0, 1000)
    (over, _), = comparisons(tmp_path, plain)
    assert over == pytest.approx(10.0)


def test_the_share_of_the_full_sets_accuracy(tmp_path):
    """The mean over seeds of the full set's runs, of the better where they differ in more; not of single frames."""
    small = finished(tmp_path, "MTT_ipc1_lr1", 30.0, 500).name
    for top1, seed, epochs in ((70.0, 0, 60), (50.0, 1, 60), (40.0, 0, 10)):
        finished(tmp_path, "full", top1, 99_000, seed=seed, epoch_eval_train=epochs)
    finished(tmp_path, "full_1frames", 90.0, 99_000, n_real=1)
    (over, share), = comparisons(tmp_path, small)
    assert np.isnan(over) and share == pytest.approx(50.0)
    assert "50 %" in table.shown(table.read_results([tmp_path]))["of full"].tolist()
    row, = report.table_of(table.read_results([tmp_path]).query("run == @small").assign(method="MTT"), None).split("<details>")[0].split("<tr")[2:]
    assert "<td></td><td>50 %</td>" in row
