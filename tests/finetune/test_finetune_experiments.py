"""Section 6 as data: what a profile runs, and what of it is published."""

import json
import re

import pytest
import torch

from lib.base import InputError, WorkError
from lib.experiments.publishing import table_of
from lib.experiments.rows import table_path
from lib.experiments.tables import read_table
from lib.finetune import experiments
from lib.finetune.bases import learning_rate
from lib.paths import PROFILES, ROWS
from lib.training.distributed import Preempted

CLEAN = "0123456789" * 4


def _finish(fine_tuning, commit: str = CLEAN, steps: tuple[int, ...] = (0, 10), **columns) -> None:
    folder = experiments.folder(fine_tuning, "laptop")
    folder.mkdir(parents=True)
    what = fine_tuning.model_dump(include={"base", "task", "mode", "n_facts", "seed", "lr"})
    what |= {"run_id": fine_tuning.run_id, "config": fine_tuning.canonical_json()}
    rows = [{**what, "step": step, "commit": commit, **columns} for step in steps]
    (folder / ROWS).write_text(json.dumps(rows))


def _missing() -> list:
    return experiments.sweep("laptop", dry_run=True).missing


@pytest.mark.parametrize("profile", PROFILES)
def test_every_fine_tuning_of_a_profile_is_another(profile):
    plan = experiments.plan(profile)
    assert len({config.run_id for config in plan}) == len(plan) > 1


def test_laptop_compares_both_modes_as_published_and_at_equal_rates_with_three_seeds():
    plan = [config for config in experiments.plan("laptop") if config.task == "facts" and not config.lora_rank]
    assert len({(config.base, config.batch_size, config.schedule, config.warmup) for config in plan}) == 1
    of_seed = {seed: {(c.mode, c.n_facts, c.lr) for c in plan if c.seed == seed} for seed in range(3)}
    assert of_seed[0] >= of_seed[1] == of_seed[2]
    rates = {mode: {lr for its, _, lr in of_seed[1] if its == mode} for mode in ("in-weight", "in-tool-text")}
    assert rates["in-tool-text"] == rates["in-weight"]
    assert all(learning_rate(plan[0].base, mode) in of_mode for mode, of_mode in rates.items())


def test_what_is_published_is_counted_once_and_stays_when_the_plan_goes(paper_data, monkeypatch):
    first, second, *_ = experiments.plan("laptop")
    _finish(first)
    assert table_of("06").add("laptop") == 2 and table_of("06").add("laptop") == 0
    assert first not in _missing() and second in _missing()
    _finish(second)
    monkeypatch.setattr(experiments, "plan", lambda _: [second])
    assert table_of("06").add("laptop") == 2
    assert set(read_table(table_path("06")).run_id) == {first.run_id, second.run_id}
    assert _missing() == []
    rows = experiments.rows("laptop")
    assert set(rows[rows.superseded].run_id) == {first.run_id}


def test_an_earlier_recipe_is_shown_where_todays_plan_has_no_run_of_the_point(paper_data, monkeypatch):
    first = experiments.plan("laptop")[0]
    other = first.model_copy(update={"n_facts": 64})
    changed = first.model_copy(update={"schedule": "cosine"})
    for config, day in ((first, "2026-01-01"), (other, "2026-01-02"), (changed, "2026-01-03")):
        _finish(config, finished_at=day, adaptation="full")
    monkeypatch.setattr(experiments, "plan", lambda _: [first, other, changed])
    table_of("06").add("laptop")
    for plan, shown in (([first], first), ([other], changed), ([], changed)):
        monkeypatch.setattr(experiments, "plan", lambda _, plan=plan: plan)
        rows = experiments.shown_rows("quick")
        assert set(rows.run_id) == {shown.run_id, other.run_id}
        earlier = rows[rows.profile == "laptop, earlier recipe"]
        assert set(earlier.run_id) == {shown.run_id, other.run_id} - {config.run_id for config in plan}
    gone = table_of("06").drop(run_ids=[other.run_id])
    assert len(gone) == 2 and set(read_table(table_path("06")).run_id) == {first.run_id, changed.run_id}


def test_a_sweep_runs_what_is_missing_and_tells_what_failed(paper_data, monkeypatch):
    first, second, third, fourth = plan = experiments.plan("laptop")[:4]
    monkeypatch.setattr(experiments, "plan", lambda _: plan)
    _finish(first)
    reasons = {second: torch.OutOfMemoryError("no memory"), third: InputError("no such model")}

    def finetune(config, directory, **_):
        if reason := reasons.get(config):
            raise reason
        _finish(config)

    monkeypatch.setattr("lib.finetune.train.finetune", finetune)
    for idle in ({"max_hours": 0}, {"dry_run": True}):
        report = experiments.sweep("laptop", **idle)
        assert (report.done_before, report.done_now, report.missing, report.failed) == (1, 0, plan[1:], {})
    assert f"3 runs ahead, beginning with\n  {second.title}\n" in str(report)
    report = experiments.sweep("laptop")
    assert report.done_now == 1 and report.missing == _missing() == [second, third]
    assert report.failed == {
        second.run_id: f"{second.title}: OutOfMemoryError: no memory",
        third.run_id: f"{third.title}: InputError: no such model",
    }
    with pytest.raises(WorkError, match=f"{re.escape(second.title)}: OutOfMemoryError: no memory; "):
        report.check()
    reasons[second] = Preempted("asked to leave")  # and no more is begun
    with pytest.raises(Preempted):
        experiments.sweep("laptop")
