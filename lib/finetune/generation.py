"""Greedy answers of Hugging Face chat models, many at a time, and the dialog with a tool between two of them."""

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib.agent.tools import Response, SqlTool
from lib.base import InputError, WorkError
from lib.dialogs.request import Request, format_request, parse_request
from lib.finetune.data import ChatMode, call_and_result, find_tool
from lib.progress import progress

Conversation = Sequence[dict]

#: How many are answered at first where nobody says; with every batch that fits, twice as many.
FIRST_BATCH = 8
#: A CPU gains nothing from more, and who takes too much memory there is killed rather than told.
LARGEST_BATCH_CPU = 64


def reply_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    tools: list[dict] | None = None,
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    description: str | None = None,
) -> list[str]:
    """What the assistant says next in each conversation, greedily, without special tokens.

    See `generate_tokens` for the options, and for what can go wrong.
    """
    prompts = encode_prompts(tokenizer, conversations, tools)
    answers = generate_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, description=description
    )
    return _texts(tokenizer, answers)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], tools: list[dict] | None = None
) -> list[list[int]]:
    """Tokens of each conversation up to where the assistant begins to speak.

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
    batch_size: int | None = None,
    description: str | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to and with the token that ends it, in the order of the prompts.

    Batches are of prompts of about one length, the longest first, so that what fits these fits all; they grow while
    there is room, to `batch_size` if given, and shrink where memory runs out. Answers do not depend on that, but for
    logits that are equal within rounding. Of the model's settings for generation only the ends are heeded: a
    penalty for repetition, say, would not be greedy. Raises `WorkError` if a single prompt does not fit into memory.
    """
    ends = _ends(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    largest = batch_size or (LARGEST_BATCH_CPU if model.device.type == "cpu" else len(prompts))
    size, done = min(FIRST_BATCH, largest), 0
    with progress(len(prompts), description) as bar, _plain_generation(model):
        while batch := order[done : done + size]:
            try:
                made = _generate(model, [prompts[i] for i in batch], ends, max_new_tokens)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                made = None
            if made is None:  # out here the error is gone, and with it what it held of the memory
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
    """The tokens that end a turn: the tokenizer's, and those that the model's settings add."""
    ids = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not ends:
        raise InputError("the tokenizer has no eos_token, so that no answer would end: set the one that ends a turn")
    return sorted(ends)


@contextmanager
def _plain_generation(model: PreTrainedModel):
    """Without the model's own settings for generation: what is not said to `generate` is taken from them."""
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


def _texts(tokenizer: PreTrainedTokenizerBase, answers: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
    """As they were written: some tokenizers would clean up blanks."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(answer, **options) for answer in answers]


# ---- With a tool


class ToolAnswer(NamedTuple):
    """How a question was answered: `response` is the tool's, None if it was not asked; `reply` what was said last."""

    request: Request | None  # None also if the tool was asked for something else than one attribute of one person
    response: Response | None
    reply: str


def answer_with_tool(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    mode: ChatMode,
    tool: SqlTool,
    *,
    expected: Sequence[str] | None = None,
    **options,
) -> list[ToolAnswer]:
    """Ask each question; what the model then asks of the tool, the tool answers, and the model speaks again.

    In mode in-tool the model calls the function of `lib.finetune.data.find_tool`, in in-tool-text it writes the paper's
    request. One call a question. What the tool is asked, and what is read from it, is the model's doing alone: nothing
    here knows the answer. A call that cannot be understood gets the tool's error. expected: of each question what the
    tool has to say for the answer to be right; where it says something else, the model is not asked for a reply, and
    its `reply` is the call. `options` are those of `generate_tokens`; `max_new_tokens` are for each of the two turns.
    """

    def look_up(i: int, said: str, call: dict | None) -> tuple[ToolAnswer, list[dict]] | None:
        if mode == "in-tool":
            turn = _as_request(call) if call else None
        else:
            turn = said if parse_request(said) else None
        if turn is None:
            return None
        response = tool(turn)
        found = ToolAnswer(parse_request(turn), response, said)
        return found, _exchange(call, said, response.text) if expected is None or response.text == expected[i] else []

    tools = {"tools": [find_tool(tool.attributes)]} if mode == "in-tool" else {}
    openings = [{"messages": [{"role": "user", "content": question}], **tools} for question in questions]
    answers = look_up_and_reply(model, tokenizer, openings, look_up, **options)
    return [(found or ToolAnswer(None, None, reply))._replace(reply=reply) for found, reply in answers]


def look_up_and_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: Sequence[dict],
    look_up: Callable[[int, str, dict | None], tuple[Any, list[dict]] | None],
    *,
    description: str | None = None,
    **options,
) -> list[tuple[Any, str]]:
    """What was looked up for each conversation, None if nothing was, and what the model said last.

    openings: of each the `messages` and, where functions are offered, the same `tools`. look_up(i, said, call): from
    what the model said in conversation i, and the function that it called, if any, what is found and the turns until
    the model speaks again (none: it is not asked to); None if nothing was asked for.
    """
    tools = openings[0].get("tools") if openings else None
    prompts = encode_prompts(tokenizer, [each["messages"] for each in openings], tools)
    first = generate_tokens(model, tokenizer, prompts, description=description and f"{description}, calls", **options)
    answers: list[tuple[Any, str]] = [(None, said) for said in _texts(tokenizer, first)]
    going_on: dict[int, list[dict]] = {}
    for i, (_, said) in enumerate(answers):
        call = read_call(tokenizer, prompts[i], first[i]) if tools else None
        if result := look_up(i, said, call):
            answers[i] = (result[0], said)
            if result[1]:
                going_on[i] = [*openings[i]["messages"], *result[1]]
    replies = reply_all(model, tokenizer, list(going_on.values()), tools, description=description, **options)
    for i, reply in zip(going_on, replies, strict=True):
        answers[i] = (answers[i][0], reply)
    return answers


def _exchange(call: dict | None, said: str, result: str) -> list[dict]:
    """What stands between question and answer, as in training: what the model said, and what the tool did."""
    if call is not None:
        return call_and_result(call, result)
    return [{"role": "assistant", "content": said}, {"role": "user", "content": result}]


def _as_request(call: dict) -> str:
    """A call of `find` in the tool's own language; what is no such call becomes what is no request."""
    arguments = call["arguments"]
    if call["name"] != "find" or not all(isinstance(arguments.get(key), str) for key in ("attribute", "name")):
        return ""
    return format_request(arguments["attribute"], arguments["name"])


def read_call(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]) -> dict | None:
    """Name and arguments of the first function call in what a model said, None if there is none.

    By the tokenizer's own rules where it has them; else it is the first JSON object with a name and arguments (or
    parameters), which is the common form, whatever a model puts around it.
    """
    if getattr(tokenizer, "response_template", None) is not None:
        with suppress(ValueError, RecursionError):  # a call that was not finished, or is no JSON
            message = tokenizer.parse_response(answer, prefix=prompt) or {}
            return next(filter(None, (_as_call(call.get("function")) for call in message.get("tool_calls", []))), None)
        return None
    (text,) = _texts(tokenizer, [answer], skip_special_tokens=False)
    decoder = json.JSONDecoder()
    for start in (i for i, character in enumerate(text) if character == "{"):
        with suppress(ValueError, RecursionError):
            if call := _as_call(decoder.raw_decode(text, start)[0]):
                return call
    return None


def _as_call(value) -> dict | None:
    match value:
        case {"name": str(name), "arguments": dict(arguments)} | {"name": str(name), "parameters": dict(arguments)}:
            with suppress(UnicodeEncodeError):  # JSON can hold half a character, a tokenizer cannot
                json.dumps([name, arguments], ensure_ascii=False).encode()
                return {"name": name, "arguments": arguments}
    return None
