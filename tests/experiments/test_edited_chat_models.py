"""Section 7.1 on tiny chat models that know their facts by heart, or look them up."""

from pathlib import Path

import pytest
from chat_models import teach, tokenizer

from lib.agent.tools import ForgivingTool, SqlTool
from lib.dialogs.templates import answer
from lib.experiments import edited_chat_models
from lib.experiments.edited_chat_models import ChatModel
from lib.facts.database import temporary_database
from lib.facts.people import People
from lib.facts.sampling import sample_people
from lib.finetune.config import FinetuneConfig


def taught(folder: Path, mode: str, n_people: int, steps: int) -> ChatModel:
    """A model as fine-tuning leaves it."""
    teach(n_people, mode, steps).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = FinetuneConfig(base=str(folder), mode=mode, n_facts=4 * n_people, capability="trivia", items=4)
    return ChatModel(folder, config, "smoke")


@pytest.fixture(scope="module")
def in_weight(tmp_path_factory) -> ChatModel:
    return taught(tmp_path_factory.mktemp("in_weight"), "in-weight", 2, 80)


@pytest.fixture(scope="module")
def in_tool(tmp_path_factory) -> ChatModel:
    return taught(tmp_path_factory.mktemp("in_tool"), "in-tool-text", 1, 130)


def other(base: ChatModel) -> list:
    """All facts with values that the model was not taught."""
    return [(*fact[:2], value) for fact, value in zip(base.facts, base.other_values(base.facts), strict=True)]


def test_memory_is_of_the_value_that_was_taught(in_weight):
    assert in_weight.recall(in_weight.model, in_weight.facts) == 1
    known, other_values = in_weight.memory(in_weight.model, in_weight.facts), other(in_weight)
    assert known["memory"] == 1 and 0.5 <= known["guess"] < 1
    assert in_weight.memory(in_weight.model, other_values)["memory"] == 0


def test_an_edit_changes_the_facts_that_it_trains_in_copies_alone(in_weight, monkeypatch):
    monkeypatch.setattr(edited_chat_models, "RATE", 10)  # of the default rate, which is for large models
    monkeypatch.setattr(in_weight, "max_steps", 60)
    changed, others = other(in_weight)[:1], in_weight.facts[1:]
    rows = [row for _, row in in_weight.trained(("alone", "among"), changed, others)]
    assert [(row["method"], row["adaptation"]) for row in rows] == [
        (method, adaptation) for method in ("alone", "among") for adaptation in ("full", "lora")
    ]
    assert all(row["done"] and row["recall_edited"] == 1 for row in rows)
    assert all(row["recall_others"] == 1 for row in rows if row["method"] == "among")
    assert all(-1 <= row["capability_change"] <= 1 for row in rows)
    assert in_weight.recall(in_weight.model, in_weight.facts) == 1


def test_gradient_ascent_ends_when_nothing_is_recalled(in_weight, monkeypatch):
    monkeypatch.setattr(edited_chat_models, "RATE", 10)
    monkeypatch.setattr(in_weight, "max_steps", 60)
    for model, row in in_weight.trained(("alone", "among"), in_weight.facts[:1], in_weight.facts[1:], forget=True):
        assert row["done"] and in_weight.recall(model, in_weight.facts[:1]) == 0


def test_what_is_looked_up_and_said_comes_from_the_tool(in_tool):
    with temporary_database(in_tool.people) as path, SqlTool(path) as tool:
        assert in_tool.recall(in_tool.model, in_tool.facts, tool) == 1
        assert in_tool.ask(in_tool.facts, tool) == [(answer(*fact), fact[2]) for fact in in_tool.facts]
        assert in_tool.ask(in_tool.facts, ForgivingTool(tool, 0)) == in_tool.ask(in_tool.facts, tool)
    moved = People(in_tool.people.names, in_tool.people.columns | {"birth_place": ["Atlantis"]})
    with temporary_database(moved) as path, SqlTool(path) as tool:
        said = in_tool.ask(in_tool.facts, tool)
    assert [found for _, found in said] == [value for *_, value in moved.facts()]
    assert {(answer(*fact), fact[2]) for fact in in_tool.facts if fact[1] != "birth_place"} < {*said}
    with temporary_database(sample_people(2)[1:]) as path, SqlTool(path) as tool:  # somebody else
        assert [found for _, found in in_tool.ask(in_tool.facts, tool)] == [None] * 4


def test_belief_counts_answers_word_for_word(in_tool, monkeypatch):
    right = in_tool.belief(in_tool.model, in_tool.facts, [fact[2] for fact in in_tool.facts])
    assert right == {"follows": 1, "remembers": 1}  # the result is the fact
    told = other(in_tool)
    said = [answer(*told[0]), answer(*told[1]), answer(*in_tool.facts[2]), "something else"]
    monkeypatch.setattr(edited_chat_models, "reply_all", lambda *_, **__: said)
    wrong = in_tool.belief(in_tool.model, in_tool.facts, [value for *_, value in told])
    assert wrong == {"follows": 0.5, "remembers": 0.25}
