"""What a training step spends its time and memory on: torch.profiler over some steps."""

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lib.paths import replacing

#: Steps before those that are recorded. The first finds memory, chooses kernels and may compile; then the profiler
#: itself is slow at first.
WAIT, WARM_UP = 3, 2


@contextmanager
def profiled(folder: Path, n_steps: int) -> Iterator[Callable[[], None]]:
    """Record `n_steps` training steps after `WAIT + WARM_UP` others; yields what is to be called after each step.

    Writes trace.json, which Perfetto and chrome://tracing show, and summary.txt: the operators that take most time
    themselves, and what `summary` says.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "trace.json") as temporary:
            profiler.export_chrome_trace(str(temporary))
            trace = json.loads(temporary.read_text(encoding="utf-8"))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40)
        with replacing(folder / "summary.txt") as temporary:
            temporary.write_text(f"{table}\n{summary(trace)}\n", encoding="utf-8")

    with profile(
        activities=activities,
        schedule=schedule(wait=WAIT, warmup=WARM_UP, active=n_steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
        acc_events=True,  # one cycle, so nothing accumulates; without it there is a warning about the others
    ) as profiler:
        yield profiler.step
    if profiler.step_num <= WAIT + WARM_UP:
        warnings.warn(f"training ended before its step {WAIT + WARM_UP + 1}: nothing was profiled", stacklevel=2)


def summary(trace: dict) -> str:
    """Lines about a Chrome trace of PyTorch: steps, time, peak memory, and how busy a GPU was, if there was one.

    Memory is what PyTorch had allocated at most on a device; on the CPU, of what it allocated while it was recorded. A
    GPU is busy while at least one kernel or copy runs on it.
    """
    events = trace["traceEvents"]
    steps = [
        event for event in events if event["name"].startswith("ProfilerStep") and event["cat"] == "user_annotation"
    ]
    begin, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    lines = [f"{len(steps)} steps of {(end - begin) / len(steps) / 1000:.2f} ms"]
    peaks: dict[str, int] = defaultdict(int)
    for memory in (event["args"] for event in events if event["name"] == "[memory]"):
        device = "CPU" if memory["Device Type"] == 0 else f"GPU {memory['Device Id']}"
        peaks[device] = max(peaks[device], memory["Total Allocated"])
    lines += [f"peak memory, {device}: {peak / 1e6:.2f} MB" for device, peak in peaks.items()]
    work = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            work[event["args"]["device"]].append((event["ts"], event["ts"] + event["dur"]))
    for device, spans in work.items():
        lines.append(f"GPU {device} was busy {_covered(spans, begin, end) / (end - begin):.0%} of the time")
    return "\n".join(lines)


def _covered(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """How much of the time from `begin` to `end` lies in at least one of the spans."""
    covered = 0.0
    for start, stop in sorted(spans):
        start, stop = max(start, begin), min(stop, end)
        if stop > start:
            covered, begin = covered + stop - start, stop
    return covered
