"""What README and docs say: links, anchors, commands and flags, the tree; and that the README stays short."""
import importlib
import os
import pathlib
import re
import shlex
import subprocess

import pytest
from dry import dry_run, program_of

from distill_utils import synset, table
from distill_utils.datasets import DATASETS
from distill_utils.search_space import METHODS
from utils import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "distill_utils" / "data" / "README.md"]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = "bash", "python", "torchrun"  # what a command of ours starts with
THEIRS = "git", "cd", "source", "unrar", "unzip", "tar", "cat"  # what else a reader is told to run; here it does nothing
# Words that stand for a value in inline commands.
PLACEHOLDERS = {"GPU": "0", "DATASET": "miniUCF101", "LR": "1", "IPC": "1", "SPC": "10", "RUN": "results/toy/a_run", "RUNS": "results", "FILE": "file", "DIR": "folder",
                "VIDEOS": "videos", "BYTES": "150000"}


def prose(text):
    """The page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)


# ---------------------------------------------------------------- links

def links(text):
    """Targets of the links and pictures of a page."""
    plain = re.sub(r"`[^`\n]*`", "", prose(text))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", plain) if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(next(name for number in range(len(found) + 1) if (name := f"{slug}-{number}" if number else slug) not in found))
    return found


def broken_links(page, text):
    """The links of a page that lead nowhere."""
    broken = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT) or anchor and anchor not in anchors(text if file == page else file.read_text(encoding="utf-8")):
            broken.append(target)
    return broken


@each_page
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_wrong_link_is_found():
    text = "# A heading: `code`, and more\n[right](#a-heading-code-and-more) [wrong](#a-heading) [](nothing.md) [](docs/data.md#nothing) [](https://nowhere)\n`[code](x)`\n"
    assert broken_links(ROOT / "README.md", text) == ["#a-heading", "nothing.md", "docs/data.md#nothing"]
    assert anchors("# A\n# A\n```\n# no heading\n```\n## [B](c) d") == {"a", "a-1", "b-d"}


def test_every_page_can_be_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        targets = {(page.parent / target.partition("#")[0]).resolve() for target in links(page.read_text(encoding="utf-8")) if target.partition("#")[0].endswith(".md")}
        ahead += sorted(path for path in targets - seen if path.is_file())
    assert set(PAGES) <= seen


# ---------------------------------------------------------------- commands

def blocks(text):
    return [body for language, body in FENCE.findall(text) if language == "bash"]


def inline(text):
    """Commands of ours in inline code that have arguments, their placeholders filled in; of optional parts the brackets are left out."""
    found = []
    for code in re.findall(r"`([^`\n]+)`", prose(text)):
        words = code.replace("[", "").replace("]", "").split()
        if len(words) > 2 and re.match(r"bash (sh|\.ci)/|python -m distill_utils\.|python \w+\.py|torchrun ", code):
            if words[0] == "bash" and "tune.sh" in words[1]:
                words = ["DM" if word == "METHOD" else word for word in words]
            words = [PLACEHOLDERS.get(word, "random" if word == "METHOD" else word) for word in words]
            found.append(" ".join(words))
    return found


def named_files(text):
    """Files of the project that inline code names by their place."""
    return set(re.findall(r"(?<![\w/.])((?:sh|tests|docs|networks|distill_utils|\.ci)/[\w/.-]+\w)", " ".join(re.findall(r"`([^`\n]+)`", prose(text)))))


def first_words(body):
    """Of each command of a block, without comments and assignments."""
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
        words.whitespace_split, first = True, True
        for word in words:
            operator = set(word) <= set("|&;()")
            if first and not operator and not re.match(r"\w+=", word):
                yield word
                first = False
            first = first or operator and word != ")"


DONE = {}  # blocks that were run, and their calls: pages give the same commands


def calls_of(body, folder):
    """The calls of Python and torchrun that a block of commands makes, dry, from the project's folder; of a study's grid a small part."""
    if body in DONE:
        return DONE[body]
    assert set(first_words(body)) <= {*OURS, *THEIRS}
    place, stub, few = folder / "bin", folder / "python", folder / "few.sh"
    few.write_text("budgets=(1000) seeds=(0) beyond=()\n")
    place.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(stub)
    text = "".join(f"{name}() {{ :; }}\n" for name in THEIRS) + body
    process, calls = dry_run(["bash", "-euo", "pipefail", "-c", text], stub, ROOT, PATH=f"{place}:{os.environ['PATH']}", SETTINGS=str(few), T="2")
    assert process.returncode == 0, process.stderr
    DONE[body] = calls
    return calls


def check(call):
    """SystemExit or an error for a call whose program does not take its flags."""
    command = call["command"]
    if command[:1] == ["-c"] or command[:2] == ["-m", "pytest"]:
        return
    if call["program"] == "torchrun":
        from torch.distributed.run import get_args_parser
        flags = get_args_parser().parse_args(command)
        return check(call | {"program": "python", "command": [flags.training_script, *flags.training_script_args]})
    _, parser, arguments = program_of(call)
    if arguments[-1:] == ["--help"]:
        return
    flags = vars(parser.parse_args(arguments))
    if flags.get("flags"):  # a search hands them on
        check(call | {"command": ["-m", METHODS[flags["method"]].script, "--dataset", flags["dataset"], *flags["flags"]]})
        arguments = [word for word in arguments if word not in flags["flags"]]
    known = {option for action in parser._actions for option in action.option_strings}
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known  # whole names, no abbreviations
    assert flags.get("dataset") in (None, *DATASETS)


@each_page
def test_commands_are_taken_by_their_programs(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    for body in [*blocks(text), *inline(text)]:
        calls = calls_of(body, tmp_path)
        assert calls or not set(first_words(body)) & set(OURS), body
        for call in calls:
            try:
                check(call)
            except (SystemExit, AssertionError, ImportError) as error:
                pytest.fail(f"{body}\n{call['command']}\n{error}")


@each_page
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    made = "distill_utils/data/", "sh/baseline/Moments.sh", "tests/test_moments.py"  # by prepare; by who follows the worked example
    assert [name for name in sorted(named_files(text)) if not (ROOT / name).exists() and not name.startswith(made)] == []


@pytest.mark.parametrize("command", ("bash sh/baseline/DM.sh cpu toy 30 1 --iterations 5", "bash sh/baseline/DM.sh cpu toi 30 1", "python -m distill_utils.table results/ --cvs x",
                                     "bash sh/baseline/DM.sh cpu toy 30 1 --Iter 5", "bash sh/study/tune.sh cpu toy DM --itp 5", "torchrun --nodes 2 distill_DM.py --dataset toy",
                                     "torchrun --nnodes 2 distill_DM.py --dataset toy --ip 1", "python -m distill_utils.tables results/", "bash sh/benchmark.sh cpu --clases 5",
                                     "bash sh/baseline/DM.sh cpu toy", "bash sh/baseline/dm.sh cpu toy 30 1", "rm file", "C='--no_such 1'\nbash sh/s2d/DC.sh cpu toy 10 $C"))
def test_a_wrong_command_is_found(command, tmp_path):
    with pytest.raises((SystemExit, AssertionError, ImportError)):
        for call in calls_of(command, tmp_path):
            check(call)


def test_every_flag_is_explained():
    """Every flag of every program stands in a page below docs/."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    programs = ["distill_DC.py", "distill_DM.py", "distill_MTT.py", "distill_FRePo.py", "distill_s2d.py", "buffer.py", "sh/benchmark"]
    calls = [{"command": [name], "environment": {}} for name in programs]
    calls += [{"command": ["-m", f"distill_utils.{name}"], "environment": {}} for name in "coreset evaluate table report export dynamics tune prepare inspect".split()]
    flags = {option for call in calls for action in program_of(call)[1]._actions for option in action.option_strings if option.startswith("--") and option != "--help"}
    explained = set(re.findall(r"--[a-zA-Z_]+(?:-[a-z_]+)?", text))
    assert sorted(flag for flag in flags - explained if not flag.startswith("--no-")) == []


