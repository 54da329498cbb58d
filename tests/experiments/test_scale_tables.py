"""Tables of Section 6: against the published file, brute force, sampling, and the standard library's statistics."""

import csv
import os
import re
import statistics
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import paths
from lib.base import InputError
from lib.experiments import scale_tables

with (paths.PUBLISHED / "large_scale_checkpoints.csv").open() as file:
    RELEASED = [row for row in csv.DictReader(file) if row["step"] != "0"]
#: The last released checkpoint of every run.
LAST = {
    (row["base"], row["mode"], int(float(row["n_facts"]))): row
    for row in sorted(RELEASED, key=lambda r: int(r["step"]))
}
NOTHING = pd.DataFrame()


def run(recalls=(0.0, 0.5, 1.0), every=10, **columns) -> pd.DataFrame:
    """The rows of one run, evaluated `every` so many steps from step 0."""
    columns = {"base": "SmolLM2-135M", "mode": "in-weight", "adaptation": "full", "n_facts": 64, "seed": 0} | columns
    columns = {
        "profile": "laptop",
        "task": "facts",
        "capability_task": "trivia",
        "capability": 0.6,
        "capability_base": 0.8,
    } | columns
    columns = {"capability_stderr": 0.03, "capability_base_stderr": 0.02, "tv": 0.1, "tv_stderr": 0.004} | columns
    rows = pd.DataFrame({"recall": recalls, "recall_stderr": 0.01, "kl": 0.2, "kl_stderr": 0.01}).assign(**columns)
    setting = [columns.get(name) for name in ("profile", "base", "task", "mode", "adaptation", "n_facts", "seed", "lr")]
    rows["run_id"], rows["step"] = "/".join(map(str, setting)), every * np.arange(len(rows))
    return rows.assign(final=rows.index == len(rows) - 1)


def runs(*each: dict) -> pd.DataFrame:
    return pd.concat([run(**columns) for columns in each])


def ours(rows: pd.DataFrame) -> pd.DataFrame:
    return scale_tables.comparable(rows, with_published=False)


# ---- One table


def number(text: str) -> float:
    return float(text) if text else np.nan


def test_a_published_point_is_the_last_checkpoint_of_a_run_with_its_facts_and_recipe():
    table = scale_tables.comparable()
    assert len(table) == len(LAST) == 36 and set(table.source) == {"published"} and set(table.seeds) == {1}
    table = table.set_index(["base", "mode", "n_facts"])
    for point, row in LAST.items():
        found = table.loc[point]
        for name in ("recall", "recall_stderr", "tv", "tv_stderr", "kl", "kl_stderr", "lr", "batch_size"):
            np.testing.assert_equal(float(found[name]), number(row[name]), err_msg=f"{point} {name}")
        for suffix in ("", "_stderr"):
            assert found["capability" + suffix] == number(row["hellaswag" + suffix])
            assert found["capability_relative" + suffix] == pytest.approx(
                number(row["hellaswag_relative" + suffix]), rel=1e-4
            )
        reached = [int(r["step"]) for r in RELEASED if number(r["recall"]) >= 0.95 and _point(r) == point]
        assert found.steps == int(row["step"])
        np.testing.assert_equal(found.steps_to_recall, float(min(reached, default=np.nan)))


def _point(row: dict) -> tuple:
    return row["base"], row["mode"], int(float(row["n_facts"]))


def test_published_rows_are_all_released_checkpoints_and_each_run_begins_at_its_base_model():
    rows = scale_tables.published_rows()
    assert len(rows[rows.step > 0]) == len(RELEASED) == 543 - 12  # each model's base stands there for both modes
    assert len(rows[rows.step == 0]) == rows.run_id.nunique() == rows.final.sum() == len(LAST)
    before = rows[rows.step == 0]
    assert (before.capability == before.capability_base).all() and (before.recall == 0).all() and (before.tv == 0).all()
    np.testing.assert_array_equal(rows.groupby("base").capability_base.nunique(), 1)
    np.testing.assert_array_equal(rows.groupby("run_id")[["lr", "batch_size"]].nunique(), 1)


