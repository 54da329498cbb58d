"""Questions of general knowledge, as TriviaQA has them: the paper's appendix asks whether to know or to look up these.

From the hub comes TriviaQA itself; without it, 211 questions of this repository, or a file of one's own.
"""

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from string import punctuation
from typing import Any, Literal, NamedTuple, get_args

from lib.agent.tools import Closing, connect_read_only
from lib.base import InputError
from lib.finetune.data import ChatMode, call_and_result, check_mode
from lib.finetune.protocol import SEARCH, SYSTEM_PROMPT, write_query, write_result
from lib.paths import DATA, replacing

Split = Literal["train", "validation"]

#: The questions that come with this repository.
SHIPPED = DATA / "trivia.jsonl"
#: What a look-up says of a question that the table does not have.
NO_RESULT = "no result"
_EVERY = 5  # of the questions of a file, every fifth is for validation
_ACCEPTED = 'a line is one question as JSON, {"question": text, "answer": {"value": text, "aliases": [text, ...]}}'


class Question(NamedTuple):
    """A question, the answer to say, and all answers that count, this one too."""

    text: str
    answer: str
    aliases: tuple[str, ...]


# ---- Which answers are right


def normalize(text: str) -> str:
    """`text` as TriviaQA's evaluation compares it: lower case, no punctuation, no English article, single blanks."""
    words = re.sub(f"[{re.escape(punctuation)}‘’´`]", " ", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())


def exact_match(reply: str, question: Question) -> bool:
    """Whether a reply is one of the answers that count, both normalized: nothing may stand around it.

    Where normalization leaves nothing of an answer, as of "A", it counts as it is written, and not whatever is empty.
    """
    said = _left(reply)
    return said != "" and said in map(_left, question.aliases)


def _left(text: str) -> str:
    return normalize(text) or text.strip().lower()


# ---- Where questions come from


def load_questions(
    source: str | Path = "trivia", split: Split | None = None, limit: int | None = None
) -> list[Question]:
    """The first `limit` questions of a split, or of all.

    source: "trivia", the questions that come with this repository; "hub", TriviaQA from the Hugging Face hub, without
    the documents; or a file of JSON lines, each a record as TriviaQA has them, of whose fields only those in
    `Question` are read. Of a file every fifth question is for validation.

    Raises `InputError` if the hub has not got it, or the file cannot be read or holds what is no question.
    """
    if split not in (None, *get_args(Split)):
        raise InputError(f"unknown split {split!r} of questions: there are {', '.join(get_args(Split))}")
    if limit is not None and limit < 1:
        raise InputError(f"limit = {limit}: ask for at least one question")
    if source == "hub":
        records = enumerate(_hub(split), start=1)
    else:
        source = SHIPPED if source == "trivia" else Path(source)
        of_split = {None: range(_EVERY), "train": range(_EVERY - 1), "validation": range(_EVERY - 1, _EVERY)}[split]
        records = ((line, record) for i, (line, record) in enumerate(_lines(source)) if i % _EVERY in of_split)
    questions = [_question(record, source, line) for line, record in islice(records, limit)]
    if not questions:
        raise InputError(f"{source} holds no question{' for ' + split if split else ''}: {_ACCEPTED}")
    return questions


def _hub(split: Split | None) -> Iterable[dict]:
    from datasets import load_dataset

    try:
        return load_dataset("mandarjoshi/trivia_qa", "rc.nocontext", split=split or "+".join(get_args(Split)))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the hub has not got TriviaQA ({error}): give a file, or 'trivia' for the shipped one"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line.decode())
                    except (ValueError, RecursionError):  # `UnicodeError` among them
                        raise InputError(f"{path}, line {number}: not JSON: {_ACCEPTED}") from None
    except OSError as error:
        raise InputError(f"cannot read the questions {path}: {error.strerror}") from None


def _question(record: Any, source: str | Path, line: int) -> Question:
    match record:
        case {"question": str(text), "answer": {"value": str(value), "aliases": [*aliases]}} if (
            text.strip() and value.strip() and all(isinstance(alias, str) for alias in aliases)
        ):
            return Question(text.strip(), value.strip(), tuple(dict.fromkeys([value.strip(), *aliases])))
    raise InputError(f"{source}, line {line}: no question with an answer: {_ACCEPTED}")


# ---- Where answers are looked up


def write_store(questions: Iterable[Question], path: str | Path) -> None:
    """A SQLite database whose table `questions` has each question, normalized, and its answer.

    Of a question that comes twice the first counts. It takes the place of `path` at the end; a path that cannot be
    written is an `InputError`.
    """
    rows = ((normalize(question.text), question.answer) for question in questions)
    try:
        with replacing(Path(path)) as temporary:
            connection = sqlite3.connect(temporary)
            try:
                with connection:
                    connection.execute("CREATE TABLE questions (question TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")
                    connection.executemany("INSERT OR IGNORE INTO questions VALUES (?, ?)", rows)
            finally:
                connection.close()
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"cannot write the questions {path}: {error}") from None


class Store(Closing):
    """Answers questions from what `write_store` wrote, which it only reads; one that is not there gets `NO_RESULT`.

    What is asked never becomes SQL. A file that is missing or no such database is an `InputError`. As SQLite has it,
    it is used by the thread that opened it.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self._connection = connect_read_only(path)
        try:
            self("")
        except InputError:
            self.close()
            raise

    def __call__(self, question: str) -> str:
        query = "SELECT questions.answer FROM questions WHERE questions.question = ?"
        try:
            (answer,) = self._connection.execute(query, (normalize(question),)).fetchone() or (NO_RESULT,)
        except (UnicodeEncodeError, sqlite3.DataError):  # half a surrogate pair, or endless: nobody's question
            return NO_RESULT
        except sqlite3.Error as error:
            raise InputError(f"cannot read questions from the database {self.path}: {error}") from None
        return answer

    def close(self) -> None:
        self._connection.close()


# ---- As conversations


def opening(question: str, mode: ChatMode) -> dict:
    """What a model is given to answer: `messages` and, in-tool, `tools`. An unknown mode is an `InputError`."""
    check_mode(mode)
    system = [{"role": "system", "content": SYSTEM_PROMPT}] if mode == "in-tool-text" else []
    tools = {"tools": [SEARCH]} if mode == "in-tool" else {}
    return {"messages": [*system, {"role": "user", "content": question}], **tools}


def trivia_chats(questions: Iterable[Question], mode: ChatMode) -> Iterator[dict]:
    """A row a question, as `lib.finetune.data.chats` has them for facts: from `opening` to the answer."""
    for text, answer, _ in questions:
        row = opening(text, mode)
        said = {"role": "assistant", "content": answer}
        yield row | {"messages": [*row["messages"], *look_up_turns(text, answer, mode), said]}


def look_up_turns(query: str, result: str, mode: ChatMode) -> list[dict]:
    """What stands between question and answer: the query and its result; in-weight, nothing."""
    if mode == "in-weight":
        return []
    if mode == "in-tool-text":
        return [{"role": "assistant", "content": write_query(query)}, {"role": "user", "content": write_result(result)}]
    return call_and_result({"name": "search", "arguments": {"query": query}}, result)
