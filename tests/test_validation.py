"""Choosing without the test set (methods.md 12): which videos are held out, that nothing learns from them, and what a result names."""
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from commands import only_folder
from conftest import write_frames

from distill_utils import table
from distill_utils.clips import load_clips
from distill_utils.datasets import DATASETS, hold_out, read_videos
from distill_utils.protocol import evaluate
from distill_utils.synset import load_set


def listed(classes=3, videos=20, groups=10, test=4):
    """A list of training videos in groups, each group with videos of two classes, and ungrouped test videos."""
    rows = [(f"v{label}_{number}", f"c{label}", "train", f"g{(label // 2)}_{number % groups}") for label in range(classes) for number in range(videos)]
    rows += [(f"t{label}_{number}", f"c{label}", "test", "") for label in range(classes) for number in range(test)]
    return pd.DataFrame(rows, columns=["folder", "label", "split", "group"])


# ---------------------------------------------------------------- which videos

@pytest.mark.parametrize("grouped", (True, False))
@pytest.mark.parametrize("share", (0.1, 0.2, 0.5))
def test_about_a_share_of_each_class_in_whole_groups(share, grouped):
    videos = listed() if grouped else listed().drop(columns="group")
    split = hold_out(videos, share)
    train = videos[videos.split == "train"].assign(now=split)
    assert (split[videos.split == "test"] == "test").all() and set(train.now) == {"train", "validation"}
    held = (train.now == "validation").groupby(train.label).mean()
    assert ((held - share).abs() <= (0.15 if grouped else 0.026)).all() and (held < 1).all()
    if grouped:
        assert (train.groupby("group").now.nunique() == 1).all()


def test_the_choice_depends_on_the_training_list_and_the_share_alone():
    videos = listed()
    split = hold_out(videos, 0.2)
    assert split.equals(hold_out(videos, 0.2)) and not split.equals(hold_out(videos, 0.4))
    shuffled = videos.sample(frac=1, random_state=1)
    assert hold_out(shuffled, 0.2).sort_index().equals(split)
    assert hold_out(videos[videos.split == "train"], 0.2).equals(split[videos.split == "train"])


def test_a_video_without_a_group_is_its_own():
    videos = listed().assign(group="")
    held = hold_out(videos, 0.2) == "validation"
    assert held.sum() == 12 and held.equals(hold_out(videos.drop(columns="group"), 0.2) == "validation")


def test_what_cannot_be_held_out_is_refused(tiny):
    (tiny / "list.csv").write_text((tiny / "list.csv").read_text().replace(",split\n", ",split,group\n").replace(",train\n", ",train,one\n").replace(
        ",test\n", ",test,\n"))
    with pytest.raises(ValueError, match="--validation 0.3: no group of training videos can be held out: the share is too small, or a class"):
        read_videos("custom", tiny, validation=0.3)


# ---------------------------------------------------------------- their clips

@pytest.mark.parametrize("pack", (True, False))
def test_training_clips_are_the_full_sets_but_those_held_out(tiny, tmp_path, pack):
    flags = dict(data_path=tiny, T=4, size=16, pack=pack, pack_path=tmp_path / "packs", train_clips=2)
    full, train, validation = (load_clips("custom", split=split, validation=share, **flags)
                               for split, share in (("train", 0), ("train", 0.3), ("validation", 0.3)))
    held = (read_videos("custom", tiny, validation=0.3)[0].query("split != 'test'").split == "validation").to_numpy()
    assert held.sum() == 2 and len(train) == len(full) - 4 and train.split == "train"
    kept = torch.from_numpy(np.repeat(~held, 2))
    assert torch.equal(train.gather(torch.arange(len(train))), full.gather(torch.arange(len(full)))[kept])
    assert torch.equal(train.labels, full.labels[kept]) and train.videos.tolist() == np.repeat(np.arange(5), 2).tolist()
    assert train.counts().tolist() == [3 * 2, 2 * 2] and len(train.class_batch(100)) == len(train)

    # The held-out videos' clips are chosen as test clips are: those of a list on which they are the test videos.
    rows = pd.read_csv(tiny / "list.csv")
    rows = rows[rows.split == "train"].assign(split=np.where(held, "test", "train"))
    (tmp_path / "other.csv").write_text(rows.to_csv(index=False))
    as_test = load_clips("custom", split="test", list_path=tmp_path / "other.csv", **flags)
    assert len(validation) == 2 * 3 and torch.equal(validation.gather(torch.arange(6)), as_test.gather(torch.arange(6)))
    assert torch.equal(validation.labels, as_test.labels) and torch.equal(validation.videos, as_test.videos)
    if pack:
        assert len(list((tmp_path / "packs").glob("*_train_*.npy"))) == 1  # one pack, whatever is held out


