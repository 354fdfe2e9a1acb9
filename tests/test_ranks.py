"""Several processes: they compute what one does, one that is killed ends all, and any number of them goes on from any other's checkpoint."""
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import ranks

import utils
from utils import ROOT

PYTHON = [sys.executable, "-m"]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
               "CUDA_VISIBLE_DEVICES": ""}
RUN = "--frames 8 --size 43 --test_clips 1 --num_eval 3 --epoch_eval_train 1 --batch_real 2 --Iteration 4 --eval_it 2".split()


def same(one, other, relative):
    """Whether two nested results agree: tensors and losses relative to their size, everything else exactly."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and (one.double() - other.double()).norm() <= relative * other.double().norm()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], relative) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair, relative) for pair in zip(one, other))
    return one == other or abs(one - other) <= relative * abs(other)


@pytest.mark.parametrize("processes", (2, 4))  # more than there are classes, too
def test_several_processes_compute_what_one_does(tmp_path, processes):
    subprocess.run([*PYTHON, "distill_utils.torchrun", "--nproc_per_node", str(processes), str(ROOT / "tests" / "ranks.py"), str(tmp_path)],
                   env=ENVIRONMENT, check=True, timeout=300)
    alone = tmp_path / "alone"
    alone.mkdir()
    every, one = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)], ranks.results(alone)
    for name in one:
        assert same(every[0][name], one[name], 0 if name == "evaluation" else 1e-12), name
    shares = [[[step.pop("gradients") for step in found[0]] for name, found in each.items() if name != "evaluation"] for each in every]
    for each, gradients in zip(every, shares):
        assert same(each, every[0], 0) and same(gradients, shares[0], 0)  # to the bit


# ---------------------------------------------------------------- as a user starts them

@pytest.fixture
def script(tiny):
    """script(launcher, gpu, save_path, *flags) -> the started launcher, on the tiny data."""
    def start(launcher, gpu, save_path, *flags):
        command = ["bash", str(ROOT / launcher), gpu, "custom", *flags, "--data_path", str(tiny), "--pack_path", str(tiny.parent / "packs"),
                   "--save_path", str(tiny.parent / save_path)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


def finished(process, code=0):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output, errors


def folder(tiny, save_path, name):
    found, = (tiny.parent / save_path).glob(f"custom-*/{name}_*")
    return found


def lines(run):
    """Metrics without times."""
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def workers(tiny):
    """Process numbers of those that work on this test's data, by rank."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = (path / "cmdline").read_bytes(), dict(
                pair.split(b"=", 1) for pair in (path / "environ").read_bytes().split(b"\0") if b"=" in pair)
        except OSError:
            continue
        if str(tiny).encode() in arguments and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(path.name)
    return found


def test_two_processes_write_what_one_does(script, tiny):
    output, _ = finished(script("sh/baseline/DM.sh", "cpu*2", "two", "10", "1", *RUN))
    assert output.count("run folder") == 1 and "2 processes" in output and output.count("result:") == 1
    finished(script("sh/baseline/DM.sh", "cpu", "one", "10", "1", *RUN))
    two, one = folder(tiny, "two", "DM"), folder(tiny, "one", "DM")
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()} and two.name == one.name
    assert same(lines(two)[0], lines(one)[0], 0)  # the same start and the same networks
    assert len(lines(two)) == len(lines(one)) == 3
    assert same(*(torch.load(run / "distilled.pt")["videos"] for run in (two, one)), 1e-4)


def test_a_killed_process_ends_all_and_one_goes_on(script, tiny):
    flags = ["10", "1", *RUN, "--Iteration", "60", "--eval_it", "1000", "--checkpoint_seconds", "0"]
    process = script("sh/baseline/DM.sh", "cpu*2", "killed", *flags)
    while not list(tiny.parent.glob("killed/*/*/checkpoint.pt")):
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    os.kill(workers(tiny)[1], signal.SIGKILL)
    _, errors = finished(process, 128 + signal.SIGKILL)
    assert errors.splitlines()[-1] == ("process 1 was ended by SIGKILL: the same command goes on from the last checkpoint, "
                                       "with any number of processes")
    assert "Traceback" not in errors and not workers(tiny)
    output, _ = finished(script("sh/baseline/DM.sh", "cpu", "killed", *flags))
    assert "resumed at iteration" in output
    finished(script("sh/baseline/DM.sh", "cpu", "whole", *flags))
    assert same(*(torch.load(folder(tiny, place, "DM") / "distilled.pt")["videos"] for place in ("killed", "whole")), 1e-3)


def test_experts_and_trajectories_of_two_processes(script, tiny):
    """Three experts by two processes are those of one, to the bit; two trajectories a step lead to the same set."""
    sizes = "--frames 8 --size 43 --test_clips 1".split()
    for gpu, place in (("cpu*2", "two"), ("cpu", "one")):
        finished(script("sh/baseline/buffer.sh", gpu, place, *sizes, *"--num_experts 3 --train_epochs 2 --batch_train 3 --lr_teacher 0.1".split()))
        finished(script("sh/baseline/MTT.sh", gpu, place, "100", "1", *sizes, *"--num_eval 1 --epoch_eval_train 1 --Iteration 2 --syn_steps 2".split(),
                        *"--max_start_epoch 2 --trajectories_per_step 2".split()))
    two, one = (folder(tiny, place, "buffer") for place in ("two", "one"))
    for number in range(3):
        assert same(*(torch.load(run / f"replay_buffer_{number}.pt") for run in (two, one)), 0)
    assert lines(two) == lines(one) and [line["iteration"] for line in lines(two)] == [0, 0, 1, 1, 2, 2]
    assert same(*(torch.load(folder(tiny, place, "MTT") / "distilled.pt")["videos"] for place in ("two", "one")), 1e-4)


