"""Tables of results against brute force; what is published is merged, traceable, and the same a second time."""

import itertools
import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from finished import FINISHED
from hypothesis import given
from hypothesis import strategies as st

from lib import paths
from lib.base import InputError
from lib.config import ModelConfig, RunConfig
from lib.experiments import publishing, summaries, tables
from lib.experiments.plan import SIZES, Search, searches
from lib.experiments.published import published_by_paper
from lib.experiments.rows import sweep_dir
from lib.facts.people import ATTRIBUTES, RELEASED, VALUES, FactsConfig

CLEAN = "0123456789" * 4
AWKWARD = 0.1 + 0.2  # 0.30000000000000004
PLANNED = ("a" * 12, "b" * 12, "c" * 12, "1" * 12, "000000000012", "12345e678901")  # some look like numbers


def _row(run_id: str = "a" * 12, **fields) -> dict:
    d_model = fields.get("d_model", 8)
    return {
        **FINISHED,
        "run_id": run_id,
        "mode": "in-weight",
        "n_facts": 32,
        "alpha": 0.0,
        "seed": 0,
        "d_model": d_model,
        "n_params": ModelConfig(d_model=d_model).n_params,
        "recall": 0.5,
        "loss": AWKWARD,
        "people_digest": "1234567890123456",
        "python": "3.11",
        "commit": CLEAN,
        "config": '{"facts":{"n_people":8}}',
        **fields,
    }


# ---- Parameters needed


@st.composite
def _runs(draw) -> list[dict]:
    runs = st.tuples(
        st.sampled_from(["in-weight", "in-tool"]),
        st.sampled_from([8, 16]),
        st.sampled_from([0.0, 0.5]),
        st.integers(0, 2),
        st.sampled_from(SIZES[:6]),
    )
    recalls = draw(st.dictionaries(runs, st.sampled_from([0.0, 0.5, 0.9, 0.95, 1.0]), min_size=1, max_size=30))
    return [
        _row(mode=mode, n_facts=n_facts, alpha=alpha, seed=seed, d_model=size, recall=recall)
        for (mode, n_facts, alpha, seed, size), recall in recalls.items()
    ]


def _brute_force(rows: list[dict], threshold: float) -> dict[tuple, dict]:
    """For each (mode, n_facts, alpha), over its seeds: the smallest size that does if the next smaller one does not."""

    def point(row: dict) -> tuple:
        return row["mode"], row["n_facts"], row["alpha"]

    table = {}
    for key in {point(row) for row in rows}:
        group, smallest = [row for row in rows if point(row) == key], []
        for seed in {row["seed"] for row in group}:
            recall = {row["d_model"]: row["recall"] for row in group if row["seed"] == seed}
            for i, size in enumerate(SIZES):
                if recall.get(size, -1) >= threshold:
                    if i == 0 or (SIZES[i - 1] in recall and recall[SIZES[i - 1]] < threshold):
                        smallest.append(ModelConfig(d_model=size).n_params)
                    break
        table[key] = {
            "min_params_mean": statistics.mean(smallest) if smallest else math.nan,
            "min_params_std": statistics.stdev(smallest) if len(smallest) > 1 else math.nan,
            "min_params_min": min(smallest, default=math.nan),
            "min_params_max": max(smallest, default=math.nan),
            "seeds_reaching_it": len(smallest),
            "seeds": len({row["seed"] for row in group}),
        }
    return table


@given(_runs(), st.sampled_from([0.5, 0.9, 0.95]))
def test_minimal_parameters_are_those_of_brute_force(rows, threshold):
    table = summaries.minimal_parameters(pd.DataFrame(rows), thresholds=[threshold])
    assert set(table.recall_threshold) == {threshold}
    found = table.set_index(["mode", "n_facts", "alpha"])[list(summaries._STATISTICS)]
    expected = _brute_force(rows, threshold)
    assert set(found.index) == set(expected)
    for key, statistics_ in expected.items():
        assert found.loc[key].to_dict() == pytest.approx(statistics_, nan_ok=True)


def test_minimal_parameters_of_nothing_is_a_table_of_nothing():
    table = summaries.minimal_parameters(pd.DataFrame())
    assert len(table) == 0 and {"mode", "n_facts", "recall_threshold", "min_params_mean"} <= set(table.columns)


