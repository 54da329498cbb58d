"""What a run shows and writes down while it trains: progress, metrics as JSON lines, TensorBoard if asked."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from lib.base import InputError
from lib.paths import replacing

#: Seconds between two lines of progress where nobody watches.
LINE_INTERVAL = 10.0


class _Lines:
    """Progress as a line of text now and then, for logs and batch-run notebooks; nothing if it is over soon."""

    def __init__(self, total: int, description: str, initial: int):
        self.total, self.description, self.n, self.initial = total, description, initial, initial
        self.start = self.last = time.monotonic()
        self.text = ""
        self.file = sys.stdout if _in_kernel() else sys.stderr

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.last >= LINE_INTERVAL:
            self.last = now
            meter = tqdm.format_meter(
                self.n,
                self.total,
                now - self.start,
                prefix=self.description,
                postfix=self.text,
                initial=self.initial,
                bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            )
            print(meter, file=self.file, flush=True)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.text = text

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel; the notebook runner imports ipykernel without being one."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def progress(total: int, description: str | None, initial: int = 0):
    """A context manager with `update(n)` and `set_postfix_str`.

    It shows a bar in a terminal, a widget in JupyterLab, and lines of text now and then elsewhere.

    No description, no display. ITL_PROGRESS=lines asks for lines (batch-run notebooks), =off for nothing.
    """
    asked = os.environ.get("ITL_PROGRESS", "")
    if description is None or asked == "off":
        return tqdm(total=total, disable=True)
    if asked == "lines" or not (_in_kernel() or sys.stderr.isatty()):
        return _Lines(total, description, initial)
    if _in_kernel():
        return _widget(total, description, initial)
    return tqdm(total=total, desc=description, initial=initial, leave=False)


def _widget(total: int, description: str, initial: int) -> tqdm:
    """tqdm's bar for JupyterLab, gone from the notebook once it is closed.

    Left to itself a closed bar leaves an output that reads "Error displaying widget" when the notebook is opened again,
    and one that was closed before its end, as early stopping does, turns red and stays.
    """
    from IPython.display import display
    from tqdm.notebook import tqdm as tqdm_notebook  # brings all of IPython and the widgets

    class Widget(tqdm_notebook):
        def close(self):
            if not self.disable:
                super().close()
                shown.update({"text/plain": ""}, raw=True)

    bar = Widget(total=total, desc=description, initial=initial, leave=False, display=False)
    shown = display(bar.container, display_id=True)
    return bar


class Monitor:
    """The record of one run: `metrics.jsonl` in `directory` always, TensorBoard on request, progress in steps.

    A resumed run continues the record at `step`: lines that a killed run wrote after its last checkpoint are dropped.
    """

    def __init__(
        self, directory: Path, total: int, step: int = 0, description: str | None = None, tensorboard: bool = False
    ):
        # A resumed run's purge_step hides what TensorBoard was told after the last checkpoint.
        self.writer = summary_writer()(directory / "tensorboard", purge_step=step + 1) if tensorboard else None
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        self._truncate_after(step)
        self.file = self.path.open("a")
        self.bar = progress(total, description, initial=step)

    def _truncate_after(self, step: int) -> None:
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))

    def log(self, step: int, **metrics: float) -> None:
        """Write down the metrics after `step` steps."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        self.bar.set_postfix_str(" ".join(f"{name}={value:.4g}" for name, value in metrics.items()), refresh=False)

    def advance(self) -> None:
        """One step is done."""
        self.bar.update(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.bar.close()
        if self.writer:
            self.writer.close()


class SilentMonitor(nullcontext):
    """What the other ranks of a run have in place of a `Monitor`: the first speaks for all."""

    def __enter__(self):
        return self

    def log(self, step: int, **metrics: float) -> None: ...

    def advance(self) -> None: ...


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half-written last line of a run that was killed, or is being written


def summary_writer() -> type:
    """TensorBoard's writer, or an `InputError` if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("TensorBoard was asked for but is not installed: pip install -e '.[monitor]'") from None
    return SummaryWriter


def read_metrics(directory: Path) -> list[dict]:
    """All whole lines that a `Monitor` wrote to `directory`, oldest first."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]
