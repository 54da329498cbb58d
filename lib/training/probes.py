"""Statistics of activations and their gradients during training: four moments of every named tensor."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

#: Statistics of the elements of a tensor. Skewness and excess kurtosis are 0 for a normal distribution.
MOMENTS = ("mean", "std", "skew", "kurtosis")


@contextmanager
def probe(model: nn.Module) -> Iterator[list[dict]]:
    """Record all submodules' outputs in the context, and the loss's gradients with respect to them; yield moments.

    The list is filled at the end with {"tensor": name of the submodule, "of": "output" or "gradient", and `MOMENTS`};
    moments that constant tensors do not have are None. Moments are over all elements, padding included, and all
    passes together: micro-batches give what the whole batch gives. Only passes that record gradients count. The
    model has to be called as it is: not compiled, not wrapped.
    """
    seen: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)

    def watch(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            seen[name, "output"].append(output.detach())
            # A tensor hook: a module's backward hook would add an autograd node, and warn of the embedding.
            output.register_hook(lambda gradient: seen[name, "gradient"].append(gradient.detach()))

    rows: list[dict] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hook = module.register_forward_hook(lambda _, __, output, name=name: watch(name, output))
                hooks.callback(hook.remove)
        yield rows
    for (name, of), tensors in seen.items():
        values = moments(torch.cat([tensor.flatten() for tensor in tensors])).tolist()
        values = [value if value == value else None for value in values]  # JSON has no NaN
        rows.append({"tensor": name, "of": of, **dict(zip(MOMENTS, values, strict=True))})


def moments(x: torch.Tensor) -> torch.Tensor:
    """Return `MOMENTS` (4,) of the elements of x, on its device, in float64 where it has that."""
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    mean, std = x.mean(), x.std(correction=0)
    z = (x - mean) / std
    constant = std <= 4 * torch.finfo(std.dtype).eps * mean.abs()  # what is left is rounding
    shape = torch.stack([(z**3).mean(), (z**4).mean() - 3]).masked_fill(constant, torch.nan)
    return torch.cat([torch.stack([mean, std]), shape])
