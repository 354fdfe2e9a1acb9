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
import ranks
import torch
from conftest import HANG

from distill_utils.processes import rank_share
from utils import ROOT

PYTHON = [sys.executable, "-m"]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
               "CUDA_VISIBLE_DEVICES": ""}
RUN = "--frames 8 --size 43 --test_clips 1 --width 8 --lr_img 10 --ipc 1 --num_eval 3 --epoch_eval_train 1 --batch_real 2 --Iteration 4 --eval_it 2".split()


def same(one, other, relative):
    """Whether two nested results agree: tensors and losses relative to their size, everything else exactly."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and (one.double() - other.double()).norm() <= relative * other.double().norm()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], relative) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair, relative) for pair in zip(one, other))
    return one == other or abs(one - other) <= relative * abs(other)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return ranks.results(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("processes", (2, 4))  # more than there are classes, too
def test_several_processes_compute_what_one_does(command, alone, tmp_path, processes):
    command.submit("ranks", [tmp_path], processes=processes)
    assert command.codes() == [0] * processes, (command.messages(), command.output.read_text())
    every = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name in alone:
        assert same(every[0][name], alone[name], 0 if name == "evaluation" else 1e-12), name
    shares = [[[step.pop("gradients") for step in found[0]] for name, found in each.items() if name != "evaluation"] for each in every]
    for each, gradients in zip(every, shares):
        assert same(each, every[0], 0) and same(gradients, shares[0], 0)  # to the bit


def test_states_that_part_are_noticed(command, tmp_path):
    """What is learned is compared at each evaluation, to the bit."""
    command.submit("ranks", [tmp_path, "--part"], processes=2)
    assert command.codes() == [2, 2]
    assert command.messages() == [
        f"ranks: error: the processes do not have the same state at iteration 7: start again from the checkpoint in {tmp_path}"] * 2


@pytest.fixture
def both(command, tmp_path):
    """both(script, *flags) -> the run folders of two processes and of one, below the folders two and one."""
    def both(script, *flags):
        for processes, place in ((2, "two"), (1, "one")):
            command.submit(script, command.arguments(script, tmp_path / place, flags), processes=processes)
            assert command.codes() == [0] * processes, (command.messages(), command.output.read_text())
        return [next((tmp_path / place).glob(f"custom-*/{NAMES[script]}_*")) for place in ("two", "one")]
    return both


NAMES = {"buffer": "buffer", "distill_MTT": "MTT", "distill_utils.coreset": "coreset"}


def test_experts_and_trajectories_of_two_processes(both):
    """Three experts by two processes are those of one, to the bit; two trajectories a step lead to the same set."""
    two, one = both("buffer", "--num_experts", 3)
    for number in range(3):
        assert same(*(torch.load(run / f"replay_buffer_{number}.pt") for run in (two, one)), 0)
    assert lines(two) == lines(one) and [line["iteration"] for line in lines(two)] == [0, 0, 1, 1, 2, 2]
    runs = both("distill_MTT", "--Iteration", 2, "--eval_it", 10, "--trajectories_per_step", 2)
    assert same(*(torch.load(run / "distilled.pt")["videos"] for run in runs), 1e-4)


def test_a_selection_is_made_once(both):
    """Herding by two processes, the feature network trained by the first alone."""
    two, one = both("distill_utils.coreset", "--method", "herding", "--ipc", 2, "--num_eval", 2, "--feature_epochs", 1)
    assert lines(two) == lines(one) and same(*(torch.load(run / "distilled.pt")["videos"] for run in (two, one)), 0)


# ---------------------------------------------------------------- as a user starts them

@pytest.fixture
def script(command, tmp_path):
    """script(launcher, gpu, save_path, *flags) -> the started launcher, on the tiny data."""
    def start(launcher, gpu, save_path, *flags, **environment):
        line = ["bash", str(ROOT / launcher), gpu, "custom", *flags, "--data_path", str(command.folder / "data"),
                "--pack_path", str(command.folder / "packs"), "--save_path", str(tmp_path / save_path)]
        return subprocess.Popen(line, env={**ENVIRONMENT, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


def finished(process, code=0):
    output, errors = process.communicate()
    assert process.returncode == code, errors
    return output, errors


def folder(tmp_path, save_path):
    found, = (tmp_path / save_path).glob("custom-*/DM_*")
    return found


def lines(run):
    """Metrics without times."""
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def workers(folder):
    """Process numbers of the ranks that work on this folder, by rank."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = (path / "cmdline").read_bytes(), dict(
                pair.split(b"=", 1) for pair in (path / "environ").read_bytes().split(b"\0") if b"=" in pair)
        except OSError:
            continue
        if str(folder).encode() in arguments and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(path.name)
    return found


FLAGS = ["10", "1", *RUN, "--checkpoint_seconds", "0"]


@pytest.fixture(scope="module")
def one(command, tmp_path_factory):
    """The run folder of one process with FLAGS."""
    place = tmp_path_factory.mktemp("one")
    code, output = command("distill_DM", place, *RUN, "--checkpoint_seconds", 0)
    assert code == 0 and "result:" in output, output
    found, = place.glob("custom-*/DM_*")
    return found


@pytest.mark.slow
def test_two_processes_write_what_one_does(script, one, tmp_path):
    output, _ = finished(script("sh/baseline/DM.sh", "cpu*2", "two", *FLAGS))
    assert output.count("run folder") == 1 and "2 processes" in output and output.count("result:") == 1
    two = folder(tmp_path, "two")
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()} and two.name == one.name
    assert same(lines(two)[0], lines(one)[0], 0)  # the same start and the same networks
    assert len(lines(two)) == len(lines(one)) == 3
    assert same(*(torch.load(run / "distilled.pt")["videos"] for run in (two, one)), 1e-4)


