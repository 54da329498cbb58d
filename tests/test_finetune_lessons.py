"""What models are to learn, how it is measured, and what else a checkpoint is asked. No hub is asked."""

import json

import pytest
from chat_models import random_model, tokenizer

from lib.base import InputError
from lib.dialogs import question
from lib.facts import FactsConfig, unseen_people
from lib.finetune import examination, lessons
from lib.finetune.config import FinetuneConfig
from lib.finetune.data import people_of
from lib.finetune.evaluation import estimate
from lib.finetune.examination import Examination
from lib.finetune.generation import ToolAnswer
from lib.finetune.lessons import FREQUENCIES, KNOWN_FROM, Lesson, lesson
from lib.finetune.prompts import PROMPTS
from lib.finetune.triviaqa import load_questions
from lib.tools import Outcome, Request, Response, format_request


@pytest.fixture
def asked(monkeypatch) -> list:
    """Notes the facts of every measurement of recall, and whether the database knows them."""
    noted = []

    def measure(model, tokenizer, facts, mode, tool):
        known = tool is None or all(tool(format_request(a, name)).text == value for name, a, value in facts)
        noted.append((facts, known))
        return estimate([0.0, 1.0])

    monkeypatch.setattr(lessons, "measure_recall", measure)
    return noted


@pytest.mark.parametrize("mode", ["in-weight", "in-tool", "in-tool-text"])
def test_a_lesson_on_facts_asks_a_fixed_sample_and_people_of_every_kind(mode, asked, tmp_path):
    config = FinetuneConfig(mode=mode, n_facts=800, seed=3, questions=300, unseen_people=8)
    with lesson(config, tmp_path) as taught:
        columns = [taught.measure(None, None) for _ in range(2)]
    (trained, known), (unseen, also_known), again, _ = asked
    assert len(taught.conversations) == 800 and known and also_known
    assert trained == again[0] and len(set(trained)) == 300 and set(trained) < set(people_of(800, 3).facts())
    kinds = unseen_people(config_of_people(config), 8)
    of_kind = [sum(name in people.names for name, *_ in unseen) for people in kinds.values()]
    assert of_kind == [8, 8, 8, 8]  # two people of each, four facts each
    assert columns[0]["n_recall"] == 300 and columns[0]["n_unseen"] == 32 and columns[0]["recall"] == 0.5


