"""Decoding that stops at a tool call, runs the tool and goes on.

Any number of prompts decode together. When a row hands over to the database, its turn goes to the tool; the answer's
tokens wait in the row's queue and are forced, one a step, before the row samples again. Finished rows leave the batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import NamedTuple

import torch

from lib.agent.tools import Response, Tool
from lib.base import InputError
from lib.dialogs.templates import Role, Turn
from lib.dialogs.tokenizers import Tokenizer
from lib.dialogs.tokens import encode_prompt
from lib.progress import progress

#: Finished rows leave a batch when at most this share of it is left: to copy the others' cache takes as long as a step.
KEPT_SHARE = 0.75


class Call(NamedTuple):
    """One use of the tool: the assistant's turn and what came back."""

    turn: str
    response: Response


@dataclass
class Generation:
    """What one row produced after its prompt."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # False: forced by the tool's answer
    calls: list[Call] = field(default_factory=list)
    finished: bool = False  # ended with the end-of-dialog token, not by length or a broken hand-over

    def turns(self, tokenizer: Tokenizer) -> list[Turn]:
        """The turns after the prompt, the assistant's first."""
        speakers = {token: role for role, token in tokenizer.role_ids.items()}
        turns, role, start = [], Role.ASSISTANT, 0
        for i, token in enumerate(self.tokens):
            if token in speakers or token == tokenizer.end:
                turns.append(Turn(role, tokenizer.decode(self.tokens[start:i])))
                role, start = speakers.get(token), i + 1
        if role is not None and start < len(self.tokens):
            turns.append(Turn(role, tokenizer.decode(self.tokens[start:])))
        return turns


class Event(NamedTuple):
    """One new token of one row."""

    row: int
    token: int
    sampled: bool


class _Row:
    """A row while it decodes: its prompt, its generation so far and the tokens that it is forced to take next."""

    def __init__(self, index: int, prompt: Sequence[int], tokenizer: Tokenizer, tool: Tool | None, max_new_tokens: int):
        self.index, self.prompt, self.tokenizer, self.tool = index, prompt, tokenizer, tool
        self.special = {*tokenizer.role_ids.values(), tokenizer.end}
        self.max_new_tokens = max_new_tokens
        self.generation = Generation()
        self.forced: deque[int] = deque()
        self.turn_start = 0
        self.done = max_new_tokens <= 0

    def take(self, sampled: int) -> Event:
        """Append the next token, forced or `sampled`, and react to it. `self.done` says whether the row has ended."""
        generation, tokens = self.generation, self.generation.tokens
        is_sampled = not self.forced
        token = sampled if is_sampled else self.forced.popleft()
        tokens.append(token)
        generation.sampled.append(is_sampled)
        if token in self.special:
            self._react(token, is_sampled)
        self.done |= len(tokens) >= self.max_new_tokens
        return Event(self.index, token, is_sampled)

    def _react(self, token: int, is_sampled: bool) -> None:
        """To a role token or the end, which has just been appended."""
        generation, tokenizer = self.generation, self.tokenizer
        if token == tokenizer.role_ids[Role.ASSISTANT]:
            self.turn_start = len(generation.tokens)
        if is_sampled and token == tokenizer.role_ids[Role.DATABASE] and self.tool is not None:
            turn = tokenizer.decode(generation.tokens[self.turn_start : -1])
            response = self.tool(turn)
            generation.calls.append(Call(turn, response))
            self.forced.extend([*tokenizer.encode(response.text), tokenizer.role_ids[Role.ASSISTANT]])
        elif is_sampled:
            generation.finished = token == tokenizer.end
            self.done = True

    def replay(self, known: Sequence[int]) -> None:
        """Take what the model would write, as far as it is known, and then what is forced: no need to run the model.

        The tool is asked again. If it says something else than it did in `known`, the rest is not known.
        """
        for token in known:
            if self.done or self.take(token).token != token:
                break
        while self.forced and not self.done:
            self.take(self.forced[0])

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generation.tokens)

    @property
    def room(self) -> int:
        """How many more tokens it may take."""
        return self.max_new_tokens - len(self.generation.tokens)


def stream(
    model,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    tool: Tool | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    into: list[Generation] | None = None,
) -> Iterator[list[Event]]:
    """Decode one batch of prompts, yielding the new tokens of every step.

    model: a `Transformer`, or anything with its `new_cache` and `decode`. prompts: token ids that end with the
    assistant's role token (see `encode_prompt`). temperature 0 is greedy; otherwise `generator` draws the samples.
    A row ends with the end token, after `max_new_tokens` (forced ones included), or where it hands over to a role that
    nobody plays (the database without a `tool`, the user). `into` receives each row's `Generation`, in the order of
    the prompts. Raises `InputError` for a negative temperature.
    """
    rows = [_Row(i, prompt, tokenizer, tool, max_new_tokens) for i, prompt in enumerate(prompts)]
    if into is not None:
        into.extend(row.generation for row in rows)
    yield from _decode(model, rows, temperature, generator)


