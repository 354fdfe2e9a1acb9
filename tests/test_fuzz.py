"""Damaged files of each kind that the scripts read: a result, or one sentence that names the file and exit code 2; never a traceback, a hang, much
memory, or a file half written. MUTANTS=3000 python -m pytest tests/test_fuzz.py takes so many of them.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import re
import resource
import shutil
import time
import traceback
import zlib

import numpy as np
import pytest
import torch
from fuzz import damaged_json, damaged_tensors, spoilt, tensors_file
from PIL import Image
from test_study import sets, written
from videos import CODECS, edited, turned, write_streams, write_video

import distill_DM
import distill_s2d
import networks
from distill_utils import coreset, evaluate, export, prepare, processes, report, table
from distill_utils.datasets import DATASETS, read_videos
from distill_utils.identity import differing_settings
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet, load_static
from distill_utils.trajectories import Experts, buffer_files
from networks import Hallucinator

MUTANTS = int(os.environ.get("MUTANTS", 300))  # of all kinds
LONGEST = 10  # seconds of one, of a core
LARGEST = 2 ** 30  # bytes of all
DAMAGE = {".json": damaged_json, ".jsonl": damaged_json, ".pt": damaged_tensors}  # any other: spoilt


def answer(main, *arguments, parser=argparse.ArgumentParser(prog="it")):
    """(exit code, what was printed) of a main function on the command line; what the command line does not catch is raised."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            processes.run_script(main, parser, list(map(str, arguments)))
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, shown.getvalue()


def script_reader(module, *flags):
    """Reads by a script: flags may name the folders as {files} and {out}."""
    return lambda files, out: answer(module.main, *(str(flag).format(files=files, out=out) for flag in flags), parser=module.parser())


def function_reader(function):
    """Reads by a function of the folder, as a script calls it."""
    return lambda files, out: answer(lambda args: function(files))


def fuzz(files, readers, count, place, name):
    """Damage one of the files {name: bytes} and have it read, `count` times. readers: (what the names of files that it reads have, reader).

    Returns how often which exit code came, and what was wrong, in words.
    """
    codes, faults, before = collections.Counter(), [], peak_memory()
    cases = [(file, reader) for words, reader in readers for file in files if words in file]
    for number in range(count):
        rng, folders = np.random.default_rng([zlib.crc32(name.encode()), number]), (place / "files", place / "out")
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        victim, reader = cases[number % len(cases)]
        for file, content in files.items():
            path = folders[0] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(DAMAGE.get(path.suffix, spoilt)(content, rng) if file == victim else content)
        start = time.process_time()
        try:
            code, printed = reader(*folders)
        except Exception:
            code, printed = "traceback", traceback.format_exc(limit=-4)
        codes[code] += 1
        sentence, seconds, memory = (printed.splitlines() or [""])[-1], time.process_time() - start, peak_memory() - before
        if code not in (0, 2) or code == 2 and not (re.match(r"[\w.-]+: error: ", sentence) and str(place) in sentence):
            faults.append(f"{name} {number}, {victim}: {code} and no sentence that names it: {printed}")
        if code == 2 and any(folders[1].iterdir()) or any(place.rglob(".*.tmp")):
            faults.append(f"{name} {number}, {victim}: left {sorted(place.rglob('.*.tmp')) or sorted(folders[1].iterdir())}")
        if seconds > LONGEST or memory > LARGEST:
            faults.append(f"{name} {number}, {victim}: {seconds:.0f} s, {memory / 1e9:.1f} GB")
    return codes, faults


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- the kinds

def lists(whole, command, tmp_path):
    table = "label,youtube_id,time_start,time_end,split\n"
    ours = {"own/a.csv": "folder_name,label,split,group\n" + "".join(f"v{n},c{n % 3},{('train', 'val', 'test')[n // 4]},g{n % 5}\n" for n in range(12)),
            **{f"data/Kinetics/{name}.csv": table + "".join(f'"c{n % 2}, x",{name}{n},{n},11,{name}\n' for n in range(6)) for name in ("train", "validate")},
            "data/SSv2/class_list.json": '{\n"a b": 0, "b": 1, "c": 2}',
            **{f"data/SSv2/annot_{name}.json": json.dumps([{"id": f"{name}{n}", "class": n % 3} for n in range(6)], indent=1) for name in ("train", "val")}}
    official = {"classInd.txt": "1 Run\n2 Walk\n", **{f"{split}list01.txt": "".join(f"{label}/v_{label}_g0{group}_c01.avi 1\n" for label in ("Run", "Walk"))
                                                      for group, split in enumerate(("train", "test"))},
                "clap_test_split1.txt": "a_clap.avi 1\nb_clap.avi 2\n", "run_test_split1.txt": "a_run.avi 1\nb_run.avi 0\n",
                **{f"{name}.json": json.dumps([{"id": n, "template": "Lifting [something]"} for n in range(n, n + 3)], indent=1)
                   for n, name in ((0, "train"), (9, "validation"))}, "labels.json": '{\n"Lifting something": "0"}',
                "train.csv": ours["data/Kinetics/train.csv"], "val.csv": ours["data/Kinetics/validate.csv"]}
    files = {name: text.encode() for name, text in (ours | {f"official/{name}": text for name, text in official.items()}).items()}
    readers = [("data/" + DATASETS[name].root, function_reader(lambda folder, name=name: read_videos(name, folder / "data"))) for name in ("Kinetics400", "SSv2")]
    readers += [("own/", function_reader(lambda folder: read_videos("custom", folder / "own", frames_path=folder)))]
    readers += [(words, function_reader(lambda folder, name=name: prepare.RECIPES[name].read(folder / "official"))) for name, words in (
        ("UCF101", "list01.txt"), ("UCF101", "classInd"), ("HMDB51", "_split1.txt"), ("Kinetics400", "official/train.csv"), ("SSv2", "official/train.json"),
        ("SSv2", "official/labels"))]
    return files, readers