def test_in_tool_smollm_was_trained_on_more_than_500_facts():
    """The released script says 500, the run's name 1,000: its steps are more than the named passes over 500 facts."""
    row = LAST["SmolLM-135M", "in-tool", 1_000]
    assert int(row["step"]) > float(row["max_epochs"]) * -(-500 // float(row["batch_size"]))


def test_pairs_at_equal_facts_are_alike_only_if_rate_and_batch_are():
    pairs = scale_tables.pairs(scale_tables.comparable()).set_index("base")
    assert set(pairs.index[pairs.same_recipe]) == {base for base, *_ in LAST if base.startswith("Llama")}
    assert dict(pairs.n_facts) == {base: n_facts for base, mode, n_facts in LAST if mode == "in-tool"}
    tool, weight = (LAST["Llama-3.2-1B", mode, 500] for mode in ("in-tool", "in-weight"))
    shares = [number(row["hellaswag"]) for row in (tool, weight)]
    base = 100 * shares[0] / number(tool["hellaswag_relative"])
    found = pairs.loc["Llama-3.2-1B"]
    assert found.capability_saved == pytest.approx(100 * (shares[0] - shares[1]) / base, rel=1e-3)
    assert found.tv_weight / found.tv_tool == pytest.approx(number(weight["tv"]) / number(tool["tv"]))
    drawn = np.random.default_rng(0).binomial(10_042, shares, (50_000, 2)) / 10_042 / base
    assert found.capability_saved_stderr == pytest.approx(100 * (drawn[:, 0] - drawn[:, 1]).std(), rel=0.02)
    both = ours(runs({"mode": "in-tool", "lr": 1e-3}, {"lr": 1e-3}, {"n_facts": 128, "lr": 1e-3}).assign(batch_size=8))
    assert list(scale_tables.pairs(both)[["n_facts", "same_recipe"]].itertuples(index=False)) == [(64, True)]


def test_pairs_at_equal_steps_are_of_the_last_step_that_both_were_evaluated_at():
    rows = runs({"mode": "in-tool", "every": 3, "recalls": [0.1] * 6}, {"every": 4, "recalls": [0.2] * 6})
    rows = rows.assign(lr=1e-3, batch_size=8, tv=rows.step / 100 + rows["mode"].eq("in-weight"))
    (row,) = scale_tables.at_equal_steps(rows).itertuples()
    assert (row.step, row.tv_tool, row.tv_weight, row.same_recipe) == (12, 0.12, 1.12, True)
    assert (row.recall_tool, row.recall_weight) == (0.1, 0.2)
    rows.loc[(rows.step == 12) & (rows["mode"] == "in-tool"), "tv"] = np.nan
    assert not len(scale_tables.at_equal_steps(rows))  # but at step 0
    found = scale_tables.at_equal_steps(scale_tables.published_rows()).set_index("base")
    for base, row in found.iterrows():
        for mode, value in (("in-tool", row.tv_tool), ("in-weight", row.tv_weight)):
            same = [r for r in RELEASED if _point(r) == (base, mode, row.n_facts) and int(r["step"]) == row.step]
            assert [number(r["tv"]) for r in same] == [value]


def test_runs_in_tool_stand_beside_every_recipe_in_weights_and_what_these_cost_is_told_in_points():
    tool = {"mode": "in-tool-text", "n_facts": 128, "lr": 1e-4, "capability_change": -0.01}
    weight = [{"lr": lr, "capability_change": change} for lr, change in ((1e-4, -0.02), (1e-3, -0.06))]
    rows = runs(tool, *weight).assign(batch_size=8, capability_change_stderr=0.003)
    rows["run_id"] += rows.lr.astype(str)
    pairs = scale_tables.pairs(ours(rows), equal_facts=False).set_index("lr_weight")
    assert dict(pairs.same_recipe) == {1e-4: True, 1e-3: False}
    assert dict(pairs.points_saved.round(6)) == {1e-4: 1, 1e-3: 5}
    assert list(pairs.points_saved_stderr) == pytest.approx([0.3 * 2**0.5] * 2)
    assert not len(scale_tables.pairs(ours(NOTHING), equal_facts=False))


@pytest.mark.parametrize("first", [None, "hub"])  # the first run names no source, or one that no other run has
def test_capability_is_averaged_and_compared_only_over_runs_asked_the_same_items(first):
    seeds = [{"seed": seed, "capability_change": change} for seed, change in enumerate((0.5, -0.01, -0.03))]
    tool, alone = (
        runs(*({"mode": "in-tool", **seed} for seed in of)).assign(lr=1e-4, batch_size=8, capability_change_stderr=0.01)
        for of in (seeds, seeds[:1])
    )
    tool["capability_source"] = tool.seed.map({0: first, 1: "file a", 2: "file a"})
    (row,) = ours(tool).itertuples()
    assert (row.seeds, row.recall_seeds, row.capability_change_seeds, row.capability_source) == (3, 3, 2, "file a")
    assert row.capability_change == pytest.approx(-0.02) and row.capability_relative_seeds == 2
    weight = tool[tool.seed > 0].assign(mode="in-weight", capability_change=-0.05)
    weight["run_id"] += "/weight"
    for in_tool, saved in ((tool, 3), (alone, np.nan)):
        (pair,) = scale_tables.pairs(ours(pd.concat([in_tool, weight]))).itertuples()
        assert pair.points_saved == pytest.approx(saved, nan_ok=True)
        assert (pair.tv_tool, pair.tv_weight) == pytest.approx((0.1, 0.1))  # other measurements compare all the same


def test_panels_set_runs_in_weights_apart_that_have_the_rate_of_those_in_tool():
    tool = {"mode": "in-tool-text"}
    each = (tool | {"lr": 1e-4}, {"lr": 1e-4}, {"lr": 1e-3}, {"lr": 1e-2, "adaptation": "lora"})
    hybrid = run(mode="in-tool-text", task="hybrid", lr=1e-4)
    found = scale_tables.panels(pd.concat([runs(*each), hybrid])).drop_duplicates(["base", "mode", "lr"])
    assert set(found[["base", "mode", "lr"]].itertuples(index=False, name=None)) == {
        ("SmolLM2-135M (laptop)", "in-weight", 1e-3),
        ("SmolLM2-135M (laptop)", "in-tool-text", 1e-4),
        ("SmolLM2-135M, equal rates 1e-4 (laptop)", "in-weight", 1e-4),
        ("SmolLM2-135M, equal rates 1e-4 (laptop)", "in-tool-text", 1e-4),
    }
    more = scale_tables.panels(runs(*each, tool | {"lr": 1e-3})).groupby("base")[["mode", "lr"]].nunique()
    assert more.to_dict("index") == {
        "SmolLM2-135M (laptop)": {"mode": 2, "lr": 2},  # each mode at its published rate
        "SmolLM2-135M, equal rates 1e-3 (laptop)": {"mode": 2, "lr": 1},
        "SmolLM2-135M, equal rates 1e-4 (laptop)": {"mode": 2, "lr": 1},
    }
    alone = scale_tables.panels(run(mode="in-tool-text", lr=1e-4))
    assert set(alone.base) == {"SmolLM2-135M (laptop)"} and len(alone) == len(run())
    assert not len(scale_tables.panels(NOTHING))


def test_batches_are_told_by_run_where_they_are_not_the_common_ones():
    text = scale_tables.batches(scale_tables.published_rows())
    assert text.startswith("Batches of 128 conversations; ")
    for (base, mode, n_facts), row in LAST.items():
        clauses = [clause for clause in text.split("; ") if f"{base} {mode}" in clause and f"{n_facts:,}" in clause]
        assert [clause.split()[0] for clause in clauses] == [row["batch_size"]] * (row["batch_size"] != "128")


@pytest.mark.parametrize(("lr", "text"), [(1e-3, "1e-3"), (5e-5, "5e-5"), (2.5e-3, "2.5e-3"), (0.3, "3e-1")])
def test_a_rate_is_written_as_in_a_recipe(lr, text):
    assert scale_tables.rate(lr) == text and float(text) == lr


def test_models_are_ordered_by_family_then_by_size():
    bases = ["Llama-3.1-8B", "SmolLM-1.7B", "Llama-3.2-1B", "SmolLM-135M", "Llama-3.1-8B", "mine", "SmolLM2-135M"]
    families = ["SmolLM-135M", "SmolLM-1.7B", "SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B", "mine"]
    assert scale_tables.by_family(bases) == families


def test_the_error_of_relative_capability_is_that_of_many_repeated_measurements():
    rng, n, right, right_base = np.random.default_rng(0), 2_000, 0.31, 0.42
    ratios = 100 * rng.binomial(n, right, 100_000) / rng.binomial(n, right_base, 100_000)
    error, error_base = (np.sqrt(share * (1 - share) / n) for share in (right, right_base))
    row = {"capability": [right], "capability_stderr": [error]}
    row |= {"capability_base": [right_base], "capability_base_stderr": [error_base]}
    found = scale_tables.relative(pd.DataFrame(row)).iloc[0]
    assert found.capability_relative == pytest.approx(ratios.mean(), rel=0.002)
    assert found.capability_relative_stderr == pytest.approx(ratios.std(), rel=0.02)


@settings(max_examples=25)
@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=5), own=st.floats(0, 0.2))
def test_seeds_are_averaged_and_the_larger_error_is_told(values, own):
    table = ours(runs(*({"seed": seed, "tv": value, "tv_stderr": own} for seed, value in enumerate(values))))
    (row,) = table.itertuples()
    spread = statistics.stdev(values)
    assert (row.seeds, row.tv_seeds) == (len(values), len(values))
    assert row.tv == pytest.approx(statistics.fmean(values)) and row.tv_std == pytest.approx(spread, abs=1e-9)
    assert row.tv_stderr == pytest.approx(max(spread / len(values) ** 0.5, own), abs=1e-9)