def _decode(model, rows: list[_Row], temperature: float, generator: torch.Generator | None) -> Iterator[list[Event]]:
    """Decode the rows that are not done to their ends, yielding the new tokens of every step."""
    if not temperature >= 0:
        raise InputError(f"temperature is {temperature}: give 0 (greedy) or more")
    rows = [row for row in rows if not row.done]
    if not rows:
        return
    device = getattr(model, "device", "cpu")
    lengths = torch.tensor([len(row) for row in rows], device=device)
    fed = [torch.tensor([*row.prompt, *row.generation.tokens]) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(fed, batch_first=True).to(device)
    cache = model.new_cache(len(rows), tokens.shape[1] + max(row.room for row in rows))
    while True:
        chosen = _choose(model.decode(tokens, cache, lengths), temperature, generator).tolist()
        lengths = None
        yield [row.take(token) for row, token in zip(rows, chosen, strict=True) if not row.done]
        alive = [i for i, row in enumerate(rows) if not row.done]
        if not alive:
            return
        if len(alive) <= KEPT_SHARE * len(rows):
            rows = [rows[i] for i in alive]
            cache = cache.select(torch.tensor(alive, device=device))
        tokens = torch.tensor([row.generation.tokens[-1:] for row in rows], device=device)


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """The next token (B,) of each row from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    # Relative to the largest, in float64: no temperature is too low.
    relative = (logits - logits.amax(-1, keepdim=True)).double()
    probabilities = (relative / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    tool: Tool | None = None,
    *,
    known: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int | Sequence[int] = 256,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    description: str | None = None,
) -> list[Generation]:
    """Decode any number of prompts in batches of similar length, see `stream`.

    max_new_tokens: one limit for all prompts, or one for each. batch_size: of rows that grow to less than twice the
    length of the shortest; longer rows share smaller batches, so that few long ones take no memory of all others.
    `known` holds, for each prompt, the first tokens of its generation as far as they are known, the tool's answers
    included: the model need not produce them again. The tool is asked all the same, and what `known` holds after an
    answer that it no longer gives is ignored. Shows progress under `description` if one is given.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    pairs = zip(prompts, limits, strict=True)
    rows = [_Row(i, prompt, tokenizer, tool, limit) for i, (prompt, limit) in enumerate(pairs)]
    for row, tokens in zip(rows, known or [], strict=known is not None):
        row.replay(tokens)
    with progress(sum(not row.done for row in rows), description) as bar:
        for batch in _batches([row for row in rows if not row.done], batch_size):
            for _ in _decode(model, batch, temperature, generator):
                pass
            bar.update(len(batch))
    return [row.generation for row in rows]


def _batches(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Rows of similar length, as they are and as they may become; a batch of rows twice as long has half as many."""
    shortest = min((len(row) + row.room for row in rows), default=0)

    def doublings(row: _Row) -> int:
        return ((len(row) + row.room) // shortest).bit_length() - 1

    for n, group in groupby(sorted(rows, key=lambda row: (doublings(row), len(row))), key=doublings):
        similar, size = list(group), max(1, batch_size >> n)
        yield from (similar[start : start + size] for start in range(0, len(similar), size))


def chat(model, question: str, tokenizer: Tokenizer, tool: Tool | None = None, **options) -> Iterator[tuple[Role, str]]:
    """Answer one question, streaming (who speaks, next piece of text). A change of role begins a new turn.

    Pieces are whole characters, and those of a turn add up to its text. `options` are those of `stream`.
    """
    prompt = encode_prompt([Turn(Role.USER, question)], tokenizer)
    produced = (event.token for (event,) in stream(model, [prompt], tokenizer, tool, **options))
    speakers = {token: role for role, token in tokenizer.role_ids.items()}
    role, spoken, told = Role.ASSISTANT, [], 0
    for token in chain(produced, [tokenizer.end]):  # however it ends, the last turn is told to its end
        turn_ends = token in speakers or token == tokenizer.end
        if not turn_ends:
            spoken.append(token)
        text = tokenizer.decode(spoken)
        # The bytes of an unfinished character decode to U+FFFD: they wait for the rest.
        ready = text if turn_ends else text.rstrip("\ufffd")
        if len(ready) > told:
            yield role, ready[told:]
            told = len(ready)
        if turn_ends:
            role, spoken, told = speakers.get(token), [], 0
