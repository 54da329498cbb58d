"""Decoding that stops at a tool call, runs the tool and resumes.

Any number of prompts decode together. When a row hands over to the database, its turn goes to the tool; the answer's
tokens wait in the row's queue and are forced, one a step, before the model goes on. Finished rows leave the batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch

from lib.agent.tools import Response, Tool
from lib.dialogs.templates import Role, Turn
from lib.dialogs.tokenizers import Tokenizer
from lib.progress import progress

#: Drop finished rows when at most this share of a batch is unfinished: copying the KV cache takes as long as a step.
KEPT_SHARE = 0.75


class Call(NamedTuple):
    """One use of the tool: the assistant's turn and the response."""

    turn: str
    response: Response


@dataclass
class Generation:
    """What one row produced after its prompt."""

    tokens: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def turns(self, tokenizer: Tokenizer) -> list[Turn]:
        """Return the turns after the prompt, the assistant's first."""
        speakers = {token: role for role, token in tokenizer.role_ids.items()}
        turns, role, start = [], Role.ASSISTANT, 0
        for i, token in enumerate(self.tokens):
            if token in speakers or token == tokenizer.end:
                turns.append(Turn(role, tokenizer.decode(self.tokens[start:i])))
                role, start = speakers.get(token), i + 1
        if role is not None and start < len(self.tokens):
            turns.append(Turn(role, tokenizer.decode(self.tokens[start:])))
        return turns


class _Row:
    """A row while it decodes: its prompt, its generation so far and the tokens that it is forced to take next."""

    def __init__(self, prompt: Sequence[int], tokenizer: Tokenizer, tool: Tool | None, max_new_tokens: int):
        self.prompt, self.tokenizer, self.tool, self.max_new_tokens = prompt, tokenizer, tool, max_new_tokens
        self.special = {*tokenizer.role_ids.values(), tokenizer.end}
        self.generation = Generation()
        self.forced: deque[int] = deque()
        self.turn_start = 0
        self.done = max_new_tokens <= 0

    def take(self, chosen: int) -> int:
        """Append the next token, forced or `chosen`, react to it and return it. `done` says if the row has ended."""
        tokens, is_chosen = self.generation.tokens, not self.forced
        token = chosen if is_chosen else self.forced.popleft()
        tokens.append(token)
        if token in self.special:
            self._react(token, is_chosen)
        self.done |= len(tokens) >= self.max_new_tokens
        return token

    def _react(self, token: int, is_chosen: bool) -> None:
        """React to a role token or the end, which has just been appended."""
        generation, tokenizer = self.generation, self.tokenizer
        if token == tokenizer.role_ids[Role.ASSISTANT]:
            self.turn_start = len(generation.tokens)
        if is_chosen and token == tokenizer.role_ids[Role.DATABASE] and self.tool is not None:
            turn = tokenizer.decode(generation.tokens[self.turn_start : -1])
            response = self.tool(turn)
            generation.calls.append(Call(turn, response))
            self.forced.extend([*tokenizer.encode(response.text), tokenizer.role_ids[Role.ASSISTANT]])
        elif is_chosen:
            self.done = True

    def replay(self, known: Sequence[int]) -> None:
        """Append the `known` tokens, then the forced ones, without running the model."""
        for token in known:
            if self.done or self.take(token) != token:
                break
        while self.forced and not self.done:
            self.take(self.forced[0])

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generation.tokens)

    @property
    def longest(self) -> int:
        """The most tokens that the row can reach."""
        return len(self.prompt) + self.max_new_tokens


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    tool: Tool | None = None,
    *,
    known: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int | Sequence[int] = 256,
    batch_size: int = 256,
    description: str | None = None,
) -> list[Generation]:
    """Decode any number of prompts, in batches of similar length.

    model: a `Transformer`, or anything with its `new_cache`, `decode` and `device`. prompts: token ids that end with
    the assistant's role token (see `encode_prompt`). A row ends with the end token, after `max_new_tokens` (forced ones
    included; one limit for all prompts or one for each), or where it hands over to a role that nobody plays (the
    database without a `tool`, the user). `batch_size` is for rows that grow to less than twice the length of the
    shortest; longer rows come in smaller batches, so that a few long ones do not multiply the memory.

    `known` holds the tokens that each generation is known to begin with, the tool's answers included, so the model
    need not produce them again. The tool is still called; after an answer that differs, the rest of `known` is
    ignored. Shows progress under `description` if one is given.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    rows = [_Row(prompt, tokenizer, tool, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    for row, tokens in zip(rows, known or [], strict=known is not None):
        row.replay(tokens)
    open_rows = [row for row in rows if not row.done]
    with progress(len(open_rows), description) as bar:
        for batch in _batches(open_rows, batch_size):
            _decode(model, batch)
            bar.update(len(batch))
    return [row.generation for row in rows]


def _batches(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Yield batches of rows of similar length; where rows may grow twice as long, batches are half as large."""
    shortest = min((row.longest for row in rows), default=0)

    def doublings(row: _Row) -> int:
        return (row.longest // shortest).bit_length() - 1

    for n, group in groupby(sorted(rows, key=lambda row: (doublings(row), len(row))), key=doublings):
        similar, size = list(group), max(1, batch_size >> n)
        yield from (similar[start : start + size] for start in range(0, len(similar), size))


def _decode(model, rows: list[_Row]) -> None:
    """Decode unfinished rows to their ends, greedily."""
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    fed = [torch.tensor([*row.prompt, *row.generation.tokens]) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(fed, batch_first=True).to(model.device)
    cache = model.new_cache(len(rows), tokens.shape[1] + max(row.longest - len(row) for row in rows))
    while True:
        chosen = model.decode(tokens, cache, lengths).argmax(-1).tolist()
        lengths = None
        for row, token in zip(rows, chosen, strict=True):
            if not row.done:
                row.take(token)
        alive = [i for i, row in enumerate(rows) if not row.done]
        if not alive:
            return
        if len(alive) <= KEPT_SHARE * len(rows):
            rows = [rows[i] for i in alive]
            cache = cache.select(torch.tensor(alive, device=model.device))
        tokens = torch.tensor([row.generation.tokens[-1:] for row in rows], device=model.device)
