"""Time and memory of training steps, by operator: torch.profiler over some steps."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, schedule

from lib.paths import replacing

#: Steps before those that are recorded. The first allocates memory, chooses kernels and may compile; then the profiler
#: itself is slow at first.
WAIT, WARM_UP = 3, 2


@contextmanager
def profiled(folder: Path, n_steps: int) -> Iterator[Callable[[], None]]:
    """Record `n_steps` training steps after `WAIT + WARM_UP` others; yield a function to call after each step.

    Writes trace.json, which Perfetto and chrome://tracing show, and summary.txt: the operators with the most
    self time, and the memory that they allocate.
    """

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "trace.json") as temporary:
            profiler.export_chrome_trace(str(temporary))
            if not temporary.exists():  # torch continues, with a partial file
                Path(f"{temporary}.tmp").unlink(missing_ok=True)
                raise OSError("torch could not finish it, the disk may be full")
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40)
        with replacing(folder / "summary.txt") as temporary:
            temporary.write_text(f"{n_steps} steps\n{table}\n", encoding="utf-8")

    with profile(
        schedule=schedule(wait=WAIT, warmup=WARM_UP, active=n_steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
        acc_events=True,  # there is one cycle: nothing accumulates, but torch would warn
    ) as profiler:
        yield profiler.step
    if profiler.step_num <= WAIT + WARM_UP:
        warnings.warn(f"training ended before its step {WAIT + WARM_UP + 1}: nothing was profiled", stacklevel=2)
