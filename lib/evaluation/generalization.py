"""What a trained model says of people that it was not trained on (Section 5.2)."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import reduce
from operator import add
from pathlib import Path

from lib.agent.tools import SqlTool
from lib.config import RunConfig
from lib.dialogs.tokenizers import Tokenizer
from lib.evaluation.recall import Fact, Recall, measure_recall
from lib.facts.database import write_database
from lib.facts.sampling import load_people, unseen_people


def measure_generalization(model, config: RunConfig, tokenizer: Tokenizer) -> dict[str, float]:
    """Ask a model of `config` about `config.evaluation.unseen_people` people of each kind of
    `lib.facts.sampling.UNSEEN`.

    All of them are in the database that an in-tool model asks, with the people it was trained on. Returns KIND_recall
    and, in-tool, KIND_well_formed, KIND_right_attribute and KIND_right_name (see `request_shares`); these three of as
    many trained people, too. Everything is a share of the questions about these people, all attributes of each.
    """
    n = config.evaluation.unseen_people
    trained, unseen = load_people(config.facts), unseen_people(config.facts, n)
    columns = {}
    with ExitStack() as stack:
        tool = None
        if config.mode == "in-tool":
            database = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "people.sqlite"
            write_database(reduce(add, unseen.values(), trained), database)
            tool = stack.enter_context(SqlTool(database))
        for kind, people in {"trained": trained[:n], **unseen}.items():
            if not people.names:  # of one person alone there is no new pair of names
                continue
            facts = list(people.facts())
            measured = measure_recall(model, facts, tokenizer, tool)
            columns[f"{kind}_recall"] = measured.overall
            if tool is not None:
                columns |= {f"{kind}_{name}": share for name, share in request_shares(measured, facts).items()}
    return columns


def request_shares(measured: Recall, facts: Sequence[Fact]) -> dict[str, float]:
    """Shares of the questions whose first request is well-formed, asks for the right attribute, of the right name."""
    pairs = list(zip(measured.requests, facts, strict=True))
    right = {
        "well_formed": sum(request is not None for request, _ in pairs),
        "right_attribute": sum(request is not None and request.attribute == fact[1] for request, fact in pairs),
        "right_name": sum(request is not None and request.name == fact[0] for request, fact in pairs),
    }
    return {name: count / len(pairs) for name, count in right.items()}
