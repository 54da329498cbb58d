"""Recall of people that a served chat model may look up, asked in the paper's words and in ten paraphrases."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import NamedTuple

import pandas as pd
import yaml

from lib.agent.server import Find
from lib.agent.tools import Outcome, SqlTool
from lib.base import InputError, WorkError, check_known
from lib.dialogs.request import format_request, parse_request
from lib.dialogs.templates import GENERIC, TEMPLATES, fill, tool_call
from lib.experiments.summaries import interval_of_share
from lib.facts import database
from lib.facts.people import comparable
from lib.finetune.config import ChatMode
from lib.finetune.conversations import look_up_turns, opening, read_call
from lib.finetune.endpoint import EndpointConfig, ask_all
from lib.finetune.triviaqa import compared
from lib.paths import DATA

PAPER = "paper"
#: Phrasing -> attribute -> question; `other` is for columns that the paper does not have.
PHRASINGS = {PAPER: {name: template.question for name, template in TEMPLATES.items()} | {"other": GENERIC.question}}
PHRASINGS |= yaml.safe_load((DATA / "paraphrases.yaml").read_text(encoding="utf-8"))
#: Errors of the connection, the address or the key, not of one question.
_ALL_FAIL = ("APIConnectionError", "AuthenticationError", "PermissionDeniedError", "NotFoundError")


class Verdict(StrEnum):
    """What became of a question. If no query found the fact, the model's last query decides."""

    RIGHT = "right"
    NO_CALL = "no call"
    WRONG_ATTRIBUTE = "wrong attribute"  # the name may be wrong, too
    WRONG_NAME = "wrong name"
    MALFORMED = "malformed call"  # another function, other arguments, or a call in the text of the answer
    IGNORED = "answer ignored"  # the fact was found, but the answer lacks it, or there is none
    WRONG = "wrong answer"  # closed-book
    SERVER_ERROR = "server error"


class PersonQuestion(NamedTuple):
    """A question about a fact, in one of `PHRASINGS`."""

    name: str
    attribute: str
    value: str
    phrasing: str

    @property
    def text(self) -> str:
        """The question in its phrasing. Raises `InputError` for an unknown phrasing."""
        check_known("phrasing", self.phrasing, PHRASINGS)
        questions = PHRASINGS[self.phrasing]
        return fill(questions.get(self.attribute, questions["other"]), self.name, self.attribute)


def sample_questions(tool: SqlTool, n_facts: int, seed: int, phrasings: Sequence[str]) -> list[PersonQuestion]:
    """Return questions about `n_facts` facts of a database, or all if it has fewer, each in every phrasing.

    Every cell with text is equally likely. Raises `InputError` if there is none.
    """
    columns = ", ".join(f"people.{database.quoted(column)}" for column in ("name", *tool.attributes))
    drawn, n_seen, random = [], 0, Random(seed)
    with database.refusing("read people from", tool.path):
        tool.connection.time_budget = database.WHOLE_TABLE
        for name, *values in tool.connection.execute(f"SELECT {columns} FROM people ORDER BY people.name"):
            for attribute, value in zip(tool.attributes, values, strict=True):
                if isinstance(name, str) and not isinstance(value, bytes | None):
                    n_seen += 1  # reservoir sampling, for there may be millions
                    place = len(drawn) if n_seen <= n_facts else random.randrange(n_seen)
                    if place < n_facts:
                        drawn[place : place + 1] = [(name, attribute, str(value))]
    if not drawn:
        raise InputError("the database has no fact to ask about: at least one person with an attribute is expected")
    return [PersonQuestion(*fact, each) for fact in drawn for each in phrasings]


