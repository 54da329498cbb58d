"""Questions that take several look-ups, one after the other: "Where was the boss of Ann Lee born?" (our Section 7.2).

A chain is the facts that answer a question, in the order in which they are asked for. Each but the last is about the
attribute `LINK`, whose value is the next person. h facts answer a question of h hops.
"""

from collections.abc import Iterator, Sequence

from lib.base import InputError
from lib.dialogs.templates import Dialog, Role, Turn, answer, question, tool_call
from lib.facts.people import LINK, People

PHRASE = f"the {LINK} of "

Fact = tuple[str, str, str]  # name, attribute, value


def chains(people: People, hops: int) -> Iterator[list[Fact]]:
    """Yield the chains of `hops` facts that begin with each of `people` and end with each attribute but `LINK`.

    Raises `InputError` for less than one hop, and if somebody's `LINK` is needed but not among `people`.
    """
    if hops < 1:
        raise InputError(f"hops = {hops}: a question takes one look-up or more")
    rows = {name: i for i, name in enumerate(people.names)}
    bosses = people.columns.get(LINK, [])
    if hops > 1 and not (bosses and rows.keys() >= {*bosses}):
        raise InputError(f"for a question of {hops} hops, the {LINK} of everybody must be among these people")
    for name in people.names:
        links = []
        for _ in range(hops - 1):
            links.append((name, LINK, bosses[rows[name]]))
            name = bosses[rows[name]]
        for attribute in people.attributes:
            if attribute != LINK:
                yield [*links, (name, attribute, people.value(rows[name], attribute))]


def chain_question(chain: Sequence[Fact]) -> str:
    """Return the user's question: `question` for one hop, with `PHRASE` before the name for each further hop."""
    return question(PHRASE * (len(chain) - 1) + chain[0][0], chain[-1][1])


def chain_dialog(chain: Sequence[Fact]) -> Dialog:
    """Return the question, then for each hop a request and the database's answer, then the final answer.

    The final answer is about the last person. For one hop this is `in_tool_dialog`.
    """
    turns = [Turn(Role.USER, chain_question(chain))]
    for name, attribute, value in chain:
        turns += [Turn(Role.ASSISTANT, tool_call(name, attribute)), Turn(Role.DATABASE, value)]
    return [*turns, Turn(Role.ASSISTANT, answer(*chain[-1]))]