def test_one_seed_has_no_spread_and_its_own_error():
    (row,) = ours(run()).itertuples()
    assert (row.tv, row.tv_stderr, row.seeds) == (0.1, 0.004, 1) and np.isnan(row.tv_std)
    assert row.capability_relative == pytest.approx(75)
    assert row.capability_relative_stderr == pytest.approx(75 * np.hypot(0.03 / 0.6, 0.02 / 0.8))


def test_only_last_checkpoints_of_runs_count():
    rows = run().assign(tv=[0.0, 0.2, 0.3])
    untouched = run(recalls=[0.1]).assign(run_id="base", mode=np.nan, n_facts=np.nan)
    (row,) = ours(pd.concat([rows, untouched])).itertuples()
    assert (row.tv, row.steps, row.recall, row.n_facts) == (0.3, 20, 1.0, 64)


def test_what_was_not_measured_is_nan_and_does_not_take_part():
    rows = runs({"seed": 0}, {"seed": 1, "capability": np.nan, "capability_task": None})
    (row,) = ours(rows.drop(columns=["kl", "kl_stderr"])).itertuples()
    assert (row.seeds, row.capability, row.capability_seeds, row.kl_seeds) == (2, 0.6, 1, 0)
    assert np.isnan(row.kl) and np.isnan(row.kl_stderr)
    never = dict.fromkeys(["capability", "capability_stderr", "capability_base", "capability_base_stderr"])
    (row,) = ours(run(**never, capability_task=None)).itertuples()
    assert np.isnan(row.capability_relative) and row.capability_relative_seeds == 0 and row.tv == 0.1


