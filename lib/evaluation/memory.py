"""What a model knows without its tool, and whether it repeats what its tool says (Section 7, our own)."""

from collections.abc import Mapping, Sequence

import numpy as np

from lib.agent.generation import generate
from lib.agent.tools import ERROR_TEXTS, Outcome
from lib.dialogs.templates import Dialog, Role, Turn, answer, question, tool_call
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
    seed: int = 0,
) -> dict[str, float]:
    """Return how well a model knows facts when it must answer without its tool.

    The answer with the true value competes with answers that have other values of the attribute, drawn from `values`,
    up to `MOST_CANDIDATES` in all. They follow the question or, `after_error`, a request that found nobody.

    Returns `memory`, the share of facts whose true answer is the most probable, and `guess`, the `memory` of a model
    that knows nothing.
    """
    draw = np.random.default_rng(seed)
    dialogs, sizes = [], []
    for name, attribute, value in facts:
        others = sorted({*values[attribute]} - {value})
        others = draw.permutation(others)[: MOST_CANDIDATES - 1].tolist()
        dialogs += [_told(name, attribute, candidate, after_error) for candidate in (value, *others)]
        sizes.append(1 + len(others))
    bits = np.split(bits_of_dialogs(model, tokenize(dialogs, tokenizer)), np.cumsum(sizes)[:-1])
    return {
        "memory": float(np.mean([each[0] < each[1:].min(initial=np.inf) for each in bits])),
        "guess": float(np.mean(1 / np.array(sizes))),
    }


def _told(name: str, attribute: str, value: str, after_error: bool) -> Dialog:
    ending = Turn(Role.ASSISTANT, answer(name, attribute, value))
    return [*_asked(name, attribute, ERROR_TEXTS[Outcome.NO_MATCH] if after_error else None), ending]


def _asked(name: str, attribute: str, result: str | None) -> Dialog:
    """Return the question and, if there is a result, the request that the database answers with it."""
    asked = [Turn(Role.USER, question(name, attribute))]
    if result is None:
        return asked
    return [*asked, Turn(Role.ASSISTANT, tool_call(name, attribute)), Turn(Role.DATABASE, result)]


def measure_belief(model, facts: Sequence[Fact], results: Sequence[str], tokenizer: Tokenizer) -> dict[str, float]:
    """Return how an in-tool model answers when the database responds with `results` to right requests for `facts`.

    `follows` is the share of answers that state the result, `remembers` of those that state the fact's own value.
    """
    prompts = [encode_prompt(_asked(*fact[:2], result), tokenizer) for fact, result in zip(facts, results, strict=True)]
    longest = [64 + 2 * len(tokenizer.encode(answer(*fact) + text)) for fact, text in zip(facts, results, strict=True)]
    turns = [generation.turns(tokenizer) for generation in generate(model, prompts, tokenizer, max_new_tokens=longest)]
    said = [turn[0].text if turn else "" for turn in turns]
    pairs = list(zip(said, facts, results, strict=True))
    return {
        "follows": float(
            np.mean([text == answer(name, attribute, result) for text, (name, attribute, _), result in pairs])
        ),
        "remembers": float(np.mean([text == answer(*fact) for text, fact, _ in pairs])),
    }
