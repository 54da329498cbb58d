"""Devices, cores and threads that a process may use."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import torch

from lib.base import InputError

#: Peak FLOP/s of dense matrix products in bfloat16, as NVIDIA states them, by a part of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
#: Speed-up that more threads must bring to be worth it.
WORTH_A_CORE = 1.1


def resolve_device(device: str) -> torch.device:
    """Return the device; `auto` is CUDA where there is one. One that this machine does not have is an `InputError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        asked = torch.device(device)
        if asked.type == "cuda" and (asked.index or 0) < torch.cuda.device_count():
            return torch.device("cuda", asked.index or 0)  # a tensor would hold memory there
        probe = torch.zeros(1, device=asked)
        probe.item()  # "meta" fails here
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"this machine has no device {device!r}: use auto or cpu") from None


def use_full_float32() -> None:
    """Multiply float32 matrices in float32: some container images enable TF32, with 10 bits of mantissa, not 23."""
    torch.set_float32_matmul_precision("highest")


def peak_flops(device: torch.device, dtype: str, n_devices: int) -> float | None:
    """Return the peak FLOP/s of several such devices in `dtype`; None if it is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((n_devices * peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def usable_cores() -> int:
    """Return how many cores this process may keep busy, at least one: the rest may belong to others.

    It is the minimum of the CPU affinity (taskset, Slurm), the container's CPU quota, and SLURM_CPUS_PER_TASK (for
    Slurm without binding).
    """
    known = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    limits = [len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1, *_quotas(Path("/"))]
    with suppress(KeyError, ValueError):
        limits.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, int(min(limits)))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of CPU time, in cores, of this process's control group (version 2) and its ancestors."""
    with suppress(OSError):
        group = (root / "proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
        here = root / "sys/fs/cgroup" / group
        for folder in (here, *here.parents):
            with suppress(OSError, ValueError):  # no limit ("max"), or not readable
                quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
                yield float(quota) / float(period)


def fastest_threads(step: Callable[[], object], most: int) -> int:
    """Return the number of threads (1, 2, 4, ... up to `most`) that runs `step` fastest, by timing a few steps of each.

    Medians are compared, and more threads must save a tenth of the time: beside a busy process each thread that
    loses its core makes all others wait, so one thread is often faster than two.
    """
    seconds: dict[int, list[float]] = {2**i: [] for i in range(most.bit_length())}
    for _ in range(1 + 5):
        for n, measured in seconds.items():
            with using_threads(n):
                started = time.perf_counter()
                step()
                measured.append(time.perf_counter() - started)
    medians = {n: median(measured[1:]) for n, measured in seconds.items()}  # the first steps allocate
    best = 1
    for n in medians:
        if WORTH_A_CORE * medians[n] < medians[best]:
            best = n
    return best


@contextmanager
def using_threads(n: int) -> Iterator[None]:
    """Use `n` threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