def test_models_are_told_apart_by_what_was_trained_and_by_profile_smaller_ones_first():
    rows = runs(
        *({"base": base} for base in ("Big-1.5B-Instruct", "SmolLM2-135M", "Small-135M")), {"adaptation": "lora"}
    )
    table = scale_tables.comparable(pd.concat([rows, run(profile="quick")]))
    assert list(table.model.unique()) == [
        *(f"{name} (published)" for name in ("SmolLM-135M", "SmolLM-360M", "Llama-3.2-1B", "SmolLM-1.7B")),
        "Llama-3.2-3B (published)", "Llama-3.1-8B (published)", "Small-135M (laptop)", "SmolLM2-135M (laptop)",
        "SmolLM2-135M (quick)", "SmolLM2-135M, LoRA (laptop)", "Big-1.5B-Instruct (laptop)",
    ]  # fmt: skip


def test_runs_of_two_learning_rates_are_two_models_and_of_one_rate_each_mode_one():
    rates = [{"lr": lr, "seed": seed, "tv": lr} for lr in (1e-3, 1e-4) for seed in range(2)]
    rows = runs(*rates, {"mode": "in-tool", "lr": 1e-4}, {"profile": "quick", "lr": 1e-2}).assign(batch_size=128)
    table = ours(rows)
    assert list(table[["model", "mode", "lr", "seeds"]].itertuples(index=False, name=None)) == [
        ("SmolLM2-135M (laptop)", "in-tool", 1e-4, 1),
        ("SmolLM2-135M (quick)", "in-weight", 1e-2, 1),
        ("SmolLM2-135M, rate 1e-3 (laptop)", "in-weight", 1e-3, 2),
        ("SmolLM2-135M, rate 1e-4 (laptop)", "in-weight", 1e-4, 2),
    ]
    assert list(table.tv[2:]) == pytest.approx([1e-3, 1e-4])
    pairs = scale_tables.pairs(table)
    assert list(pairs[["lr_tool", "lr_weight", "same_recipe"]].itertuples(index=False, name=None)) == [
        (1e-4, 1e-3, False), (1e-4, 1e-4, True),
    ]  # fmt: skip


