"""The paper's experiments as data: the search finds the true minimum, and the grids are the published ones."""

import random
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.config import RunConfig, override
from lib.experiments.plan import SIZES, Search, searches
from lib.experiments.summaries import bounds_searches
from lib.experiments.sweep import _expected
from lib.facts.people import OURS, RELEASED
from lib.paths import PROFILES

THRESHOLD = 0.95


def _search(n_sizes: int, start: int) -> Search:
    return Search(RunConfig(), threshold=THRESHOLD, start=start, sizes=SIZES[:n_sizes])


def _run_all(search: Search, recall_of: dict[int, float]) -> dict[str, float]:
    """What a sweep does: run what is pending until nothing is. `recall_of` is the truth for each size."""
    recalls: dict[str, float] = {}
    while pending := search.pending(recalls):
        for config in pending:
            assert config.run_id not in recalls, "a finished run is never repeated"
            recalls[config.run_id] = recall_of[config.model.d_model]
    return recalls


def _smallest_found(search: Search, recalls: dict[str, float]) -> int | None:
    enough = (size for size in search.sizes if recalls.get(search.config(size).run_id, -1) >= THRESHOLD)
    return min(enough, default=None)


@st.composite
def _monotone_tables(draw) -> tuple[Search, dict[int, float]]:
    search = _search(n_sizes := draw(st.integers(1, len(SIZES))), draw(st.integers(0, n_sizes - 1)))
    recalls = sorted(draw(st.lists(st.floats(0, 1), min_size=n_sizes, max_size=n_sizes)))
    first = draw(st.integers(0, n_sizes))  # where the threshold is crossed, else it would mostly be near the end
    table = [min(r, 0.94) if i < first else max(r, THRESHOLD) for i, r in enumerate(recalls)]
    return search, dict(zip(search.sizes, table, strict=True))


@given(_monotone_tables())
def test_a_search_finds_the_true_minimum_from_any_start(case):
    search, recall_of = case
    truth = next((size for size in search.sizes if recall_of[size] >= THRESHOLD), None)
    recalls = _run_all(search, recall_of)
    assert _smallest_found(search, recalls) == truth
    assert len(recalls) <= 10  # doubling strides, then halves: never the whole grid of 26


@given(_monotone_tables())
def test_a_search_from_the_minimum_takes_two_runs(case):
    search, recall_of = case
    truth = next((i for i, size in enumerate(search.sizes) if recall_of[size] >= THRESHOLD), None)
    if truth is not None:
        recalls = _run_all(_search(len(search.sizes), truth), recall_of)
        assert len(recalls) == 1 + min(truth, 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=len(SIZES)), st.data())
def test_a_search_ends_at_a_crossing_where_recall_is_not_monotone(table, data):
    search = _search(len(table), data.draw(st.integers(0, len(table) - 1)))
    recall_of = dict(zip(search.sizes, table, strict=True))
    recalls = _run_all(search, recall_of)
    found = _smallest_found(search, recalls)
    if found is None:
        assert search.config(search.sizes[-1]).run_id in recalls
    else:
        index = search.sizes.index(found)
        for size in search.sizes[max(0, index - 1) : index]:
            assert recalls[search.config(size).run_id] < THRESHOLD


@given(_monotone_tables(), st.integers(0, 9), st.integers(0, 2**32))
def test_what_is_next_is_a_function_of_the_finished_rows_alone(case, n_finished, seed):
    search, recall_of = case
    finished = list(_run_all(search, recall_of).items())[:n_finished]
    random.Random(seed).shuffle(finished)
    foreign = {"0" * 12: 1.0, RunConfig(seed=7).run_id: 0.0}
    resumed = Search(search.base, search.threshold, search.start, search.sizes)
    expected = search.pending(dict(finished))
    assert resumed.pending({**foreign, **dict(finished)}) == expected == search.pending(dict(finished))


