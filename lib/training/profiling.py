"""Time and memory of training steps, by operator: torch.profiler over some steps."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule, tensorboard_trace_handler

#: Steps before those that are recorded. The first allocates memory, chooses kernels and may compile; then the profiler
#: itself is slow at first.
WAIT, WARM_UP = 3, 2


@contextmanager
def profiled(folder: Path, n_steps: int) -> Iterator[Callable[[], None]]:
    """Record `n_steps` training steps after `WAIT + WARM_UP` others; yield a function to call after each step.

    Writes a trace (*.pt.trace.json), which Perfetto and chrome://tracing show.
    """
    with profile(
        schedule=schedule(wait=WAIT, warmup=WARM_UP, active=n_steps, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder)),
        record_shapes=True,
        profile_memory=True,
        acc_events=True,  # there is one cycle: nothing accumulates, but torch would warn
    ) as profiler:
        yield profiler.step
    if profiler.step_num <= WAIT + WARM_UP:
        warnings.warn(f"training ended before its step {WAIT + WARM_UP + 1}: nothing was profiled", stacklevel=2)
