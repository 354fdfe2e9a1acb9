"""What a machine lacks or grants: programs, locks, cores and memory, screens, places for sockets and semaphores, a name of its own."""
import argparse
import errno
import fcntl
import importlib
import io
import json
import locale
import math
import multiprocessing
import multiprocessing.synchronize
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from torch.distributed import run as torch_run

import utils
from distill_utils import compute, machine, processes, torchrun, workers
from distill_utils.packs import locked
from distill_utils.processes import run_script
from distill_utils.run import Run, git_commit, read_config
from distill_utils.toy import make_toy
from utils import ROOT

SCRIPTS = ("buffer", "distill_DC", "distill_DM", "distill_MTT", "distill_s2d",
           *(f"distill_utils.{name}" for name in ("coreset", "dynamics", "evaluate", "export", "inspect", "prepare", "report", "table", "tune")))


# ---------------------------------------------------------------- programs

def test_a_run_without_any_program(command, tmp_path):
    code, output = command("distill_DM", tmp_path / "runs", "--Iteration", 0, PATH=str(tmp_path / "none"))
    config, = (tmp_path / "runs").glob("*/*/config.json")
    assert code == 0 and json.loads(config.read_text())["git"] is None, output


@pytest.mark.parametrize("content, mode", ((None, 0), ("", 0o755), ("#!/no/such/shell\n", 0o755), ("#!/bin/sh\nexit 128\n", 0o755), ("", 0o644)))
def test_a_git_that_does_not_work(monkeypatch, tmp_path, content, mode):
    if content is not None:
        (tmp_path / "git").write_text(content)
        (tmp_path / "git").chmod(mode)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


