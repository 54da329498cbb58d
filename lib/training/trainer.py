"""The training loop, for one run or for several of the same shape in lock-step."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lib.base import InputError, WorkError
from lib.config import UNOBSERVED, Observers, RunConfig
from lib.dialogs.batches import Batches, Source
from lib.dialogs.files import ConcatDialogs, ReadAhead
from lib.dialogs.tokens import TokenizedDialogs, send
from lib.model.transformer import Transformer
from lib.training import checkpoint
from lib.training.cuda_graph import Recording
from lib.training.distributed import ALONE, Preempted, Ranks
from lib.training.gradients import IGNORED, Batch, Gradients, Sums
from lib.training.monitor import Monitor, SilentMonitor
from lib.training.optim import build_optimizers, clip_gradients, schedule_factor, set_learning_rate, step_all

#: Steps between two lines of metrics.
LOG_EVERY = 50


@dataclass(frozen=True)
class Ending:
    """How training ended."""

    steps: int
    loss: float  # cross-entropy, nats per trained token, mean over the last steps (at most LOG_EVERY)
    dialogs_seen: int
    seconds: float  # of all parts of a run that was interrupted
    stopped: str  # "recall": it was reached; "hopeless": it was given up; "budget": the last step was


class Trainer:
    """Trains a model on a dataset; killed at any moment and started again, it ends with the same weights, bit for bit.

    Trained alone, on the same kind of device, with the same versions and number of threads, that is: sums in another
    order round differently, and on GPUs some kernels choose their order as they run.

    What a step does depends on the configuration and the step alone (`Batches`, the schedule) and on what a checkpoint
    holds: weights, optimizer state, random state, and the counters below. A step never waits for an accelerator: the
    data lies on it, or is read ahead, and what the host must know of a batch, its lengths, the host keeps.
    """

    def __init__(
        self,
        model: Transformer,
        data: TokenizedDialogs | ConcatDialogs,
        config: RunConfig,
        directory: Path,
        evaluate: Callable[[Transformer], float] | None = None,
        compiled: bool = False,
        sources: Sequence[Source] = (),
        ranks: Ranks = ALONE,
        recorded: bool = False,
    ):
        """`evaluate` returns a recall in [0, 1]; `directory` receives checkpoints and metrics; `sources`
        are those of `Batches`. `ranks` train the model together; the first of them evaluates and writes.

        `compiled` has torch.compile fuse a step's elementwise work: seconds at the start (see `lib.training.run`).
        `recorded` pads all batches to one shape and keeps the rates beside the weights, so that a GPU can replay a step
        from a recording (`lib.training.cuda_graph`): of a single rank that does not compile, else it is a ValueError.
        """
        if recorded and (compiled or ranks.size > 1):
            raise ValueError("steps are recorded of a single rank, and of a model that is not compiled")
        self.model, self.config, self.directory, self.evaluate = model, config, directory, evaluate
        self.ranks, self.recorded = ranks, recorded
        self.gradients = Gradients([model], config.training.dtype == "bfloat16", compiled, ranks, config.training.gamma)
        self.data = data.to(model.device)
        self.lengths, self.first_trained = data.lengths().cpu(), data.first
        self.n_trained = data.n_trained
        self.optimizers = build_optimizers(model, config.optim, rates_on_device=recorded)
        training = config.training
        self.batches = Batches(self.lengths, training.batch_size, config.seed, sources, training.length_pool)
        # A thread costs more than it saves where nothing has to be read.
        self._ahead = ReadAhead(self._make_batch) if isinstance(data, ConcatDialogs) else None
        self.total_steps = config.training.total_steps(self.batches.n_dialogs)
        smallest, self.n_parts = self.batches.n_dialogs // self.batches.per_epoch, config.training.grad_accumulation
        if smallest < self.n_parts * ranks.data_size:
            each = f" on {ranks.data_size} processes" if ranks.data_size > 1 else ""
            raise InputError(
                f"training.grad_accumulation = {self.n_parts}{each}, but there are batches of {smallest} dialogs only"
            )
        self._shape = self._largest_shape() if recorded else None
        self.counters = {"step": 0, "dialogs_seen": 0, "seconds": 0.0, "reached": 0, "hopeless": False}
        self.losses: list[torch.Tensor] = []
        self._saving: Future | None = None
        #: The rotary table that the steps of a recording read: an evaluation may make the model's anew.
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        self.record_anew()

    def train(self, description: str | None = None, observers: Observers = UNOBSERVED) -> Ending:
        """Train from the latest checkpoint in `directory`, or from the start, to the end."""
        return train_together([self], description, observers)[0]

    def step(self) -> None:
        """One update of the weights."""
        Lockstep([self]).step()

    def record_anew(self) -> None:
        """Forget what was recorded of steps: weights, optimizer state or rates have other memory now."""
        self.recording = Recording() if self.recorded else None

    def next_batch(self) -> tuple[list[Batch], int]:
        """This rank's parts of the step's batch, and how many tokens are trained in all parts of all ranks."""
        return (self._ahead or self._make_batch)(self.counters["step"])

    def _make_batch(self, step: int) -> tuple[list[Batch], int]:
        rows = self.batches[step]
        parts = [
            # Every so many rows: they come sorted by length, and no rank should get all the long ones.
            part[self.ranks.data_rank :: self.ranks.data_size]
            for part in rows.tensor_split(self.n_parts)
        ]
        return [self._part(part) for part in parts], int(self.n_trained[rows].sum())

    def _part(self, rows: torch.Tensor) -> Batch:
        n_rows, length, first = self._shape or self._shape_of(rows)
        padding = n_rows - len(rows)
        if padding:
            rows = torch.cat([rows, rows[:1].expand(padding)])
        tokens, mask = self.data.batch(rows, length)
        targets = tokens.masked_fill(~mask, IGNORED)
        if padding:
            targets[-padding:] = IGNORED
        return Batch(tokens[:, :-1], targets[:, first + 1 :], first)

    def _shape_of(self, rows: torch.Tensor) -> tuple[int, int, int]:
        """Of a batch: how many rows, how long, and the position before the first that is trained."""
        return len(rows), int(self.lengths[rows].max()), int(self.first_trained[rows].min()) - 1

    def _largest_shape(self) -> tuple[int, int, int]:
        """The shape that all parts of all batches fit into."""
        n_rows = math.ceil(math.ceil(self.batches.n_dialogs / self.batches.per_epoch) / self.n_parts)
        _, length, first = self._shape_of(torch.arange(len(self.lengths)))
        return n_rows, length, first

    def set_rate(self) -> None:
        """Set this step's learning rate."""
        factor = schedule_factor(self.config.optim, self.counters["step"], self.total_steps)
        set_learning_rate(self.optimizers, factor)

    def prepare_update(self, weight: torch.Tensor) -> None:
        """Scale and clip the gradients, and keep what a recording of this step goes on reading.

        weight: the mean weight of the targets, of all parts of this rank's batch; the weights are to add up to one.
        """
        if self.config.training.gamma:
            gradients = [parameter.grad for parameter in self.model.parameters()]
            torch._foreach_mul_(gradients, 1 / self.ranks.sum(weight))
        self._table = self.model.rotary(1, self.model.embedding.weight.dtype)
        if self.config.optim.clip_norm is not None:
            clip_gradients(self.model.parameters(), self.config.optim.clip_norm)

    def count_step(self, loss: torch.Tensor) -> None:
        """Record that the weights were updated."""
        self.losses = [*self.losses[1 - LOG_EVERY :], loss]
        self.counters["dialogs_seen"] += len(self.batches[self.counters["step"]])
        self.counters["step"] += 1

    def report(self, monitor: Monitor) -> None:
        """After a step: what is due of metrics and evaluation."""
        step, counters, evaluation = self.counters["step"], self.counters, self.config.evaluation
        monitor.advance()
        if step % LOG_EVERY == 0 or step == self.total_steps:
            self.check_losses()
            monitor.log(step, loss=self.loss())
        if self.evaluate and evaluation.every and step % evaluation.every == 0:
            model = self.ranks.whole(self.model)
            recall = self.ranks.first_does(lambda: self.evaluate(model))
            monitor.log(step, recall=recall)
            reached = recall >= (evaluation.stop_at_recall or float("inf"))
            counters["reached"] = counters["reached"] + 1 if reached else 0
            late = step >= self.total_steps / 2
            counters["hopeless"] = late and recall < (evaluation.give_up_below or 0.0)

    @property
    def checkpoint_is_due(self) -> bool:
        return self.counters["step"] % self.config.training.checkpoint_every == 0

    @property
    def stopped(self) -> str | None:
        """Why training is over (see `Ending`), None while it is not."""
        if self.counters["reached"] >= 2:
            return "recall"
        if self.counters["step"] >= self.total_steps:
            return "budget"
        return "hopeless" if self.counters["hopeless"] else None

    def loss(self) -> float:
        """Mean loss of the last steps, in nats per trained token; every rank has to ask."""
        return float(self._all_losses().mean()) if self.losses else float("nan")

    def check_losses(self) -> None:
        """Raise `WorkError` if one of the last losses is not finite; every rank has to ask."""
        finite = self._all_losses().isfinite().tolist()
        if not all(finite):
            step = self.counters["step"] - len(finite) + finite.index(False) + 1
            raise diverged(f"the loss of step {step} is not finite")

    def _check(self) -> None:
        """Raise `WorkError` if training has diverged: a checkpoint of that must not take the place of a good one."""
        self.check_losses()
        if self.ranks.any(not are_finite(self.model.parameters())):
            raise diverged(f"the weights are not finite after step {self.counters['step']}")

    def _all_losses(self) -> torch.Tensor:
        return self.ranks.sum(torch.stack(self.losses))

    def save(self) -> None:
        """Begin to write a checkpoint of everything that the next step depends on; `finish_saving` waits for it.

        Raises `WorkError` in place of a checkpoint if training has diverged.
        """
        self.finish_saving()
        self._check()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optim.{i}.{parameter}.{slot}": value for slot, value in slots.items()}
        tensors["losses"] = self._all_losses()
        tensors["random.cpu"] = torch.get_rng_state()
        if self.model.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.model.device)
        state = {"config": self.config.model_dump(), "counters": self.counters}
        keep = self.config.training.keep_checkpoints
        root = self.directory / "checkpoints"
        self._saving = checkpoint.save_step(root, self.counters["step"], tensors, state, keep, self.ranks)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is whole."""
        saving, self._saving = self._saving, None
        if saving is not None:
            checkpoint.finish(saving)

    def resume(self) -> None:
        """Continue from the latest whole checkpoint in `directory`, if there is one."""
        folder = self.ranks.first_does(lambda: checkpoint.latest(self.directory / "checkpoints"))
        if folder is None:
            return
        tensors, state = checkpoint.load(folder, self._empty_like, self.ranks, verify=False)
        self.model.load_state_dict(below("model.", tensors))
        for i, optimizer in enumerate(self.optimizers):
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in below(f"optim.{i}.", tensors).items():
                parameter, slot = name.split(".")
                slots.setdefault(int(parameter), {})[slot] = tensor.clone()  # not the file, which retention deletes
            groups = optimizer.state_dict()["param_groups"]  # as the configuration says, and the schedule sets them
            optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.losses = list(tensors["losses"].to(self.model.device) / self.ranks.data_size)
        torch.set_rng_state(tensors["random.cpu"])
        if self.model.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.model.device)
        self.counters |= state["counters"]
        self.record_anew()

    def _empty_like(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """What a tensor of a checkpoint is read into: like the weight that it is or belongs to, if it has its shape."""
        weight = None
        if name.startswith("model."):
            weight = self.model.get_parameter(name.removeprefix("model."))
        elif name.startswith("optim."):
            _, i, parameter, _ = name.split(".")
            groups = self.optimizers[int(i)].param_groups
            weight = [p for group in groups for p in group["params"]][int(parameter)]
        if weight is not None and weight.shape == shape:
            return torch.empty_like(weight, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)


def train_together(
    trainers: Sequence[Trainer],
    description: str | None = None,
    observers: Observers = UNOBSERVED,
    asked: threading.Event | None = None,
) -> list[Ending]:
    """Train several runs to their ends, one step of each at a time. Each ends as it would alone, to rounding.

    All models of a call have one shape, and their runs one dtype, loss and number of gradient parts (`stack_key`, else
    a ValueError). Data, seeds, batches, rates and numbers of steps may differ; a run that ends leaves the others. After
    the step in which `asked` is set, or with the last one, everything is saved and `Preempted` raised.
    """
    if len({stack_key(trainer.config) for trainer in trainers}) > 1:
        raise ValueError("runs that train together need the same model, dtype, loss and grad_accumulation")
    with ExitStack() as stack:
        monitors = {}
        for trainer in trainers:
            trainer.resume()
            monitors[trainer] = stack.enter_context(
                Monitor(trainer.directory, trainer.total_steps, trainer.counters["step"], description, observers)
                if trainer.ranks.is_first
                else SilentMonitor()
            )
            stack.callback(trainer.finish_saving)
        lockstep, now = None, time.monotonic()
        while active := [trainer for trainer in trainers if trainer.stopped is None]:
            if lockstep is None or len(lockstep.trainers) != len(active):
                lockstep = Lockstep(active)
            with monitors[active[0]].watching(active[0].model):  # the only one, if its activations are probed
                lockstep.step()
            for trainer in active:
                trainer.report(monitors[trainer])
            before, now = now, time.monotonic()
            for trainer in active:
                trainer.counters["seconds"] += (now - before) / len(active)
            leaving = trainers[0].ranks.any(asked is not None and asked.is_set())
            for trainer in active:
                if trainer.checkpoint_is_due or trainer.stopped or leaving:
                    trainer.save()
            if leaving:
                raise Preempted("asked to leave: the same command goes on from here")
    return [
        Ending(t.counters["step"], t.loss(), t.counters["dialogs_seen"], t.counters["seconds"], t.stopped)
        for t in trainers
    ]


def are_finite(weights: Iterable[torch.Tensor]) -> bool:
    """Whether all elements of all tensors are finite, as far as they lie on this rank; waits for the device."""
    here = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in weights]
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in here]).all())


def diverged(how: str) -> WorkError:
    """The end of a training that has diverged."""
    return WorkError(f"training diverged, {how}: lower the learning rate (the last good checkpoint is kept)")


def stack_key(config: RunConfig) -> tuple:
    """What runs that train together have in common."""
    return config.model, config.training.dtype, config.training.grad_accumulation, config.training.gamma


class Lockstep:
    """Updates the models of some trainers, one step of each at a time. Several become one stack, till the next does."""

    def __init__(self, trainers: Sequence[Trainer]):
        self.trainers = list(trainers)
        if len(self.trainers) == 1:
            self.gradients, self.recording = self.trainers[0].gradients, self.trainers[0].recording
        else:
            bfloat16 = self.trainers[0].config.training.dtype == "bfloat16"
            gamma = self.trainers[0].config.training.gamma
            self.gradients = Gradients([trainer.model for trainer in self.trainers], bfloat16, gamma=gamma)
            for trainer in self.trainers:
                trainer.record_anew()
            self.recording = Recording() if all(trainer.recorded for trainer in self.trainers) else None

    def step(self) -> Sequence[torch.Tensor]:
        """One update of the weights of every model; returns their losses (scalars)."""
        parts, n_trained = zip(*(trainer.next_batch() for trainer in self.trainers), strict=True)
        for trainer in self.trainers:
            trainer.set_rate()
        counts = send(torch.tensor(n_trained), self.trainers[0].model.device)
        inputs = [counts, *(t for of_trainer in parts for batch in of_trainer for t in (batch.tokens, batch.targets))]
        firsts = [[batch.first for batch in of_trainer] for of_trainer in parts]  # of one shape: always the same
        update = partial(self._update, firsts)
        losses = self.recording(update, inputs) if self.recording else update(inputs)
        for trainer, loss in zip(self.trainers, losses, strict=True):
            trainer.count_step(loss)
        return losses

    def _update(self, firsts: list[list[int]], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the device does in a step: the losses' gradients, part by part of the batches, and the update."""
        counts, tensors = inputs[0], iter(inputs[1:])
        parts = [[Batch(next(tensors), next(tensors), first) for first in of_trainer] for of_trainer in firsts]
        n_parts = len(parts[0])
        sums = [
            self.gradients.accumulate(batches, counts, last=i == n_parts)
            for i, batches in enumerate(zip(*parts, strict=True), start=1)
        ]
        means = [Sums(*map(sum, zip(*of_parts, strict=True))) for of_parts in zip(*sums, strict=True)]
        for trainer, mean in zip(self.trainers, means, strict=True):
            trainer.prepare_update(mean.weight)
        step_all([optimizer for trainer in self.trainers for optimizer in trainer.optimizers])
        return [mean.cross_entropy for mean in means]


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
