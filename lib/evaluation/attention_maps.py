"""What attention heads attend to, whether they copy, and what breaks without them."""

import copy
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lib.dialogs.templates import in_tool_dialog
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import encode_dialog
from lib.evaluation.recall import Fact
from lib.model.circuit import phrases
from lib.model.transformer import Transformer, rotate


class Span(NamedTuple):
    """Consecutive tokens that make one part of an in-tool dialog."""

    part: str
    start: int
    stop: int


#: The parts that the assistant says, in the order of an in-tool dialog; `words` are the rest of the answer.
SAID = ("preamble", "attribute", "name asked", "close", "name told", "words", "value told")
#: The parts that are copied, and the parts that they may be copied from.
COPIES = {"name asked": ("name",), "name told": ("name", "name asked"), "value told": ("value",)}


def spans(fact: Fact) -> list[Span]:
    """Return the parts of a fact's in-tool dialog in bytes, from the first token to the end."""
    name, attribute, value = fact
    p, n, v = phrases(attribute), len(name.encode()), len(value.encode())
    preamble = p.call.rindex(attribute.encode())
    lengths = [
        ("question", 1 + len(p.before)), ("name", n), ("question", len(p.after)), ("assistant", 1),
        ("preamble", preamble), ("attribute", len(p.call) - preamble), ("name asked", n), ("close", len(p.close) + 1),
        ("value", v), ("assistant", 1),
        ("words", len(p.opening)), ("name told", n), ("words", len(p.middle)), ("value told", v),
        ("words", len(p.end) + 1),
    ]  # fmt: skip
    bounds = pairwise(accumulate((length for _, length in lengths), initial=0))
    return [Span(part, *bound) for (part, _), bound in zip(lengths, bounds, strict=True)]


def dialog_tokens(fact: Fact) -> torch.Tensor:
    """Return the bytes of a fact's in-tool dialog: (1, S)."""
    return torch.tensor([encode_dialog(in_tool_dialog(*fact), ByteTokenizer())[0]])


@torch.inference_mode()
def attention_weights(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Return how much each position of tokens (B, S) attends to each, in all heads of all blocks: (L, B, H, S, S)."""
    c, S = model.config, tokens.shape[1]
    x = model.embedding(tokens)
    rotary = tuple(table[:S] for table in model.rotary(S, x.dtype))
    future = torch.ones(S, S, dtype=torch.bool, device=x.device).triu(1)
    weights = []
    for block in model.blocks:
        read = block.attention_norm(x)
        projected = block.attention.q_proj(read), block.attention.k_proj(read)
        q, k = (rotate(p, rotary, c.head_dim).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for p in projected)
        k = k.repeat_interleave(c.n_heads // c.kv_heads, dim=1)
        scores = (q @ k.mT / c.head_dim**0.5).masked_fill(future, -torch.inf)
        weights.append(scores.softmax(-1))
        x = block(x, rotary)
    return torch.stack(weights)


def copying(model: Transformer, facts: Iterable[Fact]) -> pd.DataFrame:
    """Measure how much heads attend to the byte that is to be copied, at the positions from which it is predicted.

    A row per copy of `COPIES`, byte, block and head. Columns: word and letter, counted from 0; mass, the attention on
    that byte in all the places it can be taken from; uniform, the mass of a head that attends to all positions alike;
    right, whether the model predicts the byte (teacher-forced).
    """
    rows = []
    for fact in facts:
        tokens = dialog_tokens(fact).to(model.device)
        weights = attention_weights(model, tokens)[:, 0].cpu().numpy()  # (L, H, S, S)
        right = _predicted(model, tokens)
        places = {span.part: span for span in spans(fact)}
        for part, sources in COPIES.items():
            word, letter = 0, 0
            for k, target in enumerate(range(places[part].start, places[part].stop)):
                mass = sum(weights[..., target - 1, places[source].start + k] for source in sources)
                of_all = part, word, letter, len(sources) / target, right[target]
                rows += [(*of_all, *head, float(m)) for head, m in np.ndenumerate(mass)]
                word, letter = (word + 1, 0) if tokens[0, target] == ord(" ") else (word, letter + 1)
    return pd.DataFrame(rows, columns=["copy", "word", "letter", "uniform", "right", "block", "head", "mass"])


@torch.inference_mode()
def _predicted(model: Transformer, tokens: torch.Tensor) -> list[bool]:
    """Return whether the model predicts each of tokens (1, S) from those before; False for the first."""
    return [False, *(model(tokens)[0, :-1].argmax(-1) == tokens[0, 1:]).tolist()]


def accuracy_by_part(model: Transformer, facts: Iterable[Fact]) -> dict[str, float]:
    """Return the teacher-forced accuracy on the tokens of each part of `SAID`."""
    right = {part: [] for part in SAID}
    for fact in facts:
        hits = _predicted(model, dialog_tokens(fact).to(model.device))
        for part, start, stop in spans(fact):
            if part in right:
                right[part] += hits[start:stop]
    return {part: sum(hits) / len(hits) for part, hits in right.items()}


def without_head(model: Transformer, block: int, head: int) -> Transformer:
    """Return a copy of the model in which one head writes nothing."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        columns = slice(head * model.config.head_dim, (head + 1) * model.config.head_dim)
        model.blocks[block].attention.o_proj.weight[:, columns] = 0
    return model
