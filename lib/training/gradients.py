"""Loss and gradients of one model, or of several of the same shape in one pass."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.model.transformer import Transformer
from lib.training.distributed import ALONE, Ranks, gradients_stay_here

#: A target that has no loss.
IGNORED = -100


class Batch(NamedTuple):
    """What a training step takes from a dataset."""

    tokens: torch.Tensor  # (B, S) int64
    targets: torch.Tensor  # (B, S - first) int64: what follows the positions from `first` on, or IGNORED
    first: int  # no row has a target before this position


class Sums(NamedTuple):
    """What a batch's loss is made of, added up over its targets: scalars."""

    weighted: torch.Tensor  # cross-entropy times weight, in nats: what is differentiated
    weight: torch.Tensor
    cross_entropy: torch.Tensor  # in nats


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, gamma: float = 0.0) -> Sums:
    """The focal loss of logits (..., V) at targets (...), with no loss where these are IGNORED.

    A target's cross-entropy has the weight (1 - p)^gamma, p the model's probability of it (Lin et al., 2017), through
    which no gradient flows: what is known already no longer counts. `gamma` = 0 is plain cross-entropy.
    """
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    logits, targets = logits.flatten(0, -2), targets.flatten()
    if gamma == 0:
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return Sums(total, (targets != IGNORED).sum(), total)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")  # zero where IGNORED
    unsure = -torch.expm1(-losses.detach())
    # Where everything is known all weights are equal, not zero.
    weights = unsure.clamp(min=torch.finfo(torch.float32).eps) ** gamma * (targets != IGNORED)
    return Sums((weights * losses).sum(), weights.sum(), losses.detach().sum())


def _loss_of_batch(model: nn.Module, batch: Batch, gamma: float) -> Sums:
    return summed_loss(model(batch.tokens, batch.first), batch.targets, gamma)


class Gradients:
    """Computes losses and adds gradients to the parameters of `models`.

    Several models are computed as one batched model, which pays where a device is not busy with one. They stay ordinary
    models: each one's parameters become views of the stacked ones, so that optimizers, evaluation and checkpoints see
    no difference. That ends where the parameters get other storage: with `model.to(...)`, or in another stack.
    """

    def __init__(
        self,
        models: Sequence[Transformer],
        bfloat16: bool = False,
        compiled: bool = False,
        ranks: Ranks = ALONE,
        gamma: float = 0.0,
    ):
        """`gamma` is that of `summed_loss`. `bfloat16` computes matrix products in that precision; `compiled` has
        torch.compile fuse elementwise work (not that of stacked models), and leaves it as it is, with a warning, where
        that fails: without a compiler, say. A single model may be trained by several `ranks`, each on its part of a
        batch.
        """
        self.models, self.bfloat16, self.ranks, self.gamma = list(models), bfloat16, ranks, gamma
        self.called = [ranks.wrap(model) for model in self.models]
        self._loss_of_batch = _loss_of_batch
        if compiled:
            for model in self.models:  # a table that is built while compiling ties the code to the first batch's length
                model.rotary(1, torch.float32)
            self._loss_of_batch = torch.compile(_loss_of_batch, dynamic=True)
        if len(self.models) > 1:
            members = [dict(model.named_parameters()) for model in self.models]
            self.stacked = {
                name: torch.stack([member[name].detach() for member in members]).requires_grad_() for name in members[0]
            }
            for i, member in enumerate(members):
                for name, parameter in member.items():
                    parameter.data = self.stacked[name].data[i]
            self._members = members

    def accumulate(
        self, batches: Sequence[Batch], n_trained: Sequence[int] | torch.Tensor, last: bool = True
    ) -> list[Sums]:
        """Add the gradients of each model's loss on its batch: the weighted sum, divided by its `n_trained`.

        Ranks exchange gradients with the `last` part of a step's batch. Returns the sums in this rank, divided by
        `n_trained`; they add up over data ranks.
        """
        with nullcontext() if last else gradients_stay_here(self.called[0]):
            try:
                return self._accumulate(batches, n_trained)
            except torch._dynamo.exc.TorchDynamoException as error:  # before any gradient is added: it is one piece
                cause = getattr(error, "inner_exception", error)
                reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
                warnings.warn(f"training goes on without torch.compile, which failed: {reason}", stacklevel=2)
                self._loss_of_batch = _loss_of_batch
                return self._accumulate(batches, n_trained)

    def _accumulate(self, batches: Sequence[Batch], n_trained: Sequence[int] | torch.Tensor) -> list[Sums]:
        with torch.autocast(self.models[0].device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            if len(self.models) == 1:
                sums = [self._loss_of_batch(self.called[0], batches[0], self.gamma)]
            else:
                sums = [Sums(*of_model) for of_model in zip(*self._stacked_losses(batches), strict=True)]
        means = [Sums(*(total / n for total in of_model)) for of_model, n in zip(sums, n_trained, strict=True)]
        loss = sum(of_model.weighted for of_model in means)
        (self.ranks.data_size * loss).backward()  # ranks take the mean of their gradients
        if len(self.models) > 1:
            for name, stacked in self.stacked.items():
                for member, gradient in zip(self._members, stacked.grad, strict=True):
                    parameter = member[name]
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                stacked.grad = None
        return [Sums(*(mean.detach() for mean in of_model)) for of_model in means]

    def _stacked_losses(self, batches: Sequence[Batch]) -> Sums:
        """The summed loss of every model on its batch, each field (R,)."""
        model, batch = self.models[0], _stack_batches(batches)

        def loss(parameters: dict[str, torch.Tensor], tokens: torch.Tensor, targets: torch.Tensor) -> Sums:
            return summed_loss(functional_call(model, parameters, (tokens, batch.first)), targets, self.gamma)

        with sdpa_kernel(SDPBackend.MATH):  # not every other kernel can be batched over models
            return vmap(loss)(self.stacked, batch.tokens, batch.targets)


def _stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch (R, B, S) of the R given, padded to the largest B and S."""
    first = min(batch.first for batch in batches)
    rows, length = (max(batch.tokens.shape[i] for batch in batches) for i in (0, 1))
    tokens = batches[0].tokens.new_zeros(len(batches), rows, length)
    targets = batches[0].targets.new_full((len(batches), rows, length - first), IGNORED)
    for i, batch in enumerate(batches):
        B, S = batch.tokens.shape
        tokens[i, :B, :S] = batch.tokens
        targets[i, :B, batch.first - first : S - first] = batch.targets
    return Batch(tokens, targets, first)