def test_nothing_at_all_is_an_empty_table_with_the_same_columns():
    assert list(ours(NOTHING)) == list(scale_tables.comparable(run())) and not len(ours(NOTHING))


def test_two_runs_that_are_not_seeds_of_one_setting_are_refused():
    rows = pd.concat([run(seed=3), run(seed=3).assign(run_id="another", warmup=0.2)])
    with pytest.raises(
        InputError, match=r"two runs of .*SmolLM2-135M \(laptop\).* n_facts 64, .*seed 3 differ in something"
    ):
        ours(rows)


# ---- Steps


@settings(max_examples=50)
@given(
    recalls=st.lists(
        st.lists(st.floats(0, 1) | st.sampled_from([0.95, 1.0]), min_size=1, max_size=8), min_size=1, max_size=3
    ),
    shuffle=st.randoms(use_true_random=False),
)
def test_the_first_evaluation_that_recalls_enough_counts(recalls, shuffle):
    rows = pd.concat([run(recalls=each, every=7, seed=seed) for seed, each in enumerate(recalls)], ignore_index=True)
    order = list(rows.index)
    shuffle.shuffle(order)
    table = scale_tables.steps_to_recall(rows.loc[order])
    assert len(table) == len(recalls)
    for (_, of_run), each in zip(rows.groupby("seed"), recalls, strict=True):
        found = table.loc[of_run.run_id.iloc[0]]
        expected = next((7 * i for i, recall in enumerate(each) if recall >= 0.95), np.nan)
        np.testing.assert_equal(found.steps_to_recall, float(expected))


def test_a_crossing_is_as_uncertain_as_a_place_between_two_evaluations():
    (row,) = ours(run(recalls=[0.0, 0.2, 0.97, 0.5, 1.0], every=20)).itertuples()
    anywhere = np.linspace(20, 40, 100_001)
    assert row.steps_to_recall == 40 and row.steps == 80
    assert row.steps_to_recall_stderr == pytest.approx(anywhere.std(), rel=1e-4)


def test_seeds_that_do_not_reach_the_recall_are_counted_apart():
    rows = runs({"seed": 0}, {"seed": 1, "recalls": (0.0, 0.97)}, {"seed": 2, "recalls": (0.0, 0.9)})
    (row,) = ours(rows).itertuples()
    assert (row.steps_to_recall, row.seeds_reaching_it, row.seeds) == (15, 2, 3)


# ---- Hybrids


def hybrid_run(seed: int, **by_frequency: dict) -> pd.DataFrame:
    rows = run(seed=seed, task="hybrid", mode="in-tool")
    asked = [{"frequency": int(frequency[1:]), "n": 41, **shares} for frequency, shares in by_frequency.items()]
    return rows.assign(by_frequency=[[], [], asked])