def config_of_people(config: FinetuneConfig) -> FactsConfig:
    return FactsConfig(n_people=config.n_facts // 4, seed=config.seed)


def test_in_a_hybrid_lesson_frequent_facts_are_answered_and_rare_ones_looked_up(tmp_path):
    config = FinetuneConfig(task="hybrid", mode="in-tool", n_facts=56, unseen_people=4)
    with lesson(config, tmp_path) as taught:
        pass
    assert all(chat["tools"] for chat in taught.conversations)  # the tool is offered in all of them
    people = people_of(56)
    for i, name in enumerate(people.names):
        of_person = [chat for chat in taught.conversations if name in chat["messages"][0]["content"]]
        frequency = FREQUENCIES[i % len(FREQUENCIES)]
        assert len(of_person) == 4 * frequency
        looked_up = [any("tool_calls" in message for message in chat["messages"]) for chat in of_person]
        assert all(looked_up) if frequency < KNOWN_FROM else not any(looked_up)


def test_a_hybrid_is_right_by_a_call_only_if_it_found_the_value(monkeypatch, tmp_path):
    """A made-up model: it knows the frequent, calls for the others, and of strangers with the wrong name."""
    config = FinetuneConfig(task="hybrid", mode="in-tool", n_facts=56, unseen_people=4)
    trained = dict(zip(people_of(56).names, FREQUENCIES * 2, strict=True))
    value_of = {}

    def answer(model, tokenizer, questions, mode, tool, **_):
        answers = []
        for text in questions:
            name, attribute, value = value_of[text]
            if trained.get(name, 0) >= KNOWN_FROM:
                answers.append(ToolAnswer(None, None, f"It is {value}."))
            elif name in trained:
                request = Request(attribute, name)
                answers.append(ToolAnswer(request, tool(format_request(*request)), f"It is {value}."))
            else:  # the right words after the wrong look-up
                answers.append(ToolAnswer(None, Response(Outcome.NO_MATCH, "ERROR"), f"It is {value}."))
        return answers

    monkeypatch.setattr(lessons, "answer_with_tool", answer)
    people = [people_of(56), *unseen_people(config_of_people(config), 4).values()]
    value_of |= {question(n, a): (n, a, v) for group in people for n, a, v in group.facts()}
    with lesson(config, tmp_path) as taught:
        columns = taught.measure(None, None)
    table = {row["frequency"]: row for row in columns["by_frequency"]}
    assert list(table) == [0, *FREQUENCIES]
    assert table[0]["accuracy"] == 0 and table[0]["call_share"] == 1 and columns["recall_unseen"] == 0
    assert all(table[f]["call_share"] == (f < KNOWN_FROM) for f in FREQUENCIES)
    assert columns["recall"] == 1 and table[1]["accuracy_of_calls"] == 1 and table[64]["accuracy_of_calls"] is None


def test_a_lesson_on_trivia_asks_what_was_trained_and_what_was_not(monkeypatch):
    trained, others = load_questions(split="train", limit=10), load_questions(split="validation", limit=5)
    first, *rest = trained[:4]
    known = {first.text: f"the {first.answer.upper()}!"} | {each.text: each.answer for each in (*rest, others[0])}
    asked = []

    def reply_all(model, tokenizer, conversations, **_):
        asked.append([message["content"] for (message,) in conversations])
        return [known.get(text, "nothing") for text in asked[-1]]

    monkeypatch.setattr(lessons, "reply_all", reply_all)
    with lesson(FinetuneConfig(task="trivia", n_facts=10, questions=5), None) as taught:
        columns = taught.measure(None, None)
    said = [[message["content"] for message in chat["messages"]] for chat in taught.conversations]
    assert said == [[each.text, each.answer] for each in trained]
    assert asked == [[each.text for each in trained[:5]], [each.text for each in others]]
    assert (columns["recall"], columns["recall_unseen"], columns["n_unseen"]) == (0.8, 0.2, 5)


def test_facts_that_are_no_people_are_refused():
    with pytest.raises(InputError, match="multiple"), lesson(FinetuneConfig(n_facts=7), None):
        pass


# ---- What else is asked


def test_what_was_measured_before_a_stop_is_not_measured_again(monkeypatch, tmp_path):
    made = []
    taught = Lesson([], lambda *_: made.append("recall") or {"recall": 0.5})
    exam = Examination(FinetuneConfig(base="a folder", prompts=3), taught, tokenizer())
    monkeypatch.setattr(examination, "load_base", lambda *_: (random_model(0), tokenizer()))
    monkeypatch.setattr(examination, "base_source", lambda name: name)
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))
    monkeypatch.setattr(examination, "measure_capability", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exam(random_model(0), tmp_path / "parts")
    monkeypatch.setattr(examination, "measure_capability", lambda *_: made.append("capability") or estimate([0.0, 1.0]))
    columns = exam(random_model(1), tmp_path / "parts")
    assert made == ["recall", "capability"] and columns["capability_task"] == "hellaswag"
    assert columns["recall"] == 0.5 and columns["tv"] > 0 and columns["kl"] > 0
    assert exam(None, tmp_path / "parts") == columns == json.loads(json.dumps(columns))
    assert exam.prompts == [prompts[0] for prompts in PROMPTS.values()][:3]  # a category after the other


def test_the_embedded_model_is_asked_about_its_own_skills():
    exam = Examination(FinetuneConfig(base="embedded-smoke", prompts=20), Lesson([], None), tokenizer())
    assert exam.capability == "skills" and len(set(exam.prompts)) == 20
    assert not set(exam.prompts) & {prompt for prompts in PROMPTS.values() for prompt in prompts}
