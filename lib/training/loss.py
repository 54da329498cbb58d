"""The loss of a batch: cross-entropy, or the focal loss."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

#: A target that has no loss.
IGNORED = -100


class Batch(NamedTuple):
    """A micro-batch of a training step."""

    tokens: torch.Tensor  # (B, S) int64
    targets: torch.Tensor  # (B, S - first) int64: what follows the positions from `first` on, or IGNORED
    first: int  # no row has a target before this position


def batch_loss(model: nn.Module, batch: Batch, gamma: float) -> torch.Tensor:
    """Return the focal loss of the model's predictions: (3,).

    Three sums over the targets: weight times cross-entropy (only this one has a gradient), weight, cross-entropy.
    A target's cross-entropy has the weight (1 - p)^gamma, p the model's probability of it, so known
    targets count less (Lin et al., 2017). No gradient flows through the weight. `gamma` = 0 is plain cross-entropy.
    """
    logits, targets = model(batch.tokens, batch.first).flatten(0, -2), batch.targets.flatten()
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    if gamma == 0:
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return torch.stack([total, (targets != IGNORED).sum(), total.detach()])
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")  # zero where IGNORED
    unsure = -torch.expm1(-losses.detach())
    # If all targets are known, weights are equal, not zero.
    weights = unsure.clamp(min=torch.finfo(torch.float32).eps) ** gamma * (targets != IGNORED)
    return torch.stack([(weights * losses).sum(), weights.sum(), losses.detach().sum()])


def compiled_batch_loss(model: nn.Module, example: Batch, gamma: float) -> Callable[..., torch.Tensor]:
    """Return `batch_loss` with its elementwise work fused by torch.compile, for batches of any shape.

    The example is computed once, gradients included, to see whether compiling works. If it does not (no compiler, or
    half a library left by a killed process), this warns and returns `batch_loss` as it is.
    """
    compiled = torch.compile(batch_loss, dynamic=True)
    try:
        compiled(model, example, gamma)[0].backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        warnings.warn(f"training goes on without torch.compile, which failed: {reason}", stacklevel=2)
        compiled = batch_loss
    model.zero_grad()
    return compiled