def test_a_selection_is_made_once(script, tiny):
    """Herding by two processes: a module instead of a script, the feature network trained by the first alone."""
    flags = "--frames 8 --size 43 --test_clips 1 --num_eval 2 --epoch_eval_train 1 --feature_epochs 1".split()
    for gpu, place in (("cpu*2", "two"), ("cpu", "one")):
        finished(script("sh/baseline/coreset.sh", gpu, place, "herding", "2", *flags))
    two, one = (folder(tiny, place, "coreset") for place in ("two", "one"))
    assert lines(two) == lines(one) and same(*(torch.load(run / "distilled.pt")["videos"] for run in (two, one)), 0)


def test_two_machines(tiny):
    """The README's line for several machines: two agents of torchrun that meet on this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [*PYTHON, "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "distill",
               "--rdzv_endpoint", f"localhost:{port}", str(ROOT / "distill_DM.py"), "--device", "cpu", "--dataset", "custom", *RUN,
               "--Iteration", "1", "--data_path", str(tiny), "--pack_path", str(tiny.parent / "packs"), "--save_path", str(tiny.parent / "machines")]
    agents = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [finished(agent)[0] for agent in agents]
    assert sum("2 processes" in output for output in outputs) == 1
    assert (folder(tiny, "machines", "DM") / "result.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["--ipc", "0"], "distill_DM.py: error: argument --ipc: '0' is not a whole number of at least 1"),
    (["--ipc", "50"], "distill_DM.py: error: class rise has fewer training clips than the 50 asked for: "
                      "lower --ipc, --spc or --dpc, or give more --train_clips")])
def test_bad_input_is_one_sentence_of_all(script, flags, message):
    _, errors = finished(script("sh/baseline/DM.sh", "cpu*2", "bad", "10", "1", *RUN, *flags), 2)
    assert errors.splitlines()[-1] == message and errors.count("error:") == 1 and "Traceback" not in errors


# ---------------------------------------------------------------- how they end

FAILS = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch, utils
def main(args):
    torch.manual_seed(utils.rank())  # as none should
    if utils.rank() == 1:
        {fault}
    print("said by", utils.rank())
    utils.sum_over_ranks(torch.zeros(1))
    {then}
    time.sleep(60)
parser = __import__("argparse").ArgumentParser(prog="fails")
parser.add_argument("--device", default="cpu")
utils.run_script(main, parser)
"""


@pytest.fixture
def failing(tmp_path):
    """failing(fault, then) -> the started three processes, the second of which fails while the others wait for it, or that meet for `then`."""
    def start(fault, then="pass", **environment):
        (tmp_path / "fails.py").write_text(FAILS.format(root=str(ROOT), fault=fault, then=then))
        return subprocess.Popen([*PYTHON, "distill_utils.torchrun", "--nproc_per_node", "3", str(tmp_path / "fails.py")], text=True,
                                env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start


@pytest.mark.parametrize("fault, code, message", [
    ("raise ValueError('a sentence for the user')", 2, "fails: error: a sentence for the user"),
    ("raise KeyError('a fault of ours')", 1, "process 1 ended with exit code 1"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV,
     "process 1 was ended by SIGSEGV: the same command goes on from the last checkpoint, with any number of processes")])
def test_the_process_that_failed_is_the_one_that_is_heard(failing, fault, code, message):
    output, errors = finished(failing(fault), code)
    assert errors.splitlines()[-1] == message and output == "said by 0\n"
    assert ("Traceback" in errors) == (code == 1) and ("a fault of ours" in errors) == (code == 1)


def test_a_failure_of_the_work_together_is_told(failing):
    """As NCCL's where two processes are given the same GPU: a RuntimeError within a collective."""
    then = "utils.dist.all_reduce = lambda tensor: (_ for _ in ()).throw(RuntimeError('duplicate GPU detected')); utils.sum_over_ranks(torch.zeros(1))"
    _, errors = finished(failing("pass", then), 3)
    assert errors.splitlines()[-1] == "fails: error: the work with the other processes failed: duplicate GPU detected"


def test_no_process_outlives_torchrun(failing, tmp_path):
    process = failing("pass")
    assert process.stdout.readline() == "said by 0\n"
    assert len(workers(tmp_path)) == 3
    process.kill()
    process.wait()
    for _ in range(100):
        if not workers(tmp_path):
            return
        time.sleep(0.1)
    raise AssertionError(workers(tmp_path))


def test_states_that_part_are_noticed(failing):
    """What is learned is compared at each evaluation, to the bit."""
    then = ("net = torch.nn.Linear(2, 1); run = utils.Run.__new__(utils.Run); run.stateful, run.iteration, run.folder = {'set': net}, 7, 'here'; "
            "run.check_same()")
    _, errors = finished(failing("pass", then), 2)
    assert errors.splitlines()[-1] == "fails: error: the processes do not have the same state at iteration 7: start again from the checkpoint in here"


def test_shares_are_whole_and_the_first_has_the_most(monkeypatch):
    for processes in range(1, 9):
        monkeypatch.setattr(utils, "world_size", lambda: processes)
        for count in range(12):
            shares = []
            for number in range(processes):
                monkeypatch.setattr(utils, "rank", lambda number=number: number)
                shares.append(utils.own(count))
            assert [number for share in shares for number in share] == list(range(count))
            assert len(shares[0]) == max(map(len, shares)) <= min(map(len, shares)) + 1