def test_a_full_grid_asks_for_every_size_that_has_no_row():
    search = Search(RunConfig(), threshold=None)
    assert [config.model.d_model for config in search.pending({})] == list(SIZES)
    recalls = {search.config(size).run_id: 1.0 for size in SIZES[3:]}
    assert [config.model.d_model for config in search.pending(recalls)] == list(SIZES[:3])
    assert _run_all(search, dict.fromkeys(SIZES, 0.0)).keys() == {search.config(size).run_id for size in SIZES}


def test_the_sizes_are_those_of_the_paper():
    assert len(SIZES) == 26 and list(SIZES) == sorted(set(SIZES))
    parameters = [Search(RunConfig()).config(size).model.n_params for size in SIZES]
    assert (parameters[0], parameters[SIZES.index(32)], parameters[-1]) == (2_612, 49_568, 591_488)


def test_the_paper_profile_is_the_published_grid():
    configs = [config for search in searches("05_1", "paper") for config in search.pending({})]
    assert len({config.run_id for config in configs}) == len(configs) == 7_800
    assert {config.facts.n_people for config in configs} == {2**k for k in range(1, 16)}
    assert {config.seed for config in configs} == set(range(10))
    for config in configs:
        assert config.seed == config.facts.seed
        assert config.training.steps == 100_000 and config.evaluation.stop_at_recall is None
        optim = config.optim
        assert (optim.name, optim.lr, optim.weight_decay, optim.decay_norms) == ("adamw", 1e-3, 0.1, True)
        assert (optim.beta1, optim.beta2, optim.warmup_steps, optim.schedule) == (0.9, 0.95, 50, "cosine")
        assert optim.clip_norm is None and config.training.batch_size == 128
        assert config.training.loss == "cross-entropy"
        assert config.model.rope == "paper"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("section", ["05_1", "05_1_biographies", "05_1_patience", "05_2", "05_3"])
def test_every_profile_holds_valid_distinct_runs(section, profile):
    plan = searches(section, profile)
    ids = set()
    for search in plan:
        assert search.start in range(len(search.sizes))
        assert list(search.sizes) == sorted(search.sizes)
        for size in (search.sizes[0], search.sizes[-1]):
            config = search.config(size)  # built without validation
            assert RunConfig.parse(config.model_dump()) == config and config.model.d_model == size
        ids.update(search.run_ids)
    assert len(ids) == sum(len(search.sizes) for search in plan)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_bounds_of_every_profile_are_of_both_modes_and_its_generalization_too(profile):
    for plan in (bounds_searches(profile), searches("05_2", profile)):
        assert {search.base.mode for search in plan} == {"in-weight", "in-tool"}
    assert all(search.base.evaluation.unseen_people for search in searches("05_2", profile))


@pytest.mark.parametrize("profile", PROFILES)
def test_compressibility_is_about_correlation_and_law_alone(profile):
    plan = searches("05_3", profile)
    assert {search.base.mode for search in plan} == {"in-weight"}
    settings = {
        search.base.model_copy(
            update={"seed": 0, "facts": search.base.facts.model_copy(update={"alpha": 0, "seed": 0})}
        ).canonical_json()
        for search in plan
    }
    assert len(settings) == len({(search.base.facts.n_people, search.base.facts.law) for search in plan})


@pytest.mark.parametrize("profile", PROFILES)
def test_with_biographies_everything_is_as_without_and_questions_are_asked_as_often(profile):
    """A biography for every four questions: a fifth of the dialogs, so a quarter more steps."""
    without = [search for search in searches("05_1", profile) if search.base.mode == "in-weight"]
    with_them = searches("05_1_biographies", profile)
    assert with_them
    for search in with_them:
        training = search.base.training
        (plain,) = (
            other
            for other in without
            if override(other.base, {"training": training.model_dump()}) == search.base
            and (other.start, other.sizes, other.threshold) == (search.start, search.sizes, search.threshold)
        )
        assert training.questions == pytest.approx(0.8)
        assert training.steps * training.questions == pytest.approx(plain.base.training.steps, abs=1)


