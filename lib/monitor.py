"""What a run shows and writes down while it trains: progress and metrics as JSON lines always, the rest on request."""

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from math import inf
from pathlib import Path

from pydantic import Field
from torch import nn
from tqdm import tqdm

from lib.base import Config, InputError, to_json
from lib.paths import replacing
from lib.probes import probe
from lib.profiling import profiled

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


def is_watched() -> bool:
    """Whether somebody may use widgets: this is a Jupyter kernel, and no batch run of a notebook (see `progress`)."""
    return _in_kernel() and not os.environ.get("ITL_PROGRESS")


def progress(total: int, description: str | None, initial: int = 0):
    """A context manager with `update(n)` and `set_postfix_str`.

    It shows a bar in a terminal, a widget in JupyterLab, and lines of text now and then elsewhere.

    No description, no display. ITL_PROGRESS=lines asks for lines (batch-run notebooks), =off for nothing.
    """
    asked = os.environ.get("ITL_PROGRESS", "")
    if description is None or asked == "off":
        return tqdm(total=total, disable=True)
    if is_watched():
        return _widget(total, description, initial)
    if asked == "lines" or not sys.stderr.isatty():
        return _Lines(total, description, initial)
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


class Observers(Config):
    """What else watches a run. It decides nothing of what is learned, so it is no part of a `RunConfig`."""

    tensorboard: bool = False  # metrics, into tensorboard/
    wandb: str | None = Field(None, min_length=1)  # metrics, to this project of Weights & Biases
    profile_steps: int = Field(0, ge=0)  # so many steps near the start, into profile/ (see `lib.profiling`)
    probe_every: int | None = Field(None, ge=1)  # steps from one reading of `lib.probes` to the next, into probes.jsonl

    def check(self) -> None:
        """Raise `InputError` if something that is needed is not installed, or has no account."""
        if self.tensorboard:
            summary_writer()
        if self.wandb:
            wandb = _wandb()
            with _wandb_refusing():
                wandb.Settings(project=self.wandb)
                wandb.login()


#: A run as it is by default.
UNOBSERVED = Observers()


class Record:
    """Lines of JSON about steps, as {"step": 50, "loss": 2.5}: readable while they are written, and after a kill."""

    def __init__(self, path: Path, last: float = inf):
        """Goes on with what is there, less a half-written line and those about steps after `last`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_record(path) if line["step"] <= last] if path.exists() else []
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{to_json(line)}\n" for line in kept))
        self.steps = {line["step"] for line in kept}
        self.file = path.open("a")

    def write(self, step: int, **values) -> None:
        self.file.write(to_json({"step": step, **values}) + "\n")
        self.file.flush()
        self.steps.add(step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class Monitor:
    """The record of one run: `metrics.jsonl` in `directory` always, progress in steps, and what `observers` ask for.

    A resumed run continues the record at `step`: lines that a killed run wrote after its last checkpoint are dropped.
    """

    def __init__(
        self,
        directory: Path,
        total: int,
        step: int = 0,
        description: str | None = None,
        observers: Observers = UNOBSERVED,
    ):
        self.step, self.probe_every = step, observers.probe_every
        with ExitStack() as stack:
            self.tensorboard = self.wandb = None
            if observers.tensorboard:
                # purge_step hides what TensorBoard was told after the last checkpoint.
                writer = summary_writer()(directory / "tensorboard", purge_step=step + 1)
                self.tensorboard = stack.enter_context(writer)
            self.metrics = stack.enter_context(Record(directory / "metrics.jsonl", step))
            if observers.wandb:
                self.wandb = stack.enter_context(_wandb_run(observers.wandb, directory))
            if observers.probe_every:  # a reading at `step` is of the step that comes next
                self.probes = stack.enter_context(Record(directory / "probes.jsonl", step - 1))
            self.bar = stack.enter_context(progress(total, description, initial=step))
            self._end_step = lambda: None
            if observers.profile_steps:
                self._end_step = stack.enter_context(profiled(directory / "profile", observers.profile_steps))
            self._stack = stack.pop_all()

    def log(self, step: int, **metrics: float) -> None:
        """Write down the metrics after `step` steps."""
        self.metrics.write(step, **metrics)
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        self.bar.set_postfix_str(" ".join(f"{name}={value:.4g}" for name, value in metrics.items()), refresh=False)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within, the next training step of `model`: its activations are probed when that is due."""
        if self.probe_every and self.step % self.probe_every == 0:
            with probe(model) as rows:
                yield
            for row in rows:
                self.probes.write(self.step, **row)
        else:
            yield

    def advance(self) -> None:
        """One step is done."""
        self.step += 1
        self.bar.update(1)
        self._end_step()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)


class SilentMonitor(nullcontext):
    """What the other ranks of a run have in place of a `Monitor`: the first speaks for all."""

    def __enter__(self):
        return self

    def log(self, step: int, **metrics: float) -> None: ...

    def watching(self, model: nn.Module) -> nullcontext:
        return nullcontext()

    def advance(self) -> None: ...


def read_record(path: Path) -> list[dict]:
    """All whole lines that a `Record` wrote, oldest first."""
    lines = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # the half-written last line of a process that was killed, or is writing
            lines.append(json.loads(line))
    return lines


def read_metrics(directory: Path) -> list[dict]:
    """The metrics that a `Monitor` wrote to `directory`, oldest first."""
    return read_record(directory / "metrics.jsonl")


def summary_writer() -> type:
    """TensorBoard's writer, or an `InputError` if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("TensorBoard was asked for but is not installed: pip install -e '.[monitor]'") from None
    return SummaryWriter


def _wandb():
    """The package of Weights & Biases, or an `InputError` if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise InputError("Weights & Biases was asked for but is not installed: pip install -e '.[monitor]'") from None
    return wandb


@contextmanager
def _wandb_refusing() -> Iterator[None]:
    """What Weights & Biases refuses becomes an `InputError`."""
    wandb = _wandb()
    try:
        yield
    except wandb.Error as error:
        raise InputError(f"Weights & Biases: {str(error).rstrip('.')} (WANDB_MODE=offline takes no account)") from None


def _wandb_run(project: str, directory: Path):
    """The run of Weights & Biases that belongs to `directory`: one that was interrupted goes on as the same."""
    name = directory / "wandb" / "id"
    if not name.exists():
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(uuid.uuid4().hex)
    wandb = _wandb()
    with _wandb_refusing():
        return wandb.init(
            project=project,
            name=directory.resolve().name,
            id=name.read_text(),
            resume="allow",
            dir=directory,
            reinit="create_new",  # beside those of other runs of this process
            settings=wandb.Settings(console="off"),  # a progress bar is no metric
        )