def test_the_table_of_our_points_has_the_columns_of_the_published_one():
    ours = summaries.minimal_parameters(pd.DataFrame([_row()]))
    published = published_by_paper("parameter_bounds")
    shared = {"mode", "n_facts", "recall_threshold", "min_params_mean", "min_params_std"}
    assert shared <= set(ours.columns) & set(published.columns)
    assert set(ours.recall_threshold) == set(published.recall_threshold)


# ---- Reading and publishing


@pytest.fixture
def data(paper_data, monkeypatch) -> Path:
    """An empty paper_data and an empty runs; every plan holds the runs `PLANNED`."""
    monkeypatch.setattr(tables, "searches", lambda *_: [_plan(PLANNED)])
    return paper_data


def _plan(run_ids: tuple[str, ...]) -> SimpleNamespace:
    base = SimpleNamespace(tokenizer="bytes", canonical_json=lambda: str(run_ids))
    sizes, config = range(len(run_ids)), lambda size: SimpleNamespace(run_id=run_ids[size])
    return SimpleNamespace(base=base, sizes=sizes, certain=sizes[:1], config=config, run_ids=run_ids)


def _finish(row: dict, profile: str, section: str = "05_1") -> None:
    folder = sweep_dir(section, profile) / row["run_id"]
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps(row))


def test_rows_are_those_of_finished_runs_of_the_profile(data):
    _finish(_row("a" * 12), "laptop")
    _finish(_row("b" * 12), "quick")
    _finish(_row("0" * 12), "laptop")  # of an earlier plan
    (sweep_dir("05_1", "laptop") / ("c" * 12)).mkdir()  # not finished
    rows = tables.read_rows("05_1", "laptop")
    (row,) = rows.drop(columns=[*tables.COMPUTED, "next_smaller", "every_seed"]).to_dict("records")
    assert row == {**_row("a" * 12), "profile": "laptop"}
    assert len(tables.read_rows("05_1", "paper")) == 0


def test_a_row_that_is_published_and_still_in_runs_is_read_once_as_published(data):
    _finish(_row("a" * 12, recall=0.25), "laptop")
    publishing.table_of("05_1").add("laptop")
    path = sweep_dir("05_1", "laptop") / ("a" * 12) / "row.json"
    path.write_text(json.dumps(_row("a" * 12, recall=0.75)))
    _finish(_row("b" * 12), "laptop")
    rows = tables.read_rows("05_1", "laptop")
    assert dict(zip(rows.run_id, rows.recall, strict=True)) == {"a" * 12: 0.25, "b" * 12: 0.5}


def test_publishing_merges_sorted_and_says_how_many_are_new(data):
    _finish(_row("b" * 12, seed=1), "laptop")
    assert publishing.table_of("05_1").add("laptop") == 1
    _finish(_row("a" * 12, n_facts=8), "laptop")
    _finish(_row("c" * 12, seed=0), "laptop")
    assert publishing.table_of("05_1").add("laptop") == 2
    table = pd.read_csv(data / "parameter_bounds.csv", dtype={"run_id": str})
    assert [run_id[0] for run_id in table.run_id] == ["a", "c", "b"]
    assert [path.name for path in data.iterdir()] == ["parameter_bounds.csv"]


def test_who_publishes_waits_for_another_who_does_and_keeps_their_rows(data):
    _finish(_row("a" * 12), "laptop")
    publishing.table_of("05_1").add("laptop")
    _finish(_row("b" * 12), "laptop")
    with ThreadPoolExecutor() as pool, paths.only_process(paths.runs() / ".paper_data.lock"):
        waiting = pool.submit(publishing.table_of("05_1").add, "laptop")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        table = pd.read_csv(data / "parameter_bounds.csv", dtype=str)
        pd.concat([table, table.assign(run_id="d" * 12)]).to_csv(data / "parameter_bounds.csv", index=False)
    assert waiting.result(timeout=30) == 1
    assert {"a" * 12, "b" * 12, "d" * 12} == {*pd.read_csv(data / "parameter_bounds.csv", dtype=str).run_id}


