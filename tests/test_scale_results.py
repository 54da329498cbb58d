"""Tables of Section 6: against the published file, brute force, sampling, and the standard library's statistics."""

import re
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import paths, scale_results
from lib.base import InputError

PUBLISHED = pd.read_csv(paths.PUBLISHED / "large_scale_final.csv")
NAMES = {"Lam1B": "Llama-3.2-1B", "Lam3B": "Llama-3.2-3B", "Lam8B": "Llama-3.1-8B"}
NAMES |= {"Smol135M": "SmolLM-135M", "Smol360M": "SmolLM-360M", "Smol1.7B": "SmolLM-1.7B"}
FACTS = {"500": 500, "1k": 1_000, "5k": 5_000, "10k": 10_000, "50k": 50_000}
NOTHING = pd.DataFrame()


def run(recalls=(0.0, 0.5, 1.0), every=10, **columns) -> pd.DataFrame:
    """The rows of one run, evaluated `every` so many steps from step 0."""
    columns = {"base": "embedded", "mode": "in-weight", "adaptation": "full", "n_facts": 64, "seed": 0} | columns
    columns = {
        "profile": "laptop",
        "task": "facts",
        "capability_task": "skills",
        "capability": 0.6,
        "capability_base": 0.8,
    } | columns
    columns = {"capability_stderr": 0.03, "capability_base_stderr": 0.02, "tv": 0.1, "tv_stderr": 0.004} | columns
    rows = pd.DataFrame({"recall": recalls, "recall_stderr": 0.01, "kl": 0.2, "kl_stderr": 0.01}).assign(**columns)
    setting = [columns[name] for name in ("profile", "base", "task", "mode", "adaptation", "n_facts", "seed")]
    rows["run_id"], rows["step"] = "/".join(map(str, setting)), every * np.arange(len(rows))
    return rows.assign(final=rows.index == len(rows) - 1)


def runs(*each: dict) -> pd.DataFrame:
    return pd.concat([run(**columns) for columns in each])


def ours(rows: pd.DataFrame, **options) -> pd.DataFrame:
    return scale_results.comparable(rows, with_published=False, **options)


# ---- One table


def test_the_published_table_is_all_there_under_our_names():
    table = scale_results.comparable(NOTHING)
    assert len(table) == len(PUBLISHED) == 36 and set(table.source) == {"published"} and set(table.seeds) == {1}
    table = table.set_index(["base", "mode", "n_facts"])
    same = {"recall": "recall_max", "capability": "hellaswag_absolute", "steps": "steps"}
    same |= {name: name for name in ("tv", "tv_stderr", "kl", "kl_stderr")}
    same |= {"capability_relative": "hellaswag_relative", "capability_relative_stderr": "hellaswag_relative_stderr"}
    for row in PUBLISHED.itertuples():
        found = table.loc[NAMES[row.base], row.mode, FACTS[row.n_facts]]
        np.testing.assert_array_equal(
            found[list(same)].astype(float), [getattr(row, name) for name in same.values()], err_msg=str(row)
        )


def test_absolute_errors_that_are_not_published_agree_with_the_relative_ones_that_are():
    table = scale_results.comparable(NOTHING)
    base = 100 * table.capability / table.capability_relative
    of_base = np.sqrt(base * (1 - base) / 10_041)
    again = scale_results.relative(table.assign(capability_base=base, capability_base_stderr=of_base))
    np.testing.assert_allclose(again.capability_relative_stderr, table.capability_relative_stderr, rtol=2e-4)


def test_the_error_of_relative_capability_is_that_of_many_repeated_measurements():
    rng, n, right, right_base = np.random.default_rng(0), 2_000, 0.31, 0.42
    ratios = 100 * rng.binomial(n, right, 100_000) / rng.binomial(n, right_base, 100_000)
    error, error_base = (np.sqrt(share * (1 - share) / n) for share in (right, right_base))
    row = {"capability": [right], "capability_stderr": [error]}
    row |= {"capability_base": [right_base], "capability_base_stderr": [error_base]}
    found = scale_results.relative(pd.DataFrame(row)).iloc[0]
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
    rows = runs(*({"base": base} for base in ("Big-1.5B-Instruct", "embedded", "Small-135M")), {"adaptation": "lora"})
    table = scale_results.comparable(pd.concat([rows, run(profile="quick")]))
    assert list(table.model.unique()) == [
        *(f"{name} (published)" for name in ("SmolLM-135M", "SmolLM-360M", "Llama-3.2-1B", "SmolLM-1.7B")),
        "Llama-3.2-3B (published)", "Llama-3.1-8B (published)", "embedded (laptop)", "embedded (quick)",
        "embedded, LoRA (laptop)", "Small-135M (laptop)", "Big-1.5B-Instruct (laptop)",
    ]  # fmt: skip


def test_nothing_at_all_is_an_empty_table_with_the_same_columns():
    assert list(ours(NOTHING)) == list(scale_results.comparable(run())) and not len(ours(NOTHING))


