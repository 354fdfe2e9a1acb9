"""Every launcher, dry: a stub in the place of Python writes down its command line; the script's own parser reads it."""
import importlib
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import write_frames
from dry import parse, program_of

from distill_utils.identity import start_run
from utils import ROOT

LAUNCHERS = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.glob("sh/*/*.sh")) if path.parent.name != "study"}

# How a positional of a usage line reaches the script: value to try, and the flag that takes it.
POSITIONALS = {
    "sh/baseline/DM.sh": {"DATASET": ("toy", "dataset"), "LR": ("2.5", "lr_img"), "IPC": ("3", "ipc")},
    "sh/baseline/FRePo.sh": {"DATASET": ("toy", "dataset"), "LR": ("2.5", "lr_img"), "IPC": ("3", "ipc")},
    "sh/baseline/MTT.sh": {"DATASET": ("toy", "dataset"), "LR": ("2.5", "lr_img"), "IPC": ("3", "ipc")},
    "sh/baseline/buffer.sh": {"DATASET": ("toy", "dataset")},
    "sh/baseline/coreset.sh": {"DATASET": ("toy", "dataset"), "METHOD": ("herding", "method"), "IPC": ("3", "ipc")},
    "sh/baseline/full.sh": {"DATASET": ("toy", "dataset")},
    "sh/s2d/DC.sh": {"DATASET": ("toy", "dataset"), "SPC": ("10", "spc")},
    "sh/s2d/DM.sh": {"DATASET": ("toy", "dataset"), "LR": ("2.5", "lr_dynamic"), "IPC": ("3", "ipc")},
    "sh/s2d/FRePo.sh": {"DATASET": ("toy", "dataset"), "LR": ("2.5", "lr_dynamic"), "IPC": ("3", "ipc")},
    "sh/s2d/MTT.sh": {"DATASET": ("toy", "dataset"), "LR": ("2.5", "lr_dynamic"), "IPC": ("3", "ipc")},
    "sh/s2d/compact.sh": {"DATASET": ("toy", "dataset"), "LR": ("2.5", "lr_dynamic"), "IPC": ("3", "ipc")},
}
each_launcher = pytest.mark.parametrize("name", LAUNCHERS)


def usage(name):
    """Names of the positionals in the launcher's usage line."""
    line = re.search(rf"^# Usage: bash {re.escape(name)} (.*?) \[", LAUNCHERS[name].read_text(), re.MULTILINE)
    return line[1].split()


def values(name):
    """A value for each positional but the GPU."""
    return [POSITIONALS[name][word][0] for word in usage(name)[1:]]


def test_all_launchers_are_tested():
    assert set(LAUNCHERS) == set(POSITIONALS)


@each_launcher
def test_header_and_house_rules(name):
    text = LAUNCHERS[name].read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and usage(name)[0] == "GPU"
    assert "\nset -euo pipefail\n" in text and "CUDA_VISIBLE_DEVICES" not in text
    assert text.rstrip().splitlines()[-1].endswith('"${flags[@]}" "$@"')
    assert subprocess.run(["bash", "-n", LAUNCHERS[name]]).returncode == 0


@each_launcher
def test_positionals_land_in_their_flags(launch, name):
    process, call = launch(name, "cpu", *values(name))
    assert process.returncode == 0, process.stderr
    flags = parse(call)
    for value, flag in POSITIONALS[name].values():
        assert flags[flag] == type(flags[flag])(value), flag
    assert flags["device"] == "cpu"


@each_launcher
def test_each_flag_is_written_once_and_known(launch, name):
    _, call = launch(name, "cpu", *values(name))
    _, parser, arguments = program_of(call)
    written = [word for word in arguments if word.startswith("--")]
    assert len(written) == len(set(written))
    known = {option for action in parser._actions for option in action.option_strings}
    assert set(written) <= known  # whole names: no abbreviation that a new flag would make ambiguous


@each_launcher
def test_extra_flags_override(launch, name):
    extra = "--batch_train 7 --seed 5 --dataset HMDB51 --no_pack --save_path".split() + ["a folder/of results"]
    process, call = launch(name, "cpu", *values(name), *extra)
    assert process.returncode == 0 and call["command"][-len(extra):] == extra
    flags = parse(call)
    assert (flags["batch_train"], flags["seed"], flags["dataset"], flags["pack"]) == (7, 5, "HMDB51", False)
    assert flags["save_path"] == pathlib.Path("a folder/of results")


@each_launcher
def test_any_folder(launch, name, tmp_path):
    """From a folder elsewhere, from its own, and of a project whose path has spaces: relative paths stay the user's."""
    spaced = tmp_path / "a project, with spaces"
    shutil.copytree(ROOT / "sh", spaced / "sh")
    for root, folder in ((ROOT, tmp_path), (ROOT, ROOT), (ROOT, LAUNCHERS[name].parent), (spaced, tmp_path),
                         (spaced, (spaced / name).parent)):
        process, call = launch(name, "cpu", *values(name), root=root, folder=folder)
        assert process.returncode == 0, process.stderr
        assert program_of(call)[0].resolve() == root.resolve() and call["folder"] == str(folder)


@each_launcher
@pytest.mark.parametrize("gpu, device, cuda", (("cpu", "cpu", ""), ("-1", "cpu", ""), ("0", "cuda", "0"),
                                               ("3", "cuda", "3"), ("mps", "mps", ""), ("xpu", "xpu", "")))
def test_gpu(launch, name, gpu, device, cuda):
    _, call = launch(name, gpu, *values(name))
    assert parse(call)["device"] == device and call["environment"]["CUDA_VISIBLE_DEVICES"] == cuda


