"""Greedy answers of Hugging Face chat models, many at a time, and the dialog with a tool between two of them."""

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib.agent.tools import Response, SqlTool
from lib.base import InputError, WorkError
from lib.dialogs.request import format_request, parse_request
from lib.finetune.data import ChatMode, as_user, call_and_result, find_tool, text_and_result
from lib.progress import progress

#: Prompts in the first batch; it doubles with every batch that fits.
FIRST_BATCH = 8
#: A CPU gains nothing from more, and out of memory there kills the process without an error.
LARGEST_BATCH_CPU = 64


def reply_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict]],
    tools: list[dict] | None = None,
    **options,
) -> list[str]:
    """Return what the assistant says next in each conversation, greedily, without special tokens.

    See `generate_tokens` for the options, and for what can go wrong.
    """
    answers = generate_tokens(model, tokenizer, encode_prompts(tokenizer, conversations, tools), **options)
    # Exactly as written: some tokenizers would clean up blanks.
    cleaned = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(answer, **cleaned) for answer in answers]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict]], tools: list[dict] | None = None
) -> list[list[int]]:
    """Return the tokens of each conversation up to where the assistant begins to speak.

    A conversation that the tokenizer's chat template cannot write is an `InputError`.
    """
    options = {"tools": tools, "add_generation_prompt": True, "tokenize": True, "return_dict": False}
    try:
        return [tokenizer.apply_chat_template(list(messages), **options) for messages in conversations]
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(f"a conversation does not fit the tokenizer's chat template: {error}") from None


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    description: str | None = None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, up to and with the token that ends it, in the order of prompts.

    Batches hold prompts of about one length, the longest first, so that what fits these fits all; they grow while
    there is room, and shrink where memory runs out. Answers do not depend on that, except when logits tie within
    rounding. Of the model's generation settings only the end tokens count: a repetition penalty, say, would not be
    greedy. Raises `WorkError` if a single prompt does not fit into memory.
    """
    ends = _ends(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    largest = LARGEST_BATCH_CPU if model.device.type == "cpu" else len(prompts)
    size, done = FIRST_BATCH, 0
    with progress(len(prompts), description) as bar, _plain_generation(model):
        while batch := order[done : done + size]:
            try:
                made = _generate(model, [prompts[i] for i in batch], ends, max_new_tokens)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                made = None
            if made is None:  # outside `except`, so that the error's traceback no longer holds the memory
                if len(batch) == 1:
                    raise WorkError(
                        f"there is no memory for an answer to {len(prompts[batch[0]])} tokens: take a smaller model, "
                        "dtype or max_new_tokens"
                    )
                clear_device_cache(garbage_collection=True)
                size = largest = len(batch) // 2
                continue
            for i, answer in zip(batch, made, strict=True):
                answers[i] = answer
            done += len(batch)
            size = min(2 * size, largest)
            bar.update(len(batch))
    return answers


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a turn: the tokenizer's, and those of the model's generation settings."""
    ids = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not ends:
        raise InputError("the tokenizer has no eos_token, so that no answer would end: set the one that ends a turn")
    return sorted(ends)


@contextmanager
def _plain_generation(model: PreTrainedModel):
    """Set the model's generation settings aside: `generate` takes its defaults from them."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], ends: list[int], max_new_tokens: int
) -> list[list[int]]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts])  # (B, S), left padding
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(
        tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    answers = made[:, width:].tolist()
    stops = [next((i for i, token in enumerate(row, start=1) if token in ends), None) for row in answers]
    return [row[:stop] for row, stop in zip(answers, stops, strict=True)]


# ---- With a tool


def answer_with_tool(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    mode: ChatMode,
    tool: SqlTool,
    *,
    expected: Sequence[str] | None = None,
    **options,
) -> list[tuple[Response | None, str]]:
    """Ask each question, let the tool answer what the model asks of it, and let the model speak again.

    Returns, per question, the tool's response (None if it was not asked) and the model's last reply. In mode in-tool
    the model calls the function of `lib.finetune.data.find_tool`, in in-tool-text it writes the paper's request; one
    call a question. The model alone decides what the tool is asked: nothing here knows the answer. A call that cannot
    be understood gets the tool's error. expected: the right response to each question; if the tool responds otherwise,
    the answer is wrong already, so the second turn is skipped and the call is returned as the reply. options: those of
    `generate_tokens`; `max_new_tokens` holds for each of the two turns.
    """

    def look_up(i: int, said: str) -> tuple[Response, list[dict]] | None:
        call = read_call(said) if mode == "in-tool" else None
        if call is None and (mode == "in-tool" or not parse_request(said)):
            return None
        response = tool(_as_request(call) if call else said)
        if expected is not None and response.text != expected[i]:
            return response, []
        return response, call_and_result(call, response.text) if call else text_and_result(said, response.text)

    tools = {"tools": [find_tool(tool.attributes)]} if mode == "in-tool" else {}
    openings = [{"messages": messages, **tools} for messages in as_user(questions)]
    return look_up_and_reply(model, tokenizer, openings, look_up, **options)


def look_up_and_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: Sequence[dict],
    look_up: Callable[[int, str], tuple[Any, list[dict]] | None],
    **options,
) -> list[tuple[Any, str]]:
    """Return what was looked up for each conversation, None if nothing was, and what the model said last.

    openings: per conversation the `messages` and, where functions are offered, the same `tools`. look_up(i, said):
    from what the model said in conversation i, what is found and the turns until the model speaks again (none: it is
    not asked to); None if it asked for nothing.
    """
    tools = openings[0].get("tools") if openings else None
    first = reply_all(model, tokenizer, [each["messages"] for each in openings], tools, **options)
    answers: list[tuple[Any, str]] = [(None, said) for said in first]
    going_on: dict[int, list[dict]] = {}
    for i, said in enumerate(first):
        if result := look_up(i, said):
            answers[i] = (result[0], said)
            if result[1]:
                going_on[i] = [*openings[i]["messages"], *result[1]]
    replies = reply_all(model, tokenizer, list(going_on.values()), tools, **options)
    for i, reply in zip(going_on, replies, strict=True):
        answers[i] = (answers[i][0], reply)
    return answers


def _as_request(call: dict) -> str:
    """Return a call of `find` in the tool's own language; any other call becomes an empty, malformed request."""
    arguments = call["arguments"]
    if call["name"] != "find" or not all(isinstance(arguments.get(key), str) for key in ("attribute", "name")):
        return ""
    return format_request(arguments["attribute"], arguments["name"])


def read_call(said: str) -> dict | None:
    """Return name and arguments of the first function call in what a model said, None if there is none.

    It is the first JSON object with a name and arguments (or parameters), whatever a model puts around it.
    """
    decoder = json.JSONDecoder()
    for start in (i for i, character in enumerate(said) if character == "{"):
        with suppress(ValueError, RecursionError):  # invalid or unfinished JSON, or half a character
            match decoder.raw_decode(said, start)[0]:
                case {"name": str(name), "arguments": dict(arguments)} | {
                    "name": str(name),
                    "parameters": dict(arguments),
                }:
                    json.dumps([name, arguments], ensure_ascii=False).encode()
                    return {"name": name, "arguments": arguments}
    return None
