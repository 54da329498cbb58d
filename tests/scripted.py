"""A model that says what it is told to, in place of the transformer: what it says depends on what came before alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.dialogs.templates import Role
from lib.dialogs.tokenizers import ByteTokenizer

USER, ASSISTANT, DATABASE, END = 256, 257, 258, 259


def turn(text: str | bytes, then: int) -> list[int]:
    """The tokens of an assistant's turn: a text, and the token that follows it."""
    return [*(text.encode() if isinstance(text, str) else text), then]


@dataclass
class _Cache:
    rows: list[list[int]]
    capacity: int

    def select(self, rows: torch.Tensor) -> "_Cache":
        return _Cache([self.rows[i] for i in rows.tolist()], self.capacity)


class Scripted:
    """`script(prefix)` is the likeliest token after `prefix`. `batch_sizes` records what `decode` was given."""

    device = torch.device("cpu")

    def __init__(self, script: Callable[[list[int]], int]):
        self.script = script
        self.batch_sizes: list[int] = []

    def new_cache(self, batch_size: int, capacity: int) -> _Cache:
        return _Cache([[] for _ in range(batch_size)], capacity)

    def decode(self, tokens: torch.Tensor, cache: _Cache, lengths: torch.Tensor | None = None) -> torch.Tensor:
        self.batch_sizes.append(len(tokens))
        counts = [tokens.shape[1]] * len(tokens) if lengths is None else lengths.tolist()
        for prefix, new, count in zip(cache.rows, tokens.tolist(), counts, strict=True):
            prefix += new[:count]
            assert len(prefix) <= cache.capacity
        return self._logits([self.script(prefix) for prefix in cache.rows])

    def __call__(self, tokens: torch.Tensor, first: int, select: torch.Tensor) -> torch.Tensor:
        return self._logits([self.script(tokens[b, : first + t + 1].tolist()) for b, t in select.nonzero().tolist()])

    def _logits(self, chosen: list[int]) -> torch.Tensor:
        logits = torch.zeros(len(chosen), ByteTokenizer().vocab_size)
        logits[range(len(chosen)), chosen] = 10.0
        return logits


def says(replies: dict[str, list[list[int]]]) -> Scripted:
    """A model that answers each question with the assistant's turns given for it (see `turn`), one after the other.

    While the database speaks it would say `?`; when its turns are used up or the token position is past them, too.
    """

    def script(prefix: list[int]) -> int:
        special = [i for i, token in enumerate(prefix) if token >= 256]
        question = bytes(prefix[1 : special[1]]).decode()
        number = sum(prefix[i] == ASSISTANT for i in special) - 1
        said = len(prefix) - special[-1] - 1
        turns = replies[question]
        if prefix[special[-1]] != ASSISTANT or number >= len(turns) or said >= len(turns[number]):
            return ord("?")
        return turns[number][said]

    return Scripted(script)


def prompt(question: str) -> list[int]:
    """The tokens of a question, up to where the assistant is to speak."""
    return [ByteTokenizer().role_ids[Role.USER], *question.encode(), ByteTokenizer().role_ids[Role.ASSISTANT]]
