"""The facts of Section 5 as conversations for chat models.

A conversation is a list of messages as Hugging Face's chat templates know them. In-weight, the assistant answers from
memory. In-tool, it calls `find` of `lib.agent.server`; in-tool-text, for models without tool calls, it writes
the paper's request, FIND ... FOR ..., and reads the answer as the user's next turn.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress

from lib.agent.server import Find
from lib.base import InputError
from lib.dialogs.templates import answer, question, tool_call
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people
from lib.finetune.config import ChatMode

#: The id of a call, which its result refers to. Some templates insist on nine letters and digits.
CALL_ID = "find00000"


def people_of(n_facts: int, seed: int = 0) -> People:
    """Return people with `n_facts` facts in total; a number that is no multiple of four is an `InputError`."""
    n_people, rest = divmod(n_facts, len(ATTRIBUTES))
    if rest:
        raise InputError(f"n_facts = {n_facts}: people have {len(ATTRIBUTES)} facts each, so give a multiple of that")
    return sample_people(n_people, seed)


def chats(people: People, mode: ChatMode) -> Iterator[dict]:
    """Yield one row per fact, person by person: `messages` and, in-tool, `tools`."""
    find = Find(people.attributes)
    for name, attribute, value in people.facts():
        turns = found_turns(mode, name, attribute, value)
        start = opening(question(name, attribute), mode, find.declaration)
        yield answered(start, turns, answer(name, attribute, value))


def opening(text: str, mode: ChatMode, function: dict, instructions: str = "") -> dict:
    """Return a model's input: `messages` (in-tool-text: `instructions` on the tool first) and, in-tool, `tools`."""
    system = [{"role": "system", "content": instructions}] if instructions and mode == "in-tool-text" else []
    return {"messages": [*system, *as_user([text])[0]]} | ({"tools": [function]} if mode == "in-tool" else {})


def answered(start: dict, turns: list[dict], text: str) -> dict:
    """Return an `opening` with the turns that follow it and the answer."""
    return start | {"messages": [*start["messages"], *turns, {"role": "assistant", "content": text}]}


def as_user(texts: Iterable[str]) -> list[list[dict]]:
    """Return conversations of one message each, the user's."""
    return [[{"role": "user", "content": text}] for text in texts]


def look_up_turns(mode: ChatMode, call: dict | None, request: str, result: str) -> list[dict]:
    """Return the turns between question and answer: a function call (`name`, `arguments`) or a request as text.

    In text, the user speaks for the tool, as not every template has its role. In-weight, there are no such turns.
    """
    if mode == "in-tool":
        calls = [{"id": CALL_ID, "type": "function", "function": call}]
        said = {"role": "tool", "tool_call_id": CALL_ID, "name": call["name"], "content": result}
        return [{"role": "assistant", "content": "", "tool_calls": calls}, said]
    turns = [{"role": "assistant", "content": request}, {"role": "user", "content": result}]
    return turns if mode == "in-tool-text" else []


def found_turns(mode: ChatMode, name: str, attribute: str, result: str) -> list[dict]:
    """Return the `look_up_turns` of a right request for a fact, which the database answers with `result`."""
    call = {"name": "find", "arguments": {"attribute": attribute, "name": name}}
    return look_up_turns(mode, call, tool_call(name, attribute), result)


def read_call(said: str) -> dict | None:
    """Return the first JSON object with a `name` and `arguments` (or parameters) in what a model said, if any."""
    decoder = json.JSONDecoder()
    for start in (i for i, character in enumerate(said) if character == "{"):
        with suppress(ValueError, RecursionError):  # invalid or unfinished JSON, or a lone surrogate
            match decoder.raw_decode(said, start)[0]:
                case {"name": str(name), "arguments": dict(given)} | {"name": str(name), "parameters": dict(given)}:
                    json.dumps([name, given], ensure_ascii=False).encode()
                    return {"name": name, "arguments": given}
    return None
