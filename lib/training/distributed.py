"""Distributed training of one model: its sharding over processes, and the signals that ask them to exit.

Processes are started by torchrun, or by Slurm through submitit, which set the environment variables
by which processes find each other. Without these there is a single process, and everything here does nothing.
"""

import atexit
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lib.base import InputError, WorkError
from lib.config import ModelConfig
from lib.model.transformer import Transformer


class Preempted(WorkError):
    """A signal asked the process to exit; a checkpoint is written, and the same command resumes from it."""

    exit_code = 75  # EX_TEMPFAIL: try again


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and their parallelism: data ranks split a batch, tensor ranks split each matrix."""

    rank: int = 0  # the first writes, measures and prints
    size: int = 1
    mesh: DeviceMesh | None = None  # (data ranks, tensor ranks)
    sharded: bool = False  # data ranks shard the weights (FSDP2) instead of replicating them (DDP)
    cpu_group: dist.ProcessGroup | None = None  # for messages between ranks while devices are busy

    @property
    def data_size(self) -> int:
        return self.mesh["data"].size() if self.mesh else 1

    @property
    def data_rank(self) -> int:
        return self.mesh["data"].get_local_rank() if self.mesh else 0

    def wrap(self, model: Transformer) -> nn.Module:
        """Distribute the weights of `model` over the ranks, in place; return the module to call in a training step."""
        if self.mesh is None:
            return model
        if self.mesh["tensor"].size() > 1:
            _split_matrices(model, self.mesh["tensor"])
        if self.data_size == 1:
            return model
        # DDP cannot replicate DTensors, so with tensor parallelism data ranks use FSDP2.
        if self.sharded or self.mesh["tensor"].size() > 1:
            from torch.distributed.fsdp import fully_shard  # only here: it takes most of a second

            for block in model.blocks:
                fully_shard(block, mesh=self.mesh["data"])
            return fully_shard(model, mesh=self.mesh["data"])
        return DistributedDataParallel(model, process_group=self.mesh["data"].get_group())

    def full_model(self, model: Transformer) -> Transformer:
        """Return the model with full weights in this process, `model` if it has them. Every rank must call this."""
        parameters = dict(model.named_parameters())
        if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            return model
        with torch.device(model.device):
            copy = Transformer(model.config)
        copy.load_state_dict({name: full_tensor(parameter.detach()) for name, parameter in parameters.items()})
        return copy

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over data ranks."""
        if self.data_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.mesh["data"].get_group())
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any rank."""
        if self.size > 1:
            votes = torch.tensor(int(flag))
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.cpu_group)
            return bool(votes)
        return flag

    def first_does(self, work: Callable[[], Any]) -> Any:
        """Return, in every process, what `work` returns in the first; if it raises there, all raise."""
        if self.size == 1:
            return work()
        outcome, failed = [None, None], None
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                failed = error
                told = isinstance(error, InputError | WorkError)  # other errors may not survive pickling
                outcome[1] = error if told else WorkError(f"the first process failed: {type(error).__name__}: {error}")
        dist.broadcast_object_list(outcome, src=0, group=self.cpu_group)
        if outcome[1] is not None:
            raise failed or outcome[1]
        return outcome[0]


#: A single process.
ALONE = Ranks()


def world_size() -> int:
    """Return how many processes torchrun or Slurm started for this run."""
    return max(1, _number("WORLD_SIZE"))


def is_first() -> bool:
    """Return whether this process is alone, or the first of those that were started with it."""
    return _number("RANK") == 0


def _number(name: str) -> int:
    """Return a number that torchrun or Slurm set in the environment, 0 without one; else raise `InputError`."""
    text = os.environ.get(name) or "0"
    if not text.isdecimal():
        set_by = "unset it (torchrun and Slurm set it themselves)"
        raise InputError(f"{name} = {text!r} in the environment is no number: {set_by}")
    return int(text)


def local_device(device: torch.device) -> torch.device:
    """Return this process's own GPU if there are several processes; a `WorkError` if there are too few GPUs."""
    if world_size() == 1 or device.type != "cuda":
        return device
    rank, count = _number("LOCAL_RANK"), torch.cuda.device_count()
    if rank >= count:
        # No `InputError`: the command line prints these in the first process alone, which has a GPU.
        raise WorkError(f"process {rank} of this machine has no GPU, there are {count}: start one process per GPU")
    return torch.device("cuda", rank)


