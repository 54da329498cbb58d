"""Factual recall: the share of questions that a model answers with exactly the right sentence (Section 5).

"Ends with the answer" would count 11/1/1950 for 1/1/1950, so the whole final turn must match. In-tool, the answer
counts only if a query that really ran against the database retrieved the value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lib.dialogs import (
    Dialog,
    Role,
    Tokenizer,
    answer,
    encode_prompt,
    in_tool_dialog,
    in_weight_dialog,
    tokenize,
)
from lib.generation import Generation, generate
from lib.monitor import progress
from lib.tools import Request, Tool, parse_request

Fact = tuple[str, str, str]  # name, attribute, value

#: Below this gap between the two largest logits the two ways to compute them may disagree: decode to be sure.
MARGIN = 1e-4


@dataclass(frozen=True)
class Recall:
    """The verdict on every question, in the order asked."""

    correct: np.ndarray  # (Q,) bool
    attributes: np.ndarray  # (Q,) str
    decoded: int  # how many questions had to be decoded token by token

    @property
    def overall(self) -> float:
        """Share of all questions, in [0, 1]."""
        return float(self.correct.mean())

    def by_attribute(self) -> dict[str, float]:
        """Share of the questions about each attribute, in [0, 1]."""
        return {str(a): float(self.correct[self.attributes == a].mean()) for a in np.unique(self.attributes)}


def measure_recall(
    model,
    facts: Sequence[Fact],
    tokenizer: Tokenizer,
    tool: Tool | None = None,
    *,
    method: Literal["verify", "decode"] = "verify",
    batch_size: int = 256,
    description: str | None = None,
) -> Recall:
    """Ask a model about `facts`, greedily; with a `tool` the model may use it, and must.

    Greedy decoding reproduces an expected dialog exactly if the argmax at every position that the assistant speaks is
    right, so `verify` runs each expected dialog once, teacher-forced, and decodes only what diverges or is too close to
    call. `decode` decodes everything: the reference.
    """
    correct = np.zeros(len(facts), dtype=bool)
    undecided = np.arange(len(facts))
    if method == "verify":
        render = in_weight_dialog if tool is None else in_tool_dialog
        correct, undecided = _verify(
            model, [render(*fact) for fact in facts], facts, tokenizer, tool, batch_size, description
        )
    if len(undecided):
        dialogs = [in_weight_dialog(*facts[i]) for i in undecided]
        generations = generate(
            model,
            [encode_prompt(dialog[:1], tokenizer) for dialog in dialogs],
            tokenizer,
            tool,
            batch_size=batch_size,
            description=description and f"{description}, decoding",
            max_new_tokens=_token_budget([facts[i] for i in undecided], tokenizer, tool),
        )
        for i, generation in zip(undecided, generations, strict=True):
            correct[i] = is_correct(generation, facts[i], tokenizer, tool)
    return Recall(correct, np.array([attribute for _, attribute, _ in facts]), len(undecided))


def is_correct(generation: Generation, fact: Fact, tokenizer: Tokenizer, tool: Tool | None) -> bool:
    """Whether a greedy dialog ends with the expected sentence and, with a tool, whether the fact came from it."""
    name, attribute, value = fact
    turns = generation.turns(tokenizer)
    said = generation.finished and turns[-1] == (Role.ASSISTANT, answer(*fact))
    if tool is None or not said:
        return said
    return any(
        call.response.ok and call.response.text == value and parse_request(call.turn) == Request(attribute, name)
        for call in generation.calls
    )


def _token_budget(facts: Sequence[Fact], tokenizer: Tokenizer, tool: Tool | None) -> int:
    """Tokens that the longest expected dialog takes after its question, and some to be wrong in."""
    render = in_weight_dialog if tool is None else in_tool_dialog
    longest = max(sum(len(turn.text.encode()) + 1 for turn in render(*fact)[1:]) for fact in facts)
    return longest + 32


def _verify(
    model, dialogs: list[Dialog], facts: Sequence[Fact], tokenizer: Tokenizer, tool: Tool | None, batch_size, description
) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts (Q,) from one teacher-forced pass, and the indices of the questions it cannot decide."""
    data = tokenize(dialogs, tokenizer).to(getattr(model, "device", "cpu"))
    exact = torch.zeros(len(data), dtype=torch.bool, device=data.values.device)
    close = torch.zeros_like(exact)
    order = data.lengths().argsort(stable=True)
    with torch.inference_mode(), progress(len(data), description) as bar:
        for rows in order.split(batch_size):
            tokens, mask = data.batch(rows)
            targets, mask = tokens[:, 1:], mask[:, 1:]
            top = model(tokens[:, :-1], select=mask).topk(2, dim=-1)
            right = top.indices[:, 0] == targets[mask]
            near = top.values[:, 0] - top.values[:, 1] < MARGIN
            row = mask.nonzero()[:, 0]
            exact[rows] = _all_of_row(right, row, len(rows))
            close[rows] = ~_all_of_row(~near, row, len(rows))
            bar.update(len(rows))
    exact, close = exact.cpu().numpy(), close.cpu().numpy()
    if tool is None:
        # Without a tool the first turn is the last: once it diverges it cannot become the expected sentence.
        return exact & ~close, np.flatnonzero(close)
    confirmed = exact & ~close
    for i in np.flatnonzero(confirmed):
        response = tool(dialogs[i][1].text)
        confirmed[i] = response.ok and response.text == facts[i][2]
    return confirmed, np.flatnonzero(~confirmed)


def _all_of_row(flags: torch.Tensor, row: torch.Tensor, n_rows: int) -> torch.Tensor:
    """(n_rows,) whether all `flags` (N,) of each `row` (N,) are true."""
    return torch.bincount(row, weights=(~flags).float(), minlength=n_rows) == 0
