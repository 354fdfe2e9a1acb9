"""One trial of a search (distill_utils/tune.py): run a launcher in its own processes, and watch its run folder."""
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

from optuna.trial import TrialState

from distill_utils.run import read_config

DIVERGED = r"lower (the learning rate|--feature_lr)"  # the advice of a run whose values are not finite

# Run the command; kill its process group when standard input ends, that is, when the parent process ends in any way.
WATCHED = 'exec 3<&0; (read -r <&3; kill -KILL 0) & "$@" < /dev/null 3<&-'


def run_trial(trial, command, log, file, headline):
    """Run the command with output to `log`, report its evaluations to Optuna; return (state, value, why no value)."""
    reported, running = {}, True
    with watched(command, log, file) as process:
        while running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            # In this order, so that everything written before the end of the process is read.
            running, folder = process.poll() is None, run_folder(log)
            for iteration, value in evaluations(folder, headline) if folder else ():
                if iteration not in reported:
                    reported[iteration] = value
                    last = last_iteration(folder)
                    if iteration == 0 < last:
                        continue  # the pruner takes the best report of a trial, which may be that of its start
                    trial.report(value, iteration)
                    if iteration < last and trial.should_prune():
                        return TrialState.PRUNED, None, f"below the median at iteration {iteration}"
    if process.returncode == 0 and reported:
        return TrialState.COMPLETE, reported[max(reported)], None
    why = last_line(log) or f"exit code {process.returncode}"
    # TPE learns from pruned trials, not from failed ones: a full disk says nothing about the flags.
    diverged = process.returncode == 2 and re.search(DIVERGED, why)
    return TrialState.PRUNED if diverged else TrialState.FAIL, None, why


@contextlib.contextmanager
def watched(command, log, file):
    """Start the command as a process that ends with this block and with this process; it also holds the lock `file`."""
    environment = {**os.environ, "PYTHON": os.environ.get("PYTHON", sys.executable), "PYTHONUNBUFFERED": "1",
                   "PYTHONIOENCODING": "utf-8"}
    with open(log, "ab") as output:
        process = subprocess.Popen(["bash", "-c", WATCHED, "trial", *command], env=environment, stdin=subprocess.PIPE,
                                   stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True, pass_fds=[file.fileno()])
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()


def run_folder(log):
    """Return the run folder that a run has printed to its log, or None."""
    found = re.findall(r"^run folder: (.*?)(?:, \d+ processes)?$", log.read_text(encoding="utf-8", errors="replace"),
                       re.MULTILINE)
    return pathlib.Path(found[-1]) if found else None


def evaluations(folder, headline):
    """Return (iteration, accuracy) of a run's evaluations on validation videos so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    metrics = [json.loads(line) for line in lines if line.endswith("\n")]  # the last line may be incomplete
    return [(line["iteration"], line[headline]) for line in metrics if line.get("split") == "validation"]


def last_iteration(folder):
    return read_config(folder / "config.json")["settings"].get("Iteration", 0)


def last_line(log):
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