def test_laptop_passes_over_the_facts_are_the_same_for_any_number_of_them():
    for search in searches("05_1", "laptop"):
        n_facts, training = 4 * search.base.facts.n_people, search.base.training
        if n_facts >= 1024:  # fewer have the least number of steps
            assert training.steps * training.batch_size == 300 * n_facts


def test_smaller_profiles_are_smaller():
    for section in ("05_1", "05_2", "05_3"):
        cost = [
            sum(c.training.steps * c.facts.n_people for s in searches(section, profile) for c in _expected(s, {}))
            for profile in PROFILES
        ]
        assert cost == sorted(cost)


def test_the_quickstart_trains_one_model_of_each_mode():
    for profile in PROFILES:
        assert [search.base.mode for search in searches("quickstart", profile)] == ["in-weight", "in-tool"]
        assert [len(search.pending({})) for search in searches("quickstart", profile)] == [1, 1]
    smoke, quick = (searches("quickstart", profile)[0].base.training.steps for profile in ("smoke", "quick"))
    assert smoke < quick


@pytest.mark.parametrize(("section", "profile"), [("05_9", "quick"), ("05_1", "enormous"), ("", "")])
def test_an_unknown_experiment_is_one_sentence_that_lists_those_there_are(section, profile):
    with pytest.raises(InputError, match=r"there are 05_1 \(smoke, quick, laptop, paper\)"):
        searches(section, profile)


# ---- A user's file of grids


GRID = {"base": {"training": {"steps": 10}}, "axes": [{"n_facts": [8, 16]}, {"seed": [0, 1]}], "sizes": [4, 8]}


def _plan(folder, content) -> list[Search]:
    (folder / "mine.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return searches(str(folder / "mine.yaml"), "quick")


def test_a_grid_has_a_search_for_each_combination_with_the_last_axis_fastest(tmp_path):
    plan = _plan(tmp_path, GRID)
    assert [(s.base.facts.n_people, s.base.seed, s.base.facts.seed) for s in plan] == [
        (2, 0, 0), (2, 1, 1), (4, 0, 0), (4, 1, 1),
    ]  # fmt: skip
    assert {(s.sizes, s.threshold, s.start) for s in plan} == {((4, 8), 0.95, 0)}
    assert _plan(tmp_path, [GRID, GRID]) == plan + plan == _plan(tmp_path, {"quick": [GRID, GRID], "paper": []})


def test_fields_on_one_axis_vary_together_and_those_of_the_grid_vary_too(tmp_path):
    axes = [{"mode": ["in-weight", "in-tool"], "start": [4, 8], "model.n_heads": [2, 1]}, {"law": ["ours", "released"]}]
    plan = _plan(tmp_path, {**GRID, "axes": axes, "threshold": None})
    found = [(s.base.mode, s.start, s.base.model.n_heads, s.base.facts.law) for s in plan]
    assert found == [
        ("in-weight", 0, 2, OURS), ("in-weight", 0, 2, RELEASED), ("in-tool", 1, 1, OURS), ("in-tool", 1, 1, RELEASED),
    ]  # fmt: skip


def test_steps_and_evaluations_grow_with_the_facts(tmp_path):
    grid = {"recipe": "focal-32", "passes": 300, "min_steps": 100, "evaluations": 4, "axes": [{"n_facts": [8, 64]}]}
    plan = _plan(tmp_path, grid)
    assert [(s.base.training.steps, s.base.evaluation.every) for s in plan] == [(100, 25), (600, 150)]
    assert {s.base.training.loss for s in plan} == {"focal"}


def test_passes_are_over_the_people_of_a_csv(tmp_path):
    (tmp_path / "people.csv").write_text("name,pet\n" + "".join(f"P{i},cat\n" for i in range(640)))
    grid = {"base": {"facts": {"csv": str(tmp_path / "people.csv")}}, "passes": 3, "evaluations": 2}
    (search,) = _plan(tmp_path, grid)
    assert (search.base.training.steps, search.base.evaluation.every) == (
        3 * 640 // search.base.training.batch_size,
        15,
    )
    assert "people.csv" in search.base.title and "facts" not in search.base.title


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    (search,) = _plan(tmp_path, "base: {optim: {lr: 1e-3, muon_lr: 2E-2}}")
    assert (search.base.optim.lr, search.base.optim.muon_lr) == (0.001, 0.02)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": [4]}, "unknown configuration key 'grid.size': accepted are recipe, base, axes, sizes"),
        ({"base": {"optim": {"learning_rate": 1}}}, "unknown configuration key 'optim.learning_rate': accepted are"),
        ({"axes": [{"facts.people": [1]}]}, "unknown configuration key 'facts.people': accepted are n_people"),
        ({"axes": [{"n_facts": [8, 16], "seed": [0]}]}, "n_facts, seed share an axis, so their lists must"),
        ({"axes": [{"n_facts": [6]}]}, "n_facts = 6: each person has 4 facts, give a multiple of that"),
        ({"base": {"law": "mine"}}, "unknown law 'mine': there are ours, released"),
        ({"recipe": "slow"}, "unknown recipe 'slow': there are focal-32, focal-copying, focal-wide, fast"),
        ({"sizes": [8, 4]}, "in ascending order"),
        ({"start": 5}, "start = 5 is none of the sizes"),
        ({"sizes": [4, 6]}, "model.d_model = 6 with n_heads = 2"),
        ({"threshold": 2}, "grid.threshold: input should be less than or equal to 1, got 2"),
        ({"axes": [{"seed": [0]}, {"seed": [1]}]}, "'seed' is there twice: each key takes one value"),
        ({"axes": [{"axes": [[{"seed": [0]}]]}]}, "'axes' is there twice: each key takes one value"),
        ({"axes": [{"seed": []}]}, "asks for no run: give a grid, and each of its axes a value"),
    ],
)
def test_a_mistake_in_a_grid_is_one_sentence_that_names_the_file(tmp_path, change, sentence):
    with pytest.raises(InputError, match=f"mine.yaml:? .*{re.escape(sentence)}"):
        _plan(tmp_path, {**GRID, **change})


