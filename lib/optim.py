"""Optimizers and learning-rate schedules."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from lib.base import Config


class OptimConfig(Config):
    """How the weights are updated. The paper's recipe is AdamW at 1e-3, weight decay 0.1, cosine over 100,000 steps."""

    #: "muon" is Muon for the hidden matrices and AdamW for embedding, output and norms; "adamw" is AdamW for all.
    name: Literal["adamw", "muon"] = "muon"
    #: Peak learning rate of AdamW.
    lr: float = Field(1e-2, gt=0)
    #: Peak learning rate of Muon.
    muon_lr: float = Field(2e-2, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    #: The gradient is scaled down to at most this norm; None leaves it as it is.
    clip_norm: float | None = Field(1.0, gt=0)


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of `model`: AdamW alone, or Muon for the hidden matrices and AdamW for the rest.

    Every parameter group carries its peak rate as `peak_lr`; `set_learning_rate` follows the schedule from there.
    Weight decay does not apply to norms.
    """
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif name.startswith(("embedding", "output")):
            tables.append(parameter)
        else:
            matrices.append(parameter)
    decayed = tables + matrices if config.name == "adamw" else tables
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True,
        )
    ]  # fmt: skip
    if config.name == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """What the peak rate is multiplied by in `step` (from 0) of `total_steps`, in (0, 1].

    Linear warm-up, then constant, or half a cosine that would reach zero one step after the last.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