@each_launcher
@pytest.mark.parametrize("gpu, device, cuda, processes", (("0,1,2,3", "cuda", "0,1,2,3", 4), ("7,2", "cuda", "7,2", 2), ("cpu*2", "cpu", "", 2),
                                                          ("cpu*1", "cpu", "", None), ("-1*12", "cpu", "", 12)))
def test_several_gpus(launch, name, gpu, device, cuda, processes):
    _, call = launch(name, gpu, *values(name))
    assert parse(call)["device"] == device and call["environment"]["CUDA_VISIBLE_DEVICES"] == cuda
    start = ["-m", "distill_utils.torchrun", "--nproc_per_node", str(processes)]
    assert (call["command"][:4] == start) == (processes is not None)


@pytest.mark.parametrize("given, gpu, cuda", (("3", "0", "3"), ("5,7", "0", "5"), ("5,7", "1", "7"), ("5,7,6", "2,0", "6,5"), (" 5, 7 ", "1", "7"), ("0,1", "0,1", "0,1"),
                                              ("GPU-8a1b-22,GPU-9c", "1", "GPU-9c"), ("MIG-1d9a/1/0", "0", "MIG-1d9a/1/0"), ("-1", "0", "-1"), ("NoDevFiles", "0", "NoDevFiles"),
                                              ("3", "cpu", ""), ("", "cpu", ""), ("", "cpu*2", "")))
def test_gpus_that_a_scheduler_gave(launch, given, gpu, cuda):
    """Numbers count in its list, which may hold names."""
    name = "sh/baseline/DM.sh"
    process, call = launch(name, gpu, *values(name), CUDA_VISIBLE_DEVICES=given)
    assert process.returncode == 0 and call["environment"]["CUDA_VISIBLE_DEVICES"] == cuda, process.stderr
    assert parse(call)["device"] == ("cuda" if cuda else "cpu") and ("distill_utils.torchrun" in call["command"]) == ("," in gpu or "*" in gpu)


@pytest.mark.parametrize("given, gpu, place, count", (("3", "1", 1, 1), ("3", "3", 3, 1), ("5,7", "0,2", 2, 2), ("", "0", 0, 0), ("GPU-a,MIG-b", "2", 2, 2), ("3", "9999", 9999, 1)))
def test_gpus_that_a_scheduler_did_not_give(launch, given, gpu, place, count):
    name = "sh/baseline/DM.sh"
    process, call = launch(name, gpu, *values(name), CUDA_VISIBLE_DEVICES=given)
    assert process.returncode == 2 and call is None
    assert process.stderr == f"error: there is no GPU {place}: CUDA_VISIBLE_DEVICES='{given}' gives {count}, counted from 0\n"


@each_launcher
@pytest.mark.parametrize("gpu", ("gpu0", "-2", "1.5", "0,", ",1", "0,,1", "0,1,0", "0,00", "cpu*0", "cpu*", "cpu*x", "0*2", "cuda:0", "mps,0", "mps*2", "xpus", "", " ", "--help", "99999999999999999999"))
def test_nonsense_gpu(launch, name, gpu):
    process, call = launch(name, gpu, *values(name))
    assert process.returncode == 2 and call is None
    assert process.stderr == f"error: GPU must be a number, a list such as 0,1, cpu, -1, cpu*2, mps or xpu, not '{gpu}'\n"


@each_launcher
def test_missing_positionals(launch, name):
    for given in range(len(usage(name))):
        process, call = launch(name, *["cpu", *values(name)][:given])
        assert process.returncode == 2 and call is None and process.stdout == ""
        assert process.stderr.startswith(f"usage: bash {name} {' '.join(usage(name))} [")
        assert process.stderr.count("\n") == 1


