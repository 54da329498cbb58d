"""Questions of general knowledge: which answers count, where questions come from, the table, the conversations."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.finetune.triviaqa import (
    NO_RESULT,
    SEARCH,
    SHIPPED,
    SYSTEM_PROMPT,
    Question,
    Store,
    exact_match,
    load_questions,
    normalize,
    read_query,
    trivia_chats,
)

CLIFF = Question("Who hung from the clock?", "The Safety Man", ("The Safety Man", "Harold Lloyd", "H. Lloyd (actor)"))


def record(question="Why?", value="Because", aliases=("Because", "So")) -> dict:
    """In TriviaQA's form, with the fields that nothing here reads."""
    answer = {"value": value, "aliases": list(aliases), "normalized_value": "because", "type": "WikipediaEntity"}
    return {"question": question, "question_id": "tc_1", "entity_pages": {"title": []}, "answer": answer}


def write(path: Path, *records) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in records))
    return path


# ---- Which answers are right


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("The Seine", "seine"),
        ("  An   apple a day ", "apple day"),
        ("Theatre of the Absurd", "theatre of absurd"),
        ("Moby-Dick; or, The Whale", "moby dick or whale"),
        ("rock'n'roll ‘n’ more´s`", "rock n roll n more s"),
        ("U.S.A", "u s"),  # as TriviaQA has it: a lone A is an article
        ("Röntgen\tRay\n", "röntgen ray"),
        ("", ""),
    ],
)
def test_answers_are_normalized_as_triviaqa_does(text, normalized):
    assert normalize(text) == normalized


@given(st.text())
def test_what_is_normalized_has_nothing_left_to_normalize(text):
    once = normalize(text)
    assert normalize(once) == once == " ".join(once.split())
    assert not set(once.split()) & {"a", "an", "the"}


@pytest.mark.parametrize("reply", ["safety man", "The Safety-Man!", "Harold Lloyd.", "h lloyd actor", "a harold lloyd"])
def test_any_alias_counts(reply):
    assert exact_match(reply, CLIFF)


@pytest.mark.parametrize("reply", ["", "Lloyd", "It was Harold Lloyd", "Harold  Lloyds", "safetyman", "no result"])
def test_nothing_else_counts(reply):
    assert not exact_match(reply, CLIFF)


@pytest.mark.parametrize("reply, right", [("A", True), (" a ", True), ("", False), ("The", False), ("...", False)])
def test_an_answer_of_which_normalization_leaves_nothing_is_not_met_by_silence(reply, right):
    assert exact_match(reply, Question("Which vitamin is retinol?", "A", ("A", ""))) is right


# ---- Where questions come from


