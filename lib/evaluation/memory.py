"""What a model knows without its tool, and whether it repeats what its tool says (Section 7, our own)."""

from collections.abc import Mapping, Sequence

import numpy as np

from lib.agent.generation import generate
from lib.agent.tools import ERROR_TEXTS, Outcome
from lib.dialogs.templates import answer, in_tool_dialog, in_weight_dialog
from lib.dialogs.tokenizers import Tokenizer
from lib.dialogs.tokens import encode_prompt, tokenize
from lib.evaluation.recall import Fact, bits_of_dialogs

#: Maximum number of candidate values, the true one included.
MOST_CANDIDATES = 100


def measure_memory(
    model,
    facts: Sequence[Fact],
    values: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    *,
    after_error: bool = False,
) -> dict[str, float]:
    """Return how well a model knows facts when it must answer without its tool.

    The answer with the true value competes with answers that have other values of the attribute, drawn from `values`,
    up to `MOST_CANDIDATES` in all. They follow the question or, `after_error`, a request that found nobody.

    Returns `memory`, the share of facts whose true answer is the most probable, and `guess`, the `memory` of a model
    that knows nothing.
    """
    draw = np.random.default_rng(0)
    dialogs, sizes = [], []
    for name, attribute, value in facts:
        others = sorted({*values[attribute]} - {value})
        others = draw.permutation(others)[: MOST_CANDIDATES - 1].tolist()
        told = [in_weight_dialog(name, attribute, candidate) for candidate in (value, *others)]
        if after_error:
            *asked, _ = in_tool_dialog(name, attribute, ERROR_TEXTS[Outcome.NO_MATCH])
            told = [[*asked, answered] for _, answered in told]
        dialogs += told
        sizes.append(1 + len(others))
    bits = np.split(bits_of_dialogs(model, tokenize(dialogs, tokenizer)), np.cumsum(sizes)[:-1])
    return {
        "memory": float(np.mean([each[0] < each[1:].min(initial=np.inf) for each in bits])),
        "guess": float(np.mean(1 / np.array(sizes))),
    }


def measure_belief(model, facts: Sequence[Fact], results: Sequence[str], tokenizer: Tokenizer) -> dict[str, float]:
    """Return how an in-tool model answers when the database responds with `results` to right requests for `facts`.

    `follows` is the share of answers that state the result, `remembers` of those that state the fact's own value.
    """
    dialogs = [in_tool_dialog(*fact[:2], result) for fact, result in zip(facts, results, strict=True)]
    prompts = [encode_prompt(dialog[:-1], tokenizer) for dialog in dialogs]
    longest = [64 + 2 * len(tokenizer.encode(answer(*fact) + text)) for fact, text in zip(facts, results, strict=True)]
    turns = [generation.turns(tokenizer) for generation in generate(model, prompts, tokenizer, max_new_tokens=longest)]
    said = [turn[0].text if turn else "" for turn in turns]
    return {
        "follows": float(np.mean([text == dialog[-1].text for text, dialog in zip(said, dialogs, strict=True)])),
        "remembers": float(np.mean([text == answer(*fact) for text, fact in zip(said, facts, strict=True)])),
    }
