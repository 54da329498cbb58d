"""The processes that train one model together, how its weights lie on them, and the signals that ask them to leave.

Processes are started by torchrun, or by Slurm through submitit; they find each other by the variables that these set.
Without them a process is alone, and everything here does nothing.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from lib.base import InputError, WorkError
from lib.model import ModelConfig, Transformer


class Preempted(WorkError):
    """A signal asked the process to leave; a checkpoint is written, the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL: try again


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and how they divide it: data ranks take parts of a batch, tensor ranks of a matrix."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # (data ranks, tensor ranks)
    sharded: bool = False  # data ranks share the weights out (FSDP2) instead of each having all of them (DDP)
    cpu_group: dist.ProcessGroup | None = None  # for what the hosts tell each other while their devices are busy
    saving_group: dist.ProcessGroup | None = None  # for the threads that write checkpoints meanwhile

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes, measures and speaks."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        return self.mesh["data"].size() if self.mesh else 1

    @property
    def data_rank(self) -> int:
        return self.mesh["data"].get_local_rank() if self.mesh else 0

    def wrap(self, model: Transformer) -> nn.Module:
        """Lay the weights of `model` out over the ranks, in place; returns the module to call for a training step."""
        if self.mesh is None:
            return model
        if self.mesh["tensor"].size() > 1:
            _split_matrices(model, self.mesh["tensor"])
        if self.data_size == 1:
            return model
        # DDP does not know weights that are split already, so beside split matrices data ranks share out.
        if self.sharded or self.mesh["tensor"].size() > 1:
            for block in model.blocks:
                fully_shard(block, mesh=self.mesh["data"])
            return fully_shard(model, mesh=self.mesh["data"])
        return DistributedDataParallel(model, process_group=self.mesh["data"].get_group())

    def whole(self, model: Transformer) -> Transformer:
        """The same model with all of its weights in this process: itself where they are. Every rank has to ask."""
        parameters = dict(model.named_parameters())
        if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            return model
        with torch.device(model.device):
            copy = Transformer(model.config)
        copy.load_state_dict({name: whole(parameter.detach()) for name, parameter in parameters.items()})
        return copy

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over data ranks."""
        if self.data_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.mesh["data"].get_group())
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size > 1:
            votes = torch.tensor(int(flag))
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.cpu_group)
            return bool(votes)
        return flag

    def first_does(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the first process; the others wait, and every one raises what it raised."""
        outcome: list = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:
                if self.size == 1:
                    raise
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.cpu_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


#: A process on its own.
ALONE = Ranks()


def world_size() -> int:
    """How many processes torchrun or Slurm started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is alone, or the first of those that were started with it."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def connect(device: torch.device, config: ModelConfig, sharded: bool = False, tensor: int = 1) -> Iterator[Ranks]:
    """Join the other processes that train a model of this `config` on devices of this type.

    sharded: data ranks share the weights out. tensor: so many ranks split each matrix; the ranks that are left over
    divide the batch. What cannot be divided so is an `InputError`; a rank that dies makes the others raise `WorkError`.
    """
    size = world_size()
    if tensor < 1 or size % tensor:
        raise InputError(f"tensor = {tensor} does not divide the {size} processes: give one of its divisors")
    if config.n_heads % tensor or config.kv_heads % tensor:
        raise InputError(f"tensor = {tensor} does not divide the {config.kv_heads} key-value heads of the model")
    if size == 1:
        yield ALONE
        return
    # That sums over two dimensions of the mesh are two sums is how it is.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device.type, (size // tensor, tensor), mesh_dim_names=("data", "tensor"))
        yield Ranks(dist.get_rank(), size, mesh, sharded, *(dist.new_group(backend="gloo") for _ in range(2)))
    except RuntimeError as error:
        if _is_of_the_network(error):
            raise WorkError(
                "another process of this run has ended: start all of them again, they go on from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _is_of_the_network(error: RuntimeError) -> bool:
    gloo = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connect timeout", "gloo")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in gloo)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which this rank has a part; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, all_of_it: torch.Tensor) -> torch.Tensor:
    """`all_of_it`, which every rank has, laid out over the ranks as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return all_of_it
    return distribute_tensor(all_of_it, tensor.device_mesh, tensor.placements, src_data_rank=None)


# Tensor parallelism ---------------------------------------------------------------------------------------------------


class _Replicated(ParallelStyle):
    """A module that every tensor rank computes whole, with its weights as tensors of the mesh like all others."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            mesh,
            input_fn=lambda _, inputs, mesh: tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs),
            output_fn=lambda _, output, mesh: output.to_local(),
        )


def _split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Heads and hidden units over tensor ranks, embedding and output by vocabulary: two sums a block, one at an end."""
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "norm": _Replicated(),
        "output": ColwiseParallel(output_layouts=Replicate()),
        "blocks.*.attention_norm": _Replicated(),
        "blocks.*.ffn_norm": _Replicated(),
    }
    plan |= {f"blocks.*.{name}": ColwiseParallel() for name in _INTO}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in _OUT_OF}
    parallelize_module(model, mesh, plan)


_INTO = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "ffn.gate_proj", "ffn.up_proj")
_OUT_OF = ("attention.o_proj", "ffn.down_proj")


@contextmanager
def gradients_stay_here(module: nn.Module) -> Iterator[None]:
    """Within, backward passes of a wrapped module add up in each rank: for all parts of a batch but the last."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    else:
        yield


# Signals --------------------------------------------------------------------------------------------------------------

#: What a cluster sends before it takes a machine away; submitit uses the second before a time limit.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]


@contextmanager
def asked_to_leave() -> Iterator[threading.Event]:
    """An event that is set when a signal asks this process to leave; the handlers that were there come back after."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield event
        return
    before = {number: signal.signal(number, lambda *_: event.set()) for number in SIGNALS}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
