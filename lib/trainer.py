"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from lib import checkpoint
from lib.config import RunConfig
from lib.dialogs import Batches, TokenizedDialogs
from lib.model import Transformer
from lib.monitor import Monitor
from lib.optim import build_optimizers, schedule_factor, set_learning_rate

#: Steps between two lines of metrics.
LOG_EVERY = 50


@dataclass(frozen=True)
class Ending:
    """How training ended."""

    steps: int
    loss: float  # nats per trained token, mean over the last steps (at most LOG_EVERY)
    dialogs_seen: int
    seconds: float  # of all parts of a run that was interrupted
    stopped: str  # "recall": it was reached; "budget": the last step was


class Trainer:
    """Trains a model on a dataset; killed at any moment and started again, it ends with the same weights, bit for bit.

    On the same kind of device, with the same versions and number of threads, that is: sums in another order round
    differently, and on GPUs some kernels choose their order as they run.

    What a step does depends on the configuration and the step alone (`Batches`, the schedule) and on what a checkpoint
    holds: weights, optimizer state, random state, and the counters below.
    """

    def __init__(
        self,
        model: Transformer,
        data: TokenizedDialogs,
        config: RunConfig,
        directory: Path,
        evaluate: Callable[[Transformer], float] | None = None,
    ):
        """`evaluate` returns a recall in [0, 1]; `directory` receives checkpoints and metrics."""
        self.model, self.config, self.directory, self.evaluate = model, config, directory, evaluate
        self.data = data.to(model.device)
        self.optimizers = build_optimizers(model, config.optim)
        self.total_steps = config.training.total_steps(len(data))
        self.batches = Batches(data.lengths(), config.training.batch_size, config.seed)
        self.counters = {"step": 0, "dialogs_seen": 0, "seconds": 0.0, "reached": 0}
        self.losses: list[torch.Tensor] = []

    def train(self, description: str | None = None, tensorboard: bool = False) -> Ending:
        """Train from the latest checkpoint in `directory`, or from the start, to the end."""
        self.resume()
        training, counters = self.config.training, self.counters
        started = time.monotonic() - counters["seconds"]
        with Monitor(self.directory, self.total_steps, counters["step"], description, tensorboard) as monitor:
            while counters["step"] < self.total_steps and not self._recall_is_stable():
                self.step()
                monitor.advance()
                step = counters["step"]
                counters["seconds"] = time.monotonic() - started
                if step % LOG_EVERY == 0 or step == self.total_steps:
                    monitor.log(step, loss=self.loss())
                if self._due(self.config.evaluation.every) and self.evaluate:
                    recall = self.evaluate(self.model)
                    monitor.log(step, recall=recall)
                    reached = recall >= (self.config.evaluation.stop_at_recall or float("inf"))
                    counters["reached"] = counters["reached"] + 1 if reached else 0
                if self._due(training.checkpoint_every):
                    self.save()
        return Ending(
            counters["step"], self.loss(), counters["dialogs_seen"], counters["seconds"],
            "recall" if self._recall_is_stable() else "budget",
        )  # fmt: skip

    def step(self) -> None:
        """One update of the weights."""
        step, optim = self.counters["step"], self.config.optim
        set_learning_rate(self.optimizers, schedule_factor(optim, step, self.total_steps))
        rows = self.batches[step]
        self.losses = [*self.losses[1 - LOG_EVERY :], self._accumulate_gradients(rows.to(self.model.device))]
        if optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.counters["step"] += 1
        self.counters["dialogs_seen"] += len(rows)

    def _accumulate_gradients(self, rows: torch.Tensor) -> torch.Tensor:
        """Gradients of the mean loss over the batch's trained tokens, and that loss (a scalar tensor)."""
        parts = [self.data.batch(part) for part in rows.chunk(self.config.training.grad_accumulation)]
        n_trained = sum(mask[:, 1:].sum() for _, mask in parts)
        total = torch.zeros((), device=rows.device)
        bfloat16 = self.config.training.dtype == "bfloat16"
        for tokens, mask in parts:
            with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                logits = self.model(tokens[:, :-1], select=mask[:, 1:])
            loss = F.cross_entropy(logits.float(), tokens[:, 1:][mask[:, 1:]], reduction="sum") / n_trained
            loss.backward()
            total += loss.detach()
        return total

    def loss(self) -> float:
        """Mean loss of the last steps, in nats per trained token."""
        return float(torch.stack(self.losses).mean()) if self.losses else float("nan")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.counters["step"] % every == 0

    def _recall_is_stable(self) -> bool:
        return self.counters["reached"] >= 2

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        groups = []
        for i, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            groups.append(state["param_groups"])
            for parameter, slots in state["state"].items():
                tensors |= {f"optim.{i}.{parameter}.{slot}": value for slot, value in slots.items()}
        tensors["losses"] = torch.stack(self.losses)
        tensors["random.cpu"] = torch.get_rng_state()
        if self.model.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.model.device)
        state = {"config": self.config.model_dump(), "counters": self.counters, "param_groups": groups}
        keep = self.config.training.keep_checkpoints
        checkpoint.save_step(self.directory / "checkpoints", self.counters["step"], tensors, state, keep)

    def resume(self) -> None:
        """Continue from the latest whole checkpoint in `directory`, if there is one."""
        folder = checkpoint.latest(self.directory / "checkpoints")
        if folder is None:
            return
        tensors, state = checkpoint.load(folder)
        self.model.load_state_dict(_below("model.", tensors))
        for i, (optimizer, groups) in enumerate(zip(self.optimizers, state["param_groups"], strict=True)):
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in _below(f"optim.{i}.", tensors).items():
                parameter, slot = name.split(".")
                slots.setdefault(int(parameter), {})[slot] = tensor.clone()  # not the file, which retention deletes
            optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.losses = list(tensors["losses"].to(self.model.device))
        torch.set_rng_state(tensors["random.cpu"])
        if self.model.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.model.device)
        self.counters = state["counters"]


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
