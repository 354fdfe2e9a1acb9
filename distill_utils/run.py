"""The run folder: what a run writes, and how it resumes."""
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from distill_utils.processes import broadcast, gather, progress, rank, sum_gradients, world_size
from utils import (
    ROOT,
    append,
    code_digest,
    finite,
    json_digest,
    load,
    lock_folder,
    peak_memory,
    random_state,
    read_json,
    save,
    save_json,
    set_random_state,
    synchronize,
    tensor_digest,
    tensors,
)

# The code that a run's result depends on most.
CODE = ("buffer.py", "distill_*.py", "networks/*.py",
        *(f"distill_utils/{name}.py" for name in ("augment", "clips", "compute", "coreset", "datasets", "last_good",
                                                  "pool", "protocol", "starts", "storage", "synset", "temporal",
                                                  "trajectories")))
WANDB_SECONDS = 120  # longest wait for an upload at the end of a run: without a network, wandb would wait for ever


class Run:
    """One run's folder, a function of its settings: config.json, metrics.jsonl, log.txt, checkpoint.pt and results.

    The same settings give the same folder and resume from its checkpoint, on a CPU bitwise as if never interrupted.
    `settings` are all flags; those in `without_effect` (paths, device, logging) do not change the folder. Nor does the
    code: a folder that other code began prints a warning. With several processes, rank 0 reads and writes; `evaluate`
    keeps the scores of each rank's networks.
    """

    COUNTERS = ("iteration", "seconds", "steps", "refused", "logged", "loss", "evaluated", "start", "best", "result",
                "peak_memory")

    def __init__(self, settings, save_path, name, without_effect=(), wandb_mode="disabled", checkpoint_seconds=60,
                 device="cpu"):
        chosen = {key: value for key, value in sorted(settings.items()) if key not in without_effect}
        self.id = json_digest(chosen)[:8]
        self.folder = pathlib.Path(save_path).absolute() / f"{name}_{self.id}"
        self.metrics, self.wandb = self.folder / "metrics.jsonl", None
        self.iteration, self.seconds, self.steps, self.refused, self.logged, self.loss = 0, 0.0, 0, 0, 0, None
        self.device, self.peak_memory = torch.device(device), {}  # by device type: a run may go on on another
        self.evaluated = None                                    # iteration of the last evaluation
        self.start, self.best, self.result = None, None, None    # evaluations: value at iteration 0, the best, the last
        self.checkpoint_seconds, self.saved_at = checkpoint_seconds, time.monotonic()
        self.saving = 0.0  # seconds that the last checkpoint took
        self.stateful = {}
        if rank() == 0:
            self.claim_folder()
            self.write_config(settings, chosen)
            self.start_wandb(wandb_mode, settings, f"{name}_{self.id}")
        processes = f", {world_size()} processes" if world_size() > 1 else ""
        self.log_line(f"run folder: {self.folder}{processes}")

    def claim_folder(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.folder)
        for leftover in self.folder.glob(".*.tmp"):  # from a killed write
            leftover.unlink()

    def write_config(self, settings, chosen):
        path, code = self.folder / "config.json", code_digest(*CODE)
        if path.exists():
            made = read_config(path)
            if made["chosen"] != json.loads(json.dumps(chosen)):
                raise ValueError(f"{path} has other settings than this command: delete its folder, or give another "
                                 "--save_path")
            if (self.folder / "result.json").exists() and not (self.folder / "checkpoint.pt").exists():
                raise ValueError(f"{self.folder} is finished, but its checkpoint.pt is gone: delete the folder to run "
                                 "it again, or give another --save_path")
            if made["code"] not in (None, code):
                self.log_line("warning: the code has changed since this run began, and what is finished is kept: "
                              f"delete {self.folder} to run it anew")
            return
        versions = {package: importlib.metadata.version(package) for package in ("torch", "torchvision", "numpy")}
        save_json({"command": sys.argv, "settings": settings, "chosen": chosen,
                   "python": sys.version.split()[0], "versions": versions,
                   "git": git_commit(), "code": code, "created": time.strftime("%Y-%m-%dT%H:%M:%S")}, path)

    def start_wandb(self, mode, settings, name):
        if mode == "disabled":
            return
        import wandb  # slow to import, not needed when disabled
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise ValueError("--wandb online needs an account: run `wandb login` first, or give --wandb offline")
            self.wandb = wandb.init(project="video-distillation", name=name, id=self.id, resume="allow",
                                    dir=self.folder, mode=mode,
                                    config=settings, settings=wandb.Settings(silent=True, console="off",
                                                                             finish_timeout=WANDB_SECONDS))
            self.wandb.define_metric("*", step_metric="iteration")
        except wandb.Error as error:
            raise ValueError(
                f"--wandb {mode} does not work here: give --wandb offline or disabled ({error})") from error

    def log_line(self, text):
        if rank() > 0:
            return
        tqdm.write(text)
        append(self.folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def log(self, **values):
        """Write a line to metrics.jsonl, and the same to wandb."""
        if rank() > 0:
            return
        line = {"iteration": self.iteration, **values}
        append(self.metrics, json.dumps(line))
        self.logged += 1
        if self.wandb:
            self.wandb.log(line, step=self.logged)  # wandb ignores known steps: those repeated after a kill

    def resume(self, **stateful):
        """Load the checkpoint, if there is one; `stateful`: the objects with a state_dict that form the run's state.

        All ranks start from rank 0's state, bit for bit, and from its checkpoint, however many ranks wrote it.
        """
        self.stateful = stateful
        path = self.folder / "checkpoint.pt"
        if rank() == 0 and path.exists():
            self.resume_from(path)
        elif rank() == 0:
            self.metrics.write_bytes(b"")
        state = broadcast(self.state())
        if rank() > 0:
            self.set_state(state)

    def resume_from(self, path):
        try:
            state = {"peak_memory": {}} | load(path)  # older versions did not keep it
            self.set_state(state)
            metrics_bytes = state["metrics_bytes"]
            if self.metrics.stat().st_size < metrics_bytes:
                raise ValueError(f"{self.metrics.name} lacks lines that were logged before the checkpoint")
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: delete its folder to start again ({error})") from error
        with open(self.metrics, "ab") as file:
            file.truncate(metrics_bytes)  # lines after the checkpoint will be computed and logged again
        self.log_line(f"resumed at iteration {self.iteration}")

    def state(self):
        """Return all that the rest of the run depends on: learned parameters, random state, counters."""
        self.update_peak_memory()
        return ({name: thing.state_dict() for name, thing in self.stateful.items()}
                | {name: getattr(self, name) for name in self.COUNTERS} | {"random": random_state()})

    def set_state(self, state):
        for name, thing in self.stateful.items():
            thing.load_state_dict(state[name])
        set_random_state(state["random"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])

    def update_peak_memory(self):
        """Return the peak bytes of this process, or of the run's earlier ones on such a device if theirs were more."""
        kind = self.device.type
        self.peak_memory[kind] = max(self.peak_memory.get(kind, 0), peak_memory(self.device))
        return self.peak_memory[kind]

    def iterations(self, total, desc="distilling", unit="it", at_once=1):
        """Yield iterations up to and including `total`, in steps of `at_once`.

        The last one is for the final evaluation: no step follows it.
        """
        with progress(total=total, initial=self.iteration, desc=desc, unit=unit) as self.bar:
            while self.iteration < total:
                yield self.iteration
                following = min(self.iteration + at_once, total)
                self.bar.update(following - self.iteration)
                if time.monotonic() - self.saved_at > self.pause():
                    self.checkpoint(following)
                self.iteration = following
            yield total

    def pause(self):
        """Return the seconds between two checkpoints: as asked, up to ten times more if saving takes over 1/20."""
        return max(self.checkpoint_seconds, min(20 * self.saving, 10 * self.checkpoint_seconds))

    def due(self, every, total):
        """Return whether to evaluate now: at 0 and every `every` iterations (if `every` <= total), and at the end.

        If so, ValueError if a learned value is not finite or differs between ranks.
        """
        due = ((every <= total and self.iteration % every == 0 or self.iteration == total)
               and self.evaluated != self.iteration)
        if due:
            self.check_finite()
            self.check_same()
        return due

    def checkpoint(self, iteration=None):
        """Save the state before the step of `iteration` (default: the current one)."""
        start = time.monotonic()
        self.check_finite()
        if rank() == 0:
            with open(self.metrics, "ab") as metrics:
                os.fsync(metrics.fileno())  # so that it is not older than the checkpoint, even after a power failure
                size = metrics.tell()
            save({**self.state(), "iteration": self.iteration if iteration is None else iteration,
                  "metrics_bytes": size}, self.folder / "checkpoint.pt")
        self.saved_at = time.monotonic()
        self.saving = self.saved_at - start

    def check_finite(self):
        """ValueError if a learned value is not finite; called before anything is written."""
        for name, thing in self.stateful.items():
            if not finite(tensors(thing.state_dict())):
                raise ValueError(f"the {name} is not finite at iteration {self.iteration}: lower the learning rate "
                                 f"(the last good checkpoint stays in {self.folder})")

    def check_same(self):
        """ValueError if the learned values differ between ranks in any bit."""
        if world_size() == 1:
            return
        found = [tensor for thing in self.stateful.values() for tensor in tensors(thing.state_dict())]
        digests = gather([list(map(tensor_digest, found))])
        if any(each != digests[0] for each in digests):
            raise ValueError(f"the processes do not have the same state at iteration {self.iteration}: "
                             f"start again from the checkpoint in {self.folder}")

    @contextlib.contextmanager
    def timed_step(self, steps=1):
        """Count the seconds of one step, or of several parallel ones, without evaluation and checkpoints."""
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds, self.steps = self.seconds + time.perf_counter() - start, self.steps + steps

    def step(self, loss_of, optimizer, last_good=None):
        """Take one optimizer step on loss_of().

        The loss covers all ranks and is the same on each; its gradient is this rank's share. With a LastGood, a step
        that leads to a loss that is not finite is rolled back and counted.
        """
        with self.timed_step():
            optimizer.zero_grad()
            loss = loss_of()
            if last_good is None:
                self.check_loss(loss)
            if loss.isfinite():
                loss.backward()
                sum_gradients(optimizer)
            if last_good is None:
                optimizer.step()
            elif last_good.step(loss):
                self.check_loss(loss)
            else:
                self.refused += 1
                self.bar.set_postfix(loss=loss.item(), refused=self.refused, refresh=False)

    def check_loss(self, loss):
        """Store the loss, a tensor or a number; ValueError if it is not finite."""
        self.loss = torch.as_tensor(loss).item()
        if not math.isfinite(self.loss):
            raise ValueError(f"the loss is {self.loss} at iteration {self.iteration}: lower the learning rate "
                             f"(the last good checkpoint stays in {self.folder})")
        self.bar.set_postfix(loss=f"{self.loss:.4g}", refresh=False)

    def keep_best(self, value, **result):
        """Store the first and the best evaluation so far; return the best."""
        if self.iteration == 0:
            self.start = value
        if self.best is None or value > self.best["value"]:
            self.best = {"value": value, "iteration": self.iteration, **result}
        return self.best

    def finish(self, **result):
        path = self.folder / "result.json"
        if rank() == 0 and not path.exists():  # running a finished command again changes nothing
            save_json({"iteration": self.iteration, **result, "steps": self.steps, "refused": self.refused,
                       "seconds_per_iteration": self.seconds / self.steps if self.steps else None}, path)
        if self.wandb:
            self.wandb.finish()


def read_config(path) -> dict:
    """Return "settings" (all flags), "chosen" (those with an effect) and "code" (or None) of a run's config.json."""
    try:
        config = read_json(path)
        return {"settings": dict(config["settings"]), "chosen": dict(config["chosen"]), "code": config.get("code")}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged: delete its folder, or give another --save_path") from None


def git_commit() -> str | None:
    """Return the commit of this code; None without git or outside a repository."""
    ours = {name: value for name, value in os.environ.items()
            if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}  # a git hook sets these for its repository
    try:
        answer = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"], env=ours,
                                capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None
