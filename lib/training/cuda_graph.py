"""Work of a GPU that is recorded once and replayed: CUDA graphs.

A step of a small model is some hundred kernels of a few microseconds each, and Python takes longer to launch one than
the GPU to run it. Replayed, all of them are launched at once.
"""

import warnings
from collections.abc import Callable, Sequence

import torch

Work = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

#: Calls that are made as they are: libraries and optimizers allocate what they keep, which no recording may.
WARM_UP = 3


class Recording:
    """Does the same work again and again, tensors in and tensors out: recorded in the fourth call, then replayed.

    Inputs have the same shapes in every call, and the work takes nothing else that changes but tensors whose memory
    stays where it is; the host decides nothing on the way. Where that memory moves, a new recording is due. Away from a
    GPU the work is done as it is.
    """

    def __init__(self):
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._inputs: Sequence[torch.Tensor] = ()
        self._outputs: Sequence[torch.Tensor] = ()

    def __call__(self, work: Work, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What `work(inputs)` gives. A ValueError for inputs of other shapes than those recorded."""
        if not inputs[0].is_cuda:
            return work(inputs)
        if self._calls < WARM_UP:
            self._calls += 1
            return self._aside(work, inputs)
        if self._graph is None:
            self._record(work, inputs)
        if [tensor.shape for tensor in inputs] != [held.shape for held in self._inputs]:
            raise ValueError("what is replayed has other inputs than what was recorded")
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]  # the next call writes over what the graph holds

    def _aside(self, work: Work, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The work on the stream on which it is to be recorded, as CUDA asks for."""
        usual = torch.cuda.current_stream(inputs[0].device)
        self._stream = self._stream or torch.cuda.Stream(inputs[0].device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # PyTorch's optimizers warn of a step that could be recorded and is not: it will be.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            outputs = work(inputs)
        usual.wait_stream(self._stream)
        return outputs

    def _record(self, work: Work, inputs: Sequence[torch.Tensor]) -> None:
        graph, held = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        # A thread that writes a checkpoint may go on meanwhile.
        with (
            torch.cuda.device(inputs[0].device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            outputs = work(held)
        self._graph, self._inputs, self._outputs = graph, held, outputs
