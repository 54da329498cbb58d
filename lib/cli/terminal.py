"""`itl chat`: a conversation in a terminal, with commands to see and change the database."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console

from lib.agent.tools import EditableTool
from lib.base import InputError
from lib.facts.database import change_fact
from lib.training.saved import Conversation

HELP = """\
/who                            people to ask about, of whom the last were unseen in training
/who NAME                       what the database says about somebody
/set NAME | ATTRIBUTE | VALUE   change a fact, in a copy of the database that lasts as long as this conversation
/help                           this list
an empty line                   ends the conversation"""


def answer(console: Console, talks: Sequence[Conversation], text: str) -> None:
    """Put a question to each model and print the answers, turn by turn.

    With several models, each is named by its mode.
    """
    for talk in talks:
        if len(talks) > 1:
            console.print(f"-- {talk.config.mode}")
        for role, said in talk.turns(text)[1:]:
            console.print(f"{role}: {said}")


def converse(console: Console, talks: Sequence[Conversation], read: Callable[[], str]) -> None:
    """Answer the lines that `read` gives, questions and commands (see `HELP`), until one is empty.

    Unseen people are added to the copied databases first. A bad command prints one sentence, and the conversation
    continues.
    """
    tools = [talk.tool for talk in talks if isinstance(talk.tool, EditableTool)]
    unseen = next((talk for talk in talks if talk.tool), talks[0]).unseen()
    for tool in tools:
        if tool.attributes == unseen.attributes:
            tool.add(unseen)
    hint = f"Ask about a person, say {talks[0].example!r}."
    console.print(hint, "/help lists commands. An empty line ends the conversation.")
    names = [*talks[0].people.names[:3], *unseen.names]
    while line := read():
        try:
            if line.startswith("/"):
                for told in _obey(line, tools, names):
                    console.print(told)
            else:
                answer(console, talks, line)
        except InputError as error:
            console.print(str(error))


def _obey(line: str, tools: Sequence[EditableTool], names: Sequence[str]) -> Iterable[str]:
    """Run a command and return the lines to print."""
    command, _, rest = line.partition(" ")
    name, parts = rest.strip(), [part.strip() for part in rest.split("|", 2)]
    if command == "/help" and not name:
        return [HELP]
    if command == "/who" and not name:
        return names
    if command != "/who" and (command != "/set" or len(parts) < 3):
        raise InputError(f"{line!r} is not a command: /help lists them")
    if not tools:
        raise InputError("this model is in-weight and asks no database: there is nothing to look up or to change")
    if command == "/set":
        name, attribute, value = parts
        database, *others = (tool.path for tool in tools)
        old = change_fact(database, name, attribute, value, *others)
        return [f"{attribute} of {name}: {old} -> {value}"]
    facts = tools[0].facts(name)
    return [f"{attribute}: {value}" for attribute, value in facts.items()] or ["nobody of that name"]
