"""Factual recall: the share of questions that a model answers with exactly the right sentence (Section 5).

"Ends with the answer" would count 11/1/1950 for 1/1/1950, so the whole final turn must match. In-tool, the answer
counts only if a query that really ran against the database retrieved the value.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from lib.agent.generation import Generation, generate
from lib.agent.tools import Tool
from lib.dialogs.request import Request, parse_request
from lib.dialogs.templates import Dialog, Role, answer, in_tool_dialog, in_weight_dialog
from lib.dialogs.tokenizers import Tokenizer
from lib.dialogs.tokens import TokenizedDialogs, encode_prompt, tokenize
from lib.progress import progress

Fact = tuple[str, str, str]  # name, attribute, value

#: Below this gap between the two largest logits the two ways to compute them may disagree: decode to be sure.
#: In float32 they differ by 1e-4 at most where logits reach 35.
MARGIN = 1e-3

#: How many tokens a model may spend on what is not expected, a request that fails and what comes back, say.
DETOUR = 64
#: About how many tokens are verified together: what fits into a core's cache, or fills a GPU.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
#: How many questions are decoded together, unless the caller says: a GPU takes as long for few as for many.
BATCH_ROWS = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Recall:
    """The verdict on every question, in the order asked."""

    correct: np.ndarray  # (Q,) bool
    attributes: np.ndarray  # (Q,) str
    decoded: int  # how many questions had to be decoded token by token
    requests: Sequence[Request | None]  # in-tool: the first that was made for each question, None: none well-formed

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
    batch_size: int | None = None,
    description: str | None = None,
) -> Recall:
    """Ask a model about `facts`, greedily; with a `tool` the model may use it, and must.

    A dialog is cut off, and not correct, once it has generated `DETOUR` tokens more than its expected dialog has,
    question included: the limit depends on that question alone.

    Greedy decoding reproduces an expected dialog up to the first position at which the assistant speaks and the argmax
    is another token. `verify` finds it by one teacher-forced pass and decodes from there only, which in-weight is
    needed only where it is too close to call. `decode` decodes everything: the reference. Weights are taken to be
    float32.
    """
    expected = [_expected(fact, tool) for fact in facts]
    prompts = [encode_prompt(dialog[:1], tokenizer) for dialog in expected]
    data = tokenize(expected, tokenizer)
    correct, undecided, known = np.zeros(len(facts), dtype=bool), np.arange(len(facts)), None
    if method == "verify":
        agreed, refuted = _verify(model, data, description)
        if tool is None:
            # The first turn is the last: once it diverges it cannot become the expected sentence.
            correct = agreed == data.lengths().numpy()
            undecided = np.flatnonzero(~correct & ~refuted)
        starts = data.offsets.tolist()
        known = [data.values[starts[i] + len(prompts[i]) : starts[i] + agreed[i]].tolist() for i in undecided]
    generations = generate(
        model,
        [prompts[i] for i in undecided],
        tokenizer,
        tool,
        known=known,
        max_new_tokens=(data.lengths() + DETOUR)[undecided].tolist(),
        batch_size=batch_size or BATCH_ROWS.get(torch.device(getattr(model, "device", "cpu")).type, 256),
        description=description and f"{description}, decoding",
    )
    for i, generation in zip(undecided, generations, strict=True):
        correct[i] = is_correct(generation, facts[i], tokenizer, tool)
    decoded = sum(g.tokens != k for g, k in zip(generations, known, strict=True)) if known is not None else len(facts)
    requests = [parse_request(g.calls[0].turn) if g.calls else None for g in generations] if tool is not None else []
    return Recall(correct, np.array([attribute for _, attribute, _ in facts]), decoded, requests)


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


def bits_of_dialogs(model, data: TokenizedDialogs) -> np.ndarray:
    """Bits (D,) that a dialog costs the model: minus log2 of the probability it gives to what the assistant says.

    Of an answer that is known for sure nothing is left; of one of V values that are all the same to it, log2 V, if it
    knows how to say them. So the weights hold at least the entropy of the answers minus these bits (Section 4's bound
    is about what they hold): a model that cannot spell the values yet is charged for that, too.
    """
    bits = torch.zeros(len(data), dtype=torch.float64)
    for rows, mask, logits, target in _teacher_forced(model, data):
        surprise = F.cross_entropy(logits, target, reduction="none").cpu().double() / math.log(2)
        bits[rows.cpu()] = torch.zeros(mask.shape).double().masked_scatter(mask.cpu(), surprise).sum(-1)
    return bits.numpy()


def _verify(model, data: TokenizedDialogs, description: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Where the model leaves each of D dialogs, from one teacher-forced pass.

    Returns (D,) how many tokens of the dialog greedy decoding reproduces, or the tool provides, for sure; and (D,)
    whether what follows is surely another token than the dialog's.
    """
    lengths = data.lengths().to(getattr(model, "device", "cpu"))
    agreed, refuted = lengths.clone(), torch.zeros_like(lengths, dtype=torch.bool)
    with progress(len(data), description) as bar:
        for rows, mask, logits, target in _teacher_forced(model, data):
            target = target[:, None]  # (N, 1)
            # By how much the expected token leads the best of the others: negative if it is not the argmax.
            lead = logits.gather(1, target)[:, 0] - logits.scatter(1, target, -torch.inf).amax(1)
            right = torch.ones_like(mask).masked_scatter(mask, lead >= MARGIN)  # (B, S)
            wrong = torch.zeros_like(mask).masked_scatter(mask, lead <= -MARGIN)
            divergence = right.int().argmin(-1, keepdim=True)  # the first; 0 if there is none
            agreed[rows] = torch.where(right.all(-1), lengths[rows], divergence[:, 0] + 1)
            refuted[rows] = wrong.gather(1, divergence)[:, 0]
            bar.update(len(rows))
    return agreed.cpu().numpy(), refuted.cpu().numpy()


@torch.inference_mode()
def _teacher_forced(model, data: TokenizedDialogs) -> Iterator[tuple[torch.Tensor, ...]]:
    """What the model would say at every place where the assistant speaks, for D dialogs, some of a length at a time.

    Yields rows (B,), mask (B, S) of the N tokens to predict (of token 1 on), logits (N, V) and these tokens (N,).
    """
    first = data.first_trained() - 1
    data = data.to(getattr(model, "device", "cpu"))
    lengths = data.lengths()
    order = lengths.argsort(stable=True)
    batch = lengths[order].cumsum(0) // BATCH_TOKENS.get(lengths.device.type, 2048)
    for rows in order.split(batch.unique_consecutive(return_counts=True)[1].tolist()):
        tokens, mask = data.batch(rows)
        start = int(first[rows.cpu()].min())
        targets, mask = tokens[:, 1:], mask[:, 1:]
        yield rows, mask, model(tokens[:, :-1], start, mask[:, start:]), targets[mask]
