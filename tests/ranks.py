"""What the processes of test_distributed do: its functions run in every rank, so they must be importable."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lib.config import RunConfig
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize_people
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.training.distributed import ALONE, Ranks, connect, full_tensor
from lib.training.monitor import read_record
from lib.training.trainer import Trainer

STEPS, HALF = 50, 25
LAYOUTS = {"replicated": {}, "sharded": {"sharded": True}, "tensor": {"tensor": 2}}


def config(optimizer: str = "adamw", **training) -> RunConfig:
    loss = {"muon": "focal"}.get(optimizer, "cross-entropy")  # each loss with one of the optimizers
    steps = {"steps": STEPS, "checkpoint_every": HALF}
    training = {**steps, "batch_size": 16, "grad_accumulation": 2, "loss": loss, **training}
    return RunConfig.parse({
        "model": {"d_model": 16},
        "optim": {"name": optimizer},
        "training": training,
        "evaluation": {"every": None},
    })  # fmt: skip


def trainer(run: RunConfig, directory: Path, ranks: Ranks = ALONE) -> Trainer:
    data = tokenize_people(sample_people(16), "in-weight", ByteTokenizer())
    model = Transformer(run.model, torch.Generator().manual_seed(0))
    return Trainer(model, data, run, directory, ranks=ranks)


def losses(trainer: Trainer, steps: int) -> list[float]:
    """The loss of the whole batch in each of the next steps; a checkpoint after `HALF` of all."""
    found = []
    for _ in range(steps):
        trainer.step()
        found.append(float(trainer.ranks.sum(trainer.losses[-1])))
        if trainer.counters["step"] % trainer.config.training.checkpoint_every == 0:
            trainer.save()
    return found


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: full_tensor(tensor.detach()).clone() for name, tensor in trainer.model.named_parameters()}


def record(directory: Path) -> list[dict]:
    """The metrics of a run but for how fast it was."""
    rates = ("tokens_per_second", "tflops", "mfu")
    lines = read_record(directory / "metrics.jsonl")
    return [{name: line[name] for name in line if name not in rates} for line in lines]


def launch(n: int, work: Callable, *arguments) -> None:
    """Call `work(rank, ...)` in `n` processes that can connect with each other; fails if one of them does."""
    context = get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_enter, args=(rank, n, port, work, arguments)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * n


def _enter(rank: int, n: int, port: int, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    work(rank, *arguments)


def train_in_layouts(rank: int, folder: Path, layouts: dict[str, dict], optimizer: str) -> None:
    """In each layout: all steps; the second half from the checkpoint in `alone`; keep losses, weights, checkpoints."""
    for name, layout in layouts.items():
        with connect(torch.device("cpu"), config().model, **layout) as ranks:
            first = trainer(config(optimizer), folder / name, ranks)
            found = {"losses": losses(first, STEPS), "weights": weights(first)}
            second = trainer(config(optimizer), folder / "alone", ranks)
            second.resume()
            steps = STEPS - second.counters["step"]
            second.directory = folder / f"{name} after alone"
            found |= {"losses after alone": losses(second, steps), "weights after alone": weights(second)}
            found["parameters here"] = sum(
                getattr(parameter, "to_local", lambda parameter=parameter: parameter)().numel()
                for parameter in first.model.parameters()
            )
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")


def count_exchanges(rank: int, folder: Path) -> None:
    """How often replicated ranks exchange gradients in three steps of four parts."""
    calls = 0

    def counting(state, bucket):
        nonlocal calls
        calls += 1
        return allreduce_hook(state, bucket)

    with connect(torch.device("cpu"), config().model) as ranks:
        run = trainer(config(grad_accumulation=4), folder, ranks)
        run.module.register_comm_hook(None, counting)
        run.step()
        before = calls
        for _ in range(3):
            run.step()
    if rank == 0:
        (folder / "exchanges").write_text(f"{before} {calls}")
