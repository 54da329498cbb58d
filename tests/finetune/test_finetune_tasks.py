"""What models are to learn, how it is measured, and what else a checkpoint is asked. No hub is asked."""

import json
import re
from collections.abc import Callable
from hashlib import sha256

import pytest
import torch
from chat_models import ScriptedModel, random_model, tokenizer

from lib.dialogs.request import format_request
from lib.facts.people import FactsConfig
from lib.facts.sampling import unseen_people
from lib.finetune import capability, evaluation, tasks
from lib.finetune.config import FinetuneConfig
from lib.finetune.conversations import as_user, people_of
from lib.finetune.evaluation import PROMPTS, Evaluator
from lib.finetune.tasks import FREQUENCIES, KNOWN_FROM, Task, make_task
from lib.finetune.triviaqa import load_questions


@pytest.fixture
def asked(monkeypatch) -> list:
    """Notes the facts of every measurement of recall, and whether the database knows them."""
    noted = []

    def measure(model, tokenizer, facts, mode, tool, **_):
        known = all(tool(format_request(a, name)).text == value for name, a, value in facts)
        noted.append((facts, known))
        return [(mode != "in-weight", recalled) for recalled in (False, True)]

    monkeypatch.setattr(tasks, "measure_recall", measure)
    return noted


@pytest.mark.parametrize("mode", ["in-weight", "in-tool", "in-tool-text"])
def test_a_task_of_facts_asks_a_fixed_sample_and_unseen_people_of_every_kind(mode, asked):
    config = FinetuneConfig(base="random", mode=mode, n_facts=800, seed=3, questions=300, unseen_people=8)
    with make_task(config) as taught:
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


def hybrid(mode: str) -> FinetuneConfig:
    return FinetuneConfig(base="random", task="hybrid", mode=mode, n_facts=56, unseen_people=4)


@pytest.mark.parametrize("mode", ["in-tool", "in-tool-text"])
def test_in_a_hybrid_task_frequent_facts_are_answered_and_rare_ones_looked_up(mode):
    with make_task(hybrid(mode)) as taught:
        pass
    assert len({json.dumps(chat.get("tools")) for chat in taught.conversations}) == 1  # in all of them, or in none
    assert ("tools" in taught.conversations[0]) == (mode == "in-tool")
    people = people_of(56)
    for i, name in enumerate(people.names):
        of_person = [chat for chat in taught.conversations if name in chat["messages"][0]["content"]]
        frequency = FREQUENCIES[i % len(FREQUENCIES)]
        assert len(of_person) == 4 * frequency
        looked_up = [len(chat["messages"]) == 4 for chat in of_person]
        assert all(looked_up) if frequency < KNOWN_FROM else not any(looked_up)


@pytest.mark.parametrize("mode", ["in-tool", "in-tool-text"])
def test_a_hybrid_is_measured_by_frequency(mode, monkeypatch):
    """A made-up model: it knows frequent facts, calls for the others, and calls with a wrong name for unseen people."""
    config = hybrid(mode)
    trained = dict(zip(people_of(56).names, FREQUENCIES * 2, strict=True))

    def measure(model, tokenizer, facts, mode, tool, **_):
        return [(trained.get(name, 0) < KNOWN_FROM, name in trained) for name, *_ in facts]

    monkeypatch.setattr(tasks, "measure_recall", measure)
    with make_task(config) as taught:
        columns = taught.measure(None, None)
    table = {row["frequency"]: row for row in columns["by_frequency"]}
    assert list(table) == [0, *FREQUENCIES]
    assert table[0]["accuracy"] == 0 and table[0]["call_share"] == 1 and columns["recall_unseen"] == 0
    assert all(table[f]["call_share"] == (f < KNOWN_FROM) for f in FREQUENCIES)
    assert columns["recall"] == 1 and table[1]["accuracy_of_calls"] == 1 and table[64]["accuracy_of_calls"] is None


def trivia(reply, mode: str) -> tuple[Task, dict]:
    """A task of ten questions, and what is measured of a model that replies to turns, each a role and a text."""

    def to_turns(prompt: str) -> str:
        return reply(re.findall(r"<\|start\|>(\w+)\n(.*?)<\|end\|>", prompt, re.DOTALL))

    with make_task(FinetuneConfig(base="random", task="trivia", mode=mode, n_facts=10, questions=5)) as taught:
        return taught, taught.measure(ScriptedModel(to_turns), tokenizer(), max_new_tokens=128)


TRAINED, OTHERS = load_questions(split="train", limit=10), load_questions(split="validation", limit=5)


def test_a_task_of_trivia_asks_what_was_trained_and_what_was_not():
    first, *rest = TRAINED[:4]
    known = {first.text: f"the {first.answer.upper()}!"} | {each.text: each.answer for each in (*rest, OTHERS[0])}
    asked = []
    taught, columns = trivia(lambda turns: asked.append(turns[-1][1]) or known.get(asked[-1], "nothing"), "in-weight")
    said = [[message["content"] for message in chat["messages"]] for chat in taught.conversations]
    assert said == [[each.text, each.answer] for each in TRAINED]
    assert sorted(asked) == sorted(each.text for each in (*TRAINED[:5], *OTHERS))
    assert (columns["recall"], columns["recall_unseen"], columns["n_unseen"]) == (0.8, 0.2, 5)


