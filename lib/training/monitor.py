"""Progress and metrics of a run while it trains: always a bar and JSON lines, the rest on request."""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from math import inf
from pathlib import Path
from types import ModuleType

from torch import nn

from lib.base import InputError, optional, to_json
from lib.config import UNOBSERVED, Observers
from lib.paths import replacing, writing
from lib.progress import progress
from lib.training.probes import probe
from lib.training.profiling import profiled


def check_observers(observers: Observers) -> None:
    """Raise `InputError` if a requested observer is not installed, or has no account."""
    if observers.tensorboard:
        _summary_writer()
    if observers.wandb:
        with _wandb() as wandb:
            wandb.Settings(project=observers.wandb)
            wandb.login()


class Record(AbstractContextManager):
    """Lines of JSON about steps, as {"step": 50, "loss": 2.5}: readable while they are written, and after a kill."""

    def __init__(self, path: Path, last: float = inf):
        """Continue the file, but drop a half-written line and those of steps after `last`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:  # refuses a pipe: reading it would never end
            kept = [line for line in read_record(path) if line["step"] <= last] if path.exists() else []
            temporary.write_text("".join(f"{to_json(line)}\n" for line in kept), encoding="utf-8")
        self.steps = {line["step"] for line in kept}
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values) -> None:
        with writing(Path(self.file.name)):
            self.file.write(to_json({"step": step, **values}) + "\n")
            self.file.flush()
        self.steps.add(step)

    def __exit__(self, *_):
        with suppress(OSError):  # `write` has reported that the disk is full
            self.file.close()


class Monitor(AbstractContextManager):
    """Writes `metrics.jsonl` in `directory` always (from `step` on), shows progress, and does what `observers` ask."""

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
                # purge_step hides TensorBoard's events after the last checkpoint.
                writer = _summary_writer()(directory / "tensorboard", purge_step=step + 1)
                self.tensorboard = stack.enter_context(writer)
            self.metrics = stack.enter_context(Record(directory / "metrics.jsonl", step))
            if observers.wandb:
                self.wandb = stack.enter_context(_wandb_run(observers.wandb, directory))
            if observers.probe_every:  # a probe at `step` is made during the step after it
                self.probes = stack.enter_context(Record(directory / "probes.jsonl", step - 1))
            self.bar = stack.enter_context(progress(total, description, initial=step))
            self._end_step = lambda: None
            if observers.profile_steps:
                self._end_step = stack.enter_context(profiled(directory / "profile", observers.profile_steps))
            self._stack = stack.pop_all()

    def log(self, step: int, **metrics: float) -> None:
        """Log the metrics after `step` steps."""
        self.metrics.write(step, **metrics)
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        self.bar.set_postfix_str(" ".join(f"{name}={value:.4g}" for name, value in metrics.items()), refresh=False)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Probe the activations of the training step within, when a probe is due."""
        is_due = self.probe_every and self.step % self.probe_every == 0
        with probe(model) if is_due else nullcontext(()) as rows:
            yield
        for row in rows:
            self.probes.write(self.step, **row)

    def advance(self) -> None:
        """Show that one step is done."""
        self.step += 1
        self.bar.update(1)
        self._end_step()

    def __exit__(self, *error):
        return self._stack.__exit__(*error)


class Throughput:
    """Trained tokens and model FLOPs per second since the last reading, counted by the host alone.

    Model FLOPs are those that the dialogs need, without padding (`ModelConfig.forward_flops`, three times). Their share
    of `peak`, the FLOP/s of all devices together, is `mfu`, where the peak is known.
    """

    def __init__(self, peak: float | None):
        self.peak = peak
        self.restart()

    def restart(self) -> None:
        """Begin to count now."""
        self.tokens, self.flops, self.since = 0, 0.0, time.perf_counter()

    def count(self, tokens: int, flops: float) -> None:
        """Add one step."""
        self.tokens += tokens
        self.flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Return the rates, and restart. On a GPU, call it only after waiting for the losses: steps must be done."""
        seconds = time.perf_counter() - self.since
        rates = {"tokens_per_second": self.tokens / seconds, "tflops": self.flops / seconds / 1e12}
        if self.peak:
            rates["mfu"] = self.flops / seconds / self.peak
        self.restart()
        return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def read_record(path: Path) -> list[dict]:
    """Return all whole lines that a `Record` wrote, oldest first."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # Left by a power cut, or the half-written last line of a killed or running process.
        with suppress(ValueError, RecursionError):
            if isinstance(line := json.loads(text), dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def _summary_writer() -> type:
    """Return TensorBoard's writer; an `InputError` if it is not installed."""
    lack = "TensorBoard was asked for but is not installed"
    return optional("torch.utils.tensorboard", "monitor", lack).SummaryWriter


@contextmanager
def _wandb() -> Iterator[ModuleType]:
    """Yield the package of Weights & Biases; an `InputError` if it is not installed, or refuses."""
    wandb = optional("wandb", "monitor", "Weights & Biases was asked for but is not installed")
    try:
        yield wandb
    except wandb.Error as error:
        raise InputError(f"Weights & Biases: {str(error).rstrip('.')} (WANDB_MODE=offline needs no account)") from None


def _wandb_run(project: str, directory: Path):
    """Return the run of Weights & Biases that belongs to `directory`: an interrupted one is resumed."""
    (directory / "wandb").mkdir(parents=True, exist_ok=True)  # where `resume` keeps the id
    with _wandb() as wandb:
        settings = wandb.Settings(console="off")  # a progress bar is no metric
        names = {"project": project, "name": directory.resolve().name, "dir": directory}
        return wandb.init(**names, resume="auto", reinit="create_new", settings=settings)  # other runs stay open
