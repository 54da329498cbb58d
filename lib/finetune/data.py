"""The facts of Section 5 as conversations for chat models, and which of their tokens are trained.

A conversation is a list of messages as Hugging Face's chat templates know them. In-weight, the assistant answers from
memory. In-tool, it calls `find` of `lib.agent.server`; in-tool-text, for models without tool calls, it writes
the paper's request, FIND ... FOR ..., and reads the answer as the user's next turn.
"""

import itertools
import json
from collections.abc import Iterable, Iterator

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lib.agent.server import Find
from lib.base import InputError
from lib.dialogs.templates import answer, question, tool_call
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people
from lib.finetune.config import ChatMode
from lib.paths import reading
from lib.training.loss import IGNORED

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


def tokenize_chats(chats: Iterable[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Return conversations as `input_ids` and `labels`, a row each, in their order.

    The assistant's words and the special token that ends its turn are trained, as they would be generated; other labels
    are `IGNORED`. No row is truncated: one of more than `max_length` tokens is an `InputError`, and so is a chat
    template that cannot write a message, leaves out part of it, changes it once others follow, or never ends a turn.
    """
    rows = []
    for number, chat in enumerate(chats, start=1):
        with reading(f"conversation {number} in the tokenizer's chat template", TemplateError, TypeError):
            tokens, labels = _encode_chat(chat["messages"], chat.get("tools"), tokenizer)
            if (n := len(tokens)) > max_length:
                raise ValueError(f"it has {n} tokens, more than max_length = {max_length}: raise it")
        rows.append({"input_ids": tokens, "labels": labels})
    return Dataset.from_list(rows)


def trained_parts(chat: dict, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return a conversation as a model reads it, special tokens included, cut into trained and other parts."""
    (row,) = tokenize_chats([chat], tokenizer, max_length=10**9)
    parts = itertools.groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORED)
    return [(tokenizer.decode([token for token, _ in part]), trained) for trained, part in parts]


def _encode_chat(
    messages: list[dict], tools: list[dict] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Return tokens and labels of one conversation. Raises ValueError that says why the template does not fit."""

    def render(n: int, **options):
        return tokenizer.apply_chat_template(messages[:n], tools=tools, return_dict=False, **options)

    tokens, text = render(len(messages), tokenize=True), render(len(messages), tokenize=False)
    special, labels = set(tokenizer.all_special_ids), [IGNORED] * len(tokens)
    for i, message in enumerate(messages):
        written = text
        if message["role"] == "assistant":
            start = render(i, tokenize=True, add_generation_prompt=True)
            turn = render(i + 1, tokenize=True)
            if tokens[: len(turn)] != turn or turn[: len(start)] != start:
                raise ValueError(
                    f"it renders message {i + 1} differently in training and generation: use another template"
                )
            ends = [place for place in range(len(start), len(turn)) if turn[place] in special]
            if not ends:
                raise ValueError(f"no special token ends message {i + 1}, so that a model would never stop")
            spoken = slice(len(start), ends[-1] + 1)
            labels[spoken], written = tokens[spoken], tokenizer.decode(tokens[spoken])
        functions = [call["function"] for call in message.get("tool_calls", ())]
        called = (part for each in functions for part in (each["name"], *each["arguments"].values()))
        for piece in (message["content"], *called):
            if piece not in written and json.dumps(piece, ensure_ascii=False)[1:-1] not in written:
                raise ValueError(f"it leaves out {piece!r}")
            if of_piece := [token for token in tokenizer.all_special_tokens if token in piece]:
                raise ValueError(f"{piece!r} would write the special token {of_piece[0]}")
    return tokens, labels