@pytest.mark.parametrize("names", (("GIT_DIR",), ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")))
def test_the_commit_is_ours_also_within_a_hook_of_another(monkeypatch, tmp_path, names):
    ours = git_commit()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in names:
        monkeypatch.setenv(name, str(tmp_path / ("" if name == "GIT_WORK_TREE" else ".git")))
    assert git_commit() == ours


# ---------------------------------------------------------------- locks

@pytest.fixture
def no_locks(monkeypatch):
    """no_locks(error number): every lock fails so."""
    def no_locks(number):
        def refuse(file, how):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(fcntl, "flock", refuse)
        utils.warn_of_no_locks.cache_clear()
    yield no_locks
    utils.warn_of_no_locks.cache_clear()


def lock_everything(folder):
    utils.lock_folder(folder).close()
    with locked(folder / "pack.lock"):
        pass
    make_toy(folder / "toy", train=1, test=1)


@pytest.mark.parametrize("name", ("ENOSYS", "EOPNOTSUPP", "ENOTSUP", "ENOLCK"))
def test_a_file_system_without_locks(no_locks, capsys, tmp_path, name):
    no_locks(getattr(errno, name))
    lock_everything(tmp_path)
    assert capsys.readouterr().err.count("warning: this file system has no locks") == 1


@pytest.mark.parametrize("name", ("EIO", "EACCES", "ESTALE"))
def test_other_errors_of_locks_are_errors(no_locks, tmp_path, name):
    no_locks(getattr(errno, name))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        utils.lock_folder(tmp_path)


# ---------------------------------------------------------------- cores and memory

GB = 10 ** 9
DOCKER = "0123abc"
LIMITS = {  # /proc/self/cgroup, files below /sys/fs/cgroup, cores and bytes of memory then, on a machine of 64 cores and 256 GB
    "no container": ("0::/\n", {}, 64, 256 * GB),
    "no Linux": (None, {}, 64, 256 * GB),
    "docker --cpus 2 --memory 8g, version 2": ("0::/\n", {"cpu.max": "200000 100000", "memory.max": f"{8 * GB}"}, 2, 8 * GB),
    "without limits, version 2": ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 64, 256 * GB),
    "half a core": ("0::/\n", {"cpu.max": "50000 100000"}, 1, 256 * GB),
    "two cores and a half": ("0::/\n", {"cpu.max": "250000 100000"}, 3, 256 * GB),
    "more than there is": ("0::/\n", {"cpu.max": "12800000 100000", "memory.max": f"{512 * GB}"}, 64, 256 * GB),
    "slurm, version 2: the job's limit, not the step's": (
        "0::/slurm/job_7/step_0\n", {"slurm/job_7/cpu.max": "400000 100000", "slurm/job_7/memory.max": f"{16 * GB}",
                                     "slurm/job_7/step_0/cpu.max": "max 100000", "slurm/job_7/step_0/memory.max": "max"}, 4, 16 * GB),
    "systemd-run -p CPUQuota=150%, and a tighter slice": (
        "0::/user.slice/run-1.scope\n", {"user.slice/run-1.scope/cpu.max": "150000 100000", "user.slice/cpu.max": "100000 100000"}, 1, 256 * GB),
    "docker, version 1, whose groups are the container's top": (
        f"5:memory:/docker/{DOCKER}\n4:cpu,cpuacct:/docker/{DOCKER}\n", {
            "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": f"{4 * GB}"}, 3, 4 * GB),
    "without limits, version 1": ("4:cpu,cpuacct:/\n3:memory:/\n", {
        "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "9223372036854771712"}, 64, 256 * GB),
    "slurm, version 1": ("4:cpu:/slurm/job_7\n3:memory:/slurm/job_7\n", {
        "cpu/slurm/job_7/cpu.cfs_quota_us": "800000", "cpu/slurm/job_7/cpu.cfs_period_us": "100000",
        "memory/slurm/job_7/memory.limit_in_bytes": f"{2 * GB}", "memory/memory.limit_in_bytes": "9223372036854771712"}, 8, 2 * GB),
    "both versions": ("4:memory:/a\n0::/b\n", {"memory/a/memory.limit_in_bytes": f"{3 * GB}"}, 64, 3 * GB),
    "above the container's top": ("0::/../other\n", {"cpu.max": "200000 100000"}, 2, 256 * GB),
    "a name with colons": ("0::/a:b\n", {"a:b/cpu.max": "200000 100000"}, 2, 256 * GB),
}


@pytest.fixture
def container(monkeypatch, tmp_path):
    """container(name) makes this a machine of LIMITS."""
    def container(name):
        groups, files, *expected = LIMITS[name]
        mine, mounted = tmp_path / "cgroup", tmp_path / "mounted"
        if groups is not None:
            mine.write_text(groups)
        for file, content in files.items():
            (mounted / file).parent.mkdir(parents=True, exist_ok=True)
            (mounted / file).write_text(content + "\n")
        monkeypatch.setattr(machine, "CONTROL_GROUPS", (mine, mounted))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 256 * GB}.__getitem__)
        return expected
    return container


@pytest.mark.parametrize("name", LIMITS)
def test_what_a_container_grants(container, name):
    cores, memory = container(name)
    assert machine.cores() == cores
    assert compute.total_memory(torch.device("cpu")) == memory


@pytest.mark.parametrize("count, cores", ((12, 12), (None, 1)))
def test_systems_that_do_not_tell_where_a_process_may_run(container, monkeypatch, count, cores):
    container("no Linux")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert machine.cores() == cores


def test_memory_budgets_are_shares_of_the_containers(container):
    values = 6, 6, 8, 64, 128, 10 ** 6, torch.device("cpu")
    container("no container")
    whole = compute.count_kept_steps(*values)
    container("docker --cpus 2 --memory 8g, version 2")
    assert 0 < compute.count_kept_steps(*values) < whole / 16


@pytest.mark.parametrize("given, counted, kept", (("", 64, 2), (None, 64, 2), ("7", 7, 7), (None, 2, 2), (None, 1, 1)))
def test_threads(container, monkeypatch, given, counted, kept):
    """No more than the container has cores; what PyTorch counted, where that is less, and what the user says, stay."""
    container("docker --cpus 2 --memory 8g, version 2")
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    threads = [counted]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run_script(lambda args: None, argparse.ArgumentParser(), [])
    assert threads[-1] == kept and os.environ.get("OMP_NUM_THREADS") == (str(kept) if counted > kept else given)


@pytest.mark.parametrize("make, refused", (
    (lambda: torch.empty(2 ** 55), "tried to allocate 144115188075855872 bytes\n"), (lambda: torch.empty(2 ** 40, 2 ** 40), "Storage size calculation overflowed "),
    (lambda: np.empty(2 ** 55), "Unable to allocate 256. PiB\n"), (lambda: bytes(2 ** 55), "the missing amount is unknown\n")))
def test_too_much_memory_is_a_sentence(capsys, make, refused):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda args: make(), argparse.ArgumentParser(prog="it"), [])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith(f"it: error: out of memory: {refused}") and printed.count("\n") == 1


