"""Conversations as tokens, and which of these are trained."""

import itertools
import json
from collections.abc import Iterable

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lib.paths import reading
from lib.training.loss import IGNORED


def tokenize_chats(chats: Iterable[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Return conversations as `input_ids` and `labels`, a row each, in their order.

    The assistant's words and the special token that ends its turn are trained, as they would be generated; other labels
    are `IGNORED`. No row is truncated: one of more than `max_length` tokens is an `InputError`, and so is a chat
    template that cannot write a message, leaves out part of it, changes it once others follow, or never ends a turn.
    """
    # Not `all_special_ids`, which lacks Gemma's end of a turn.
    rows, special = [], {i: each.content for i, each in tokenizer.added_tokens_decoder.items() if each.special}
    for number, chat in enumerate(chats, start=1):
        with reading(f"conversation {number} in the tokenizer's chat template", TemplateError, TypeError):
            tokens, labels = _encode_chat(chat["messages"], chat.get("tools"), tokenizer, special)
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
    messages: list[dict], tools: list[dict] | None, tokenizer: PreTrainedTokenizerBase, special: dict[int, str]
) -> tuple[list[int], list[int]]:
    """Return tokens and labels of one conversation. Raises ValueError that says why the template does not fit."""

    def render(n: int, **options):
        return tokenizer.apply_chat_template(messages[:n], tools=tools, return_dict=False, **options)

    tokens, text = render(len(messages), tokenize=True), render(len(messages), tokenize=False)
    labels = [IGNORED] * len(tokens)
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
            if of_piece := [token for token in special.values() if token in piece]:
                raise ValueError(f"{piece!r} would write the special token {of_piece[0]}")
    return tokens, labels
