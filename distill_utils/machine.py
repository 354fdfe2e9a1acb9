"""Cores and memory that this process may use, with the limits of containers."""
import contextlib
import math
import os
import pathlib

import torch

CONTROL_GROUPS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")  # Linux: this process; mount point


def cores() -> int:
    """Return how many cores this process may use: the minimum of its CPU affinity and its containers' quotas."""
    allowed = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")  # not on macOS
               else os.cpu_count() or 1)
    figures = (*control_group_figures("cpu", "cpu.max"),
               *control_group_figures("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min([allowed, *(math.ceil(quota / period) for quota, period in figures if 0 < quota < math.inf)])


def memory_limits() -> list[int]:
    """Return the memory limits of this process's containers in bytes, possibly none; the machine may have less."""
    figures = *control_group_figures("memory", "memory.max"), *control_group_figures("memory", "memory.limit_in_bytes")
    return [int(limit) for limit, in figures if limit < math.inf]


def control_group_figures(controller, *names):
    """Yield the numbers in the files `names`, from this process's control groups and their parents; "max" is inf."""
    mine, mounted = CONTROL_GROUPS
    for line in mine.read_text().splitlines() if mine.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):  # an empty field is cgroup version 2
            continue
        top = mounted / controller if controllers else mounted
        group = top / group.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):  # not every group has the files
                    yield [float(word.replace("max", "inf"))
                           for name in names for word in (folder / name).read_text().split()]


def limit_threads():
    """Limit PyTorch, here and in child processes, to the container's cores, unless OMP_NUM_THREADS is set.

    PyTorch itself counts the cores of the machine.
    """
    if not os.environ.get("OMP_NUM_THREADS") and cores() < torch.get_num_threads():
        os.environ["OMP_NUM_THREADS"] = str(cores())
        torch.set_num_threads(cores())