def test_an_operation_that_an_older_pytorch_lacks_on_apple_gpus(capsys):
    def fail(args):
        raise NotImplementedError("The operator 'aten::max_pool3d_with_indices' is not currently implemented for the MPS device.\nIf you want …")
    with pytest.raises(SystemExit) as stop:
        run_script(fail, argparse.ArgumentParser(prog="it"), [])
    assert stop.value.code == 2 and capsys.readouterr().err == (
        "it: error: this PyTorch cannot run these networks on Apple GPUs: install PyTorch 2.9 or later, or give cpu\n")
    with pytest.raises(NotImplementedError):  # of ours
        run_script(lambda args: (_ for _ in ()).throw(NotImplementedError("forward")), argparse.ArgumentParser(prog="it"), [])


def test_a_defect_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="must match the size"):
        run_script(lambda args: torch.ones(2) + torch.ones(3), argparse.ArgumentParser(), [])


# ---------------------------------------------------------------- screens and files

@pytest.fixture
def screen(monkeypatch):
    """screen(encoding) puts such a one in the place of stdout and stderr; it gives what they show."""
    def screen(encoding):
        shown = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(shown, encoding, write_through=True))
        return lambda: shown.getvalue().decode(encoding)
    return screen


@pytest.mark.parametrize("encoding, text, shown", (
    ("ascii", "50.0 ± 1.5 %", "50.0 +- 1.5 %"), ("ascii", "64×64 … é", "64x64 ... \\xe9"), ("ascii", "日本\udcff", "\\u65e5\\u672c\\udcff"),
    ("latin-1", "± × é 日", "± × é \\u65e5"), ("cp1252", "± …", "± …"), ("utf-8", "± × é 日本", "± × é 日本"), ("utf-8", "a\udcffb", "a\\udcffb")))
