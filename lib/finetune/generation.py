"""Greedy replies of Hugging Face chat models, in batches, and a look-up between two replies."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lib.finetune.models import read_shared
from lib.progress import progress

#: Prompts in a batch; fewer where memory runs out, except on a CPU, where that kills the process without an error.
BATCH = {"cpu": 64, "cuda": 512}


def reply_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict]],
    tools: list[dict] | None = None,
    drafts: Sequence[str] = (),
    **options,
) -> list[str]:
    """Return what the assistant says next in each conversation, without special tokens; see `generate_tokens`."""
    prompts = encode_prompts(tokenizer, conversations, tools)
    guesses = drafts and tokenizer(list(drafts), add_special_tokens=False)["input_ids"]
    answers = generate_tokens(model, tokenizer, prompts, drafts=guesses, **options)
    # Exactly as written: some tokenizers would remove spaces.
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
    drafts: Sequence[list[int]] = (),
    description: str | None = None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, up to and with the token that ends it, in the order of prompts.

    drafts: guesses of the answers, up to an end token, for speculative decoding: the right beginning of a guess is
    accepted in one pass. Batches hold prompts of similar length, the longest first, so that a size that fits them fits
    all. Batches shrink if memory runs out. Answers depend on none of this, except when logits tie within rounding. Of
    the model's generation settings only the end tokens count: a repetition penalty, say, would not be greedy.
    """
    drafts = drafts or [[]] * len(prompts)
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: dict[int, list[int]] = {}
    size = BATCH.get(model.device.type, 64)
    with progress(len(prompts), description) as bar:
        while batch := order[len(answers) : len(answers) + size]:
            asked, guessed = ([rows[i] for i in batch] for rows in (prompts, drafts))
            try:
                answers.update(zip(batch, _generate(model, asked, guessed, ends, max_new_tokens), strict=True))
                bar.update(len(batch))
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                size = len(batch) // 2
    return [answers[i] for i in range(len(prompts))]


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, prompts: list[list[int]], drafts: list[list[int]], ends: set[int], max_new_tokens: int
) -> list[list[int]]:
    """Decode a batch. The prompts' common prefix is read once; a row that has ended leaves the batch."""

    def padded(rows: list[list[int]], side: str) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long, device=model.device) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side=side)

    def read(tokens: torch.Tensor, n: int) -> torch.Tensor:
        """Return the greedy token after each of the last n tokens: (B, n)."""
        nonlocal cache
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options = {"attention_mask": mask, "position_ids": places, "past_key_values": cache}
        made = model(input_ids=tokens, **options, use_cache=True, logits_to_keep=n)
        cache = made.past_key_values
        return made.logits.argmax(-1)

    shared, cache = 0, None
    if any(DynamicCache(config=model.config).is_sliding):  # its window would count masked padding
        drafts = [[] for _ in prompts]
    else:
        shared, cache = read_shared(model, padded(prompts, "right"), min(map(len, prompts)) - 1)
    drafts = [[*takewhile(lambda token: token not in ends, tokens)][: max_new_tokens - 1] for tokens in drafts]
    draft = padded(drafts, "right")  # (B, D)
    tokens = torch.cat([padded([prompt[shared:] for prompt in prompts], "left"), draft], dim=1)  # (B, S)
    mask = pad((tokens >= 0).long(), (shared, 0), value=1)
    said = read(tokens.clamp(min=0), draft.shape[1] + 1)
    agreed = (said[:, :-1] == draft).long().cumprod(1).sum(1, keepdim=True)  # (B, 1)
    mask[:, shared + tokens.shape[1] - draft.shape[1] :] = torch.arange(draft.shape[1], device=model.device) < agreed
    tokens = said.gather(1, agreed)
    answers = rows = [tokens[:n] for tokens, (n,) in zip(drafts, agreed.tolist(), strict=True)]
    while True:
        for row, (token,) in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        unfinished = [i for i, row in enumerate(rows) if row[-1] not in ends and len(row) < max_new_tokens]
        if not unfinished:
            return answers
        if len(unfinished) < len(rows):  # selecting copies the whole cache
            rows, kept = [rows[i] for i in unfinished], torch.tensor(unfinished, device=model.device)
            cache.batch_select_indices(kept)
            mask, tokens = mask[kept], tokens[kept]
        mask = pad(mask, (0, 1), value=1)
        tokens = read(tokens, 1)


def look_up_and_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: Sequence[dict],
    look_up: Callable[[int, str], tuple[Any, list[dict]] | None],
    drafts: Sequence[str] = (),
    **options,
) -> list[tuple[Any, str]]:
    """Return what was looked up for each conversation, None if nothing was, and what the model said last.

    openings: per conversation the `messages` and, where functions are offered, the same `tools`. look_up(i, said)
    returns, for what the model said in conversation i, the result and the turns to add before it speaks again (no
    turns: it does not speak again); None if it asked for nothing. drafts: of the first turn, see `reply_all`.
    """
    tools = openings[0].get("tools") if openings else None
    first = reply_all(model, tokenizer, [each["messages"] for each in openings], tools, drafts, **options)
    looked_up = {i: result for i, said in enumerate(first) if (result := look_up(i, said))}
    longer = {i: [*openings[i]["messages"], *turns] for i, (_, turns) in looked_up.items() if turns}
    replies = dict(zip(longer, reply_all(model, tokenizer, [*longer.values()], tools, **options), strict=True))
    return [(looked_up.get(i, (None,))[0], replies.get(i, said)) for i, said in enumerate(first)]