def runs(whole, command, tmp_path):
    """A run's own files, and the same as two runs on the full set, of which the report tells dynamic classes."""
    folder, _ = whole("distill_DM")
    files = {f"data/{folder.name}/{name}": (folder / name).read_bytes() for name in ("config.json", "result.json", "metrics.jsonl", "distilled.pt")}
    config = json.loads(files[f"data/{folder.name}/config.json"])
    for name, n_real in (("full_1", None), ("full_1frames_2", 1)):
        changed = {part: config[part] | {"n_real": n_real} for part in ("settings", "chosen")}
        files[f"data/{name}/config.json"] = json.dumps(config | changed, indent=1).encode()
        files |= {f"data/{name}/{file}": files[f"data/{folder.name}/{file}"] for file in ("result.json", "metrics.jsonl")}
    args = distill_s2d.parser().parse_args(["--dataset", "custom", "--data_path", str(command.folder / "data"), "--device", "cpu"])
    flags = ("frames", "size", "seed", "stride", "validation", "width", "segments", "data_path")

    def settings(files, out):
        """As flags of other commands."""
        return answer(lambda args: None, files / "data" / folder.name, parser=evaluate.parser())
    readers = [(".json", script_reader(table, "{files}", "--csv", "{out}/all.csv")), (".json", script_reader(table, "{files}", "--over_seeds")),
               ("", script_reader(report, "{files}", "--out", "{out}")), (f"{folder.name}/config.json", settings),
               ("config.json", function_reader(lambda files: [differing_settings(args, path.parent, flags, {"list_digest": "x", "content_digest": "x"}) for path in files.rglob("config.json")]))]
    return files, readers


def experts(whole, command, tmp_path):
    folder, _ = whole("buffer")
    files = {path.name: path.read_bytes() for path in folder.glob("replay_buffer_*.pt")}
    files["replay_buffer_7.pt"] = tensors_file(torch.load(folder / "replay_buffer_0.pt", weights_only=True), zipped=False)
    shapes = [parameter.shape for parameter in networks.build("ConvNet3D", 2, 8, 43, 8).parameters()]

    def read(folder):
        found = Experts(buffer_files(folder), shapes, 3)
        for visit in range(len(found)):
            assert all(vector.isfinite().all() and len(vector) == sum(map(torch.Size.numel, shapes)) for vector in found.draw(visit, (0, 1, 2)))
    return files, [(".pt", function_reader(read))]


def distilled_sets(whole, command, tmp_path):
    made = sets() | {"pixels uint4": PixelSet(torch.randn(6, 5, 3, 8, 8), 3, storage="uint4"), "still fp16": StillSet(torch.randn(3, 2, 3, 4, 4), 2, 5, 8, "fp16"),
                     "dynamic uint8": StaticDynamicSet(torch.randn(3, 2, 3, 4, 4), torch.randn(3, 2, 3, 1, 8, 8), Hallucinator(), 2, 5, 8, "uint8")}
    contents = {kind: torch.load(written(synset, tmp_path / "a.pt", size=8, storage=synset.storage), weights_only=True) for kind, synset in made.items()}
    files = {f"{kind}{zipped:d}.pt": tensors_file(content, zipped) for kind, content in contents.items() for zipped in (True, False)}
    return files, [(name, script_reader(export, f"{{files}}/{name}", "--format", format, "--out", "{out}/made")) for name in files for format in ("npz", "pt")]


def static_memories(whole, command, tmp_path):
    content = torch.load(whole("distill_DC")[0] / "distilled.pt", weights_only=True)
    plain = {"image": content["image"], "label": content["label"]}
    files = {"run.pt": tensors_file(content), "old.pt": tensors_file(plain, zipped=False), "image.pt": tensors_file({"image": content["image"]}),
             "listed.pt": tensors_file({**plain, "label": plain["label"].tolist()})}
    return files, [(name, function_reader(lambda folder, name=name: load_static(folder / name, 2, 2, 43))) for name in files]