def test_shares_of_hybrids_are_averaged_over_seeds_with_the_error_of_what_was_asked(tmp_path):
    often = {"call_share": 0.25, "accuracy": 0.5, "accuracy_of_calls": 0.8}
    always = {"call_share": 0.0, "accuracy": 0.5, "accuracy_of_calls": None}
    seeds = [
        hybrid_run(0, _64=always, _8=often, _0={"call_share": 1.0, "accuracy": 0.9, "accuracy_of_calls": 0.9}),
        hybrid_run(1, _0={"call_share": 0.9, "accuracy": 0.7, "accuracy_of_calls": 0.7}),
    ]
    rows = pd.concat([*seeds, run(mode="in-tool")])  # a run that is no hybrid
    never, often, always = scale_tables.hybrid(rows).itertuples()
    assert [row.frequency for row in (never, often, always)] == [0, 8, 64]
    assert (never.seeds, often.seeds) == (2, 1)
    assert never.accuracy == pytest.approx(0.8) and never.accuracy_std == pytest.approx(statistics.stdev([0.9, 0.7]))
    assert never.accuracy_stderr == pytest.approx(0.1)
    assert often.accuracy_stderr == pytest.approx((0.5 * 0.5 / 40) ** 0.5)
    assert often.accuracy_of_calls_stderr == pytest.approx((0.8 * 0.2 / 9) ** 0.5)  # 10 of 41 were looked up
    assert always.call_share == 0 and np.isnan(always.accuracy_of_calls)

    rows.to_csv(tmp_path / "rows.csv", index=False)
    read = scale_tables.hybrid(pd.read_csv(tmp_path / "rows.csv"))
    pd.testing.assert_frame_equal(read, scale_tables.hybrid(rows))
    with pytest.raises(InputError, match=r"two runs of frequency 64"):
        scale_tables.hybrid(pd.concat([*seeds, seeds[0]]))
    assert not len(scale_tables.hybrid(NOTHING))


def test_hybrids_are_a_mode_of_their_own_and_trivia_is_no_recall_of_facts():
    rows = runs({"mode": "in-tool"}, {"mode": "in-tool", "task": "hybrid"}, {"task": "trivia"})
    assert list(ours(rows)["mode"]) == ["hybrid", "in-tool"]


# ---- What the notebooks say


@pytest.mark.parametrize("name", ["06_1_factual_recall_at_scale", "06_2_capabilities_at_scale"])
def test_prose_of_section_6_is_short_and_its_numbers_are_computed(name):
    cells = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", 4).cells
    computed = [cell for cell in cells if "from-tables" in cell.metadata.get("tags", [])]
    said = ["".join(out.data["text/markdown"]) for cell in computed for out in cell.outputs]
    assert len(computed) >= 4 and all(cell.outputs for cell in computed)
    assert any(text.startswith("**Like with like") for text in said) and "nan" not in " ".join(said)
    readings = [cell.source for cell in cells if cell.cell_type == "markdown" and "**How to read it.**" in cell.source]
    assert all(len(text.split()) <= 120 for text in [*readings, *said])
    assert not [text for text in readings if re.search(r"\d\.\d|\d%", text)]


@pytest.mark.parametrize("name", ["06_1_factual_recall_at_scale", "06_2_capabilities_at_scale"])
@pytest.mark.slow
def test_notebooks_of_section_6_need_no_rows_of_ours_and_no_model_libraries(name, tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["transformers", "datasets", "peft", "trl", "lm_eval"]))
import matplotlib, nbformat
from pathlib import Path
from lib import paths
matplotlib.use("agg")
paths.PAPER_DATA, names = Path({str(tmp_path)!r}), {{}}
for cell in nbformat.read(paths.NOTEBOOKS / "{name}.ipynb", 4).cells:
    if cell.cell_type == "code":
        exec(cell.source.replace("recompute: bool = True", "recompute: bool = False"), names)
"""
    environment = {**os.environ, "ITL_FIGURES": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, env=environment, check=True)
    produced = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", 4).metadata.itl.produces
    assert {path.name for path in tmp_path.iterdir()} == set(produced)
