"""Recall of people that a model was not trained on (Section 5.2)."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from operator import add

from lib.agent.tools import TOOLS, open_tool
from lib.config import RunConfig
from lib.dialogs.tokenizers import Tokenizer
from lib.evaluation.recall import Fact, Recall, measure_recall
from lib.facts.database import temporary_database
from lib.facts.sampling import load_people, unseen_people


def measure_generalization(model, config: RunConfig, tokenizer: Tokenizer) -> dict[str, float]:
    """Ask a model about `config.evaluation.unseen_people` people of each kind of `lib.facts.sampling.UNSEEN`.

    An in-tool model asks a database of all of them and of the people it was trained on. Returns KIND_recall and, for
    in-tool, KIND_well_formed, KIND_right_attribute and KIND_right_name (see `request_shares`); KIND is also
    "trained", for as many trained people. Values are shares of the questions about these people (all attributes).
    """
    n = config.evaluation.unseen_people
    trained, unseen = load_people(config.facts), unseen_people(config.facts, n)
    columns = {}
    everybody = reduce(add, unseen.values(), trained)
    database = temporary_database(everybody) if config.mode in TOOLS else nullcontext()
    with database as path, open_tool(config.mode, path) as tool:
        for kind, people in {"trained": trained[:n], **unseen}.items():
            if not people.names:  # one person alone gives no new pair of names
                continue
            facts = list(people.facts())
            measured = measure_recall(model, facts, tokenizer, tool)
            columns[f"{kind}_recall"] = measured.overall
            if tool is not None:
                columns |= {f"{kind}_{name}": share for name, share in request_shares(measured, facts).items()}
    return columns


def request_shares(measured: Recall, facts: Sequence[Fact]) -> dict[str, float]:
    """Return the shares of first requests: well-formed, with the right attribute, with the right name."""
    pairs = [(request or (None, None), fact) for request, fact in zip(measured.requests, facts, strict=True)]
    right = {
        "well_formed": [request is not None for request in measured.requests],
        "right_attribute": [request[0] == fact[1] for request, fact in pairs],
        "right_name": [request[1] == fact[0] for request, fact in pairs],
    }
    return {name: sum(hits) / len(facts) for name, hits in right.items()}