# ---------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def grouped(command):
    """Another list of the tiny data with more training videos, in groups of a video of either class."""
    lines = ["folder_name,label,split,group"]
    for label in ("fall", "rise"):
        for number in range(6):
            folder = command.folder / "data" / "jpegs" / f"{label}_more_{number}"
            write_frames(folder, 9, seed=100 + number)
            lines.append(f"{folder.name},{label},train,g{number}")
        lines += [f"{label}_test_{number},{label},test," for number in range(3)]
    path = command.folder / "grouped.csv"
    path.write_text("\n".join(lines) + "\n")
    return "--list_path", path, "--frames_path", command.folder / "data" / "jpegs", "--validation", 0.3


@pytest.mark.parametrize("script", ("distill_DC", "distill_DM", "distill_s2d", "distill_MTT"))
def test_a_result_names_the_last_and_the_best_on_validation(command, grouped, tmp_path, script):
    for needed, name in (("distill_s2d", "distill_DC"), ("distill_MTT", "buffer")):
        if script == needed:
            code, output = command(name, tmp_path, *grouped)
            assert code == 0, output
    code, output = command(script, tmp_path, *grouped, "--eval_it", 1)
    assert code == 0, output
    folder, = tmp_path.glob(f"*/{script.removeprefix('distill_')}_*")
    result = json.loads((folder / "result.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in metrics} == {"validation"} and "best_on_test" not in result
    best = max(metrics, key=lambda line: line["top1"])  # the first of equals
    assert result["best_on_validation"]["iteration"] == best["iteration"] and result["best_on_validation"]["value"] == best["top1"]
    assert result["validation"]["top1"] == metrics[-1]["top1"]

    # The figures are those of the sets in the files on the test clips.
    settings = json.loads((folder / "config.json").read_text())["settings"]
    test = load_clips("custom", split="test", data_path=command.folder / "data", list_path=grouped[1], frames_path=grouped[3], T=8, size=43,
                      test_clips=1, pack=False)
    for name, found in (("distilled.pt", result), ("best_on_validation.pt", result["best_on_validation"]["test"])):
        synset, content = load_set(folder / name)
        again = evaluate(synset, test, num_eval=1, epochs=1, lr=content["lr"], precision=settings["precision"], width=settings["width"])
        assert again["networks"] == pytest.approx(found["networks"]) and again["confusion"] == found.get("confusion", again["confusion"])
    row, = table.shown(table.read_results([tmp_path / folder.parent.name / folder.name])).to_dict("records")
    assert row["top1"] == f"{result['top1']:.1f} ± 0.0"
    assert row["top1 at best on validation"] == f"{result['best_on_validation']['test']['top1']:.1f} ± 0.0 (step {best['iteration']})"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name in ("result.json", "metrics.jsonl")}
    code, output = command(script, tmp_path, *grouped, "--eval_it", 1)
    assert code == 0 and "on validation" in output and {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("script", ("distill_DC", "distill_DM"))
def test_the_lists_own_validation_videos(command, tmp_path, script):
    """They are evaluated on where they are asked for, and learned from by nobody."""
    lines = (command.folder / "data" / "list.csv").read_text().replace("_train_2,fall,train", "_train_2,fall,validation")
    lines = lines.replace("_train_2,rise,train", "_train_2,rise,val")
    (tmp_path / "own.csv").write_text(lines)
    (tmp_path / "without.csv").write_text("".join(line for line in lines.splitlines(True) if "_train_2" not in line))
    results = {}
    for name, validation in (("own", "list"), ("own", "0"), ("without", "0")):
        code, output = command(script, tmp_path / f"{name} {validation}", "--list_path", tmp_path / f"{name}.csv", "--eval_it", 1, "--validation", validation)
        assert code == 0, output
        folder = only_folder(tmp_path / f"{name} {validation}")
        results[name, validation] = torch.load(folder / "distilled.pt", weights_only=True), json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {line["split"] for line in lines} == {"validation" if validation == "list" else "test"}
    sets = [content["videos" if script == "distill_DM" else "image"] for content, _ in results.values()]
    assert torch.equal(sets[0], sets[1]) and torch.equal(sets[0], sets[2])
    assert results["own", "list"][1]["top1"] == results["own", "0"][1]["top1"]
    code, output = command(script, tmp_path, "--list_path", tmp_path / "own.csv", "--validation", 0.3)
    assert code == 2 and "the list has its own validation videos: give --validation list" in output
    code, output = command(script, tmp_path, "--validation", "lists")
    assert code == 2 and "argument --validation: 'lists' is not a share from 0 to 0.9" in output


@pytest.mark.parametrize("name", ("coreset", "evaluate"))
def test_reference_selections_and_the_full_set_are_tested_once(grouped, command, tmp_path, capsys, monkeypatch, name):
    import importlib
    module = importlib.import_module(f"distill_utils.{name}")
    monkeypatch.setitem(DATASETS, "custom", dataclasses.replace(DATASETS["custom"], headline="top5"))
    flags = ["--dataset", "custom", "--frames", "8", "--size", "43", "--test_clips", "1", "--data_path", command.folder / "data", "--pack_path",
             command.folder / "packs", "--save_path", tmp_path, "--device", "cpu", "--wandb", "disabled", "--num_eval", "1", "--epoch_eval_train", "1",
             "--width", "8", *grouped]
    module.main(module.parser().parse_args([str(flag) for flag in flags]))
    result, = (json.loads(path.read_text()) for path in tmp_path.rglob("result.json"))
    assert len(result["per_class"]) == 2 and sum(map(sum, result["confusion"])) == 6  # three test videos of each class
    assert result["best_on_validation"]["test"]["top1"] == result["top1"]
    assert result["best_on_validation"]["value"] == 100                    # top-5 of two classes
    output = capsys.readouterr().out
    assert output.count("result: ") == output.count("iteration 0: on validation top5 100.0 ") == 1


def test_experts_and_static_memory_of_other_splits_are_not_found(grouped, command, tmp_path):
    code, output = command("buffer", tmp_path, *grouped[:4])
    assert code == 0, output
    code, output = command("distill_MTT", tmp_path, *grouped)
    assert code == 2 and "no finished buffer of experts" in output and "--validation 0.3" in output
    buffer, = tmp_path.glob("*/buffer_*")
    code, output = command("distill_MTT", tmp_path, *grouped, "--buffer_path", buffer)
    assert code == 2 and "different validation and list" in output

    code, output = command("distill_DC", tmp_path, *grouped[:4])
    assert code == 0, output
    static, = tmp_path.glob("*/DC_*/distilled.pt")
    code, output = command("distill_s2d", tmp_path / "s2d", *grouped, "--path_static", static)
    assert code == 2 and f"the static memory {static} was learned with a different validation and list" in output
    code, output = command("distill_s2d", tmp_path / "s2d", *grouped[:4], "--path_static", static, "--dsa", "color")
    assert code == 0, output  # another augmentation is a choice, not a leak
    content = torch.load(static, weights_only=True)
    torch.save(content | {"iteration": 1}, static)
    code, output = command("distill_s2d", tmp_path / "s2d", *grouped[:4], "--path_static", static)
    assert code == 2 and f"the static memory {static} has learned 1 of {content['iteration']} iterations" in output
    torch.save(content, static)
    code, output = command("distill_s2d", tmp_path / "s2d", *grouped[:4], "--path_static", static)
    assert code == 0, output