def test_the_shipped_questions_are_sound():
    questions = load_questions()
    assert len(questions) >= 200 and len({normalize(question.text) for question in questions}) == len(questions)
    for question in questions:
        assert question.text.endswith("?") and exact_match(question.answer, question)
        assert all(normalize(alias) for alias in question.aliases), question
        assert len(set(question.aliases)) == len(question.aliases)
    ids = [json.loads(line)["question_id"] for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    assert len(set(ids)) == len(questions)


@pytest.mark.parametrize("limit", [None, 1, 7, 10_000])
def test_the_splits_of_a_file_part_its_questions_four_to_one(limit):
    everything = load_questions()
    train, validation = load_questions(split="train"), load_questions(split="validation")
    assert sorted(train + validation) == sorted(everything) and not set(train) & set(validation)
    assert len(validation) == len(everything) // 5
    for split, whole in ((None, everything), ("train", train), ("validation", validation)):
        assert load_questions(split=split, limit=limit) == whole[:limit]


def test_a_record_is_read_in_triviaqas_own_form(tmp_path):
    file = write(
        tmp_path / "q.jsonl", record(" Why? ", "Because", ["So", "Because", "So"]), "", record("Who?", "I", [])
    )
    assert load_questions(file) == load_questions(str(file)) == [
        Question("Why?", "Because", ("Because", "So")),
        Question("Who?", "I", ("I",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1, 2]",
        '{"question": "Why?", "answer": "So"}',
        json.dumps(record(question="  ")),
        json.dumps(record(aliases=["So", 1])),
        json.dumps(record() | {"answer": {"value": "So", "aliases": "So"}}),
        "[" * 100_000,
    ],
    ids=str.__len__,
)
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    file = write(tmp_path / "q.jsonl", record(), "", line)
    with pytest.raises(InputError, match=r"q\.jsonl: line 3: no question with an answer: a line is one"):
        load_questions(file)


def test_what_holds_no_questions_is_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    for source, message in {
        tmp_path / "none.jsonl": "cannot read the questions .*none.jsonl: .*No such file",
        tmp_path: "cannot read the questions .*: it is no file",
        write(tmp_path / "empty.jsonl", "", " "): "empty.jsonl: there is no question: a line is one",
        tmp_path / "latin.jsonl": "latin.jsonl: line 1: no question",
    }.items():
        with pytest.raises(InputError, match=message):
            load_questions(source)
    one = write(tmp_path / "one.jsonl", record())
    with pytest.raises(InputError, match="there is no question for validation"):
        load_questions(one, split="validation")


def test_the_hub_is_asked_for_triviaqa_without_documents(tmp_path, monkeypatch):
    # `datasets` takes a folder of this name in the current one for the data set of the hub.
    folder = tmp_path / "mandarjoshi" / "trivia_qa" / "rc.nocontext"
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(3)), ("validation", range(3, 5))):
        Dataset.from_list([record(f"Why {i}?") for i in numbers]).to_parquet(folder / f"{split}-0.parquet")
    files = [{"split": split, "path": f"rc.nocontext/{split}-*"} for split in ("train", "validation")]
    card = {"configs": [{"config_name": "rc.nocontext", "data_files": files}]}
    (folder.parent / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def asked(**options):
        return [question.text for question in load_questions("hub", **options)]

    assert asked(split="train", limit=2) == ["Why 0?", "Why 1?"]
    assert asked(split="validation") == ["Why 3?", "Why 4?"] and len(asked()) == 5
    assert load_questions("hub", limit=1) == [Question("Why 0?", "Because", ("Because", "So"))]


def test_without_the_hub_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(InputError, match="cannot read the questions hub: "):
        load_questions("hub")


# ---- The table


TABLE = Store([*load_questions(limit=20), CLIFF, CLIFF._replace(answer="Nobody")])


def test_the_table_answers_the_questions_it_has_however_they_are_written():
    for question in load_questions(limit=20):
        assert TABLE(question.text) == TABLE(f" {question.text.upper().rstrip('?')}!") == question.answer
    assert TABLE(CLIFF.text) == "The Safety Man"  # the first of two
    assert {TABLE(other.text) for other in load_questions()[20:]} == {NO_RESULT}


@given(st.text())
def test_other_words_find_nothing(words):
    known = {normalize(question.text) for question in [*load_questions(limit=20), CLIFF]}
    assert (TABLE(words) == NO_RESULT) == (normalize(words) not in known)


# ---- Conversations


def test_conversations_lead_from_the_question_by_the_protocol_to_the_answer():
    user, last = {"role": "user", "content": CLIFF.text}, {"role": "assistant", "content": "The Safety Man"}
    assert list(trivia_chats([CLIFF], "in-weight")) == [{"messages": [user, last]}]

    (row,) = trivia_chats([CLIFF], "in-tool")
    first, call, result, final = row["messages"]
    assert (first, final, row["tools"]) == (user, last, [SEARCH])
    (called,) = call["tool_calls"]
    assert called["function"] == {"name": "search", "arguments": {"query": CLIFF.text}}
    assert (result["role"], result["tool_call_id"], result["content"]) == ("tool", called["id"], "The Safety Man")

    (row,) = trivia_chats([CLIFF], "in-tool-text")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    system, first, request, result, final = (message["content"] for message in row["messages"])
    assert (system, first, final) == (SYSTEM_PROMPT, CLIFF.text, "The Safety Man")
    assert read_query(request, "in-tool-text") == CLIFF.text and result == "<result>The Safety Man</result>"
