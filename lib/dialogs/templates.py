"""Facts as dialogs (Section 3 of the paper).

A dialog is a list of turns. In-weight, the assistant answers from memory; in-tool, it writes a request, the
database answers, and it repeats the answer. The model is trained to produce what the assistant says and the
token that follows it, nothing else.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Literal, NamedTuple, get_args

from lib.base import check_known
from lib.dialogs.request import format_request
from lib.facts.people import People

#: How a model answers questions: from memory, or by a tool of `lib.agent.tools.TOOLS`.
QuestionMode = Literal["in-weight", "in-tool"]
Mode = Literal[QuestionMode, "biography"]


class Role(StrEnum):
    """The speaker of a turn."""

    USER = "user"
    ASSISTANT = "assistant"
    DATABASE = "database"


class Turn(NamedTuple):
    """One turn of a dialog."""

    role: Role
    text: str


Dialog = list[Turn]


class Template(NamedTuple):
    """Question and answer about one attribute."""

    question: str
    answer: str


#: The paper's four attributes (Appendix on data). Any other attribute gets `GENERIC`.
TEMPLATES = {
    "birth_date": Template("When was {name} born?", "{name} was born on {value}."),
    "birth_place": Template("Where was {name} born?", "{name} was born in {value}."),
    "occupation": Template("What is {name}'s occupation?", "{name} works as an {value}."),
    "current_address": Template("Where does {name} live?", "{name} lives at {value}."),
}
GENERIC = Template("What is the {attribute} of {name}?", "The {attribute} of {name} is {value}.")
PREAMBLE = "To answer this question I will make a request to the database:"


def fill(template: str, name: str, attribute: str, value: str = "") -> str:
    """Fill a template in one pass, so that braces in a name or a value stay what they are."""
    return template.format(name=name, attribute=attribute.replace("_", " "), value=value)


def question(name: str, attribute: str) -> str:
    """Return the user's question about one attribute of one person."""
    return fill(TEMPLATES.get(attribute, GENERIC).question, name, attribute)


def answer(name: str, attribute: str, value: str) -> str:
    """Return the sentence that answers `question`."""
    return fill(TEMPLATES.get(attribute, GENERIC).answer, name, attribute, value)


def tool_call(name: str, attribute: str) -> str:
    """Return the assistant's turn that asks the database for one attribute of one person."""
    return f"{PREAMBLE}\n{format_request(attribute, name)}"


def in_weight_dialog(name: str, attribute: str, value: str) -> Dialog:
    """Return question and answer: the fact must come from the weights."""
    return [Turn(Role.USER, question(name, attribute)), Turn(Role.ASSISTANT, answer(name, attribute, value))]


def in_tool_dialog(name: str, attribute: str, value: str) -> Dialog:
    """Return question, request to the database, its answer, and the final answer."""
    return [
        Turn(Role.USER, question(name, attribute)),
        Turn(Role.ASSISTANT, tool_call(name, attribute)),
        Turn(Role.DATABASE, value),
        Turn(Role.ASSISTANT, answer(name, attribute, value)),
    ]


def biography(name: str, values: dict[str, str]) -> Dialog:
    """Return everything about one person in one turn: `values` maps attribute to value."""
    sentences = (answer(name, attribute, value) for attribute, value in values.items())
    return [Turn(Role.ASSISTANT, " ".join(sentences))]


_RENDER = {"in-weight": in_weight_dialog, "in-tool": in_tool_dialog}


def dialogs(people: People, mode: Mode) -> Iterator[Dialog]:
    """Yield the dialogs of `people`: one per fact, person by person, or one per person if `mode` is "biography".

    An unknown mode is an `InputError`.
    """
    if mode == "biography":
        for name, *values in people.rows():
            yield biography(name, dict(zip(people.attributes, values, strict=True)))
    elif mode in _RENDER:
        for fact in people.facts():
            yield _RENDER[mode](*fact)
    else:
        check_known("mode", mode, get_args(Mode), " of dialogs")