def test_two_runs_that_are_not_seeds_of_one_setting_are_refused():
    rows = pd.concat([run(seed=3), run(seed=3).assign(run_id="another", lr=1e-3)])
    with pytest.raises(
        InputError, match=r"two runs of .*embedded \(laptop\).* n_facts 64, .*seed 3 differ in something"
    ):
        ours(rows)


# ---- Steps


@settings(max_examples=50)
@given(
    recalls=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=3),
    threshold=st.sampled_from([0.5, 0.95]),
    shuffle=st.randoms(use_true_random=False),
)
def test_the_first_evaluation_that_recalls_enough_counts(recalls, threshold, shuffle):
    rows = pd.concat([run(recalls=each, every=7, seed=seed) for seed, each in enumerate(recalls)], ignore_index=True)
    order = list(rows.index)
    shuffle.shuffle(order)
    table = scale_results.steps_to_recall(rows.loc[order], threshold)
    assert len(table) == len(recalls)
    for (_, of_run), each in zip(rows.groupby("seed"), recalls, strict=True):
        found = table.loc[of_run.run_id.iloc[0]]
        expected = next((7 * i for i, recall in enumerate(each) if recall >= threshold), np.nan)
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
    (row,) = ours(rows, threshold=0.99).itertuples()
    assert (row.steps_to_recall, row.seeds_reaching_it) == (20, 1)


def _cells(latex: str) -> list[list[str]]:
    lines = [line.removesuffix(r"\\").split("&") for line in latex.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in line] for line in lines]


def test_the_table_of_steps_has_a_row_per_model_and_the_published_numbers():
    modes, facts, *rows = _cells(scale_results.steps_table(scale_results.comparable(NOTHING)))
    assert modes == ["", r"\multicolumn{5}{c}{in-weight}", "in-tool"]
    assert facts == ["facts", "500", "1,000", "5,000", "10,000", "50,000", "500"]
    found = {name: cells for name, *cells in rows}
    assert len(rows) == 6 and set(found) == {f"{name} (published)" for name in NAMES.values()}
    of = PUBLISHED.set_index(["base", "mode", "n_facts"]).steps
    for base, name in NAMES.items():
        expected = [f"{of[base, 'in-weight', n]:,}" for n in FACTS]
        in_tool = "--" if base == "Smol360M" else str(of[base, "in-tool", "500"])  # its recall is 0.92
        assert found[f"{name} (published)"] == [*expected, in_tool]


def test_the_table_of_steps_tells_spread_failures_and_what_was_not_run():
    rows = runs(
        {"seed": 0}, {"seed": 1, "every": 20}, {"seed": 2, "recalls": (0.0, 0.9)},
        {"n_facts": 2000, "recalls": (0.0, 0.9)},
        {"base": "my_model", "n_facts": 2000, "mode": "in-tool", "every": 600},
    )  # fmt: skip
    latex = scale_results.steps_table(ours(rows))
    assert [part for part in re.findall(r"\\(\w+)", latex) if part.endswith("rule")] == [
        "toprule",
        "midrule",
        "bottomrule",
    ]
    assert _cells(latex)[1:] == [
        ["facts", "64", "2,000", "2,000"],
        ["embedded (laptop)", "30 ± 14 (2 of 3)", "--", ""],
        [r"my\_model (laptop)", "", "", "1,200"],
    ]


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
    never, often, always = scale_results.hybrid(rows).itertuples()
    assert [row.frequency for row in (never, often, always)] == [0, 8, 64]
    assert (never.seeds, often.seeds) == (2, 1)
    assert never.accuracy == pytest.approx(0.8) and never.accuracy_std == pytest.approx(statistics.stdev([0.9, 0.7]))
    assert never.accuracy_stderr == pytest.approx(0.1)
    assert often.accuracy_stderr == pytest.approx((0.5 * 0.5 / 40) ** 0.5)
    assert often.accuracy_of_calls_stderr == pytest.approx((0.8 * 0.2 / 9) ** 0.5)  # 10 of 41 were looked up
    assert always.call_share == 0 and np.isnan(always.accuracy_of_calls)

    rows.to_csv(tmp_path / "rows.csv", index=False)
    read = scale_results.hybrid(pd.read_csv(tmp_path / "rows.csv"))
    pd.testing.assert_frame_equal(read, scale_results.hybrid(rows))
    with pytest.raises(InputError, match=r"two runs of frequency 64"):
        scale_results.hybrid(pd.concat([*seeds, seeds[0]]))
    assert not len(scale_results.hybrid(NOTHING))


def test_hybrids_are_a_mode_of_their_own_and_trivia_is_no_recall_of_facts():
    rows = runs({"mode": "in-tool"}, {"mode": "in-tool", "task": "hybrid"}, {"task": "trivia"})
    assert list(ours(rows)["mode"]) == ["hybrid", "in-tool"]


def test_nothing_here_needs_the_models_of_others():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'datasets', 'peft', 'trl', 'lm_eval']));"
    code = (
        f"{blocked} from lib import scale_figures, scale_results as s; import pandas as p; s.comparable(p.DataFrame())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, check=True)