#: Messages of gloo and NCCL when another process has died.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


@contextmanager
def connect(device: torch.device, config: ModelConfig, sharded: bool = False, tensor: int = 1) -> Iterator[Ranks]:
    """Join the other processes that train a model of this `config`, each on its `local_device`.

    sharded: data ranks shard the weights (FSDP2). tensor: number of ranks that split each matrix; groups of this size
    split the batch. An impossible split is an `InputError`; a rank that dies makes the others raise `WorkError`.
    """
    size = world_size()
    if tensor < 1 or size % tensor:
        raise InputError(f"tensor = {tensor} does not divide the {size} processes: give one of its divisors")
    if config.n_heads % tensor or config.kv_heads % tensor:
        raise InputError(f"tensor = {tensor} does not divide the {config.kv_heads} key-value heads of the model")
    if size == 1:
        yield ALONE
        return
    if not dist.is_initialized() and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
        raise InputError(f"WORLD_SIZE = {size} without RANK, MASTER_ADDR and MASTER_PORT in the environment: unset it")
    # Harmless here: warnings of two all-reduces for a tensor on a 2D mesh, and of views returned by an FSDP2 block.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .*returned a view")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if not dist.is_initialized():  # once: a process that rejoins would find old keys in the store
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(_disconnect)
        mesh = init_device_mesh(device.type, (size // tensor, tensor), mesh_dim_names=("data", "tensor"))
        # While the first process measures, the others wait, however long; a process that dies is noticed at once.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield Ranks(dist.get_rank(), size, mesh, sharded, group)
    except BaseException as error:
        _disconnect()  # the others notice that
        gone = isinstance(error, RuntimeError) and any(text in str(error) for text in GONE)
        if gone or isinstance(error, dist.DistNetworkError):
            told = "the connection to another process of this run is gone: start all again, they resume"
            raise WorkError(f"{told} ({str(error).splitlines()[0][:200]})") from error
        raise


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a DTensor; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(example: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, which every rank has in full, distributed like `example`."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Skip gradient synchronization in the context; for all micro-batches but the last."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif hasattr(module, "set_requires_gradient_sync"):  # FSDP2 adds it
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    else:
        yield


# Tensor parallelism ---------------------------------------------------------------------------------------------------


def _split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Split heads and hidden units over tensor ranks, embedding and output by vocabulary: two all-reduces a block."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Replicate()),
        "blocks.*.attention.[qkv]_proj": ColwiseParallel(),
        "blocks.*.attention.o_proj": RowwiseParallel(),
        "blocks.*.ffn.[gu]*_proj": ColwiseParallel(),
        "blocks.*.ffn.down_proj": RowwiseParallel(),
    }
    parallelize_module(model, mesh, plan)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):  # every tensor rank computes it in full; its weights are DTensors like all
            distribute_module(
                module,
                mesh,
                input_fn=lambda _, inputs, mesh: tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs),
                output_fn=lambda _, output, mesh: output.to_local(),
            )


# Signals --------------------------------------------------------------------------------------------------------------

#: Signals that a cluster sends before it takes a machine away; submitit uses the second before a time limit.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]


@contextmanager
def asked_to_leave() -> Iterator[threading.Event]:
    """Yield an event that is set when a signal asks this process to exit; restore earlier handlers afterwards."""
    event = threading.Event()
    with _handling(lambda *_: event.set()):
        yield event


@contextmanager
def exiting_at_once() -> Iterator[None]:
    """Raise `Preempted` as soon as a signal asks this process to exit: for work that a restart repeats."""

    def leave(*_) -> None:
        raise Preempted("stopped by a signal: the same command goes on from the last checkpoint")

    with _handling(leave):
        yield


@contextmanager
def _handling(handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
