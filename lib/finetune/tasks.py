"""Tasks of fine-tuning (`FinetuneConfig.task`): conversations to train on, and how much a model recalls of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from lib.agent.tools import SqlTool
from lib.dialogs.templates import question
from lib.evaluation.recall import Fact
from lib.facts.database import write_database
from lib.facts.people import FactsConfig, People
from lib.facts.sampling import unseen_people
from lib.finetune.config import FinetuneConfig
from lib.finetune.data import chats, find_tool, people_of
from lib.finetune.evaluation import mean_columns, measure_recall, says
from lib.finetune.generation import answer_with_tool, look_up_and_reply
from lib.finetune.triviaqa import Store, exact_match, load_questions, look_up_turns, opening, read_query, trivia_chats
from lib.paths import DATABASE


@dataclass(frozen=True)
class Task:
    """Conversations to train on, and the columns that say how much of them a model recalls, `recall` among them.

    measure(model, tokenizer, **options): options are `max_new_tokens` and `description` of `generate_tokens`.
    """

    conversations: list[dict]
    measure: Callable[..., dict]


@contextmanager
def make_task(config: FinetuneConfig) -> Iterator[Task]:
    """Yield the task of a run; its database lives as long as the context."""
    if config.task == "trivia":
        yield _trivia(config)
        return
    people = people_of(config.n_facts, config.seed)
    # Equally many of each kind: names that are new in part, in full, or as a pair.
    kinds = unseen_people(FactsConfig(n_people=len(people), seed=config.seed), config.unseen_people)
    unseen = reduce(add, (group[i :: len(kinds)] for i, group in enumerate(kinds.values())))
    make = _hybrid if config.task == "hybrid" else _facts
    if config.mode == "in-weight":
        yield make(config, people, unseen, None)
        return
    with TemporaryDirectory() as folder:
        write_database(people + unseen, Path(folder) / DATABASE)
        with SqlTool(Path(folder) / DATABASE) as tool:
            yield make(config, people, unseen, tool)


def _sample(people: People, config: FinetuneConfig) -> list[Fact]:
    """Return `config.questions` facts, or all if there are no more, in their order."""
    facts = list(people.facts())
    return [facts[i] for i in sorted(Random(config.seed).sample(range(len(facts)), min(config.questions, len(facts))))]


def _facts(config: FinetuneConfig, people: People, unseen: People, tool: SqlTool | None) -> Task:
    asked = {"recall": _sample(people, config), "recall_unseen": list(unseen.facts())}

    def measure(model, tokenizer, **options) -> dict:
        columns = {}
        for name, facts in asked.items():
            columns |= mean_columns(name, measure_recall(model, tokenizer, facts, config.mode, tool, **options))
            columns[f"n_{name.removeprefix('recall_')}"] = len(facts)
        return columns

    return Task(list(chats(people, config.mode)), measure)


#: Hybrid: how often a fact is in the training data, person by person in turn.
FREQUENCIES = (1, 2, 4, 8, 16, 32, 64)
#: Facts at least this frequent are answered from memory in the data; rarer ones are looked up.
KNOWN_FROM = 8


def _hybrid(config: FinetuneConfig, people: People, unseen: People, tool: SqlTool) -> Task:
    """Return conversations of both kinds; all offer the tool or none, so no question says whether it is needed."""
    groups = {f: people[i :: len(FREQUENCIES)] for i, f in enumerate(FREQUENCIES)}
    offer = {"tools": [find_tool(people.attributes)]} if config.mode == "in-tool" else {}
    conversations = [
        chat | offer
        for frequency, group in groups.items()
        for chat in chats(group, "in-weight" if frequency >= KNOWN_FROM else config.mode)
        for _ in range(frequency)
    ]
    asked = {f: _sample(group, config) for f, group in {0: unseen, **groups}.items() if group}

    def calls(model, tokenizer, facts: list[Fact], **options) -> dict:
        """Measure how often the model calls, and is right: by a call, if it made one, that really found the value."""
        questions = [question(name, attribute) for name, attribute, _ in facts]
        answers = answer_with_tool(model, tokenizer, questions, config.mode, tool, **options)
        right = [
            (response is not None, says(reply, value) and (response is None or response.text == value))
            for (response, reply), (*_, value) in zip(answers, facts, strict=True)
        ]
        by_call = [is_right for called, is_right in right if called]
        return {
            "n": len(facts),
            "call_share": len(by_call) / len(facts),
            "accuracy": sum(is_right for _, is_right in right) / len(facts),
            "accuracy_of_calls": sum(by_call) / len(by_call) if by_call else None,
        }

    def measure(model, tokenizer, **options) -> dict:
        table = [{"frequency": f, **calls(model, tokenizer, facts, **options)} for f, facts in asked.items()]
        trained = [row for row in table if row["frequency"]]
        total = sum(row["n"] for row in trained)
        recall = sum(row["accuracy"] * row["n"] for row in trained) / total
        return {
            "recall": recall,
            "recall_stderr": (recall * (1 - recall) / total) ** 0.5,
            "recall_unseen": table[0]["accuracy"],
            "by_frequency": table,
        }

    return Task(conversations, measure)


def _trivia(config: FinetuneConfig) -> Task:
    """Return questions of general knowledge; in tool a table has the answers, to the held-out questions as well."""
    trained = load_questions(config.source, "train", config.n_facts)
    held_out = load_questions(config.source, "validation", config.questions)
    store = Store([*trained, *held_out])

    def look_up(i: int, said: str) -> tuple[str, list[dict]] | None:
        query = read_query(said, config.mode)
        return None if query is None else (result := store(query), look_up_turns(query, result, config.mode))

    def measure(model, tokenizer, **options) -> dict:
        columns = {}
        for name, questions in (("recall", trained[: config.questions]), ("recall_unseen", held_out)):
            openings = [opening(each.text, config.mode) for each in questions]
            answers = look_up_and_reply(model, tokenizer, openings, look_up, **options)
            right = (
                exact_match(reply, each) and (config.mode == "in-weight" or found == each.answer)
                for (found, reply), each in zip(answers, questions, strict=True)
            )
            columns |= mean_columns(name, right) | {f"n_{name.removeprefix('recall_')}": len(questions)}
        return columns

    return Task(list(trivia_chats(trained, config.mode)), measure)
