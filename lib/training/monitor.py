"""What a run shows and writes down while it trains: progress and metrics as JSON lines always, the rest on request."""

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from math import inf
from pathlib import Path

from torch import nn

from lib.base import InputError, to_json
from lib.config import UNOBSERVED, Observers
from lib.paths import replacing
from lib.progress import progress
from lib.training.probes import probe
from lib.training.profiling import profiled


def check_observers(observers: Observers) -> None:
    """Raise `InputError` if something that is asked for is not installed, or has no account."""
    if observers.tensorboard:
        summary_writer()
    if observers.wandb:
        wandb = _wandb()
        with _wandb_refusing():
            wandb.Settings(project=observers.wandb)
            wandb.login()


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
