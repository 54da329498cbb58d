"""What activations and their gradients look like while a model trains: four moments of every named tensor."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

#: What is computed of the elements of a tensor. Skewness and excess kurtosis are 0 for a normal distribution.
MOMENTS = ("mean", "std", "skew", "kurtosis")


@contextmanager
def probe(model: nn.Module) -> Iterator[list[dict]]:
    """Within, the moments of what every submodule puts out, and of the loss's gradient with respect to it.

    Yields a list that is filled at the end, {"tensor": name of the submodule, "of": "output" or "gradient", and
    `MOMENTS`}, None where a moment is not defined: of tensors that are constant. They are those of all elements, of
    padding too, in all passes together: a batch that is computed in parts gives what it gives in one. Only passes
    that record gradients count. The model has to be called as it is: not compiled, not wrapped, not vectorized.
    """
    sums: dict[tuple[str, str], _PowerSums] = defaultdict(_PowerSums)

    def watch(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            sums[name, "output"].add(output)
            # On the tensor: a module's backward hook would pass it through another node, and warn of the embedding.
            output.register_hook(lambda gradient: sums[name, "gradient"].add(gradient))

    rows: list[dict] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hook = module.register_forward_hook(lambda _, __, output, name=name: watch(name, output))
                hooks.callback(hook.remove)
        yield rows
    if sums:
        moments = torch.stack([each.moments() for each in sums.values()]).tolist()  # waits for the device, once
        for (name, of), values in zip(sums, moments, strict=True):
            values = [value if value == value else None for value in values]  # JSON has no NaN
            rows.append({"tensor": name, "of": of, **dict(zip(MOMENTS, values, strict=True))})


class _PowerSums:
    """Sums of powers over the elements of all tensors that were added, on their device, in float64 where it has it.

    They are about the first tensor's mean instead of zero: nothing cancels where a mean is large beside the spread.
    """

    def __init__(self):
        self.n, self.shift, self.sums = 0, None, 0

    def add(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
        if self.shift is None:
            self.shift = tensor.mean()
        x = tensor - self.shift
        square = x * x
        self.sums = self.sums + torch.stack([x.sum(), square.sum(), (square * x).sum(), (square * square).sum()])
        self.n += tensor.numel()

    def moments(self) -> torch.Tensor:
        """(4,) `MOMENTS`."""
        a, b, c, d = self.sums / self.n
        mean, variance = self.shift + a, (b - a**2).clamp(min=0)
        third = c - 3 * a * b + 2 * a**3
        fourth = d - 4 * a * c + 6 * a**2 * b - 3 * a**4
        std = variance.sqrt()
        constant = std <= 4 * torch.finfo(std.dtype).eps * mean.abs()  # what is left is rounding
        shape = torch.stack([third / std**3, fourth / variance**2 - 3]).masked_fill(constant, torch.nan)
        return torch.cat([torch.stack([mean, std]), shape])