def test_publishing_only_adds_and_rows_of_an_earlier_plan_are_superseded(data, monkeypatch):
    for run_id in PLANNED[:2]:
        _finish(_row(run_id), "laptop")
    assert publishing.table_of("05_1").add("laptop") == 2
    before = tables.committed_rows("05_1").set_index("run_id")
    monkeypatch.setattr(tables, "searches", lambda *_: [_plan(PLANNED[2:])])
    _finish(_row(PLANNED[2]), "laptop")
    assert publishing.table_of("05_1").add("laptop") == 1
    after = tables.committed_rows("05_1").set_index("run_id")
    pd.testing.assert_frame_equal(after.loc[list(PLANNED[:2])], before)  # even what the earlier plan said of sizes
    assert not set(tables.COMPUTED) & set(after.columns)
    rows = tables.read_rows("05_1", "laptop")
    assert dict(zip(rows.run_id, rows.superseded, strict=True)) == dict(zip(PLANNED, (True, True, False), strict=False))


def test_rows_leave_a_table_only_as_selected(data, monkeypatch):
    for profile, run_ids in (("laptop", PLANNED[:3]), ("paper", PLANNED[3:5])):
        for run_id in run_ids:
            _finish(_row(run_id), profile)
        publishing.table_of("05_1").add(profile)
    monkeypatch.setattr(tables, "searches", lambda *_: [_plan(PLANNED[1:4])])

    def dropped(**selection) -> set[str]:
        expected = set(publishing.table_of("05_1").drop(dry_run=True, **selection).run_id)
        before = set(tables.committed_rows("05_1").run_id)
        assert set(publishing.table_of("05_1").drop(**selection).run_id) == expected
        assert set(tables.committed_rows("05_1").run_id) == before - expected
        return expected

    bytes_before = (data / "parameter_bounds.csv").read_bytes()
    for wrong, message in (
        ({}, "nothing says which rows to drop: give a profile, run ids, or superseded"),
        ({"run_ids": ["a" * 12, "f" * 12]}, "no row in .* has the run id ffffffffffff"),
        ({"profile": "quick"}, "no row in .* is selected by all of these conditions"),
        ({"profile": "paper", "run_ids": ["a" * 12]}, "no row in .* is selected by all of these conditions"),
    ):
        with pytest.raises(InputError, match=message):
            publishing.table_of("05_1").drop(**wrong)
    publishing.table_of("05_1").drop(superseded=True, dry_run=True)
    assert (data / "parameter_bounds.csv").read_bytes() == bytes_before
    assert dropped(superseded=True, profile="laptop") == {PLANNED[0]}
    assert dropped(run_ids=[PLANNED[1]]) == {PLANNED[1]}
    assert dropped(superseded=True) == {PLANNED[4]}
    assert dropped(profile="paper") == {PLANNED[3]}
    assert "superseded" not in tables.committed_rows("05_1")


