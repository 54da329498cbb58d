"""Questions that take several look-ups, one after the other: "Where was the boss of Ann Lee born?" (our Section 7.2).

A chain is the facts that answer a question, in the order in which they are asked for. Each but the last is about the
attribute `LINK`, whose value is the next person: h facts are a question of h hops.
"""

from collections.abc import Iterator, Sequence

from lib.base import InputError
from lib.dialogs.templates import Dialog, Role, Turn, answer, question, tool_call
from lib.facts.people import LINK, People

PHRASE = f"the {LINK} of "

Fact = tuple[str, str, str]  # name, attribute, value


def chains(people: People, hops: int) -> Iterator[list[Fact]]:
    """Yield the chains of `hops` facts that begin with each of `people` and end with each attribute but `LINK`.

    Without a hop, without links, or if a link leads to nobody of `people`, it is an `InputError`.
    """
    if hops < 1:
        raise InputError(f"hops = {hops}: a question takes one look-up or more")
    if hops > 1 and LINK not in people.attributes:
        raise InputError(f"these people have no {LINK}: a question of {hops} hops needs one")
    rows = {name: i for i, name in enumerate(people.names)}
    for name in people.names:
        links, last = [], name
        for _ in range(hops - 1):
            links.append((last, LINK, people.value(rows[last], LINK)))
            last = links[-1][2]
            if last not in rows:
                raise InputError(f"{last!r}, the {LINK} of {links[-1][0]!r}, is not among these people")
        for attribute in people.attributes:
            if attribute != LINK:
                yield [*links, (last, attribute, people.value(rows[last], attribute))]


def chain_question(chain: Sequence[Fact]) -> str:
    """Return the user's question: of one hop it is `question`; each hop more puts `PHRASE` before the name."""
    return question(PHRASE * (len(chain) - 1) + chain[0][0], chain[-1][1])


def chain_dialog(chain: Sequence[Fact]) -> Dialog:
    """Return question, request and database's answer for each hop, and the answer, about the last person by name.

    Of one hop it is `in_tool_dialog`.
    """
    turns = [Turn(Role.USER, chain_question(chain))]
    for name, attribute, value in chain:
        turns += [Turn(Role.ASSISTANT, tool_call(name, attribute)), Turn(Role.DATABASE, value)]
    return [*turns, Turn(Role.ASSISTANT, answer(*chain[-1]))]