def runs_that_go_on(whole, command, tmp_path):
    """A finished run that is started again, and one of which the result is missing; a set that other networks were trained on."""
    folder, _ = whole("distill_DM")
    place = f"{folder.parent.name}/{folder.name}"
    names = "config.json", "checkpoint.pt", "metrics.jsonl", "result.json", "distilled.pt"
    files = {f"{first}/{place}/{name}": (folder / name).read_bytes() for first in ("done", "late") for name in names if (first, name) != ("late", "result.json")}
    others = ("--networks", "CNN+mean", "--device", "cpu", "--wandb", "disabled", "--pack_path", command.folder / "packs")
    shutil.copytree(folder, tmp_path / "run")
    assert answer(evaluate.main, tmp_path / "run", *others, parser=evaluate.parser())[0] == 0
    files["done/networks.json"] = (tmp_path / "run" / "networks.json").read_bytes()

    def other_networks(files, out):
        (files / "done" / "networks.json").rename(files / "done" / place / "networks.json")
        return answer(evaluate.main, files / "done" / place, *others, parser=evaluate.parser())
    flags = [*command.arguments("distill_DM", ""), "--wandb", "disabled", "--save_path"]
    readers = [(f"{first}/custom", script_reader(distill_DM, *flags, f"{{files}}/{first}")) for first in ("done", "late")]
    return files, [*readers, ("networks.json", other_networks), ("done/custom-data/" + folder.name + "/distilled.pt", other_networks)]


def packs(whole, command, tmp_path):
    """Of clips, and what stands beside it; a feature network."""
    flags = [*command.arguments("distill_utils.coreset", ""), "--wandb", "disabled", "--method", "herding", "--feature_epochs", "1", "--pack_path"]
    assert answer(coreset.main, *flags, tmp_path / "made", "--save_path", tmp_path / "made", parser=coreset.parser())[0] == 0
    shutil.rmtree(next(tmp_path.glob("made/*/coreset*")))
    files = {str(path.relative_to(tmp_path / "made")): path.read_bytes() for path in (tmp_path / "made").rglob("*") if path.is_file()}
    reader = script_reader(coreset, *flags, "{files}", "--save_path", "{files}")
    return files, [(suffix, reader) for suffix in (".npy", ".pt")]


KINDS = {"lists": (lists, 0.2), "runs": (runs, 0.2), "experts": (experts, 0.15), "sets": (distilled_sets, 0.2), "static": (static_memories, 0.1),
         "go on": (runs_that_go_on, 0.1), "packs": (packs, 0.05)}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(whole, command, tmp_path, kind):
    make, share = KINDS[kind]
    codes, faults = fuzz(*make(whole, command, tmp_path), int(MUTANTS * share), tmp_path / "fuzz", kind)
    print(f"{kind}: {dict(codes)}")
    assert not faults, f"{len(faults)} of {sum(codes.values())}:\n" + "\n".join(faults[:9])
    assert codes[0] and codes[2]


def test_damaged_videos(tmp_path, capfd):
    """Prepared together, each in a process that may crash: a folder of frames or a line that says why."""
    whole, rng, count = [], np.random.default_rng(0), int(MUTANTS * 0.2)
    for number, suffix in enumerate(CODECS):
        whole.append(write_video(tmp_path / f"whole{suffix}", 6, gop=3))
    whole += [edited(write_video(tmp_path / "edited.mov", 9, gop=3), (1, 5)), turned(write_video(tmp_path / "turned.mp4", 6), 1),
              write_streams(tmp_path / "streams.mkv", ((32, 24), 1, 0), ((48, 36), 6, 1))]
    for number in range(count):
        path = whole[number % len(whole)]
        folder = tmp_path / "videos" / "ab"[number // len(whole) % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}{path.suffix}").write_bytes(spoilt(path.read_bytes(), rng))
    for label in "ab":
        for number in "xy":
            shutil.copy(whole[0], tmp_path / "videos" / label / f"{number}{whole[0].suffix}")
    code, printed = answer(prepare.main, "custom", "--videos", tmp_path / "videos", "--out", tmp_path / "out", "--workers", 2, parser=prepare.parser())
    assert code == 0, printed
    broken = dict(line.split("\t", 1) for line in (tmp_path / "out" / "broken_videos.txt").read_text().splitlines())
    made = [path for path in (tmp_path / "out").glob("jpegs_112/*/*")]
    for folder in made:
        for path in folder.iterdir():
            Image.open(path).load()
    print(f"videos: {len(made)} read, {len(broken)} refused, {sum('crashed' in reason for reason in broken.values())} crashed")
    assert len(made) + len(broken) == count + 4 and not list(tmp_path.rglob(".preparing*")) and len(made) > 4 and broken
