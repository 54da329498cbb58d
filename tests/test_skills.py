"""What the embedded model learns: right answers, held-out questions, tools that are used rightly, and no facts."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from lib.dialogs import GENERIC, TEMPLATES
from lib.facts import FIRST_NAMES, LAST_NAMES, VALUES
from lib.finetune import skills
from lib.finetune.protocol import SEARCH, SYSTEM_PROMPT, read_query
from lib.finetune.skills import QUESTIONS, SKILLS, conversations, multiple_choice, prompts

N = 3_000


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(conversations(N, seed=0))


@pytest.fixture(scope="module")
def choices() -> list[dict]:
    return multiple_choice(330, seed=0)


def _of(skill: str, n: int = 200) -> list[list[dict]]:
    return [row["messages"] for row in conversations(n, 5, only=skill)]


def _user(row: dict) -> str:
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


# ---- Draws


def test_what_is_drawn_depends_on_the_seed_alone(rows, choices):
    assert list(islice(conversations(10**9, seed=0), 200)) == rows[:200]
    assert list(conversations(200, seed=1)) != rows[:200]
    assert multiple_choice(330, 0) == choices and multiple_choice(30, 0) == choices[:30]
    assert prompts(50, 3) == prompts(60, 3)[:50]
    elsewhere = "import json; from lib.finetune.skills import *; print(json.dumps([*conversations(200, 0)]))"
    for seed in ("1", "2"):  # of what sets are in order of
        environment = os.environ | {"PYTHONHASHSEED": seed}
        made = subprocess.run([sys.executable, "-c", elsewhere], env=environment, capture_output=True, check=True)
        assert json.loads(made.stdout) == rows[:200]


def test_no_question_that_is_trained_on_is_asked(rows, choices):
    trained = {_user(row) for row in rows}
    trained |= {_user(row) for skill in QUESTIONS for row in conversations(1_000, 0, only=skill)}
    asked = {row["ctx"] for row in choices} | {_user(row) for _, row in prompts(500, 0)}
    assert len(trained) > 5_000 and len(asked) > 500
    assert not trained & asked


def test_every_skill_is_asked_about(choices):
    assert Counter(skill for skill, _ in prompts(1_000, 0)).keys() == SKILLS.keys()
    count = Counter(row["skill"] for row in choices)
    assert count.keys() == QUESTIONS.keys() and min(count.values()) >= 10
    assert len({row["ctx"] for row in choices}) == len(choices)
    for row in choices:
        assert len(set(row["endings"])) == 4
    places = Counter(row["label"] for row in choices)
    assert set(places) == {0, 1, 2, 3} and min(places.values()) > 50


def test_a_prompt_ends_with_the_users_question():
    for skill, row in prompts(300, 1):
        *before, last = [message["role"] for message in row["messages"]]
        assert last == "user" and before == (["system"] if skill == "search as text" else [])
        assert ("tools" in row) == (skill in ("search", "functions", "inspection"))


# ---- Answers, computed in another way


def _true_answer(skill: str, question: str) -> str | None:
    """What a rule says, None for a skill without one."""
    if skill == "arithmetic":
        return str(eval(re.search(r"\d+ [+-] \d+", question)[0]))
    symbols = re.findall(r"(?<!\S)\S(?!\S)", question)
    if skill == "sorting":
        return " ".join(sorted(symbols))
    if skill == "reversing":
        return " ".join(reversed(symbols))
    if skill == "counting":
        return str(symbols.count(symbols[0]) - 1)
    if skill == "copying":
        return re.fullmatch(r"(?:Repeat after me|Repeat|Say|Copy this|Echo):? (.*)", question)[1]
    if skill == "instructions":
        words = question.split(": ")[1].split()
        return words[{"first": 0, "second": 1, "last": -1}[re.search("first|second|last", question.split(":")[0])[0]]]
    if skill == "units":
        return str(round(_converted(question)))
    return None


def _converted(question: str) -> float:
    """So many of the larger unit in the smaller one."""
    month = 2_629_800
    size = {
        "second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800, "month": month, "year": 12 * month,
        "decade": 120 * month, "century": 1200 * month, "meter": 1, "centimeter": 0.01, "kilometer": 1000,
        "dozen": 12, "piece": 1, "inch": 1 / 12, "foot": 1, "yard": 3,
    }  # fmt: skip
    singular = {"feet": "foot", "inches": "inch", "centuries": "century"}
    words = [singular.get(word, word.removesuffix("s")) for word in re.findall("[a-z]+", question)]
    large, small = sorted((word for word in words if word in size), key=size.get, reverse=True)
    return int(re.search(r"\d+", question)[0]) * size[large] / size[small]


RULES = ["arithmetic", "sorting", "reversing", "counting", "copying", "instructions", "units"]


@pytest.mark.parametrize("skill", RULES)
def test_answers_follow_the_rules(skill):
    for question, answer in _of(skill):
        assert answer["content"] == _true_answer(skill, question["content"])


def test_one_ending_is_right(choices):
    by_rule = 0
    for row in choices:
        true = _true_answer(row["skill"], row["ctx"])
        if true is not None:
            by_rule += 1
            assert row["endings"].count(true) == 1 and row["endings"][row["label"]] == true
    assert by_rule > 150
    known = {_user(row): row["messages"][1]["content"] for row in conversations(N, 1, only="capitals")}
    of_key = {
        re.search(r"[A-Z]\w+(?= has|\?|\.| is)", q.removeprefix("Name the capital of "))[0]: a for q, a in known.items()
    }
    for row in choices:
        if row["skill"] == "capitals":
            (country,) = [key for key in of_key if key in row["ctx"]]
            assert row["endings"][row["label"]] == of_key[country]


# ---- Tools


@pytest.mark.parametrize("skill", ["search", "functions", "inspection"])
def test_calls_copy_the_question_and_answers_tell_the_result(skill):
    seen = Counter()
    for row in conversations(400, 2, only=skill):
        question, call, result, answer = row["messages"]
        (function,) = [called["function"] for called in call["tool_calls"]]
        (offered,) = [t["function"] for t in row["tools"] if t["function"]["name"] == function["name"]]
        schema = offered["parameters"]
        assert list(function["arguments"]) == schema["required"] == list(schema["properties"])
        for name, value in function["arguments"].items():
            values = schema["properties"][name].get("enum")
            assert values is None or value in values
            if skill != "inspection" or name == "thing":
                assert (value.replace("_", " ") if values else value) in question["content"]
        assert result["content"] in answer["content"]
        assert result["tool_call_id"] == call["tool_calls"][0]["id"] and result["name"] == function["name"]
        seen[function["name"], len(row["tools"])] += 1
        if skill == "search":
            assert function["arguments"] == {"query": question["content"]} and SEARCH in row["tools"]
            assert answer["content"] == result["content"]
    assert len(seen) >= {"search": 2, "functions": 18, "inspection": 1}[skill]


def test_the_textual_protocol_is_that_of_the_experiments():
    for system, question, query, result, answer in _of("search as text"):
        assert system == {"role": "system", "content": SYSTEM_PROMPT}
        assert read_query(query["content"]) == question["content"]
        assert result["content"] == f"<result>{answer['content']}</result>"


# ---- Nothing of the facts


def _all_texts(rows: list[dict]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def test_nothing_of_the_facts_is_told(rows, choices):
    texts = _all_texts([*rows, *choices, *[row for _, row in prompts(500, 0)]])
    words = [re.split(r"[\W\d_]+", text) for text in texts]
    # A text tells a name or a value if it has all its words in a row, wherever it stands.
    said = {" ".join(part[i : i + n]) for part in words for n in (1, 2, 3, 4) for i in range(len(part) - n + 1)}
    names = [name for lists in (FIRST_NAMES, LAST_NAMES) for part in lists.values() for name in part]
    values = [value for key in ("birth_place", "current_address", "occupation") for value in VALUES[key]]
    assert not said.intersection([*names, *values])
    dates = set(VALUES["birth_date"])
    assert not [text for text in texts if dates.intersection(re.findall(r"\d+/\d+/\d+", text))]


def test_no_question_is_one_about_a_person_and_no_function_is_find(rows, choices):
    questions = [_user(row) for row in rows] + [row["ctx"] for row in choices]
    templates = [*TEMPLATES.values(), GENERIC]
    forms = [re.escape(t.question).replace(r"\{name\}", ".+").replace(r"\{attribute\}", ".+") for t in templates]
    assert not [question for question in questions if re.fullmatch("|".join(forms), question)]
    assert not [text for text in _all_texts(rows) if re.search(r'"find"|FIND|birth|occupation|address', text)]


@pytest.mark.parametrize(
    "text", ["Ann is here", "so says a Schneider.", "12/3/1987", "an aerospace engineer", "(Paris)", "x7Kim-8"]
)
def test_what_would_tell_facts_is_recognized(text):
    assert skills.tells_facts(text)


def test_words_that_only_look_like_facts_are_let_pass():
    assert not skills.tells_facts("Annas Parisians, 12/3/19: schneiders")