DIES = """
import os, signal
if os.environ.get("RANK") == "1":
    import torch.distributed as dist
    together = dist.all_reduce
    def counted(*tensors, **options):
        counted.calls += 1
        if counted.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return together(*tensors, **options)
    counted.calls, dist.all_reduce = 0, counted
"""


@pytest.mark.slow
def test_a_killed_process_ends_all_and_one_goes_on(script, command, one, tmp_path):
    """kill -9 in the third sum over both processes, of the third step: after the first step is a checkpoint."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(DIES)
    _, errors = finished(script("sh/baseline/DM.sh", "cpu*2", "killed", *FLAGS, PYTHONPATH=f"{site}:{ROOT}"), 128 + signal.SIGKILL)
    assert errors.splitlines()[-1] == ("process 1 was killed by SIGKILL: run the same command to resume from the last checkpoint, "
                                       "with any number of processes")
    assert "Traceback" not in errors and not workers(tmp_path)
    code, output = command("distill_DM", tmp_path / "killed", *RUN, "--checkpoint_seconds", 0)
    assert code == 0 and "resumed at iteration" in output
    assert same(*(torch.load(run / "distilled.pt")["videos"] for run in (folder(tmp_path, "killed"), one)), 1e-3)


@pytest.mark.slow
def test_two_machines(command, tmp_path):
    """The README's line for several machines: two agents of torchrun that meet on this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [*PYTHON, "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "distill",
            "--rdzv_endpoint", f"localhost:{port}", str(ROOT / "distill_DM.py"),
            *command.arguments("distill_DM", tmp_path / "machines", ["--Iteration", 1])]
    agents = [subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [finished(agent)[0] for agent in agents]
    assert sum("2 processes" in output for output in outputs) == 1
    assert (folder(tmp_path, "machines") / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher, flags, message", [  # a script, and a module
    ("DM", ["10", "1", "--ipc", "0"], "distill_DM.py: error: argument --ipc: '0' is not a whole number of at least 1"),
    ("coreset", ["herding", "50"], "coreset: error: class fall has fewer training clips than the required 50: "
                                "lower --ipc, --spc or --dpc, or raise --train_clips")])
def test_bad_input_is_one_sentence_of_all(script, launcher, flags, message):
    _, errors = finished(script(f"sh/baseline/{launcher}.sh", "cpu*2", "bad", *flags, "--frames", "8", "--size", "43"), 2)
    assert errors.splitlines()[-1] == message and errors.count("error:") == 1 and "Traceback" not in errors


# ---------------------------------------------------------------- how they end

FAILS = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
from distill_utils import processes
def main(args):
    if processes.rank() == 1:
        {fault}
    print("said by", processes.rank())
    processes.sum_over_ranks(torch.zeros(1))
    {then}
    time.sleep({limit})
parser = __import__("argparse").ArgumentParser(prog="fails")
parser.add_argument("--device", default="cpu")
processes.run_script(main, parser)
"""


@pytest.fixture
def failing(tmp_path):
    """failing(fault, then, processes) -> the started processes, the second of which fails while the others wait for it, or that meet for `then`."""
    def start(fault, then="pass", processes=2):
        (tmp_path / "fails.py").write_text(FAILS.format(root=str(ROOT), fault=fault, then=then, limit=2 * HANG))
        return subprocess.Popen([*PYTHON, "distill_utils.torchrun", "--nproc_per_node", str(processes), str(tmp_path / "fails.py")], text=True,
                                env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield start
    for process in workers(tmp_path).values():
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("fault, processes, code, message", [
    ("raise ValueError('a sentence for the user')", 3, 2, "fails: error: a sentence for the user"),
    ("raise KeyError('a fault of ours')", 2, 1, "process 1 ended with exit code 1"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", 2, 128 + signal.SIGSEGV,
     "process 1 was killed by SIGSEGV: run the same command to resume from the last checkpoint, with any number of processes")])
def test_the_process_that_failed_is_the_one_that_is_heard(failing, fault, processes, code, message):
    output, errors = finished(failing(fault, processes=processes), code)
    assert errors.splitlines()[-1] == message and output == "said by 0\n"
    assert ("Traceback" in errors) == (code == 1) and ("a fault of ours" in errors) == (code == 1)


@pytest.mark.slow
def test_a_failure_of_the_work_together_is_told(failing):
    """As NCCL's where two processes are given the same GPU: a RuntimeError within a collective."""
    then = "processes.dist.all_reduce = lambda tensor: (_ for _ in ()).throw(RuntimeError('duplicate GPU detected')); processes.sum_over_ranks(torch.zeros(1))"
    _, errors = finished(failing("pass", then), 3)
    assert errors.splitlines()[-1] == "fails: error: communication with the other processes failed: duplicate GPU detected"


@pytest.mark.slow
def test_no_process_outlives_torchrun(failing, tmp_path):
    process = failing("pass")
    assert process.stdout.readline() == "said by 0\n"
    assert len(workers(tmp_path)) == 2
    process.kill()
    process.wait()
    while workers(tmp_path):
        time.sleep(0.1)


def test_shares_are_whole_and_the_first_has_the_most(monkeypatch):
    for size in range(1, 9):
        monkeypatch.setattr("distill_utils.processes.world_size", lambda size=size: size)
        for count in range(12):
            shares = []
            for number in range(size):
                monkeypatch.setattr("distill_utils.processes.rank", lambda number=number: number)
                shares.append(rank_share(count))
            assert [number for share in shares for number in share] == list(range(count))
            assert len(shares[0]) == max(map(len, shares)) <= min(map(len, shares)) + 1