# ---------------------------------------------------------------- the worked example

def test_the_worked_example_runs_to_its_row(tiny, tmp_path, monkeypatch, capsys):
    """The set and the script of docs/extending.md, as they stand there, on tiny data: to a result, a set in a file, and a row; its launcher and its flags."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (set_code, code), (launcher,) = ([body for kind, body in FENCE.findall(text) if kind == language] for language in ("python", "sh"))
    monkeypatch.setattr(synset, "KINDS", synset.KINDS.copy())
    for name in ("MixtureSet", "mixture_set"):
        monkeypatch.setattr(synset, name, None, raising=False)  # gone again after the test
    exec(compile(set_code, "synset.py", "exec"), vars(synset))
    (tmp_path / "distill_Moments.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    script = importlib.import_module("distill_Moments")
    flags = ["--dataset", "custom", "--data_path", str(tiny), "--pack_path", str(tmp_path / "packs"), "--save_path", str(tmp_path / "results"), "--device", "cpu", "--wandb", "disabled",
             *"--frames 8 --size 43 --width 4 --test_clips 1 --ipc 1 --bytes 66999 --batch_real 2 --rank 3 --Iteration 2 --eval_it 1 --num_eval 1 --epoch_eval_train 1 --storage uint8".split()]
    script.main(script.parser().parse_args(flags))
    run, = (path.parent for path in tmp_path.glob("results/*/*/result.json"))
    found, _ = synset.load_set(run)
    assert type(found).__name__ == "MixtureSet" and found.bytes() == 4 * (3 * 3 * 43 ** 2 + 3 * 4 + 8 * 3 * 4)
    table.main(table.parser().parse_args([str(tmp_path / "results")]))
    assert "Moments_ipc2_lr30_" in capsys.readouterr().out
    written = re.findall(r"^  (--\w+)", launcher, re.MULTILINE)
    assert set(written) <= {option for action in script.parser()._actions for option in action.option_strings}


# ---------------------------------------------------------------- the README

def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 200


def tree():
    """The names at the beginning of the lines of the tree below "What is where"."""
    body = re.search(r"^## What is where\n.*?^```\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    return [word for line in body.splitlines() if line and not line[0].isspace() for word in line.split("  ")[0].split()]


def test_the_tree_is_that_of_the_project():
    assert all((ROOT / name).is_dir() == name.endswith("/") and (ROOT / name).exists() for name in tree())
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git here to tell the project's files from others")
    ours = {pathlib.PurePosixPath(name).parts[0] for name in listed.stdout.splitlines()}
    assert sorted(name.rstrip("/") for name in tree()) == sorted(name for name in ours if not name.startswith("."))


def test_a_sentence_stands_before_each_table():
    for page in PAGES:
        lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
        for number, line in enumerate(lines):
            if line.startswith("|") and not lines[number - 1].startswith(("|", "<!--")):
                before = [text for text in lines[:number] if text.strip()]
                assert before and not before[-1].startswith(("#", "|")), f"{page.name}: the table {line!r} has no sentence before it"