def test_recipes_are_told_apart_by_passes_or_steps_and_optimizer_but_not_by_biographies_or_seed():
    def row(n_facts=256, steps=4000, seed=0, mode="in-weight", **groups):
        config = {"facts": {"n_people": n_facts // 4, "seed": seed, **groups.pop("facts", {})}, "seed": seed, **groups}
        size = {"n_facts": n_facts, "steps_budget": steps, "batch_size": 64}
        return _row(seed=seed, mode=mode, **size, config=json.dumps(config))

    def recipes(*rows) -> int:
        return tables.described(pd.DataFrame(rows)).recipe.nunique()

    assert recipes(row(), row(seed=1), row(model={"d_model": 8}), row(evaluation={"every": 3})) == 1
    assert recipes(row(), row(steps=5000, training={"biographies": 0.2, "steps": 5000})) == 1
    assert recipes(row(n_facts=1024), row(n_facts=2048, steps=8000)) == 1
    tool = {"mode": "in-tool", "n_facts": 1024}  # steps tell recipes apart here, whatever the number of facts
    assert recipes(row(mode="in-tool"), row(**tool), row(**tool, steps=16_000)) == 2
    assert recipes(row(), row(steps=8000), row(optim={"lr": 1e-3}), row(model={"rope": "paper"})) == 4
    laws = [{}, {"alpha": 0.5}, RELEASED._asdict(), {"n_families": 9}]
    described = tables.described(pd.DataFrame([row(facts=facts) for facts in laws]))
    assert list(described.law) == ["ours", "ours", "released", "(None, 9, 'full')"]


def test_recipes_are_never_averaged_and_one_of_them_is_shown():
    """At 32 facts today's plan needs d = 8; before it, 12 and then 4; at 64 today's found nothing."""

    def runs(n_facts: int, enough: int, steps: int, superseded: bool, day: str) -> list[dict]:
        about = {"steps_budget": steps, "batch_size": 32, "superseded": superseded, "finished_at": day}
        return [_row(n_facts=n_facts, d_model=d, recall=float(d >= enough), **about) for d in (4, 8, 12)]

    rows = pd.DataFrame([
        *runs(32, 8, 100, False, "2026-03-01"), *runs(32, 12, 100, True, "2026-01-01"),
        *runs(32, 4, 200, True, "2026-02-01"), *runs(64, 99, 100, False, "2026-03-01"),
        *runs(64, 12, 100, True, "2026-01-01"), *runs(64, 4, 200, True, "2026-02-01"),
        *runs(128, 99, 100, False, "2026-03-01"),
    ])  # fmt: skip
    table = summaries.minimal_parameters(rows, [0.95])
    assert sorted(table[table.n_facts == 32].min_params_mean) == [ModelConfig(d_model=d).n_params for d in (4, 8, 12)]
    shown = tables.shown(table, "min_params_mean").set_index("n_facts")
    assert dict(shown.superseded) == {32: False, 64: True, 128: False}
    assert list(shown.min_params_mean[:2]) == [ModelConfig(d_model=d).n_params for d in (8, 4)]
    assert set(summaries.behind(rows, 0.95).finished_at) == {"2026-03-01", "2026-02-01"}
    assert len(tables.sizes_shown(rows)) == 9 and not tables.sizes_shown(rows).superseded.any()


def test_capacity_is_by_how_much_a_model_shortens_the_answers():
    columns = {"profile": "laptop", "n_facts": 40, "alpha": 0.0, "n_params": 1000, "optimizer": "muon"}
    columns |= {"steps": 1, "stopped": "budget", **{f"nll_bits_{a}": 3.0 for a in ATTRIBUTES}}
    rows = pd.DataFrame([_row("a" * 12, mode=mode, **columns) for mode in ("in-weight", "in-tool")])
    (held,) = summaries.capacity(rows).itertuples()
    assert held.entropy_bits == pytest.approx(10 * 31.25, rel=1e-3)  # four independent attributes: 31.25 bits a person
    # Three bits of every answer are left; of a birth place, which has log2 7, they are more than there were.
    assert held.stored_bits == pytest.approx(10 * (31.25 - 4 * 3 + (3 - math.log2(7))), rel=1e-3)
    assert held.stored_bits_per_parameter == pytest.approx(held.stored_bits / 1000)
    assert summaries.capacity(rows.assign(nll_bits_birth_date=20.0)).stored_bits[0] == pytest.approx(
        held.stored_bits - 10 * (math.log2(28 * 12 * 51) - 3)
    )
    assert summaries.capacity(rows.drop(columns="nll_bits_birth_date")).stored_bits.isna().all()
    assert len(summaries.capacity(pd.DataFrame())) == 0
    # Right answers prove that they are stored, however sure the model is; correlated facts may share their bits.
    right = rows.assign(recall_birth_date=1.0, recall_birth_place=0.0)
    assert summaries.capacity(right).stored_bits[0] == pytest.approx(held.stored_bits + 10 * 3)
    assert summaries.capacity(right.assign(alpha=0.5)).stored_bits[0] < summaries.capacity(right).stored_bits[0]
    half = summaries.capacity(rows.assign(nll_bits_occupation=20.0, recall_occupation=0.5)).stored_bits[0]
    n = len(VALUES["occupation"])
    fano = math.log2(n) - 1 - math.log2(n - 1) / 2
    assert half == pytest.approx(held.stored_bits + 10 * (fano - (math.log2(n) - 3)))


def test_publishing_again_changes_no_byte(data):
    for i, run_id in enumerate(PLANNED[3:]):
        _finish(_row(run_id, seed=i, loss=AWKWARD / (i + 1), recall=1 / 3), "laptop")
    publishing.table_of("05_1").add("laptop")
    first = (data / "parameter_bounds.csv").read_bytes()
    for _ in range(2):
        assert publishing.table_of("05_1").add("laptop") == 0
        assert (data / "parameter_bounds.csv").read_bytes() == first


def test_a_published_row_is_the_row_of_the_run(data):
    row = _row("000000000012", loss=AWKWARD)
    _finish(row, "laptop")
    publishing.table_of("05_1").add("laptop")
    (stored,) = tables.committed_rows("05_1").to_dict("records")
    assert stored == {**row, "profile": "laptop", "next_smaller": 3, "every_seed": False}


def test_publishing_one_profile_leaves_the_rows_of_another(data):
    _finish(_row("a" * 12, loss=AWKWARD), "paper")
    publishing.table_of("05_1").add("paper")
    _finish(_row("a" * 12, loss=2.0), "laptop")
    assert publishing.table_of("05_1").add("laptop") == 1
    assert publishing.table_of("05_1").add("paper") == 0
    rows = tables.committed_rows("05_1")
    assert dict(zip(rows.profile, rows.loss, strict=True)) == {"laptop": 2.0, "paper": AWKWARD}


@pytest.mark.parametrize("commit", [f"{CLEAN}-dirty", "unknown"])
def test_a_row_that_cannot_be_traced_to_a_clean_commit_stops_publishing(data, commit):
    _finish(_row("a" * 12), "laptop")
    _finish(_row("b" * 12, commit=commit), "laptop")
    with pytest.raises(InputError, match=f"1 rows were not made by a clean commit .run {'b' * 12}, commit {commit}"):
        publishing.table_of("05_1").add("laptop")
    assert list(data.iterdir()) == []


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_smoke_and_quick_do_not_publish(data, profile):
    _finish(_row(), profile)
    with pytest.raises(InputError, match=f"the profile {profile} does not publish: laptop and paper do"):
        publishing.table_of("05_1").add(profile)
    assert list(data.iterdir()) == []


def test_code_that_no_commit_holds_makes_no_rows_to_publish(monkeypatch):
    monkeypatch.setattr(publishing, "commit", lambda: CLEAN)
    publishing.check_traceable()
    for commit in (f"{CLEAN}-dirty", "unknown"):
        monkeypatch.setattr(publishing, "commit", lambda commit=commit: commit)
        with pytest.raises(InputError, match="is not committed: commit it"):
            publishing.check_traceable()


def test_results_are_shown_of_a_publishing_profile_and_otherwise_of_laptop(data):
    for profile, run_id in zip(("quick", "laptop", "paper"), PLANNED, strict=False):
        _finish(_row(run_id), profile)
    rows = {name: tables.read_rows("05_1", tables.publishing_profile(name)) for name in paths.PROFILES}
    laptop, paper = [PLANNED[1]], [PLANNED[2]]
    expected = {"smoke": laptop, "quick": laptop, "laptop": laptop, "paper": paper}
    assert {name: list(table.run_id) for name, table in rows.items()} == expected


def test_publishing_nothing_writes_nothing(data):
    assert publishing.table_of("05_1").add("laptop") == 0
    assert list(data.iterdir()) == []


def test_an_unknown_section_is_one_sentence():
    with pytest.raises(InputError, match="unknown section '05_9' among those with a table: there are 05_1"):
        tables.committed_rows("05_9")


# ---- The rows of 5.1, which the laptop profile takes from two sections


def test_the_next_smaller_size_is_that_of_the_plan():
    base = RunConfig.parse({"mode": "in-tool", "facts": {"n_people": 8}})
    rows = pd.DataFrame([
        _row(mode="in-tool", n_facts=n, d_model=d, n_params=100 * d, recall=float(d >= 36))
        for n in (32, 64) for d in (16, 24, 36)
    ])  # fmt: skip
    search = Search(base, threshold=None, sizes=(16, 24, 36, 56))
    ids = [search.config(d).run_id if n == 32 else "0" for n, d in zip(rows.n_facts, rows.d_model, strict=True)]
    rows = tables._marked(rows.assign(run_id=ids), [search])
    table = summaries.minimal_parameters(rows, [0.95]).set_index("n_facts")
    assert table.min_params_mean[32] == 3600
    assert table.seeds_reaching_it[64] == 0  # of which the plan says nothing: 32 might have been enough
    table = summaries.minimal_parameters(rows.assign(recall=1.0), [0.95]).set_index("n_facts")
    assert table.seeds_reaching_it[32] == 0  # even less than 16 might have been enough


@given(st.integers(0, 5), st.lists(st.sampled_from([0.0, 0.94, 0.95, 1.0]), min_size=6, max_size=6))
def test_a_bound_is_known_once_its_search_is_over_and_not_before(start, recall_of):
    search, done = Search(RunConfig(), start=start, sizes=SIZES[:6]), {}
    while pending := search.pending({row["run_id"]: row["recall"] for row in done.values()}):
        (config,) = pending
        d_model = config.model.d_model
        if done:
            assert summaries.minimal_parameters_of_seeds(pd.DataFrame(done.values()), 0.95).min_params.isna().all()
        recall = recall_of[SIZES.index(d_model)]
        done[d_model] = _row(config.run_id, d_model=d_model, recall=recall, config=config.canonical_json())
    (known,) = summaries.minimal_parameters_of_seeds(pd.DataFrame(done.values()), 0.95).min_params
    reached = [row["n_params"] for row in done.values() if row["recall"] >= 0.95]
    assert known == min(reached) if reached else math.isnan(known)


def test_the_smallest_width_that_fits_the_heads_needs_no_smaller_one_tried():
    rows = pd.DataFrame([
        _row(seed=seed, d_model=d, recall=1.0, config=json.dumps({"model": {"n_heads": n, "d_model": d}}))
        for seed, (n, d) in enumerate(((8, 16), (1, 4), (8, 32)))
    ])  # fmt: skip
    found = summaries.minimal_parameters_of_seeds(rows, 0.95).set_index("seed").min_params
    assert [found[0], found[1]] == [*rows.n_params[:2]] and math.isnan(found[2])


def test_rows_of_earlier_plans_stand_in_only_where_todays_has_none():
    rows = pd.DataFrame({"mode": ["a", "a", "b", "b"], "superseded": [True, False, True, True], "base": None})
    assert [*tables.of_todays_plan(rows, ["mode", "base"]).index] == [1, 2, 3]


def test_bounds_take_in_tool_searches_from_generalization_and_no_others():
    bounds, grid = searches("05_1", "laptop"), searches("05_2", "laptop")
    plan = summaries.bounds_searches("laptop")
    assert plan[: len(bounds)] == bounds
    taken = plan[len(bounds) :]
    assert taken == [s for s in grid if s.base.mode == "in-tool" and s.threshold]
    assert {s.base.mode for s in bounds} == {"in-weight"}
    for profile in ("quick", "paper"):  # whose 5.2 is a grid: it searches nothing
        assert summaries.bounds_searches(profile) == searches("05_1", profile)


def test_bounds_rows_are_those_of_the_plan(data, monkeypatch):
    def plan(run_id: str, mode: str, n_people: int):
        plan = _plan([run_id])
        facts = FactsConfig(n_people=n_people)
        plan.base.mode, plan.base.facts, plan.threshold = mode, facts, 0.95
        return plan

    weight, tool = plan(PLANNED[1], "in-weight", 8), plan(PLANNED[0], "in-tool", 8)
    control = plan(PLANNED[2], "in-weight", 8)
    both = {"05_1": [weight], "05_2": [control, tool]}
    monkeypatch.setattr(tables, "searches", lambda section, *_: both[section])
    for section, run_ids in (("05_1", PLANNED[1:2]), ("05_2", [PLANNED[0], PLANNED[2]])):
        for run_id in run_ids:
            folder = sweep_dir(section, "laptop") / run_id
            folder.mkdir(parents=True)
            (folder / "row.json").write_text(json.dumps(_row(run_id)))
    assert set(summaries.bounds_rows("laptop").run_id) == set(PLANNED[:2])
    both["05_1"] = [weight, plan("0" * 12, "in-tool", 8)]  # the same database, searched here: its runs count alone
    assert set(summaries.bounds_rows("laptop").run_id) == {PLANNED[1]}


# ---- Fits and tidy tables


@given(st.floats(1, 50), st.floats(-1e4, 1e5), st.lists(st.integers(1, 14), min_size=3, max_size=9, unique=True))
def test_a_line_is_fitted_as_it_was_drawn(slope, intercept, exponents):
    points = pd.DataFrame({"n_facts": [2.0**k for k in exponents]})
    points["min_params_mean"] = slope * points.n_facts + intercept
    points.loc[len(points)] = [1e6, math.nan]  # a number of facts without a bound
    fit = summaries.fit_line(points)
    assert fit["n_points"] == len(exponents)
    assert fit["slope"] == pytest.approx(slope, rel=1e-5) and fit["intercept"] == pytest.approx(intercept, abs=1)
    assert math.isnan(fit["low"])  # one point per number of facts: nothing to resample
    fit = summaries.fit_line(pd.concat([points] * 2))
    assert fit["low"] == pytest.approx(slope, rel=1e-5) and fit["high"] == pytest.approx(slope, rel=1e-5)


def test_the_interval_of_a_fit_covers_a_noisy_line():
    rng = np.random.default_rng(1)
    covered = 0
    x = np.repeat(2.0 ** np.arange(6, 14), 3)  # three seeds, as in the laptop profile
    for _ in range(60):
        y = (9000 + 7 * x) * rng.normal(1, 0.15, len(x))
        fit = summaries.fit_line(pd.DataFrame({"n_facts": x, "min_params_mean": y}))
        covered += fit["low"] < 7 < fit["high"]
    assert 45 <= covered < 60  # 57 would be right; of three seeds each it covers less


def test_the_interval_of_a_fit_is_that_of_all_ways_to_draw_seeds_within_each_number_of_facts():
    points = pd.DataFrame({"n_facts": [1.0, 1, 2, 2, 4, 4, 4], "min_params_mean": [7.0, 9, 1, 5, 11, 20, 35]})
    of_facts = [group.to_numpy() for _, group in points.groupby("n_facts").min_params_mean]
    ways = itertools.product(*(itertools.product(seeds, repeat=len(seeds)) for seeds in of_facts))
    slopes = [np.polyfit(points.n_facts, np.concatenate(way), 1)[0] for way in ways]
    assert len(slopes) == 4 * 4 * 27
    fit = summaries.fit_line(points)
    assert [fit["low"], fit["high"]] == pytest.approx(np.quantile(slopes, [0.025, 0.975]), rel=0.05)
    assert math.isnan(summaries.fit_line(points[1:])["low"])  # a single seed would seem to be certain


def test_seeds_that_a_later_recipe_hides_are_kept_for_fits_and_marked():
    rows = [_row(f"{i:012d}", n_facts=256, d_model=d, seed=seed, recall=float(d > 8), recipe=recipe)
            for i, (d, seed, recipe) in enumerate(itertools.product((8, 12), (0, 1), ("today", "before")))]  # fmt: skip
    rows = pd.DataFrame(rows).assign(law="ours").query("recipe == 'before' or seed == 0")
    seeds = summaries.seeds_of_bounds(rows.assign(superseded=rows.recipe == "before"))
    seeds = seeds[seeds.recall_threshold == 0.95].set_index(["recipe", "seed"]).sort_index()
    assert seeds.shown.to_dict() == {("before", 0): False, ("before", 1): False, ("today", 0): True}
    assert {*seeds.min_params} == {ModelConfig(d_model=12).n_params}


def test_a_fit_takes_points_of_one_recipe_alone():
    def seeds(superseded: bool, **fields) -> pd.DataFrame:
        about = {"mode": "in-tool", "superseded": superseded} | fields
        return pd.DataFrame({"n_facts": [4096, 4096, 8192], "seed": [0, 1, 0], "min_params": [1.0, 2.0, 3.0]}).assign(
            **about
        )

    mixed = pd.concat([seeds(True, recipe="a"), seeds(True, recipe="b")[:2], seeds(False, recipe="c")[2:]])
    fit = summaries.fit_of_mode(mixed, "in-tool")
    assert fit["n_points"] == 3 and fit["slope"] == summaries.fit_of_mode(seeds(True, recipe="a"), "in-tool")["slope"]
    mixed = pd.concat([seeds(True, recipe="a"), seeds(False, recipe="c")[1:]])  # as many numbers of facts: today's
    assert summaries.fit_of_mode(mixed, "in-tool")["n_points"] == 2


def test_the_interval_of_seeds_holds_zero_if_sizes_do_not_grow_with_the_facts_and_else_does_not():
    """Two numbers of facts, three seeds each: as in-tool in the laptop profile."""
    seeds = pd.DataFrame({"n_facts": [8192] * 3 + [32_768] * 3})
    flat = summaries.fit_line(seeds.assign(min_params=[31_032, 60_372, 60_372] * 2), of="min_params")
    assert flat["slope"] == pytest.approx(0, abs=1e-6) and flat["low"] < 0 < flat["high"]
    rising = [16_592, 31_032, 31_032, 60_372, 60_372, 138_992]
    rising = summaries.fit_line(seeds.assign(min_params=rising), of="min_params")
    assert 0 < rising["low"] < rising["slope"] < rising["high"] and rising["n_points"] == 6
    same = summaries.fit_line(seeds.assign(min_params=60_372), of="min_params")
    assert same["low"] == pytest.approx(0, abs=1e-6) == same["high"]


def test_a_seed_without_a_bracket_has_no_smallest_model():
    """Four sizes are searched: 16 is not known to be the smallest, beyond 56 nothing was tried."""
    reached = {0: {36: True, 24: False}, 1: {36: True, 24: True, 16: True}, 2: {36: False, 56: False}, 3: {36: True}}
    base = Search(RunConfig(mode="in-tool", facts=FactsConfig(n_people=2)), sizes=(16, 24, 36, 56))
    plan = {seed: replace(base, base=base.base.model_copy(update={"seed": seed})) for seed in reached}
    rows = [
        _row(plan[seed].config(size).run_id, mode="in-tool", n_facts=8, seed=seed, d_model=size, recall=float(yes))
        for seed, sizes in reached.items()
        for size, yes in sizes.items()
    ]
    rows = tables._marked(pd.DataFrame(rows), plan.values())
    found = summaries.minimal_parameters_of_seeds(rows, 0.95).set_index("seed").min_params
    assert found[0] == ModelConfig(d_model=36).n_params and found[1:].isna().all() and len(found) == 4


def test_means_over_seeds_are_of_sizes_that_no_outcome_chose(paper_data):
    """24 is run in every seed of 5.2, 20 only where 24 was enough."""
    search = next(s for s in searches("05_2", "laptop") if s.base.seed == 0 and s.base.facts.n_people == 8192)
    for size in (20, 24):
        _finish(_row(run_id=search.config(size).run_id, d_model=size), "laptop", "05_2")
    assert set(tables.read_rows("05_2", "laptop").d_model) == {20, 24}
    assert set(summaries.generalization_rows("laptop").d_model) == {24}


def test_too_few_points_have_no_interval():
    points = pd.DataFrame({"n_facts": [1.0, 2.0, 3.0, 4.0], "min_params_mean": [3.0, 5.0, 7.0, 9.0]})
    assert summaries.fit_line(points)["slope"] == pytest.approx(2) and math.isnan(summaries.fit_line(points)["low"])
    for at_one_number in (points[:1], pd.concat([points[:1]] * 6)):
        assert math.isnan(summaries.fit_line(at_one_number)["slope"])


def test_the_published_slopes_are_those_of_the_published_table():
    theirs = published_by_paper("parameter_bounds")
    theirs = theirs[(theirs["mode"] == "in-weight") & (theirs.recall_threshold == 0.95)]
    fits = [summaries.fit_line(theirs[theirs.n_facts.between(256, last)]) for last in (8192, 65_536)]
    assert [round(fit["slope"], 1) for fit in fits] == [6.9, 8.1]


def test_columns_about_unseen_people_become_rows():
    rows = pd.DataFrame([
        _row(new_pair_recall=0.25, new_pair_right_name=0.75, trained_well_formed=1.0, new_both_recall=math.nan),
    ])  # fmt: skip
    tidy = summaries.unseen_shares(rows)
    assert {(row.kind, row.measure, row.share) for row in tidy.itertuples()} == {
        ("new_pair", "recall", 0.25),
        ("new_pair", "right_name", 0.75),
        ("trained", "well_formed", 1.0),
    }
    assert len(summaries.unseen_shares(pd.DataFrame())) == 0


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe", b'profile,run_id\n"a,b\n'])
def test_what_is_no_table_is_one_sentence(content, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match="cannot read the table .*t.csv, which `git checkout` restores: "):
        tables.read_table(tmp_path / "t.csv")
