"""Cores and memory that this process may use, in a container too."""
import contextlib
import math
import os
import pathlib

import torch

CONTROL_GROUPS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")  # of Linux: those of this process, and where they are mounted


def cores():
    """How many cores this process may use: those that it may run on, or its container's quota where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    figures = *control_group_figures("cpu", "cpu.max"), *control_group_figures("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    return min([allowed, *(math.ceil(quota / period) for quota, period in figures if 0 < quota < math.inf)])


def memory_limits():
    """Bytes of memory that containers grant this process, one limit or several; a machine's own memory may be less."""
    figures = *control_group_figures("memory", "memory.max"), *control_group_figures("memory", "memory.limit_in_bytes")
    return [int(limit) for limit, in figures if limit < math.inf]


def control_group_figures(controller, *names):
    """The numbers in the files `names` of this process's control groups, and of those above them, that have these files; "max" is infinite."""
    mine, mounted = CONTROL_GROUPS
    for line in mine.read_text().splitlines() if mine.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):        # none: version 2
            continue
        top = mounted / controller if controllers else mounted
        group = top / group.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):              # not all have the files
                    yield [float(word.replace("max", "inf")) for name in names for word in (folder / name).read_text().split()]


def limit_threads():
    """PyTorch counts the machine's cores: no more threads than a container grants, here and in processes of ours, where nobody said how many."""
    if not os.environ.get("OMP_NUM_THREADS") and cores() < torch.get_num_threads():
        os.environ["OMP_NUM_THREADS"] = str(cores())
        torch.set_num_threads(cores())