def test_a_file_that_is_missing_or_no_yaml_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot read the plan .*none.yaml, a file of YAML: .*No such file"):
        searches(str(tmp_path / "none.yaml"), "quick")
    with pytest.raises(InputError, match="cannot read the plan .*mine.yaml, a file of YAML: "):
        _plan(tmp_path, "sizes: [4")
    with pytest.raises(InputError, match="mine.yaml: grid takes an object with fields, got 'sizes'"):
        _plan(tmp_path, "sizes")


@pytest.mark.parametrize("text", ["sizes: [4]\nsizes: [8]", "base: {training: {steps: 1, steps: 2}}"])
def test_a_key_that_is_there_twice_is_one_sentence(tmp_path, text):
    with pytest.raises(InputError, match="cannot read the plan .*mine.yaml.* is there twice"):
        _plan(tmp_path, text)


def test_merged_keys_may_be_given_again(tmp_path):
    text = (
        "axes: [{base: [{training: &some {steps: 1, batch_size: 3}}, {training: {<<: *some, steps: 2}}]}]\nsizes: [4]"
    )
    _, search = _plan(tmp_path, text)
    assert (search.base.training.steps, search.base.training.batch_size) == (2, 3)


@pytest.mark.parametrize("name", ["...yaml", "..yml", ".yaml", "folder/...yaml"])
def test_a_file_without_a_name_is_no_experiment_for_its_runs_would_leave_their_folder(name):
    with pytest.raises(InputError, match="unknown experiment"):
        searches(name, "quick")


def test_runs_of_two_layers_of_two_heads_are_those_of_5_1_and_5_2():
    ids = {
        (s.base.mode, s.base.model.n_layers, s.base.model.n_heads): s.run_ids[0]
        for s in searches("depth_and_heads", "laptop")
    }
    for section, mode in (("05_1", "in-weight"), ("05_2", "in-tool")):
        known = {run_id for search in searches(section, "laptop") for run_id in search.run_ids}
        assert {shape for shape, run_id in ids.items() if run_id in known} == {(mode, 2, 2)}
