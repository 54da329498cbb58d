"""Optimizers and learning-rate schedules."""

import math
from collections import defaultdict

import torch
from torch import nn

from lib.config import OptimConfig
from lib.training.distributed import distribute_like, full_tensor


class Muon(torch.optim.Muon):
    """PyTorch's Muon with all matrices of one shape orthogonalized together.

    Small models spend more on launching kernels than on arithmetic, so stacks of matrices save most of the time of a
    step. The iteration runs in the weights' own precision, not in bfloat16 like PyTorch's: it is no slower at these
    sizes, and equal gradients then give equal steps whatever else is in the stack. Nesterov momentum only.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                gradients = [parameter.grad for parameter in parameters]
                moments = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
                torch._foreach_lerp_(gradients, moments, group["momentum"])
                updates = orthogonalize(torch.stack([full_tensor(gradient) for gradient in gradients]))
                steps = [distribute_like(*pair) for pair in zip(parameters, updates, strict=True)]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_mul_(steps, group["lr"] * math.sqrt(max(1, rows / columns)))
                torch._foreach_sub_(parameters, steps)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return U S' V^T for matrices U S V^T (N, rows, columns), singular values S' near 1: five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315  # as in `torch.optim.Muon`: steepest at zero, not convergent
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build_optimizers(
    model: nn.Module, config: OptimConfig, rates_on_device: bool = False
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of `model`: AdamW alone, or AdamW and, for the hidden matrices, Muon.

    Every parameter group carries its peak rate as `peak_lr`; `set_learning_rate` follows the schedule from there.
    Weight decay spares norms unless `config.decay_norms`. `rates_on_device`: rates are tensors beside the parameters,
    so that a CUDA graph reads them (`lib.training.cuda_graph`). The optimizers' state is there from the start, not from
    the first step on: a checkpoint is loaded into it.
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
    optimizers = [
        torch.optim.AdamW(
            [{"params": decayed}, {"params": vectors, "weight_decay": config.weight_decay * config.decay_norms}],
            lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True,
            capturable=rates_on_device,
        )
    ]  # fmt: skip
    if config.name == "muon":
        optimizers.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        moments = ["momentum_buffer"] if isinstance(optimizer, Muon) else ["step", "exp_avg", "exp_avg_sq"]
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
            if rates_on_device:
                group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
            for parameter in filter(lambda parameter: parameter.requires_grad, group["params"]):
                like = {"step": torch.zeros((), device=parameter.device)}
                optimizer.state[parameter] = {name: torch.zeros_like(like.get(name, parameter)) for name in moments}
    return optimizers


def schedule_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the factor in (0, 1] of the peak rate in `step` (from 0) of `total_steps`.

    Linear warm-up, then constant, or a decay (cosine or linear) that would reach zero one step after the last.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = factor * group["peak_lr"]
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
