"""Functions that jobs of the tests call."""

import json
import os
import signal
import time
from pathlib import Path

import torch.distributed

from lib.training.distributed import Preempted


def add_ranks(folder: str) -> None:
    """Add 10 + rank over all processes, and write down sum and environment."""
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(10 + torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NODEID")
    found = {"sum": int(total), **{name: int(os.environ[name]) for name in names}}
    Path(folder, f"rank{found['RANK']}.json").write_text(json.dumps(found))


def run_until_asked(folder: str) -> None:
    """Do what a run does that is asked to end: write a checkpoint and raise; with a checkpoint finish."""
    if Path(folder, "checkpoint").exists():
        Path(folder, "row").touch()
        return
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: asked.append(True))
    Path(folder, "started").touch()
    while not asked:
        time.sleep(0.05)
    Path(folder, "checkpoint").touch()
    raise Preempted