@pytest.mark.parametrize("mode", ["in-tool", "in-tool-text"])
def test_in_tool_trivia_counts_if_it_was_looked_up_and_found(mode):
    answers = {each.text: each.answer for each in (*TRAINED, *OTHERS)}

    def by_heart(turns) -> str:
        return next(answers[text] for _, text in turns if text in answers)

    def asking(query: str, then) -> Callable:
        """Asks, of "" what it is asked itself, and then answers."""

        def reply(turns) -> str:
            if (text := turns[-1][1]) not in answers:
                return then(turns)
            if mode == "in-tool-text":
                return f"<query>{query or text}</query>"
            return json.dumps({"name": "search", "arguments": {"query": query or text}})

        return reply

    def repeat(turns) -> str:
        return turns[-1][1].removeprefix("<result>").removesuffix("</result>")

    taught, columns = trivia(asking("", repeat), mode)
    assert columns["recall"] == columns["recall_unseen"] == 1  # the table has the others as well
    assert {len(chat["messages"]) for chat in taught.conversations} == {4 + (mode == "in-tool-text")}
    for model in (by_heart, asking("What else?", by_heart)):  # right, but not by what was found
        _, columns = trivia(model, mode)
        assert columns["recall"] == columns["recall_unseen"] == 0


# ---- What else is asked


@pytest.fixture
def made(monkeypatch, tmp_path) -> list[str]:
    """Notes what is measured, of a model and of its base, which is another."""
    noted, base = [], random_model(0)
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("lib.finetune.evaluation.PROMPT_TOKENS", 8)
    monkeypatch.setattr(evaluation, "base_source", lambda name: name)
    monkeypatch.setattr(evaluation, "load_model", lambda *_: base)

    def measure(model, tokenizer, task, n_items, description):
        noted.append("the base's capability" if model is base else "capability")
        return {"acc": [0.0, 1.0], "acc_norm": [1.0, 1.0]}

    monkeypatch.setattr(evaluation, "measure_capability", measure)
    return noted


def evaluating(made: list[str], **config) -> Evaluator:
    taught = Task([], lambda *_, **__: made.append("recall") or {"recall": 0.5})
    config = FinetuneConfig(base="a folder", prompts=3, **config)
    return Evaluator(config, taught.measure, tokenizer(), torch.device("cpu"), torch.float32)


def at_end(recall: float) -> bool:
    return True


def test_a_base_is_asked_once_for_all_checkpoints_and_runs(made, monkeypatch):
    evaluate, model, prompts, encode = evaluating(made), random_model(1), [], evaluation.encode_prompts
    monkeypatch.setattr(evaluation, "encode_prompts", lambda _, chats: prompts.extend(chats) or encode(_, chats))
    columns = evaluate(model, "hellaswag", at_end)
    assert made == ["recall", "the base's capability", "capability"]
    assert columns["capability_task"] == "hellaswag" and columns["n_capability"] == 2
    assert (columns["capability"], columns["capability_change"], columns["capability_norm"]) == (0.5, 0, 1)
    assert columns["recall"] == 0.5 and columns["tv"] > 0 and columns["kl"] > 0
    assert columns == json.loads(json.dumps(columns))
    assert prompts == as_user([of_category[0] for of_category in PROMPTS.values()][:3])  # a category after the other
    made.clear()
    monkeypatch.setattr(evaluation, "generate_tokens", lambda *_, **__: pytest.fail("the base is asked again"))
    assert evaluating(made)(model, "hellaswag", at_end) == columns and made == ["recall", "capability"]


def test_a_base_is_asked_anew_where_its_prompts_read_otherwise(made, monkeypatch):
    asked, generate, encode = [], evaluation.generate_tokens, evaluation.encode_prompts
    monkeypatch.setattr(evaluation, "generate_tokens", lambda *a, **how: asked.append(a[2]) or generate(*a, **how))
    for more in ([], [5]):
        monkeypatch.setattr(evaluation, "encode_prompts", lambda *given: [more + row for row in encode(*given)])  # noqa: B023
        evaluating(made)(random_model(1), None, at_end)
    assert len(asked) == 2


def test_a_run_may_take_the_test_at_its_ends_only(made):
    evaluate = evaluating(made, capability_at_end=True)
    asked = [evaluate(random_model(1), "trivia", lambda recall, last=i: last and recall == 0.5) for i in (0, 1)]
    assert [columns["capability"] for columns in asked] == [None, 0.5]
    assert [columns["capability_task"] for columns in asked] == ["trivia", "trivia"]
    assert made == ["recall", "recall", "the base's capability", "capability"]
    assert evaluate(random_model(1), None, at_end)["capability"] is None


@pytest.mark.parametrize(
    ("given", "answers", "test"),
    [("any", True, "hellaswag"), ("any", False, "trivia"), ("hellaswag", False, "hellaswag"), ("none", True, None)],
)
def test_the_test_is_the_one_that_is_asked_for_or_at_hand(monkeypatch, given, answers, test):
    def dataset_info(*_, **__):
        if not answers:
            raise ConnectionError

    monkeypatch.delenv("ITL_HELLASWAG", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    assert capability.choose_test(given) == test


def test_the_base_is_asked_anew_where_the_items_are_others(made, monkeypatch, tmp_path):
    for text in ("one item", "another"):
        (tmp_path / "items").write_text(text)
        monkeypatch.setenv("ITL_HELLASWAG", str(tmp_path / "items"))
        columns = evaluating(made)(random_model(1), "hellaswag", at_end)
        assert columns["capability_source"] == f"file {sha256(text.encode()).hexdigest()[:8]}"
    assert made.count("the base's capability") == 2
    monkeypatch.setenv("ITL_HELLASWAG", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        evaluating(made)(random_model(1), "hellaswag", at_end)
