"""Section 6 as data: the fine-tunings of each profile, run one after the other, and their rows as one table."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from filelock import Timeout

from lib import paths
from lib.experiments.publishing import Table
from lib.experiments.scale_tables import rate, table_path
from lib.experiments.sweep import check_failed
from lib.experiments.tables import publishing_profile, rows_of_profile, shown
from lib.finetune.bases import BASES, PUBLISHED
from lib.finetune.config import N_FACTS, FinetuneConfig
from lib.paths import ROWS
from lib.progress import progress

SECTION = "06"
#: A model that two cores can fine-tune.
LAPTOP = "SmolLM2-135M"


def plan(profile: str) -> list[FinetuneConfig]:
    """Return the fine-tunings of a profile, the most useful first."""
    paths.profile_dir(profile)  # an unknown profile is an `InputError`
    return list(_PLANS[profile]())


def _smoke() -> Iterator[FinetuneConfig]:
    for mode in ("in-weight", "in-tool-text"):
        yield FinetuneConfig(base="random", mode=mode, n_facts=8, steps=4, checkpoint_every=2, questions=4,
                             unseen_people=4, prompts=4, capability="trivia", items=8, batch_size=4)  # fmt: skip


def _quick() -> Iterator[FinetuneConfig]:
    """Yield a hundred facts each way, with few questions and smaller batches than published."""
    asked = {"questions": 40, "unseen_people": 8, "prompts": 10, "capability": "any", "items": 100}
    small = {"base": LAPTOP, "n_facts": 100, "batch_size": 32, "capability_at_end": True, **asked}
    yield FinetuneConfig(mode="in-weight", steps=60, checkpoint_every=15, **small)
    yield FinetuneConfig(mode="in-tool-text", steps=24, checkpoint_every=6, lr=3e-4, **small)


def _laptop() -> Iterator[FinetuneConfig]:
    """Yield the published recipe of models of this size, in weights also at the in-tool rate; then variants."""
    asked = {"unseen_people": 25, "items": 1_000, "capability_at_end": True}
    common = {"base": LAPTOP, "grad_accumulation": 4, **asked}
    in_weight = {"mode": "in-weight", "n_facts": 500, "checkpoint_every": 20}
    in_tool = {"mode": "in-tool-text", "checkpoint_every": 4}
    for seed in range(3):
        yield FinetuneConfig(**in_tool, n_facts=1_000, seed=seed, **common)
        yield FinetuneConfig(**in_weight, seed=seed, **common)
        yield FinetuneConfig(**in_weight, seed=seed, lr=BASES[LAPTOP].in_tool, **common)
    yield FinetuneConfig(**in_weight | {"n_facts": 1_000}, **common)
    yield FinetuneConfig(**in_tool, task="hybrid", n_facts=500, **common)
    yield FinetuneConfig(**in_weight, lora_rank=16, **common)


def _paper() -> Iterator[FinetuneConfig]:
    """Yield the published runs: six models, five numbers of facts in weights, and one in tool."""
    for name, base in PUBLISHED.items():
        mode = "in-tool" if base.calls else "in-tool-text"
        yield FinetuneConfig(base=name, mode=mode, n_facts=500 if base.calls else 1_000)
        for n_facts in N_FACTS:
            yield FinetuneConfig(base=name, mode="in-weight", n_facts=n_facts)


_PLANS = {"smoke": _smoke, "quick": _quick, "laptop": _laptop, "paper": _paper}


def folder(config: FinetuneConfig, profile: str) -> Path:
    """Return where a fine-tuning of a profile is kept."""
    return paths.profile_dir(profile) / SECTION / config.run_id


def title(config: FinetuneConfig) -> str:
    """Return a run in a few words."""
    what = config.task if config.task != "facts" else config.mode
    adapters = f", LoRA of rank {config.lora_rank}" if config.lora_rank else ""
    return f"{config.base}, {what}{adapters}, {config.n_facts:,} facts, rate {rate(config.lr)}, seed {config.seed}"


def missing(profile: str) -> list[FinetuneConfig]:
    """Return the fine-tunings of a profile that have no rows yet."""
    done = set(rows(profile).get("run_id", ()))
    return [config for config in plan(profile) if config.run_id not in done]


@dataclass
class Report:
    """How many runs a sweep finished, and which failed: title -> why."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `WorkError` if a run failed: a notebook must not continue without its rows."""
        check_failed(self.failed)


def sweep(profile: str, *, device: str = "auto", max_hours: float = math.inf) -> Report:
    """Run all that is missing in a profile. A failure is reported; the other runs continue.

    Several processes may call it: each takes runs that no other has started. After `max_hours` no new run is started.
    """
    from lib.finetune.train import finetune
    from lib.training.distributed import Preempted

    todo, deadline, report = missing(profile), time.monotonic() + 3600 * max_hours, Report()
    with progress(len(todo), f"Section 6, {profile}") as bar:
        for config in todo:
            directory = folder(config, profile)
            if time.monotonic() >= deadline:
                break
            directory.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), paths.only_process(f"{directory}.lock", timeout=0):
                if not (directory / ROWS).exists():
                    try:
                        finetune(config, directory, device=device, description=title(config))
                        report.done += 1
                    except Preempted:
                        raise
                    except Exception as error:  # a gated model, or one too large for the memory
                        report.failed[title(config)] = f"{type(error).__name__}: {error}"
            bar.update(1)
    return report


def rows(profile: str) -> pd.DataFrame:
    """Return a row a checkpoint of finished runs: all in paper_data, and those of today's plan still in runs.

    Two columns are added and never stored: superseded, whether today's plan does not ask for the run, and recipe.
    """
    configs = plan(profile)
    files = [folder(config, profile) / ROWS for config in configs]
    planned = {config.run_id for config in configs}
    table = rows_of_profile(table_path(), profile, files, planned, ("run_id", "config"))
    recipes = [json.loads(config) | {"seed": None} for config in table.get("config", ["{}"] * len(table))]
    return table.assign(recipe=[json.dumps(recipe, sort_keys=True) for recipe in recipes])


def shown_rows(profile: str) -> pd.DataFrame:
    """Return the rows that figures are drawn from: those of the publishing profile, and the profile's own.

    There is one recipe for each point (`lib.experiments.tables.shown`); superseded rows have the profile
    "laptop, earlier recipe", say.
    """
    tables = [rows(name) for name in dict.fromkeys((publishing_profile(profile), profile))]
    table = pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)
    if not len(table):
        return table
    table = shown(table, "step", ["profile", "base", "task", "mode", "adaptation", "n_facts", "lr"])
    earlier = table.profile.where(~table.superseded, table.profile + ", earlier recipe")
    return table.assign(profile=earlier).drop(columns="superseded")


def table_of_rows() -> Table:
    """Return the table in paper_data of these rows."""
    return Table(table_path(), ("profile", "base", "task", "mode", "n_facts", "seed", "step", "run_id"), rows)
