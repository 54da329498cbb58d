"""Factual recall: the share of questions that a model answers with exactly the right sentence (Section 5).

The test "ends with the answer" would accept 11/1/1950 for 1/1/1950, so the whole final turn must match. In-tool, the
answer counts only if a query that really ran against the database retrieved the value.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib.agent.generation import Generation, generate
from lib.agent.tools import Tool
from lib.base import InputError
from lib.dialogs.chains import Fact
from lib.dialogs.request import Request
from lib.dialogs.templates import Dialog, Role, in_weight_dialog
from lib.dialogs.tokenizers import Tokenizer
from lib.dialogs.tokens import TokenizedDialogs, encode_prompt, tokenize
from lib.progress import progress

#: If the gap between the two largest logits is smaller, teacher forcing and cached decoding may disagree: then decode.
#: In float32 their logits differ by 1e-4 at most where logits reach 35.
MARGIN = 1e-3

#: How many unexpected tokens a model may spend, for example on a failed request and the error that comes back.
DETOUR = 64
#: About how many tokens are verified together: as many as fit into a core's cache, or fill a GPU.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
#: How many questions are decoded together: a GPU takes as long for few as for many.
BATCH_ROWS = {"cpu": 256, "cuda": 2048}


class Recall(NamedTuple):
    """The verdict on every question, in the order asked."""

    correct: np.ndarray  # (Q,) bool
    attributes: np.ndarray  # (Q,) str
    decoded: int  # how many questions had to be decoded token by token
    #: In-tool: the first request of each question, None if it is malformed or missing.
    requests: Sequence[Request | None]
    dialogs: TokenizedDialogs | None = None  # the expected ones

    @property
    def overall(self) -> float:
        """The share of all questions, in [0, 1]."""
        return float(self.correct.mean())

    def by_attribute(self) -> dict[str, float]:
        """Return the share of the questions about each attribute, in [0, 1]."""
        return {str(a): float(self.correct[self.attributes == a].mean()) for a in np.unique(self.attributes)}

    def columns(self) -> dict[str, float]:
        """Return the columns of a row: recall, and recall_ATTRIBUTE of each attribute."""
        return {"recall": self.overall, **{f"recall_{name}": share for name, share in self.by_attribute().items()}}


def measure_recall(
    model,
    facts: Sequence[Fact | Sequence[Fact]],
    tokenizer: Tokenizer,
    tool: Tool | None = None,
    *,
    method: Literal["verify", "decode"] = "verify",
    description: str | None = None,
) -> Recall:
    """Ask a model about `facts`, greedily; if there is a `tool`, one of `lib.agent.tools.TOOLS`, it must be used.

    A sequence of facts in place of one is a question of several hops (`lib.dialogs.chains`): each must be looked up.
    Without a tool, such a question is an `InputError`.

    A generation `DETOUR` tokens longer than the whole expected dialog is cut off and counts as wrong: the limit does
    not depend on other questions.

    Greedy decoding reproduces an expected dialog up to the first position where the assistant speaks and the argmax is
    another token. `verify` finds this position by one teacher-forced pass and decodes only from there; in-weight it
    decodes only where the pass is too close to call. `decode` decodes everything: the reference. Both assume float32.
    """
    chains = [[fact] if isinstance(fact[0], str) else fact for fact in facts]
    if tool is None and any(len(chain) > 1 for chain in chains):
        raise InputError("a question of more than one hop needs a tool")
    dialogs = [in_weight_dialog(*chain[0]) if tool is None else tool.dialog(chain) for chain in chains]
    prompts = [encode_prompt(dialog[:1], tokenizer) for dialog in dialogs]
    data = tokenize(dialogs, tokenizer)
    agreed, refuted = np.array([len(prompt) for prompt in prompts]), np.zeros(len(chains), dtype=bool)
    if method == "verify":
        agreed, refuted = _verify(model, data, description)
    # Without a tool the first turn is the last: once it diverges it cannot become the expected sentence.
    correct = (agreed == data.lengths().numpy()) & (tool is None)
    undecided = np.flatnonzero(~correct & ~(refuted & (tool is None)))
    starts = data.offsets.tolist()
    known = [data.values[starts[i] + len(prompts[i]) : starts[i] + agreed[i]].tolist() for i in undecided]
    generations = generate(
        model,
        [prompts[i] for i in undecided],
        tokenizer,
        tool,
        known=known,
        max_new_tokens=(data.lengths() + DETOUR)[undecided].tolist(),
        batch_size=BATCH_ROWS.get(model.device.type, 256),
        description=description and f"{description}, decoding",
    )
    for i, generation in zip(undecided, generations, strict=True):
        correct[i] = is_correct(generation, dialogs[i], tokenizer, tool)
    decoded = sum(g.tokens != tokens for g, tokens in zip(generations, known, strict=True))
    requests = [tool.parse(g.calls[0].turn) if g.calls else None for g in generations] if tool is not None else []
    return Recall(correct, np.array([attribute for *_, (_, attribute, _) in chains]), decoded, requests, data)


def is_correct(generation: Generation, dialog: Dialog, tokenizer: Tokenizer, tool: Tool | None) -> bool:
    """Return whether a greedy generation ends as `dialog` does and, with a tool, looked up every value in `dialog`.

    A value counts as retrieved if a request equal to the one in `dialog` returned it.
    """
    assistant = tokenizer.role_ids[Role.ASSISTANT]  # the prompt ends with it
    final_turn = [assistant, *tokenizer.encode(dialog[-1].text), tokenizer.end]
    said = [assistant, *generation.tokens][-len(final_turn) :] == final_turn
    if tool is None or not said:
        return said
    retrieved = {(tool.parse(call.turn), call.response.text) for call in generation.calls if call.response.ok}
    lookups = [pair for pair in pairwise(dialog) if pair[1].role == Role.DATABASE]
    return all((tool.parse(request.text), value.text) in retrieved for request, value in lookups)


def bits_of_dialogs(model, data: TokenizedDialogs) -> np.ndarray:
    """Return minus log2 of the probability that the model gives to the assistant's tokens of each dialog: (D,) bits.

    A certain answer costs 0 bits; one of V equally likely values costs log2 V. So the weights hold at least the entropy
    of the answers minus these bits (Section 4 bounds what they hold). A model that cannot spell the values yet is
    charged for the spelling, too.
    """
    bits = torch.zeros(len(data), dtype=torch.float64)
    for rows, mask, logits, target in _teacher_forced(model, data):
        surprise = F.cross_entropy(logits, target, reduction="none").cpu().double() / math.log(2)
        bits[rows.cpu()] = torch.zeros(mask.shape).double().masked_scatter(mask.cpu(), surprise).sum(-1)
    return bits.numpy()


def _verify(model, data: TokenizedDialogs, description: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Find where the model leaves each of D dialogs, by one teacher-forced pass.

    Returns (D,) how many tokens of the dialog greedy decoding surely reproduces, or the tool provides; and (D,) whether
    the next token surely differs from the dialog's.
    """
    lengths = data.lengths().to(model.device)
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
    """Run the model over D dialogs, those of similar length together.

    Yields rows (B,), the mask (B, S) of the N trained tokens (from token 1 on), logits (N, V) and these tokens (N,).
    """
    first = data.first - 1
    data = data.to(model.device)
    lengths = data.lengths()
    order = lengths.argsort(stable=True)
    batch = lengths[order].cumsum(0) // BATCH_TOKENS.get(lengths.device.type, 2048)
    for rows in order.split(batch.unique_consecutive(return_counts=True)[1].tolist()):
        tokens, mask = data.batch(rows)
        start = int(first[rows.cpu()].min())
        targets, mask = tokens[:, 1:], mask[:, 1:]
        yield rows, mask, model(tokens[:, :-1], start, mask[:, start:]), targets[mask]