@each_launcher
def test_exit_code_is_the_scripts(launch, name, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 2\n")
    failing.chmod(0o755)
    process, _ = launch(name, "cpu", *values(name), PYTHON=str(failing))
    assert process.returncode == 2


def test_files_of_the_users_folder_are_not_imported(launch, tmp_path):
    """With the real Python, from a folder with a utils.py and a networks.py of its own."""
    (tmp_path / "utils.py").write_text("raise SystemExit(99)")
    (tmp_path / "networks.py").write_text("raise SystemExit(99)")
    process, _ = launch("sh/baseline/full.sh", "cpu", "UCF-101", PYTHON=sys.executable)
    assert process.returncode == 2 and "error: unknown --dataset 'UCF-101'" in process.stderr, process.stderr


# ---------------------------------------------------------------- the environment

# A Python that has what KNOWS names: venv, ensurepip, pip, torch; one that is "old" is of 3.9. What it installs it says in the file CALL.
FAKE = """#!/usr/bin/env bash
has() { for word in $KNOWS $(cat "${0%/*}/has" 2>/dev/null); do [[ $word != "$1" ]] || return 0; done; return 1; }
case "$*" in
  "-m venv --clear --without-pip "*) has venv || exit 1; rm -rf "$5"; mkdir -p "$5/bin"; cp "$BASE" "$5/bin/python" ;;
  "-m ensurepip"*) has ensurepip || exit 1; echo pip >> "${0%/*}/has" ;;
  "-m pip install"*) has pip || exit 1; echo "$*" >> "$CALL"; [[ $KNOWS != *offline* ]] || exit 1; echo torch >> "${0%/*}/has" ;;
  "-c import pip") has pip ;;
  "-c import importlib"*) has torch ;;
  "-c import sys"*) ! has old ;;
  "-c "* | "-I -c import "*) ;;
  *) echo "$*" >> "$CALL" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """project(launcher, KNOWS) runs it in a project of our launchers, with FAKE as the only Python -> exit code, last line on stderr, calls."""
    root, place, calls = tmp_path / "our project", tmp_path / "bin", tmp_path / "calls"
    shutil.copytree(ROOT / "sh", root / "sh")
    (root / "requirements.txt").write_text("torch>=2.5\nav>=17\n")
    place.mkdir()
    for program in ("bash", "cat", "cp", "dirname", "grep", "mkdir", "rm", "sed", "sort", "tr", "uniq", "wc"):
        (place / program).symlink_to(shutil.which(program))
    (place / "python3").write_text(FAKE)
    (place / "python3").chmod(0o755)

    def project(name="sh/prepare.sh", knows="venv ensurepip", *arguments):
        calls.unlink(missing_ok=True)
        environment = {"PATH": str(place), "KNOWS": knows, "BASE": str(place / "python3"), "CALL": str(calls)}
        process = subprocess.run(["bash", root / name, *(arguments or ("custom", "videos"))], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return process.returncode, (process.stderr.splitlines() or [""])[-1], calls.read_text().splitlines() if calls.exists() else []
    project.root, project.bin = root, place
    return project


def installed_once(project, **options):
    code, said, calls = project(**options)
    assert code == 0 and len(calls) == 2 and calls[0].startswith("-m pip install ") and calls[1].startswith("-m distill_utils.prepare"), said
    code, said, calls = project(**options)
    assert code == 0 and len(calls) == 1, said  # all is there


def half_made(venv, how):
    """What a python3 -m venv or a pip install that stopped leaves, or a base Python that went away."""
    if how != "nothing":
        (venv / "bin").mkdir(parents=True)
    if how == "python without pip":
        shutil.copy(venv.parent.parent / "bin" / "python3", venv / "bin" / "python")
    if how == "link to a Python that is gone":
        (venv / "bin" / "python").symlink_to("/no/such/python")
        (venv / "installed").write_text("torch>=2.5\nav>=17\n")
    if how == "python that does not run":
        (venv / "bin" / "python").write_text("#!/no/such/interpreter")
        (venv / "bin" / "python").chmod(0o755)


@pytest.mark.parametrize("how", ("nothing", "empty folder", "python without pip", "link to a Python that is gone", "python that does not run"))
def test_half_made_environments_are_repaired(project, how):
    half_made(project.root / ".venv", how)
    installed_once(project)


def test_an_installation_that_failed_is_tried_again(project):
    code, _, calls = project(knows="venv ensurepip offline")
    assert code == 1 and len(calls) == 1
    installed_once(project)


def test_a_new_requirement_is_installed(project):
    installed_once(project)
    with open(project.root / "requirements.txt", "a") as file:
        file.write("tqdm>=4.66\n")
    installed_once(project)


NO_PYTHON = ("error: {}/.venv needs Python 3.10 or later: install it (on Debian and Ubuntu the packages python3 and python3-venv), "
             "or give PYTHON=/path/to/python")


@pytest.mark.parametrize("knows, sentence", (
    ("", NO_PYTHON), ("venv ensurepip old", NO_PYTHON),
    ("venv", "error: {}/.venv has no pip: on Debian and Ubuntu install the package python3-venv, elsewhere Python's ensurepip")))
def test_what_an_environment_needs_is_a_sentence(project, knows, sentence):
    for _ in range(2):  # the first attempt changes nothing about the second
        code, said, calls = project(knows=knows)
        assert code == 2 and said == sentence.format(project.root) and not calls
    installed_once(project)  # once it is there


def test_no_python(project):
    (project.bin / "python3").rename(project.bin / "nobody's")
    code, said, calls = project()
    assert (code, said) == (2, NO_PYTHON.format(project.root))


def test_launchers_before_anything_is_installed(project):
    """They install nothing themselves; another Python that has all packages will do."""
    name, arguments = "sh/baseline/full.sh", ("cpu", "toy")
    code, said, calls = project(name, "venv ensurepip", *arguments)
    assert code == 2 and not calls
    assert said == f"error: python3 lacks packages of requirements.txt: bash sh/quickstart.sh installs them into {project.root}/.venv, or give PYTHON=/path/to/python"
    code, said, calls = project(name, "torch", *arguments)
    assert code == 0 and calls[0].startswith("-m distill_utils.evaluate "), said
    half_made(project.root / ".venv", "python without pip")
    code, said, calls = project(name, "", *arguments)
    assert code == 2 and not calls and said.startswith(f"error: {project.root}/.venv/bin/python lacks packages of requirements.txt: "), said


def test_an_environment_of_another_python_version_is_filled_again(project):
    """As after an upgrade of the system: .venv/bin/python is there, without the packages that .venv/installed names."""
    installed_once(project)
    (project.root / ".venv" / "bin" / "has").unlink()
    code, said, calls = project("sh/baseline/full.sh", "", "cpu", "toy")
    assert code == 2 and not calls and "lacks packages of requirements.txt" in said
    installed_once(project)


@pytest.mark.parametrize("name", ("sh/baseline/DM.sh", "sh/study/tune.sh", "sh/prepare.sh"))
def test_a_signal_to_a_launcher_reaches_the_run(name, tmp_path):
    """The launcher's process is the run's: so it also ends with what a scheduler or a script ends."""
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\necho $$ > '{tmp_path}/process'\n")
    python.chmod(0o755)
    process = subprocess.Popen(["bash", ROOT / name, "cpu", "toy", "1", "1"], env={**os.environ, "PYTHON": str(python)})
    assert process.wait() == 0 and int((tmp_path / "process").read_text()) == process.pid


def test_launchers_look_for_all_packages():
    required = [re.split("[>=<]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    looked_for = re.search(r"sys.argv\[1:\]\)\)\)' \\\n +(.*?) \|\|", (ROOT / "sh" / "launch.sh").read_text())[1].split()
    assert sorted({"pillow": "PIL"}.get(name, name) for name in required) == sorted(looked_for)


def test_allocator_settings_can_be_overridden(launch, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    name = "sh/baseline/DM.sh"
    for given, expected in (({}, "0"), ({"MALLOC_MMAP_MAX_": "7"}, "7")):
        assert launch(name, "cpu", *values(name), **given)[1]["environment"]["MALLOC_MMAP_MAX_"] == expected


def test_static_dynamic_finds_the_static_memory_of_its_launcher(launch, monkeypatch, tmp_path):
    """DC.sh with SPC = 2·IPC and DM.sh with the same flags mean the same data: the one takes what the other leaves."""
    from distill_DC import parser as dc_parser
    from distill_s2d import find_static, parser

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "my videos"
    (data / "frames").mkdir(parents=True)
    (data / "list.csv").write_text("folder_name,label,split\na,walk,train\n")
    common = ["--data_path", "my videos", "--save_path", "results", "--wandb", "disabled", "--size", "48"]

    def flags(name, *arguments):
        return launch(name, "cpu", *arguments, *common)[1]["command"][1:]

    def parsed(*others):
        return parser().parse_args([*flags("sh/s2d/DM.sh", "custom", "1", "5"), "--spc", "10", *others])

    arguments = parsed()
    with pytest.raises(ValueError) as caught:
        find_static(arguments)
    command = re.search("`(.*)`", str(caught.value))[1]
    assert command == "bash sh/s2d/DC.sh GPU custom 10 --data_path 'my videos' --size 48 --save_path results"

    for spc in (10, 10, 2):
        run = start_run(dc_parser().parse_args(flags("sh/s2d/DC.sh", "custom", str(spc))), f"DC_spc{spc}")
        run.lock.close()
    with pytest.raises(ValueError, match="no finished static memory of 10 frames"):  # it has only begun
        find_static(arguments)
    for folder in tmp_path.glob("results/*/*"):
        (folder / "result.json").write_text("{}")
    found = find_static(arguments)
    assert found.name == "distilled.pt" and found.parent.name.startswith("DC_spc10_")
    shutil.copy(data / "list.csv", tmp_path / "other.csv")
    assert find_static(parsed("--list_path", "other.csv")) == found  # the same list
    for changed in (("--size", "64"), ("--seed", "1"), ("--train_clips", "2"), ("--frame_names", "img_#.jpg"), ("--stride", "2"),
                    ("--static_size", "8"), ("--mirror", "0"), ("--dsa", "flip")):
        with pytest.raises(ValueError, match="no finished static memory of 10 frames"):
            find_static(parsed(*changed))

    with open(data / "list.csv", "a") as file:
        file.write("b,walk,train\n")
    with pytest.raises(ValueError, match="no finished static memory of 10 frames"):  # it was made of another list
        find_static(arguments)
    (data / "list.csv").write_text((tmp_path / "other.csv").read_text())

    # of equal memories that were evaluated in another way, the one evaluated like this run
    alike = start_run(dc_parser().parse_args([*flags("sh/s2d/DC.sh", "custom", "10"), "--test_clips", "1"]), "DC_spc10")
    (alike.folder / "result.json").write_text("{}")
    alike.lock.close()
    assert find_static(arguments) == found and find_static(parsed("--test_clips", "1")).parent.name == alike.folder.name
    assert find_static(parsed("--test_clips", "1", "--num_eval", "7")).parent.name == alike.folder.name
    shutil.rmtree(alike.folder)

    # but not of memories that learned by other settings, however they were evaluated
    for more in ((), ("--test_clips", "1")):
        other = start_run(dc_parser().parse_args([*flags("sh/s2d/DC.sh", "custom", "10"), "--lr_img", "3", *more]), "DC_spc10")
        (other.folder / "result.json").write_text("{}")
        other.lock.close()
        with pytest.raises(ValueError, match="several finished runs have a matching static memory of 10 frames per class: choose one by --path_static"):
            find_static(parsed("--test_clips", "1"))
        shutil.rmtree(other.folder)

    other = start_run(dc_parser().parse_args([*flags("sh/s2d/DC.sh", "custom", "10"), "--lr_img", "3"]), "DC_spc10")
    (other.folder / "result.json").write_text("{}")
    other.lock.close()
    with pytest.raises(ValueError, match="several finished runs have a matching static memory of 10 frames per class: choose one by --path_static"):
        find_static(arguments)
    (other.folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{other.folder.name}/config.json is damaged"):
        find_static(arguments)


def test_trajectory_matching_finds_the_experts_of_its_launcher(launch, monkeypatch, tmp_path):
    """On both launchers, with the data set's own values given or not; experts of other data are refused."""
    import buffer
    import distill_MTT
    from distill_MTT import prepare

    monkeypatch.setattr(distill_MTT, "open_experts", lambda args, net: None)  # here they are empty files
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy_splits1.csv").write_text("folder_name,label,split\na,walk,train\n")
    common = ["--data_path", str(tmp_path), "--save_path", "results", "--wandb", "disabled"]

    def flags(name, *arguments):
        _, call = launch(name, "cpu", "toy", *arguments, *common)
        return program_of(call)[1].parse_args(call["command"][1:])

    for name in "sh/baseline/MTT.sh", "sh/s2d/MTT.sh":
        with pytest.raises(ValueError) as caught:
            prepare(flags(name, "1", "5"))
        command = re.search("`(.*)`", str(caught.value))[1]
        assert command == f"bash sh/baseline/buffer.sh GPU toy --data_path {tmp_path} --save_path results"
        with pytest.raises(ValueError, match="buffer.sh GPU toy --train_epochs 36 --data_path"):  # as many as will be matched
            prepare(flags(name, "1", "5", "--max_start_epoch", "35", "--expert_epochs", "2"))
    run = start_run(flags("sh/baseline/buffer.sh", "--num_experts", "1"), "buffer")
    for name in "replay_buffer_0.pt", "result.json":
        (run.folder / name).write_text("{}")
    for name in "sh/baseline/MTT.sh", "sh/s2d/MTT.sh":
        for same in (), ("--frames", "8", "--size", "64"), ("--seed", "3"), ("--buffer_path", str(run.folder)):
            assert [path.resolve() for path in prepare(flags(name, "1", "5", *same))] == [run.folder / "replay_buffer_0.pt"]
        for other in ("--size", "112"), ("--frames", "16"), ("--mirror", "0.0"):
            with pytest.raises(ValueError, match="no finished buffer of experts"):
                prepare(flags(name, "1", "5", *other))
            with pytest.raises(ValueError, match=f"were trained with a different {other[0][2:]}: "):
                prepare(flags(name, "1", "5", *other, "--buffer_path", str(run.folder)))
    shutil.copytree(tmp_path / "toy", tmp_path / "moved" / "toy")
    common[1] = str(tmp_path / "moved")  # the same list in another place
    arguments = flags("sh/baseline/MTT.sh", "1", "5", "--buffer_path", str(run.folder))
    assert prepare(arguments) == [run.folder / "replay_buffer_0.pt"]
    (run.folder / "replay_buffer_0.pt").rename(run.folder / "replay_buffer_1.pt")
    for found in ("--buffer_path", str(run.folder)), ():  # a folder that was copied in part
        with pytest.raises(ValueError, match=r"lacks replay_buffer_0.pt \(1 of 1 experts are missing\): copy it again"):
            prepare(flags("sh/baseline/MTT.sh", "1", "5", *found))
    (run.folder / "result.json").unlink()
    with pytest.raises(ValueError, match="are not finished: let buffer.py finish first"):
        prepare(arguments)
    (tmp_path / "moved" / "toy" / "toy_splits1.csv").write_text("folder_name,label,split\nb,walk,train\n")
    with pytest.raises(ValueError, match="were trained with a different list: give the same"):
        prepare(arguments)
    assert buffer.parser().get_default("train_epochs") == 10


# ---------------------------------------------------------------- the trees of the method's authors, as they are

def ucf101(root, lists):
    """Their frames and lists; `lists` are the names that the list goes by."""
    rows = ["folder_name,label,split"]
    for label, split, number in itertools.product(("Biking", "Walk"), ("train", "test"), (1, 2)):
        folder = f"v_{label}_g{'08' if split == 'train' else '01'}_c0{number}"
        write_frames(root / "UCF101" / "jpegs_112" / folder, 15 + 4 * number, size=(112, 112), seed=len(rows))
        rows.append(f"{folder},{label},{split}")
    for name in lists:
        (root / "UCF101" / name).write_text("\n".join(rows) + "\n")
    (root / "UCF101" / "UCF101actions.pkl").write_bytes(b"\x80\x04nothing that anybody reads")


def hmdb51(root, lists):
    rows = ["folder_name,label,split"]
    for name, label, split in (("Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!_brush_hair_h_cm_np1_fr_goo_0", "brush_hair", "train"),
                               ("Geena_und_die_Radschl_ge___;-)_cartwheel_f_cm_np1_fr_med_2", "cartwheel", "train"),
                               ("(Rad)Schlag_die_Bank!_cartwheel_f_cm_np1_le_med_0", "cartwheel", "test"),
                               ("indianrapunzels_com---silky_long_hair_brushing_brush_hair_u_cm_np2_fr_goo_0", "brush_hair", "test")):
        write_frames(root / "HMDB51" / "jpegs_112" / name, 20, size=(112, 112), seed=len(rows))
        rows.append(f"{name},{label},{split}")
    for name in lists:
        (root / "HMDB51" / name).write_text("\n".join(rows) + "\n")


def kinetics(root, lists):
    """What could not be extracted has an empty folder, and is among the replacements."""
    root, header = root / "Kinetics", "label,youtube_id,time_start,time_end,split"
    for number, folder in enumerate(("train/-abc_000005_000015", "train/x_y_000103_000113", "val/NA_000000_000010", "val/q_000001_000011",
                                     "replacement/x_y_000103_000113", "replacement/zzz_000001_000011", "test/ttt_000001_000011")):
        write_frames(root / folder, 5 if folder.startswith("val/q") else 8, size=(64, 64), seed=number, name="{:02d}.jpg")
    for path in (root / "train" / "x_y_000103_000113").iterdir():
        path.unlink()
    (root / "train.csv").write_text("\n".join([header, "abseiling,-abc,5,15,train", "zumba,x_y,103,113,train", "zumba,zzz,1,11,train", ""]))
    (root / "validate.csv").write_text("\n".join([header, "zumba,NA,0,10,validate", "abseiling,q,1,11,validate", ""]))
    (root / "test.csv").write_text("\n".join([header, "zumba,ttt,1,11,test", ""]))
    (root / "broken_videos.txt").write_text("train/x_y_000103_000113.mp4\n")
    (root / "short_videos.txt").write_text("val/q_000001_000011.mp4,5\n")


def ssv2(root, lists):
    """Numbers of classes, and frames that keep the numbers that they had in the video."""
    root = root / "SSv2"
    for number in range(6):
        folder = root / lists[number % len(lists)] / str(700 + number)
        write_frames(folder, 8, size=(64, 64), seed=number, name="{:010d}.jpg")
        for path in sorted(folder.iterdir(), reverse=True):
            path.rename(path.with_name(f"{5 * int(path.stem) - 3:010d}.jpg"))
    videos = [{"id": str(700 + number), "class": number % 2 * 2} for number in range(6)]
    (root / "annot_train.json").write_text(json.dumps(videos[:4]))
    (root / "annot_val.json").write_text(json.dumps(videos[4:]))
    (root / "class_list.json").write_text(json.dumps(["approaching something", "unused", "holding something"]))
    (root / "frame").mkdir(exist_ok=True)


@pytest.mark.parametrize("dataset, tree, lists, classes", (
    ("UCF101", ucf101, ["ucf101_splits1.csv", "ucf50_splits1.csv"], ["Biking", "Walk"]),
    ("miniUCF101", ucf101, ["ucf50_splits1.csv"], ["Biking", "Walk"]),
    ("miniUCF101", ucf101, ["miniucf_splits1.csv"], ["Biking", "Walk"]),
    ("miniUCF101", ucf101, ["ucf50_splits1.csv", "miniucf_splits1.csv"], ["Biking", "Walk"]),
    ("HMDB51", hmdb51, ["hmdb51_splits.csv"], ["brush_hair", "cartwheel"]),
    ("Kinetics400", kinetics, [], ["abseiling", "zumba"]),
    ("SSv2", ssv2, ["frame"], ["approaching something", "holding something"]),
    ("SSv2", ssv2, ["jpegs_112"], ["approaching something", "holding something"]),
    ("SSv2", ssv2, ["frame", "jpegs_112"], ["approaching something", "holding something"]),
))
def test_the_authors_trees_load_as_they_are(launch, command, tmp_path, dataset, tree, lists, classes):
    """By the data set's launcher, in its own sizes."""
    tree(tmp_path / "data", lists)
    for folder in (tmp_path / "data").iterdir():
        (folder / "._companion.csv").write_bytes(b"\0\5\26\7")
    small = ["--data_path", tmp_path / "data", "--pack_path", tmp_path / "packs", "--save_path", tmp_path / "results", "--width", "4", "--Iteration", "1",
             "--eval_it", "1", "--batch_real", "2", "--num_eval", "1", "--epoch_eval_train", "1", "--wandb", "disabled"]
    _, call = launch("sh/baseline/DM.sh", "cpu", dataset, "1", "1", *map(str, small))
    command.submit("distill_DM", call["command"][1:])
    code, output = command.end()
    assert code == 0, output
    result, = (json.loads(path.read_text()) for path in tmp_path.glob(f"results/{dataset}/*/result.json"))
    assert result["class_names"] == classes
    assert ("fewer than 8 frames and are stretched" in output) == (dataset == "Kinetics400")


def test_two_lists_of_one_data_set_that_are_not_the_same(tmp_path):
    from distill_utils.datasets import read_videos
    ucf101(tmp_path, ["ucf50_splits1.csv", "miniucf_splits1.csv"])
    assert len(read_videos("miniUCF101", tmp_path)[0]) == 8
    with open(tmp_path / "UCF101" / "miniucf_splits1.csv", "a") as file:
        file.write("v_more,Walk,train\n")
    with pytest.raises(ValueError, match="ucf50_splits1.csv and miniucf_splits1.csv beside it are different lists of one data set: choose one by --list_path"):
        read_videos("miniUCF101", tmp_path)
    assert len(read_videos("miniUCF101", tmp_path, list_path=tmp_path / "UCF101" / "miniucf_splits1.csv")[0]) == 9


def test_prepare(launch, tmp_path):
    """Its positionals are not a GPU's; relative folders stay the user's, what follows overrides."""
    name = "sh/prepare.sh"
    process, call = launch(name, "custom", "my videos", "--quality", "80", "--groups", "_(g[0-9]+)_")
    assert process.returncode == 0 and call["folder"] == str(tmp_path), process.stderr
    assert call["command"][:2] == ["-m", "distill_utils.prepare"]
    flags = vars(importlib.import_module("distill_utils.prepare").parser().parse_args(call["command"][2:]))
    assert (flags["dataset"], flags["videos"], flags["quality"]) == ("custom", pathlib.Path("my videos"), 80)
    for given in ((), ("custom",)):
        process, call = launch(name, *given)
        assert process.returncode == 2 and call is None and process.stderr.startswith("usage: bash sh/prepare.sh DATASET VIDEOS [")


def test_tests(launch):
    """All tests, or with --quick, in any place, those that are not marked slow; all else is pytest's."""
    for given, passed in (((), []), (("--quick",), ["-m", "not slow"]), (("-x", "--quick", "-k", "a or b"), ["-x", "-m", "not slow", "-k", "a or b"])):
        process, call = launch("sh/test.sh", *given)
        assert process.returncode == 0 and call["command"][:3] == ["-m", "pytest", "-n"] and call["command"][4:] == ["--dist", "loadfile", "-q", *passed, "tests"], process.stderr
        assert call["folder"] == str(ROOT) and call["environment"]["WANDB_MODE"] == "disabled"
    process, call = launch(".ci/run")
    assert process.returncode == 0 and "not slow" not in call["command"]  # everything


# ---------------------------------------------------------------- studies: launchers that call others, many times

@pytest.mark.parametrize("method", ("DM", "MTT"))
@pytest.mark.parametrize("dataset, T", (("toy", 8), ("miniUCF101", 16)))
def test_taxonomy(study, tmp_path, method, dataset, T):
    process, calls = study("sh/study/taxonomy.sh", "cpu", dataset, "5", "--lr_img", "7", METHOD=method, RESULTS=str(tmp_path / "grid"))
    assert process.returncode == 0, process.stderr
    *cells, final = calls
    flags = [parse(call) for call in cells]
    assert all(call["command"][0].endswith(f"distill_{method}.py") for call in cells)
    assert all((each["dataset"], each["ipc"], each["lr_img"], each["save_path"]) == (dataset, 5, 7.0, tmp_path / "grid") for each in flags)
    grid = {(each["n_syn"], each["interpolation"]) for each in flags if each["n_syn"]}
    powers = [2 ** k for k in range(10) if 2 ** k < T]
    assert grid == {(T, "duplicate"), (T, "parametric"), (1, "duplicate"), (1, "parametric")} | {
        (n, kind) for n in powers[1:] for kind in ("duplicate", "linear", "parametric")}
    assert [each["n_real"] for each in flags if each["n_real"]] == powers
    assert [each["segments"] for each in flags if each["segments"] > 1] == powers[1:]
    assert len({json.dumps(each, default=str) for each in flags}) == len(flags)  # no cell twice
    assert final["command"] == ["-m", "distill_utils.table", str(tmp_path / "grid"), "--csv", str(tmp_path / "grid" / "taxonomy.csv")]


def test_taxonomy_goes_on_after_a_cell_that_fails(study):
    process, calls = study("sh/study/taxonomy.sh", "cpu", "toy", "1", FAILS="--segments", CODE="2")
    assert process.returncode == 1 and process.stderr.splitlines()[-2:] == ["failed: DM --segments 2", "failed: DM --segments 4"]
    assert calls[-1]["command"][1] == "distill_utils.table"
    process, calls = study("sh/study/taxonomy.sh", "cpu", "toy", "1", METHOD="DC")
    assert process.returncode == 2 and not calls and "METHOD must be DM or MTT, not 'DC'" in process.stderr


def test_quickstart(study):
    """Every call is one that its script takes, at IPC 1, and each method is run for each selection; flags given last reach all scripts."""
    process, calls = study("sh/quickstart.sh", "cpu", "--precision", "fp32")
    assert process.returncode == 0, process.stderr
    cores, toy, *runs, final, film = calls
    assert cores["command"] == ["-c", "from distill_utils.machine import cores; print(cores())"]
    flags = [parse(call) for call in runs]
    assert film["command"][:2] == ["-m", "distill_utils.export"] and film["command"][3:6] == ["--format", "gif", "--memories"]
    assert toy["command"] == ["-m", "distill_utils.toy"] and final["command"][1:3] == ["distill_utils.table", "--over_seeds"]
    assert {(each["device"], each["dataset"], each["precision"], each["size"], each["width"], str(each["save_path"])) for each in flags} == \
        {("cpu", "toy", "fp32", 48, 32, final["command"][3])}
    evaluated, (experts,) = ([each for each in flags if ("num_eval" in each) == whether] for whether in (True, False))
    assert {each.get("ipc") or each["spc"] for each in evaluated} == {1}
    settings = [{name: value for name, value in each.items() if name != "seed"} for each in evaluated]
    assert [sorted(each["seed"] for each in evaluated[n:n + 3]) for n in (0, 3, 6, 9)] == [[0, 1, 2]] * 4  # those of a chapter run side by side
    assert len(evaluated) == 12 and all(settings[n] == settings[n // 3 * 3] for n in range(12))
    assert experts["train_epochs"] >= max(each["max_start_epoch"] + each["expert_epochs"] - 1 for each in evaluated if "syn_steps" in each)
    assert "[5/5] static-dynamic MTT" in process.stdout


@pytest.mark.parametrize("launcher, given", (("sh/quickstart.sh", ("cpu", "--save_path", "x")), ("sh/quickstart.sh", ("cpu", "--seed=3")),
                                             ("sh/study/frontier.sh", ("cpu", "toy", "--save_path=x")), ("sh/study/frontier.sh", ("cpu", "toy", "--seed", "3")),
                                             ("sh/study/taxonomy.sh", ("cpu", "toy", "1", "--save_path", "x"))))
def test_flags_that_a_launcher_sets_itself(study, launcher, given):
    process, calls = study(launcher, *given)
    flag = next(word for word in given if word.startswith("--")).partition("=")[0]
    assert process.returncode == 2 and not calls and process.stderr.startswith(f"error: this launcher sets {flag}: ")


def test_quickstart_ends_at_the_first_run_that_fails(study):
    process, calls = study("sh/quickstart.sh", "cpu", FAILS="--spc", CODE="2")  # that of DC
    assert process.returncode == 2 and not any("buffer.py" in word for call in calls for word in call["command"])


def test_tune(study, tmp_path):
    """All arguments are the search's: where GPU and data set go, its flags, and those that are the script's, in their order."""
    process, calls = study("sh/study/tune.sh", "0,1", "toy", "s2d-MTT", "--ipc", "5", "--trials", "7", "--train_static", "--search", "lr_hal=log:1:2", "--size", "48")
    (call,) = calls
    assert process.returncode == 0 and call["command"][:2] == ["-m", "distill_utils.tune"], process.stderr
    flags = parse(call)
    assert (flags["gpu"], flags["dataset"], flags["method"], flags["trials"], flags["search"]) == ("0,1", "toy", "s2d-MTT", 7, ["lr_hal=log:1:2"])
    assert flags["flags"] == ["--ipc", "5", "--train_static", "--size", "48"]


FRONTIER = ("random", "herding", "k-center", "DM", "DM few", "MTT", "MTT few", "FRePo", "static", "s2d real", "s2d DM", "s2d MTT", "s2d FRePo")


def kind_of(flags):
    """Which of FRONTIER's methods the flags of a call are."""
    if "spc" in flags and "lr_dynamic" not in flags:
        return "static"
    if "lr_dynamic" in flags:
        return f"s2d {flags['method'] if flags['Iteration'] else 'real'}"
    if "method" in flags:
        return flags["method"]
    return ("MTT" if "syn_steps" in flags else "FRePo" if "batch_target" in flags else "DM") + (" few" if flags["n_syn"] else "")


def test_frontier(study, tmp_path):
    """Every method at every budget for every seed, with flags that its script takes; settings of a file, and flags that reach all scripts."""
    (tmp_path / "small.sh").write_text("budgets=(1000 2000)\nbeyond=(3000)\nseeds=(4 5)\ncompact_DM=(--lr_dynamic 7 --lr_static 8 --Iteration 9)\n")
    process, calls = study("sh/study/frontier.sh", "cpu", "toy", "--width", "32", RESULTS=str(tmp_path / "grid"), SETTINGS="small.sh")
    assert process.returncode == 0, process.stderr
    full, experts, *runs, final, page = calls
    flags = [parse(call) for call in (full, experts, *runs)]
    assert {(each["dataset"], each["width"], each["save_path"]) for each in flags} == {("toy", 32, tmp_path / "grid")}
    assert [(each["bytes"], each["seed"], kind_of(each)) for each in flags[2:]] == [(size, seed, kind) for size in (1000, 2000) for seed in (4, 5) for kind in FRONTIER] + [
        (3000, 4, "random"), (3000, 5, "random")]
    assert {each["storage"] for each in flags[2:] if "storage" in each} == {"uint8", "uint4"}
    assert flags[1]["train_epochs"] >= max(each["max_start_epoch"] + each["expert_epochs"] - 1 for each in flags if "syn_steps" in each)
    compact, = {(each["lr_dynamic"], each["lr_static"], each["Iteration"], each["static"], each["init_dynamic"], each["init_hal"], each["train_static"])
                for each in flags[2:] if kind_of(each) == "s2d DM"}
    assert compact == (7.0, 8.0, 9, "real", "residual", "identity", True)
    assert final["command"] == ["-m", "distill_utils.table", "--over_seeds", str(tmp_path / "grid"), "--csv", str(tmp_path / "grid" / "frontier.csv")]
    assert page["command"] == ["-m", "distill_utils.report", str(tmp_path / "grid"), "--out", str(tmp_path / "grid" / "report")]


def test_frontier_goes_on_after_a_run_that_is_refused_or_fails(study, tmp_path):
    (tmp_path / "small.sh").write_text("budgets=(1000)\nseeds=(0)\nbeyond=()\n")
    for code, sentence in ((2, "left out (see the error above): herding at 1000 bytes, seed 0"), (1, "failed: herding at 1000 bytes, seed 0")):
        process, calls = study("sh/study/frontier.sh", "cpu", "toy", SETTINGS="small.sh", FAILS="herding", CODE=str(code))
        assert process.returncode == (code == 1) and process.stderr.splitlines() == [sentence] and len(calls) == 2 + len(FRONTIER) + 2
    process, _ = study("sh/study/frontier.sh", "cpu", "toy", SETTINGS="small.sh", FAILS="--num_experts", CODE="2")
    assert process.returncode == 1 and process.stderr.splitlines() == ["failed: experts"]  # it has no budget that could be too small
    for code in 130, 143:
        process, calls = study("sh/study/frontier.sh", "cpu", "toy", SETTINGS="small.sh", FAILS="herding", CODE=str(code))
        assert process.returncode == code and len(calls) == 4
    process, calls = study("sh/study/frontier.sh", "cpu", "toy", SETTINGS="nowhere.sh")
    assert process.returncode == 2 and not calls and process.stderr == "error: SETTINGS=nowhere.sh cannot be read\n"


def test_dynamics(study, tmp_path):
    process, calls = study("sh/study/dynamics.sh", "cpu", "toy", "--save_path", str(tmp_path / "some where"), "--seed", "3")
    assert process.returncode == 0, process.stderr
    whole, still, final = calls
    assert [parse(call)["n_real"] for call in (whole, still)] == [None, 1] and parse(still)["seed"] == 3
    assert final["command"] == ["-m", "distill_utils.dynamics", str(tmp_path / "some where")]


def test_cross_architecture(study):
    process, calls = study("sh/study/cross_arch.sh", "cpu", "results/toy/a run", "--networks", "r3d_18", "--num_eval", "1")
    flags = parse(calls[0])
    assert process.returncode == 0 and (flags["run"], flags["networks"], flags["num_eval"]) == (pathlib.Path("results/toy/a run"), ["r3d_18"], 1)
    for name, count in (("taxonomy", 3), ("dynamics", 2), ("cross_arch", 2), ("tune", 3), ("frontier", 2)):
        for given in range(count):
            process, calls = study(f"sh/study/{name}.sh", *["cpu", "toy", "1"][:given])
            assert process.returncode == 2 and not calls and process.stderr.startswith(f"usage: bash sh/study/{name}.sh GPU ")
