"""Greedy answers of Hugging Face chat models, in batches, and tool calls between two answers."""

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib.agent.server import Find
from lib.agent.tools import Response, SqlTool
from lib.dialogs.request import parse_request
from lib.finetune.data import ChatMode, call_and_result, opening, text_and_result
from lib.progress import progress

#: Prompts in a batch; fewer where memory runs out, except on a CPU, where that kills the process without an error.
BATCH = {"cpu": 64, "cuda": 512}


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
    """Return the tokens of each conversation up to where the assistant begins to speak."""
    options = {"tools": tools, "add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [tokenizer.apply_chat_template(list(messages), **options) for messages in conversations]


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    description: str | None = None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, up to and with the token that ends it, in the order of prompts.

    Batches hold prompts of similar length, the longest first, so that a size that fits them fits all. Batches shrink
    if memory runs out. Answers do not depend on that, except when logits tie within rounding. Of the model's generation
    settings only the end tokens count: a repetition penalty, say, would not be greedy.
    """
    ends = _ends(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: dict[int, list[int]] = {}
    size = BATCH.get(model.device.type, 64)
    with progress(len(prompts), description) as bar, _plain_generation(model):
        while batch := order[len(answers) : len(answers) + size]:
            try:
                made = _generate(model, [prompts[i] for i in batch], ends, max_new_tokens)
                answers.update(zip(batch, made, strict=True))
                bar.update(len(batch))
                continue
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)  # now the error's traceback no longer holds the memory
            size = len(batch) // 2
    return [answers[i] for i in range(len(prompts))]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a turn: the tokenizer's, and those of the model's generation settings."""
    ids = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None})


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
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True, padding_value=ends[0], padding_side="left")  # (B, S)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    made = model.generate(
        tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    answers = made[:, tokens.shape[1] :].tolist()
    stops = [next((i for i, token in enumerate(row, start=1) if token in ends), None) for row in answers]
    return [row[:stop] for row, stop in zip(answers, stops, strict=True)]


# ---- With a tool


def answer_with_tool(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    mode: ChatMode,
    tool: SqlTool | None,
    *,
    values: Sequence[str] | None = None,
    **options,
) -> list[tuple[Response | None, str]]:
    """Ask each question, let the tool answer what the model asks of it, and let the model speak again.

    Returns, per question, the tool's response (None if it was not asked) and the model's last reply. In mode in-tool
    the model calls the function `find`, in in-tool-text it writes the paper's request, one call a question; in-weight
    there is no tool. The model alone decides what the tool is asked: nothing here knows the answer. A call that cannot
    be understood gets the tool's error. values: what the tool should find; if it finds something else, the answer is
    wrong already, and the model does not speak again. options: those of `generate_tokens`; `max_new_tokens` holds for
    each turn.
    """
    find = Find(tool.attributes if tool else ())

    def look_up(i: int, said: str) -> tuple[Response, list[dict]] | None:
        if mode == "in-tool" and (call := read_call(said)):
            query = find.query_of_call(call)
            response = tool.find(**query) if query else tool("")
            turns = call_and_result(call, response.text)
        elif mode == "in-tool-text" and parse_request(said):
            response = tool(said)
            turns = text_and_result(said, response.text)
        else:
            return None
        return response, turns if values is None or response.text == values[i] else []

    openings = [opening(text, mode, find.declaration) for text in questions]
    return look_up_and_reply(model, tokenizer, openings, look_up, **options)


def look_up_and_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: Sequence[dict],
    look_up: Callable[[int, str], tuple[Any, list[dict]] | None],
    **options,
) -> list[tuple[Any, str]]:
    """Return what was looked up for each conversation, None if nothing was, and what the model said last.

    openings: per conversation the `messages` and, where functions are offered, the same `tools`. look_up(i, said)
    returns, for what the model said in conversation i, the result and the turns to add before it speaks again (none: it
    does not); None if it asked for nothing.
    """
    tools = openings[0].get("tools") if openings else None
    first = reply_all(model, tokenizer, [each["messages"] for each in openings], tools, **options)
    looked_up = {i: result for i, said in enumerate(first) if (result := look_up(i, said))}
    longer = {i: [*openings[i]["messages"], *turns] for i, (_, turns) in looked_up.items() if turns}
    replies = dict(zip(longer, reply_all(model, tokenizer, [*longer.values()], tools, **options), strict=True))
    return [(looked_up.get(i, (None,))[0], replies.get(i, said)) for i, said in enumerate(first)]


def read_call(said: str) -> dict | None:
    """Return name and arguments of the first function call in what a model said, None if there is none.

    It is the first JSON object with a name and arguments (or parameters), whatever a model puts around it.
    """
    decoder = json.JSONDecoder()
    for start in (i for i, character in enumerate(said) if character == "{"):
        with suppress(ValueError, RecursionError):  # invalid or unfinished JSON, or a lone surrogate
            match decoder.raw_decode(said, start)[0]:
                case {"name": str(name), "arguments": dict(arguments)} | {
                    "name": str(name),
                    "parameters": dict(arguments),
                }:
                    json.dumps([name, arguments], ensure_ascii=False).encode()
                    return {"name": name, "arguments": arguments}
    return None
