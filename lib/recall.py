"""Factual recall: the share of questions that a model answers with exactly the right sentence (Section 5).

"Ends with the answer" would count 11/1/1950 for 1/1/1950, so the whole final turn must match. In-tool, the answer
counts only if a query that really ran against the database retrieved the value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lib.dialogs import Dialog, Role, Tokenizer, answer, encode_prompt, in_tool_dialog, in_weight_dialog, tokenize
from lib.generation import Generation, generate
from lib.monitor import progress
from lib.tools import Request, Tool, parse_request

Fact = tuple[str, str, str]  # name, attribute, value

#: Below this gap between the two largest logits the two ways to compute them may disagree: decode to be sure.
#: In float32 they differ by 1e-4 at most where logits reach 35.
MARGIN = 1e-3


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

    A dialog that goes on for longer than the longest expected one is cut off, and not correct.

    Greedy decoding reproduces an expected dialog exactly if the argmax at every position that the assistant speaks is
    right, so `verify` runs each expected dialog once, teacher-forced, and decodes only what is too close to call and,
    with a tool, what diverges. `decode` decodes everything: the reference. Weights are taken to be float32.
    """
    correct, undecided = np.zeros(len(facts), dtype=bool), np.arange(len(facts))
    if method == "verify":
        correct, undecided = _verify(model, facts, tokenizer, tool, batch_size, description)
    if len(undecided):
        generations = generate(
            model,
            [encode_prompt(_expected(facts[i], tool)[:1], tokenizer) for i in undecided],
            tokenizer,
            tool,
            batch_size=batch_size,
            description=description and f"{description}, decoding",
            max_new_tokens=_token_budget(facts, tokenizer, tool),
        )
        for i, generation in zip(undecided, generations, strict=True):
            correct[i] = is_correct(generation, facts[i], tokenizer, tool)
    return Recall(correct, np.array([attribute for _, attribute, _ in facts]), len(undecided))


def is_correct(generation: Generation, fact: Fact, tokenizer: Tokenizer, tool: Tool | None) -> bool:
    """Whether a greedy dialog ends with the expected sentence and, with a tool, whether the fact came from it."""
    name, attribute, value = fact
    assistant = tokenizer.role_ids[Role.ASSISTANT]  # the prompt ends with it
    final_turn = [assistant, *tokenizer.encode(answer(*fact)), tokenizer.end]
    said = [assistant, *generation.tokens][-len(final_turn) :] == final_turn
    if tool is None or not said:
        return said
    return any(
        call.response.ok and call.response.text == value and parse_request(call.turn) == Request(attribute, name)
        for call in generation.calls
    )


def _expected(fact: Fact, tool: Tool | None) -> Dialog:
    return in_weight_dialog(*fact) if tool is None else in_tool_dialog(*fact)


def _token_budget(facts: Sequence[Fact], tokenizer: Tokenizer, tool: Tool | None) -> int:
    """Tokens of the longest expected dialog; those of its question leave room to be wrong in.

    Of all questions, not of the undecided ones: a verdict must not depend on those of others.
    """
    return int(tokenize((_expected(fact, tool) for fact in facts), tokenizer).lengths().max())


def _verify(
    model, facts: Sequence[Fact], tokenizer: Tokenizer, tool: Tool | None, batch_size: int, description: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts (Q,) from one teacher-forced pass, and the indices of the questions it cannot decide."""
    dialogs = [_expected(fact, tool) for fact in facts]
    data = tokenize(dialogs, tokenizer).to(getattr(model, "device", "cpu"))
    exact = torch.zeros(len(data), dtype=torch.bool, device=data.values.device)
    decided = torch.zeros_like(exact)
    order = data.lengths().argsort(stable=True)
    with torch.inference_mode(), progress(len(data), description) as bar:
        for rows in order.split(batch_size):
            tokens, mask = data.batch(rows)
            targets, mask = tokens[:, 1:], mask[:, 1:]
            top = model(tokens[:, :-1], select=mask).topk(2, dim=-1)
            sure = top.values[:, 0] - top.values[:, 1] >= MARGIN
            right = sure & (top.indices[:, 0] == targets[mask])
            right, sure = (torch.ones_like(mask).masked_scatter(mask, flags) for flags in (right, sure))  # (B, S)
            divergence = right.int().argmin(-1, keepdim=True)  # the first; 0 if there is none
            exact[rows] = right.all(-1)
            decided[rows] = sure.gather(-1, divergence).squeeze(-1)
            bar.update(len(rows))
    exact, decided = exact.cpu().numpy(), decided.cpu().numpy()
    if tool is None:
        # The first turn is the last: once it diverges it cannot become the expected sentence.
        return exact, np.flatnonzero(~decided)
    for i in np.flatnonzero(exact):
        response = tool(dialogs[i][1].text)
        exact[i] = response.ok and response.text == facts[i][2]
    return exact, np.flatnonzero(~exact)
