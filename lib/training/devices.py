"""Devices and cores that a process may use."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from lib.base import InputError


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; a device that this machine does not have is an `InputError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # "meta" fails here
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"this machine has no device {device!r}: use auto or cpu") from None


def usable_cores() -> int:
    """How many cores this process may keep busy, at least one: those that the machine has may be others' to use.

    Less than all is left by an affinity (taskset, Slurm), by a quota of CPU time (containers) and by
    SLURM_CPUS_PER_TASK, where Slurm binds no process.
    """
    known = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    limits = [len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1, *_quotas(Path("/"))]
    with suppress(KeyError, ValueError):
        limits.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, int(min(limits)))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of CPU time, in cores, of this process's control groups: its own and all that they are part of."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # version 1 has a folder for each controller
            here = top / group.lstrip("/")
            for folder in (here, *here.parents):
                with suppress(OSError, ValueError):  # no quota, or not for this process to see
                    if controllers:
                        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                    else:
                        quota, period = (folder / "cpu.max").read_text().split()
                    if float(quota) > 0:  # -1: none; "max" is no number
                        yield float(quota) / float(period)
                if folder == top:
                    break
