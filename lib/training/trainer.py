"""The training loop of one run: batches, steps, metrics, evaluations and checkpoints."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from lib.base import InputError, WorkError
from lib.config import UNOBSERVED, Observers, RunConfig
from lib.dialogs.batches import Batches, Source
from lib.dialogs.tokens import TokenizedDialogs, send
from lib.model.transformer import Transformer
from lib.paths import reading
from lib.training import checkpoint
from lib.training.cuda_graph import CudaGraph
from lib.training.devices import peak_flops
from lib.training.distributed import ALONE, Preempted, Ranks, distribute_like, full_tensor, no_sync
from lib.training.loss import IGNORED, Batch, batch_loss, compiled_batch_loss
from lib.training.monitor import Monitor, Throughput
from lib.training.optim import build_optimizers, schedule_factor, set_learning_rate

#: Steps between two lines of metrics.
LOG_EVERY = 50


class Ending(NamedTuple):
    """How training ended."""

    steps: int
    loss: float  # cross-entropy, nats per trained token, mean over the last steps (at most LOG_EVERY)
    dialogs_seen: int
    seconds: float  # of all parts of an interrupted run
    stopped: str  # "recall": target reached; "hopeless": given up; "budget": last step reached


class Trainer:
    """Trains a model on a dataset; killed at any moment and started again, it ends with the same weights, bit for bit.

    That holds on the same kind of device, with the same versions and number of threads: sums in another order round
    differently, and on GPUs some kernels choose their order as they run.

    A step depends on the configuration and the step's number (`Batches`, the schedule) and on what a checkpoint holds:
    weights, optimizer state, random state, and the counters below. The host never waits for the accelerator in a step:
    the data is on it, and the host keeps the lengths of all dialogs.
    """

    def __init__(
        self,
        model: Transformer,
        data: TokenizedDialogs,
        config: RunConfig,
        directory: Path,
        evaluate: Callable[[Transformer], float] | None = None,
        compiled: bool = False,
        sources: Sequence[Source] = (),
        ranks: Ranks = ALONE,
        cuda_graph: bool = False,
    ):
        """`evaluate` returns a recall in [0, 1]; `directory` receives checkpoints and metrics; `sources`
        are those of `Batches`. `ranks` train the model together; the first of them evaluates and logs.

        `compiled` has torch.compile fuse a step's elementwise work: seconds at the start (see `lib.training.run`).
        `cuda_graph` pads all batches to one shape and keeps the rates beside the weights, so that a GPU can replay a
        step (`lib.training.cuda_graph`): for a single rank, and not with `compiled`.
        """
        self.model, self.config, self.directory, self.evaluate, self.ranks = model, config, directory, evaluate, ranks
        self.module = ranks.wrap(model)
        self.optimizers = build_optimizers(model, config.optim, rates_on_device=cuda_graph)
        self.data = data.to(model.device)
        self.lengths = data.lengths().cpu()
        training = config.training
        self.batches = Batches(self.lengths, training.batch_size, config.seed, sources, training.length_pool)
        self.total_steps = training.total_steps(self.batches.n_dialogs)
        smallest, n_parts = self.batches.n_dialogs // self.batches.per_epoch, training.grad_accumulation
        if smallest < n_parts * ranks.data_size:
            parts = f"training.grad_accumulation = {n_parts}, times the processes,"
            raise InputError(f"{parts} is too large for batches of {smallest} dialogs")
        self.counters = {"step": 0, "dialogs_seen": 0, "seconds": 0.0, "reached": 0, "hopeless": False}
        self.losses: list[torch.Tensor] = []  # of the last steps, this rank's part; the loss is the sum over all
        self.throughput = Throughput(peak_flops(model.device, training.dtype, ranks.size))
        self.cuda_graph, self._shape = None, None
        if cuda_graph:  # the shape that fits every micro-batch
            n_rows = math.ceil(math.ceil(self.batches.n_dialogs / self.batches.per_epoch) / n_parts)
            self.cuda_graph, self._shape = CudaGraph(), (n_rows, *self._span(torch.arange(len(self.lengths))))
        self._batch_loss = batch_loss
        if compiled:
            # A table that grows in the compiled code would be compiled again.
            self.model.rotary(int(self.lengths.max()), torch.float32)
            with self._autocast():
                self._batch_loss = compiled_batch_loss(self.module, self.next_batch()[0][0], training.gamma)

    # Training ---------------------------------------------------------------------------------------------------------

    def train(
        self, description: str | None = None, observers: Observers = UNOBSERVED, asked: threading.Event | None = None
    ) -> Ending:
        """Train from the latest checkpoint in `directory`, or from the start, to the end.

        If `asked` is set, save after the current step and raise `Preempted`. Raises `WorkError` if
        training diverges or a checkpoint cannot be written.
        """
        self.resume()
        counters = self.counters
        args = self.directory, self.total_steps, counters["step"], description, observers
        with Monitor(*args) if self.ranks.rank == 0 else nullcontext() as monitor:  # the first rank logs for all
            now = time.monotonic()
            self.throughput.restart()
            while self.stopped is None:
                with monitor.watching(self.model) if monitor else nullcontext():
                    self.step()
                self.report(monitor)
                before, now = now, time.monotonic()
                counters["seconds"] += now - before
                leaving = self.ranks.any(asked is not None and asked.is_set())
                due = counters["step"] % self.config.training.checkpoint_every == 0
                if due or self.stopped or leaving:
                    self.save()
                if leaving:
                    raise Preempted("stopped by a signal: the same command resumes from here")
        return Ending(counters["step"], self.loss(), counters["dialogs_seen"], counters["seconds"], self.stopped)

    def step(self) -> None:
        """Update the weights once, on the next batch: forward, loss, backward, clip, step."""
        training, clip_norm = self.config.training, self.config.optim.clip_norm
        factor = schedule_factor(self.config.optim, self.counters["step"], self.total_steps)
        set_learning_rate(self.optimizers, factor)
        parts, n_trained = self.next_batch()
        inputs = [send(torch.tensor(n_trained), self.model.device)]
        inputs += [tensor for part in parts for tensor in (part.tokens, part.targets)]
        if self.cuda_graph and self.cuda_graph.is_captured:
            self.cuda_graph.replay(inputs)  # the block below, without Python
        else:
            with self.cuda_graph.capture(inputs) if self.cuda_graph else nullcontext(inputs) as (count, *tensors):
                means = []
                for i, (tokens, targets) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
                    is_last = i == len(parts) - 1
                    with nullcontext() if is_last else no_sync(self.module):  # one gradient sync a step
                        with self._autocast():
                            part = Batch(tokens, targets, parts[i].first)
                            totals = self._batch_loss(self.module, part, training.gamma)
                        (self.ranks.data_size * (totals[0] / count)).backward()  # ranks take the mean of gradients
                    means.append(totals.detach() / count)
                _, weight, self._loss = sum(means)
                if training.gamma:  # normalize the targets' weights to sum to one
                    gradients = [parameter.grad for parameter in self.model.parameters()]
                    torch._foreach_mul_(gradients, 1 / self.ranks.sum(weight))
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                # Keep the table that a replay reads: an evaluation may rebuild the model's.
                self._rotary = self.model.rotary(1, self.model.embedding.weight.dtype)
        self.losses = [*self.losses[1 - LOG_EVERY :], self._loss.clone()]  # a replay overwrites it
        # Count the arithmetic that the model needs for its dialogs without padding: forward, times 3.
        rows = self.batches[self.counters["step"]]
        n = len(rows)
        length, n_logits = round(int(self.lengths[rows].sum()) / n) - 1, round(n_trained / n)
        self.throughput.count(n_trained, 3 * n * self.config.model.forward_flops(length, n_logits))
        self.counters["dialogs_seen"] += n
        self.counters["step"] += 1

    def _autocast(self) -> torch.autocast:
        bfloat16 = self.config.training.dtype == "bfloat16"
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=bfloat16)

    # Batches ----------------------------------------------------------------------------------------------------------

    def next_batch(self) -> tuple[list[Batch], int]:
        """Return this rank's micro-batches of the step, and the number of trained tokens over all ranks."""
        rows = self.batches[self.counters["step"]]
        # Strided: rows are sorted by length, and no rank should get all the long ones.
        share = slice(self.ranks.data_rank, None, self.ranks.data_size)
        parts = []
        for part in rows.tensor_split(self.config.training.grad_accumulation):
            part = part[share]
            n_rows, length, first = self._shape or (len(part), *self._span(part))
            tokens, mask = self.data.batch(torch.cat([part, part[:1].expand(n_rows - len(part))]), length)
            mask[len(part) :] = False  # of padding
            targets = tokens.masked_fill(~mask, IGNORED)
            parts.append(Batch(tokens[:, :-1], targets[:, first + 1 :], first))
        return parts, int(self.data.n_trained[rows].sum())

    def _span(self, rows: torch.Tensor) -> tuple[int, int]:
        """Return the length of the longest of these dialogs, and the position before the first trained one."""
        return int(self.lengths[rows].max()), int(self.data.first[rows].min()) - 1

    # Metrics and the end ----------------------------------------------------------------------------------------------

    def report(self, monitor: Monitor | None) -> None:
        """Log metrics and evaluate, if either is due after this step."""
        step, counters, evaluation = self.counters["step"], self.counters, self.config.evaluation
        log = monitor.log if monitor else lambda step, **_: None
        if monitor:
            monitor.advance()
        if step % LOG_EVERY == 0 or step == self.total_steps:
            log(step, loss=self.loss(), **self.throughput.read())
        if self.evaluate and evaluation.every and step % evaluation.every == 0:
            self.losses[-1].item()  # wait for the device now: evaluation time is excluded
            with self.throughput.paused():
                model = self.ranks.full_model(self.model)
                recall = self.ranks.first_does(lambda: self.evaluate(model))
            log(step, recall=recall)
            reached = recall >= (evaluation.stop_at_recall or float("inf"))
            counters["reached"] = counters["reached"] + 1 if reached else 0
            late = step >= self.total_steps / 2
            counters["hopeless"] = late and recall < (evaluation.give_up_below or 0.0)

    @property
    def stopped(self) -> str | None:
        """Return why training is over (see `Ending`); None while it is not."""
        if self.counters["reached"] >= 2:
            return "recall"
        if self.counters["step"] >= self.total_steps:
            return "budget"
        return "hopeless" if self.counters["hopeless"] else None

    def loss(self) -> float:
        """Return the mean loss of the last steps, in nats per trained token; every rank must call this.

        Raises `WorkError` if one of them is not finite.
        """
        losses = self.ranks.sum(torch.stack(self.losses))
        if not all(finite := losses.isfinite().tolist()):
            step = self.counters["step"] - len(finite) + finite.index(False) + 1
            raise diverged(f"the loss of step {step} is not finite")
        return float(losses.mean())

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on.

        Raises `WorkError` if training has diverged: a good checkpoint must not be replaced.
        """
        self.loss()  # raises if one is not finite
        if self.ranks.any(not are_finite(self.model.parameters())):
            raise diverged(f"the weights are not finite after step {self.counters['step']}")
        state = {"config": self.config.model_dump(), "counters": self.counters}
        root, keep = self.directory / "checkpoints", self.config.training.keep_checkpoints
        tensors = {name: full_tensor(tensor) for name, tensor in self._tensors().items()}
        tensors |= {"losses": self.ranks.sum(torch.stack(self.losses)), "random.cpu": torch.get_rng_state()}
        self.ranks.first_does(lambda: checkpoint.save_step(root, self.counters["step"], tensors, state, keep))

    @torch.no_grad()
    def resume(self) -> None:
        """Continue from the latest whole checkpoint in `directory`, if there is one."""
        folder = self.ranks.first_does(lambda: checkpoint.latest(self.directory / "checkpoints"))
        if folder is None:
            return
        tensors, state = checkpoint.load(folder)
        with reading(f"the checkpoint {folder}", KeyError, RuntimeError, TypeError, AttributeError):  # no run wrote it
            for name, tensor in self._tensors().items():
                tensor.copy_(distribute_like(tensor, tensors[name].to(tensor.device)))
            self.losses = list(tensors["losses"].to(self.model.device) / self.ranks.data_size)
            torch.set_rng_state(tensors["random.cpu"])
            # A step that is a word would end in a traceback later.
            self.counters |= {name: type(self.counters[name])(n) for name, n in state["counters"].items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return weights and optimizer state, as they are and where they are."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optim.{i}.{parameter}.{slot}": value for slot, value in slots.items()}
        return tensors


def are_finite(weights: Iterable[torch.Tensor]) -> bool:
    """Return whether all elements of this rank's part of the tensors are finite; waits for the device."""
    here = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in weights]
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in here]).all())


def diverged(how: str) -> WorkError:
    """Return the error that ends a training that has diverged."""
    return WorkError(f"training diverged, {how}: lower the learning rate (the last good checkpoint is kept)")
