"""Section 6 as data: a profile gives fine-tunings, which are run one after the other, and their rows as one table."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from lib import paths
from lib.base import WorkError
from lib.experiments.publishing import Table
from lib.experiments.scale_tables import rate
from lib.experiments.tables import publishing_profile, read_table, shown
from lib.finetune.bases import BASES, PUBLISHED
from lib.finetune.config import FinetuneConfig
from lib.finetune.data import N_FACTS
from lib.finetune.train import finetune
from lib.paths import ROWS
from lib.progress import progress
from lib.training.distributed import Preempted

SECTION = "06"
#: What two cores can fine-tune.
LAPTOP = "SmolLM2-135M"


def plan(profile: str) -> list[FinetuneConfig]:
    """The fine-tunings of a profile, in the order in which they are worth doing."""
    paths.profile_dir(profile)  # an unknown profile is an `InputError`
    return list(_PLANS[profile]())


def _smoke() -> Iterator[FinetuneConfig]:
    for mode in ("in-weight", "in-tool-text"):
        yield FinetuneConfig(base="random", mode=mode, n_facts=8, steps=4, checkpoint_every=2, questions=4,
                             unseen_people=4, prompts=4, capability="trivia", items=8, batch_size=4)  # fmt: skip


def _quick() -> Iterator[FinetuneConfig]:
    """A hundred facts each way, of few questions, in smaller batches than published."""
    asked = {"questions": 40, "unseen_people": 8, "prompts": 10, "capability": "any", "items": 100}
    small = {"base": LAPTOP, "n_facts": 100, "batch_size": 32, "capability_at_end": True, **asked}
    yield FinetuneConfig(mode="in-weight", steps=60, checkpoint_every=15, **small)
    yield FinetuneConfig(mode="in-tool-text", steps=24, checkpoint_every=6, lr=3e-4, **small)


def _laptop() -> Iterator[FinetuneConfig]:
    """The published recipe of models of this size, and in weights at the rate in tool as well; then variants."""
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
    """As published: six models, five numbers of facts in weights, and one by tool."""
    for name, base in PUBLISHED.items():
        mode = "in-tool" if base.calls else "in-tool-text"
        yield FinetuneConfig(base=name, mode=mode, n_facts=500 if base.calls else 1_000)
        for n_facts in N_FACTS:
            yield FinetuneConfig(base=name, mode="in-weight", n_facts=n_facts)


_PLANS = {"smoke": _smoke, "quick": _quick, "laptop": _laptop, "paper": _paper}


def folder(config: FinetuneConfig, profile: str) -> Path:
    """Where a fine-tuning of a profile is kept."""
    return paths.profile_dir(profile) / SECTION / config.run_id


def missing(profile: str) -> list[FinetuneConfig]:
    """The fine-tunings of a profile that have no rows yet."""
    done = set(rows(profile).get("run_id", ()))
    return [config for config in plan(profile) if config.run_id not in done]


@dataclass
class Report:
    """What a sweep did, and what failed: title -> why."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `WorkError` if a run failed: a notebook must not go on as if it had its rows."""
        if self.failed:
            raise WorkError("; ".join(f"{run}: {reason}" for run, reason in self.failed.items()))


def sweep(profile: str, *, device: str = "auto", max_hours: float = math.inf) -> Report:
    """Run all that is missing in a profile. What fails is reported, and the others are run all the same.

    Call it in several processes: each takes what no other is at. After `max_hours` nothing new is started.
    """
    todo, deadline, report = missing(profile), time.monotonic() + 3600 * max_hours, Report()
    with progress(len(todo), f"Section 6, {profile}") as bar:
        for config in todo:
            directory = folder(config, profile)
            if time.monotonic() >= deadline:
                break
            directory.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(f"{directory}.lock", timeout=0):
                if not (directory / ROWS).exists():
                    try:
                        finetune(config, directory, device=device, description=title(config))
                        report.done += 1
                    except Preempted:
                        raise
                    except Exception as error:  # a model that nobody may fetch, no memory for one
                        report.failed[title(config)] = f"{type(error).__name__}: {error}"
            bar.update(1)
    return report


def title(config: FinetuneConfig) -> str:
    """A run in a few words."""
    what = config.task if config.task != "facts" else config.mode
    adapters = f", LoRA of rank {config.lora_rank}" if config.lora_rank else ""
    return f"{config.base}, {what}{adapters}, {config.n_facts:,} facts, rate {rate(config.lr)}, seed {config.seed}"


def rows(profile: str) -> pd.DataFrame:
    """A row a checkpoint of finished runs: all in paper_data, and those of today's plan still in runs.

    superseded: whether today's plan does not ask for the run. Neither it nor `recipe` is stored.
    """
    planned = {config.run_id for config in plan(profile)}
    known = committed_rows()
    tables = [known[known.profile == profile]] if len(known) else []
    done = set(tables[0].run_id) if tables else set()
    for run_id in sorted(planned - done):
        path = paths.profile_dir(profile) / SECTION / run_id / ROWS
        if path.exists():
            tables.append(pd.DataFrame(json.loads(path.read_text())).assign(profile=profile))
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    recipes = [_recipe(config) for config in table.get("config", ["{}"] * len(table))]
    return table.assign(superseded=~table.run_id.isin(planned), recipe=recipes)


def _recipe(config: str) -> str:
    """What is the same for all seeds of a configuration."""
    return json.dumps({name: value for name, value in json.loads(config).items() if name != "seed"}, sort_keys=True)


def shown_rows(profile: str) -> pd.DataFrame:
    """The rows that figures are drawn from: those that count (`tables.publishing_profile`), and the profile's own.

    One recipe for each point, see `tables.shown`; what is superseded has a profile "laptop, earlier recipe", say.
    """
    tables = [rows(name) for name in dict.fromkeys((publishing_profile(profile), profile))]
    table = pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)
    if not len(table):
        return table
    table = shown(table, "step", ["profile", "base", "task", "mode", "adaptation", "n_facts", "lr"])
    earlier = table.profile.where(~table.superseded, table.profile + ", earlier recipe")
    return table.assign(profile=earlier).drop(columns="superseded")


def table_path() -> Path:
    """Where the rows are committed."""
    return paths.PAPER_DATA / "scale.csv"


def committed_rows() -> pd.DataFrame:
    """The rows in paper_data, of all profiles; empty before anything was published."""
    return read_table(table_path())


def table_of_rows() -> Table:
    """The table that these rows enter and leave."""
    return Table(table_path(), ("profile", "base", "task", "mode", "n_facts", "seed", "step", "run_id"), rows)


def publish(profile: str) -> int:
    """Add the finished runs of a profile to paper_data (`Table.add`); returns how many rows are new."""
    return table_of_rows().add(profile)
