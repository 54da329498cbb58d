"""Work of a GPU that is recorded once and replayed: CUDA graphs.

A step of a small model is some hundred kernels of a few microseconds each, and Python takes longer to launch one than
the GPU to run it. Replayed, all of them are launched at once.
"""

from collections.abc import Callable, Sequence

import torch

Work = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

#: Calls that are made as they are: libraries and optimizers allocate what they keep, which no recording may.
WARM_UP = 3


class Captured:
    """`work`, tensors in and tensors out, recorded on the fourth call and replayed from then on.

    Inputs have the same shapes in every call, and the work takes nothing else that changes but tensors whose memory
    stays where it is; the host decides nothing on the way. Away from a GPU the work is done as it is.
    """

    def __init__(self, work: Work):
        self._work, self._calls = work, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: Sequence[torch.Tensor] = ()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if not inputs[0].is_cuda:
            return self._work(inputs)
        if self._calls < WARM_UP:
            self._calls += 1
            return self._aside(inputs)
        if self._graph is None:
            self._capture(inputs)
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]  # the next call writes over what the graph holds

    def _aside(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The work on the stream on which it is to be recorded, as CUDA asks for."""
        usual = torch.cuda.current_stream(inputs[0].device)
        self._stream = self._stream or torch.cuda.Stream(inputs[0].device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            outputs = self._work(inputs)
        usual.wait_stream(self._stream)
        return outputs

    def _capture(self, inputs: Sequence[torch.Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # A thread that writes a checkpoint may go on meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._outputs = self._work(self._inputs)