def test_what_a_screen_cannot_show_is_spelt_out(screen, encoding, text, shown):
    show = screen(encoding)

    def main(args):
        print(text)
        print(text, file=sys.stderr)
        raise ValueError(text)
    with pytest.raises(SystemExit):
        run_script(main, argparse.ArgumentParser(prog="it"), [])
    assert show().splitlines() == [shown, shown, f"it: error: {shown}"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_on_a_plain_screen(screen, name):
    show, parser = screen("ascii"), importlib.import_module(name).parser()
    with pytest.raises(SystemExit) as stop:
        run_script(None, parser, ["--help"])
    assert stop.value.code == 0 and "--help" in show() and "\\u" not in show()


@pytest.fixture
def c_locale():
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    with open(os.devnull, "w") as file:
        plain = file.encoding.lower() in ("ascii", "ansi_x3.4-1968", "us-ascii", "646")
    if not plain:
        locale.setlocale(locale.LC_CTYPE, before)
        pytest.skip("this Python writes UTF-8 whatever the locale")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


def test_files_are_utf8_whatever_the_locale(c_locale, tmp_path):
    run = Run({"name": "é ± 日本"}, tmp_path, "run")
    run.log_line("± 日本 \udcff")
    with utils.atomic_write(tmp_path / "page", "w") as file:
        file.write("± \udcff")
    run.lock.close()
    assert (run.folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1].endswith("± 日本 \\udcff")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "± \\udcff"
    assert read_config(run.folder / "config.json")["settings"]["name"] == "é ± 日本"


# ---------------------------------------------------------------- sockets and semaphores

@pytest.mark.parametrize("length", (10, 70, 100, 200))
def test_temporary_folders_of_long_paths(tmp_path, length):
    """With the longest the processes' socket lies elsewhere; everything else stays there."""
    folder = pathlib.Path(tempfile.gettempdir(), "x" * max(1, length - len(tempfile.gettempdir()) - 1))
    folder.mkdir(exist_ok=True)
    program = "import tempfile; from distill_utils import workers; print(workers.alone(abs, -1), tempfile.gettempdir())"
    try:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True)
        assert done.stdout == f"1 {folder}\n", done.stderr
    finally:
        folder.rmdir()  # nothing is left in it


def test_processes_without_semaphores(monkeypatch):
    """As where /dev/shm is read-only, or not there."""
    def refuse(*values, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refuse)
    assert list(workers.in_processes(abs, range(-9, 0), 2)) == [(number, -number) for number in range(-9, 0)]


def test_what_a_job_raises(monkeypatch):
    """Reaches the caller, and no process is left."""
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="math domain error|nonnegative"):
        list(workers.in_processes(math.sqrt, [4, 9, -1, 16], 2))
    assert set(multiprocessing.active_children()) == before


# ---------------------------------------------------------------- a name of its own, other systems, older Pythons

@pytest.mark.parametrize("inherited", ({}, {"PET_NNODES": "2"}, {"PET_RDZV_ENDPOINT": "login:29400", "PET_RDZV_BACKEND": "static", "PET_STANDALONE": "0"},
                                       {"MASTER_ADDR": "login", "MASTER_PORT": "1"}))
@pytest.mark.parametrize("threads, given", (("3", None), ("3", ""), ("7", "7")))
def test_the_processes_of_one_machine_need_no_name_of_it(monkeypatch, inherited, threads, given):
    """They meet at the local address, whatever a cluster's environment says, and share the cores."""
    asked = []
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torchrun, "cores", lambda: 5)
    monkeypatch.setattr(torch_run, "run", asked.append)
    torchrun.main(["--nproc_per_node", "2", "a.py", "--flag"])
    flags, = asked
    config, _, command = torch_run.config_from_args(flags)
    assert (config.min_nodes, config.max_nodes, config.rdzv_backend, config.rdzv_endpoint) == (1, 1, "c10d", "127.0.0.1:0")
    assert config.local_addr == "127.0.0.1" and config.nproc_per_node == 2 and command[-2:] == ["a.py", "--flag"]
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_a_process_ends_with_its_parent_on_any_system(monkeypatch):
    """Without pidfd_open, which only newer Linux has."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    parents, ended = iter([7, 7, 1]), []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    thread = threading.Thread(target=processes.exit_with_parent, args=(7,))
    thread.start()
    thread.join()
    assert ended == [processes.PEER_ENDED]


@pytest.mark.parametrize("safe", ("", "1"))
def test_ours_are_found_before_the_users(tmp_path, safe):
    """Also before Python 3.11, which has no PYTHONSAFEPATH."""
    for name in ("utils", "networks", "buffer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(99)")
    program = "import importlib.util as u, distill_utils; print(*(u.find_spec(name).origin for name in ('utils', 'networks', 'buffer')), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": safe},
                           capture_output=True, text=True)
    assert found.stdout.splitlines() == [str(ROOT / name) for name in ("utils.py", "networks/__init__.py", "buffer.py")], found.stderr