class PeopleTask(Find):
    """A task of `ask_all`: a chat model asks a database of people. A query has the keys `attribute` and `name`."""

    def __init__(self, tool: SqlTool):
        super().__init__(tool.attributes)
        self.tool, self.NO_RESULT = tool, self.sentences[Outcome.MALFORMED]
        self.prompt = (
            "Answer questions about people in a few words. You cannot know the answers: first ask the database, by "
            f"writing three lines such as\n{format_request(tool.attributes[0], 'Ada Stone')}\nThe attribute is one of "
            f"{', '.join(tool.attributes)}. The next message is what the database says: repeat it."
        )

    def opening(self, text: str, mode: ChatMode) -> dict:
        return opening(text, mode, self.declaration, self.prompt)

    def read_query(self, said: str, mode: ChatMode) -> dict | None:
        _, fence, rest = said.partition("```sql\n")  # text after the request may be invented
        line, end, _ = rest.partition("\n```")
        request = parse_request(fence + line + end) if mode == "in-tool-text" else None
        return request and request._asdict()

    def look_up_turns(self, query: dict, result: str, _) -> list[dict]:
        return look_up_turns("in-tool-text", None, tool_call(**query), result)

    def look_up(self, query: dict) -> str:
        outcome, text = self.tool.find_spelled(**query)
        return self.sentences.get(outcome, text)

    def grade(self, record: dict, asked: PersonQuestion) -> dict:
        """Return whether a record is `correct`, its `outcome` (a `Verdict`), and what was asked."""
        outcome = _verdict(record, asked)
        return {"correct": outcome == Verdict.RIGHT, "outcome": outcome.value, **asked._asdict()}


async def ask_people(questions: Sequence[PersonQuestion], endpoint: EndpointConfig, tool: SqlTool, out: Path) -> list:
    """Return the records of `ask_all`. Raises `WorkError` if the first question shows that all others would fail."""
    people = PeopleTask(tool)
    (first,) = await ask_all(questions[:1], endpoint, people.look_up, out, task=people)
    if (first["error"] or "").startswith(_ALL_FAIL):
        raise WorkError(f"the server {endpoint.base_url} did not answer the first question: {first['error']}")
    return await ask_all(questions, endpoint, people.look_up, out, endpoint.protocol, people)


def contains(answer: str, value: str) -> bool:
    """Return whether a value's words occur in an answer, next to each other, both normalized by `compared`."""
    return f" {compared(value)} " in f" {compared(answer)} "


def _verdict(record: dict, asked: PersonQuestion) -> Verdict:
    """Right: the answer `contains` the value and, with a tool, a query for this attribute and name found it."""
    calls, answer = record.get("calls", [])[:], record["answer"]  # only of a list: a dict there is damage
    if record["error"] is not None:
        return Verdict.SERVER_ERROR
    said = answer is not None and contains(answer, asked.value)
    if record["protocol"] == "closed-book":
        return Verdict.RIGHT if said else Verdict.WRONG
    wanted = asked.attribute, comparable(asked.name), asked.value  # the tool accepts other spellings of a name, too
    found = [(query["attribute"], comparable(query["name"]), result) for query, result in calls if query]
    if wanted in found:
        return Verdict.RIGHT if said else Verdict.IGNORED
    if not calls:
        return Verdict.MALFORMED if "```sql" in answer or read_call(answer[:10_000]) else Verdict.NO_CALL
    if (query := calls[-1][0]) is None:
        return Verdict.MALFORMED
    return Verdict.WRONG_ATTRIBUTE if query["attribute"] != asked.attribute else Verdict.WRONG_NAME


def recall_by_phrasing(records: Sequence[dict]) -> pd.DataFrame:
    """Return a row for each protocol and phrasing: counts of each `Verdict`, `recall`, `low`, `high` and `n_questions`.

    Recall is over `n_questions`, those without a server error; `low` and `high` are Wilson's 95% interval.
    """
    by = ["protocol", "phrasing"]
    table = pd.DataFrame(records, columns=[*by, "outcome"])  # pandas does not accept every answer
    table = table.groupby([*by, "outcome"], sort=False).size().unstack(fill_value=0)
    table = table.reindex(columns=list(map(str, Verdict)), fill_value=0)
    n = table.drop(columns=Verdict.SERVER_ERROR).sum(axis=1)
    low, high = interval_of_share(table[Verdict.RIGHT], n)
    return table.assign(recall=table[Verdict.RIGHT] / n, low=low, high=high, n_questions=n).reset_index()
