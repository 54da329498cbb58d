"""What a model knows by heart, and whom it believes, beside models that know or copy by construction."""

import math

import numpy as np
import pytest
import torch
from small_models import build

from lib.config import ModelConfig
from lib.dialogs.templates import answer, in_weight_dialog, question
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import encode_prompt
from lib.evaluation.memory import measure_belief, measure_memory
from lib.facts.sampling import sample_people
from lib.model.circuit import Circuit

TOKENIZER = ByteTokenizer()
PEOPLE = sample_people(6)
FACTS = list(PEOPLE.facts())
RANDOM = build(ModelConfig(d_model=16)).eval()


class Knows:
    """Gives high probability to the answers of some facts, token by token, and equal ones to all else."""

    device = torch.device("cpu")

    def __init__(self, facts):
        self.dialogs = (
            [TOKENIZER.encode(question(*f[:2])) for f in facts],
            [TOKENIZER.encode(answer(*f)) for f in facts],
        )

    def __call__(self, tokens, first, select):
        logits = torch.zeros(int(select.sum()), TOKENIZER.vocab_size)
        for i, (row, t) in enumerate(select.nonzero().tolist()):
            prefix = tokens[row, : first + t + 1].tolist()
            for asked, said in zip(*self.dialogs, strict=True):
                whole = [256, *asked, 257, *said, 259]
                if whole[: len(prefix)] == prefix:
                    logits[i, whole[len(prefix)]] = 5.0
        return logits


def test_a_model_that_knows_facts_remembers_them_all_and_others_no_better_than_a_guess():
    known, unknown = FACTS[:8], FACTS[8:]
    model = Knows(known)
    assert measure_memory(model, known, PEOPLE.columns, TOKENIZER)["memory"] == 1
    measured = measure_memory(model, unknown, PEOPLE.columns, TOKENIZER)
    # Equal probabilities for each byte: the true value is the most probable only if it is the shortest.
    assert measured["memory"] < 0.7


def test_memory_is_that_of_probabilities_computed_one_answer_at_a_time():
    def log_probability(name, attribute, value):
        prompt = encode_prompt(in_weight_dialog(name, attribute, value)[:1], TOKENIZER)
        tokens = torch.tensor([*prompt, *TOKENIZER.encode(answer(name, attribute, value)), TOKENIZER.end])[None]
        logits = RANDOM(tokens[:, :-1]).log_softmax(-1)[0].double()
        return sum(logits[t - 1, tokens[0, t]].item() for t in range(len(prompt), tokens.shape[1]))

    right = []
    for name, attribute, value in FACTS:
        best = max({*PEOPLE.columns[attribute]}, key=lambda other: log_probability(name, attribute, other))
        right.append(best == value)
    measured = measure_memory(RANDOM, FACTS, PEOPLE.columns, TOKENIZER)
    assert measured["memory"] == np.mean(right)
    sizes = [len({*PEOPLE.columns[attribute]}) for _, attribute, _ in FACTS]
    assert measured["guess"] == pytest.approx(np.mean([1 / n for n in sizes]))


def test_candidates_are_bounded_and_the_same_every_time():
    values = {attribute: [*column, *(f"value {i}" for i in range(300))] for attribute, column in PEOPLE.columns.items()}
    measured = [measure_memory(RANDOM, FACTS[:2], values, TOKENIZER) for _ in range(2)]
    assert measured[0] == measured[1] and math.isclose(measured[0]["guess"], 0.01)


def test_after_an_error_the_answer_follows_a_request_in_vain():
    asked = []

    class Listens(Knows):
        def __call__(self, tokens, first, select):
            asked.extend(bytes(t for t in row.tolist() if t < 256).decode() for row in tokens)
            return super().__call__(tokens, first, select)

    measure_memory(Listens(FACTS), FACTS[:1], PEOPLE.columns, TOKENIZER, after_error=True)
    assert asked and all("FIND " in text and "ERROR\nNothing matches" in text for text in asked)


def test_a_circuit_that_copies_believes_whatever_the_database_says():
    false = [(fact[2][::-1] if fact[1] != "birth_date" else "1/1/1111") for fact in FACTS]
    model = Circuit().model()
    assert measure_belief(model, FACTS, false, TOKENIZER)["follows"] == 1
    assert measure_belief(model, FACTS, [fact[2] for fact in FACTS], TOKENIZER) == {"follows": 1, "remembers": 1}


def test_a_model_that_says_nothing_sensible_neither_follows_nor_remembers():
    assert measure_belief(RANDOM, FACTS[:3], ["x"] * 3, TOKENIZER) == {"follows": 0, "remembers": 0}
