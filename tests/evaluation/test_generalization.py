"""Unseen people are unseen, and what is said of them is judged against the database that really was asked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import DATABASE, END, says, turn

from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs.request import Request
from lib.dialogs.templates import answer, question, tool_call
from lib.dialogs.tokenizers import ByteTokenizer
from lib.evaluation.generalization import measure_generalization, request_shares
from lib.evaluation.recall import Recall
from lib.facts.people import FIRST_NAMES, LAST_NAMES, VALUES, FactsConfig, best_constant_guess
from lib.facts.sampling import UNSEEN, load_people, sample_people, unseen_people
from lib.training.run import run

TOKENIZER = ByteTokenizer()


def _config(mode: str = "in-tool", n_people: int = 3, unseen: int = 2, **evaluation) -> RunConfig:
    return RunConfig.parse({
        "mode": mode, "facts": {"n_people": n_people, "seed": 5}, "model": {"d_model": 8},
        "training": {"steps": 2, "batch_size": 4}, "evaluation": {"unseen_people": unseen, "every": None, **evaluation},
    })  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 3))
def test_unseen_people_have_names_of_their_kind_that_nobody_trained_on_has(n_people, n, seed):
    config = FactsConfig(n_people=n_people, seed=seed)
    trained, groups = load_people(config), unseen_people(config, n)
    names = [name for people in groups.values() for name in people.names]
    assert len(set(names) | set(trained.names)) == len(names) + n_people
    firsts, lasts = ({name.split()[part] for name in trained.names} for part in (0, 1))
    for kind, people in groups.items():
        possible = len(FIRST_NAMES["unseen"] if UNSEEN[kind][0] else firsts)
        possible *= len(LAST_NAMES["unseen"] if UNSEEN[kind][1] else lasts)
        assert len(people) == min(n, possible - n_people * (kind == "new_pair"))
        for name in people.names:
            first, last = name.split()
            assert (first not in firsts, last not in lasts) == UNSEEN[kind]
            assert (first in FIRST_NAMES["unseen"], last in LAST_NAMES["unseen"]) == UNSEEN[kind]
        for attribute, column in people.columns.items():
            assert len(column) == len(people) and set(column) <= set(VALUES[attribute])


def test_unseen_people_are_the_same_every_time_and_their_facts_unlike_those_of_others():
    config = FactsConfig(n_people=100, seed=4)
    groups, again = unseen_people(config, 50), unseen_people(config, 50)
    assert groups == again
    dates = {kind: tuple(people.columns["birth_date"]) for kind, people in groups.items()}
    assert len(set(dates.values())) == 4
    assert unseen_people(config, 20)["new_both"] == groups["new_both"][:20]


def test_one_person_alone_has_no_new_pair_of_names_and_is_asked_about_others_all_the_same(tmp_path):
    row = run(_config(n_people=1), tmp_path / "run")
    assert "new_pair_recall" not in row and "new_both_recall" in row


def test_people_of_a_file_have_no_unseen_ones():
    with pytest.raises(InputError, match="they exist for sampled people only"):
        unseen_people(FactsConfig(csv="people.csv"), 3)
    with pytest.raises(InputError, match="unseen_people must be 0 where facts.csv"):
        RunConfig.parse({"facts": {"csv": "people.csv"}, "evaluation": {"unseen_people": 3}})
    with pytest.raises(InputError, match="there are 4,578,012 names"):
        RunConfig.parse({"facts": {"n_people": 4_578_000}, "evaluation": {"unseen_people": 13}})


def _everyone(config: RunConfig) -> list[tuple[str, str, str]]:
    groups = unseen_people(config.facts, config.evaluation.unseen_people)
    return [fact for people in (load_people(config.facts), *groups.values()) for fact in people.facts()]


def test_who_asks_rightly_generalizes_whoever_it_is_about():
    config = _config()
    model = says({
        question(*fact[:2]): [turn(tool_call(*fact[:2]), DATABASE), turn(answer(*fact), END)]
        for fact in _everyone(config)
    })  # fmt: skip
    assert measure_generalization(model, config, TOKENIZER) == {
        f"{kind}_{name}": 1.0
        for kind in ("trained", *UNSEEN)
        for name in ("recall", "well_formed", "right_attribute", "right_name")
    }


def test_who_asks_about_somebody_else_gets_no_credit_for_a_lucky_answer():
    config, other = _config(), load_people(_config().facts).names[0]
    model = says({
        question(*fact[:2]): [turn(tool_call(other, fact[1]), DATABASE), turn(answer(*fact), END)]
        for fact in _everyone(config)
    })  # fmt: skip
    measured = measure_generalization(model, config, TOKENIZER)
    assert measured["new_both_well_formed"] == measured["new_both_right_attribute"] == 1
    assert measured["new_both_right_name"] == measured["new_both_recall"] == 0
    assert measured["trained_recall"] == measured["trained_right_name"] == 0.5  # one of the two who were asked about


def test_a_model_without_a_tool_is_judged_by_what_it_says():
    config = _config("in-weight")
    trained = list(load_people(config.facts).facts())
    knows = {question(*fact[:2]): [turn(answer(*fact), END)] for fact in trained}
    model = says({question(*fact[:2]): [turn("?", END)] for fact in _everyone(config)} | knows)
    measured = measure_generalization(model, config, TOKENIZER)
    assert measured == {"trained_recall": 1.0, **{f"{kind}_recall": 0.0 for kind in UNSEEN}}


def test_request_shares_count_each_thing_for_itself():
    facts = [("Ann Lee", "occupation", "Baker")] * 5
    requests = [
        Request("occupation", "Ann Lee"), Request("birth_date", "Ann Lee"), Request("occupation", "Bob Oak"), None,
        Request("birth_place", "Bob Oak"),
    ]  # fmt: skip
    shares = request_shares(Recall(None, None, 0, requests), facts)
    assert shares == {"well_formed": 0.8, "right_attribute": 0.4, "right_name": 0.4}


def test_the_best_constant_guess_beats_every_constant():
    people = sample_people(200, seed=3)
    values = {a: set(column) for a, column in people.columns.items()}
    best = sum(max(sum(v == value for v in people.columns[a]) for value in values[a]) for a in people.attributes)
    assert best_constant_guess(people) == best / 800
    assert 1 / 7 / 4 < best_constant_guess(people) < 0.1


def test_a_row_tells_of_the_unseen_people_that_were_asked_for(tmp_path):
    row = run(_config(), tmp_path / "asked")
    for kind in ("trained", *UNSEEN):
        assert 0 <= row[f"{kind}_recall"] <= row[f"{kind}_right_name"] <= row[f"{kind}_well_formed"] <= 1
    assert not any("new_" in column for column in run(_config(unseen=0), tmp_path / "not"))
