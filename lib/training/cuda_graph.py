"""CUDA graphs: the work of a training step, captured once and then replayed.

A step of a small model is some hundred kernels of a few microseconds each, and Python takes longer to launch one than
the GPU to run it. A replay launches all of them at once.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

#: Eager steps before the capture. In them libraries and optimizers allocate their lasting buffers; a captured step
#: must not.
WARM_UP = 3


class CudaGraph:
    """The same GPU work on inputs of the same shapes: captured after `WARM_UP` eager calls, then replayed.

    Captured work may read only its inputs and tensors at fixed addresses, and the host must not branch on values of the
    device. If such a tensor moves, make a new graph. On other devices nothing is captured.
    """

    def __init__(self):
        self._warmed_up = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._inputs: Sequence[torch.Tensor] = ()

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    @contextmanager
    def capture(self, inputs: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        """Run the work of the `with` block on the tensors that this yields; after `WARM_UP` calls, capture it, too.

        Tensors that a captured block makes keep their memory, and every replay writes them anew.
        """
        if not inputs[0].is_cuda:
            yield inputs
            return
        device = inputs[0].device
        if self._warmed_up < WARM_UP:
            self._warmed_up += 1
            usual = torch.cuda.current_stream(device)
            self._stream = self._stream or torch.cuda.Stream(device)  # a side stream, as CUDA requires
            self._stream.wait_stream(usual)
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                # PyTorch's optimizers warn that a capturable step is not captured; later it is.
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                yield inputs
            usual.wait_stream(self._stream)
            return
        graph, held = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=self._stream):
            yield held
        self._graph, self._inputs = graph, held
        graph.replay()  # capture only records, so run it

    def replay(self, inputs: Sequence[torch.Tensor]) -> None:
        """Run the captured work on `inputs`, of the shapes that were captured."""
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new, non_blocking=True)
        self._graph.replay()
