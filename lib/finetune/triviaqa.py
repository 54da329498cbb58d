"""General-knowledge questions, answered from memory or looked up, as in the paper's appendix on TriviaQA."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from string import punctuation
from typing import Literal, NamedTuple, get_args

from lib.agent.server import function_schema
from lib.finetune import conversations
from lib.finetune.config import ChatMode
from lib.paths import DATA, read_bytes, reading

Split = Literal["train", "validation"]

#: The questions that come with this repository.
SHIPPED = DATA / "trivia.jsonl"
#: The result of a question that the table does not have.
NO_RESULT = "no result"
_EVERY = 5  # of the questions of a file, every fifth is for validation
_ACCEPTED = 'a line is one question as JSON, {"question": text, "answer": {"value": text, "aliases": [text, ...]}}'
#: The system prompt of the textual protocol, as in the paper's appendix.
SYSTEM_PROMPT = (
    "Answer the user's question in a few words. You cannot know the answer: first look it up by writing "
    "<query>the question</query>, wait for <result>...</result>, then say the result."
)
#: The function that a model may call.
SEARCH = function_schema(
    "search", "Look up the answer to a question.", {"query": {"type": "string", "description": "The question."}}
)


class Question(NamedTuple):
    """A question, the answer to say, and all answers that count, this one included."""

    text: str
    answer: str
    aliases: tuple[str, ...]


def normalize(text: str) -> str:
    """Return `text` as TriviaQA's evaluation compares it: lower case, no punctuation, no article, single spaces."""
    words = re.sub(f"[{re.escape(punctuation)}‘’´`]", " ", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())


def compared(text: str) -> str:
    """Return `text` normalized or, if that leaves nothing (of "A", say), in lower case."""
    return normalize(text) or text.strip().lower()


def exact_match(reply: str, question: Question) -> bool:
    """Return whether a reply and an answer that counts are equal after `compared`; an empty reply is never right."""
    return compared(reply) != "" and compared(reply) in map(compared, question.aliases)


def grade(record: dict, question: Question) -> dict:
    """Return whether a record of `lib.finetune.endpoint` is `correct`."""
    return {"correct": exact_match(record["answer"] or "", question)}


def load_questions(
    source: str | Path = "trivia", split: Split | None = None, limit: int | None = None
) -> list[Question]:
    """Return the first `limit` questions of a split, or of all.

    source: "trivia", the questions that come with this repository; "hub", TriviaQA from the Hugging Face hub, without
    the documents; or a file of JSON lines, each a record as TriviaQA has them, of which every fifth is for validation.
    Raises `InputError` if the hub lacks TriviaQA, or the file cannot be read or holds a line that is no question.
    """
    with reading(f"the questions {source}", RuntimeError):
        if source == "hub":
            from datasets import load_dataset

            name = split or "+".join(get_args(Split))
            records = enumerate(load_dataset("mandarjoshi/trivia_qa", "rc.nocontext", split=name), start=1)
        else:
            content = read_bytes(SHIPPED if source == "trivia" else source)
            lines = [(n, line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]
            of_split = {None: range(_EVERY), "train": range(_EVERY - 1), "validation": [_EVERY - 1]}[split]
            records = (line for i, line in enumerate(lines) if i % _EVERY in of_split)
        questions = [_question(*record) for record in islice(records, limit)]
        if not questions:
            raise ValueError(f"there is no question{' for ' + split if split else ''}: {_ACCEPTED}")
    return questions


def _question(number: int, record: dict | bytes) -> Question:
    """Return the question in a record, or in a line that holds one as JSON."""
    with suppress(ValueError, RecursionError):  # no JSON, or no UTF-8
        match json.loads(record) if isinstance(record, bytes) else record:
            case {"question": str(text), "answer": {"value": str(value), "aliases": [*aliases]}} if (
                text.strip() and value.strip() and all(isinstance(alias, str) for alias in aliases)
            ):
                return Question(text.strip(), value.strip(), tuple(dict.fromkeys([value.strip(), *aliases])))
    raise ValueError(f"line {number}: no question with an answer: {_ACCEPTED}")


class Store:
    """A table of questions, normalized, and their answers. If a question occurs twice, the first counts."""

    def __init__(self, questions: Iterable[Question]):
        self.answers = {normalize(text): answer for text, answer, _ in reversed([*questions])}

    def __call__(self, question: str) -> str:
        """Return the answer, or `NO_RESULT` for a question that the table does not have."""
        return self.answers.get(normalize(question), NO_RESULT)


def opening(question: str, mode: ChatMode) -> dict:
    """Return a model's input: `messages` and, in-tool, `tools`."""
    return conversations.opening(question, mode, SEARCH, SYSTEM_PROMPT)


def trivia_chats(questions: Iterable[Question], mode: ChatMode) -> Iterator[dict]:
    """Yield one row per question, as `conversations.chats` does for facts: from `opening` to the answer."""
    for text, answer, _ in questions:
        yield conversations.answered(opening(text, mode), look_up_turns(text, answer, mode), answer)


def look_up_turns(query: str, result: str, mode: ChatMode) -> list[dict]:
    """Return the turns between question and answer: the query and its result; in-weight, none."""
    call = {"name": "search", "arguments": {"query": query}}
    result = result if mode == "in-tool" else f"<result>{result}</result>"
    return conversations.look_up_turns(mode, call, f"<query>{query}</query>", result)


def read_query(said: str, mode: ChatMode) -> str | None:
    """Return the question of the first query in what a model said, None if there is none."""
    if mode == "in-tool":
        return query_of_call(conversations.read_call(said))
    query, end, _ = said.partition("<query>")[2].partition("</query>")
    return query.strip() if end and mode == "in-tool-text" else None


def query_of_call(call: dict | None) -> str | None:
    """Return the question in a call of `SEARCH`, {"name", "arguments"}; None for any other call."""
    match call:
        case {"name": "search", "arguments": {"query": str(query)}}:
            return query
    return None
