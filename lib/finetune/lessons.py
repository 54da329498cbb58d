"""What a model is to learn (`FinetuneConfig.task`): its conversations, and how much of it a checkpoint knows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from lib.agent.tools import SqlTool
from lib.dialogs.templates import question
from lib.facts.database import write_database
from lib.facts.people import FactsConfig, People
from lib.facts.sampling import unseen_people
from lib.finetune.config import FinetuneConfig
from lib.finetune.data import ChatMode, chats, find_tool, people_of
from lib.finetune.evaluation import FACT_TOKENS, estimate, measure_recall, says
from lib.finetune.generation import answer_with_tool, look_up_and_reply
from lib.finetune.protocol import query_of_call, read_query
from lib.finetune.triviaqa import Store, exact_match, load_questions, look_up_turns, opening, trivia_chats, write_store
from lib.paths import DATABASE


@dataclass(frozen=True)
class Lesson:
    """Conversations to train on, and the columns that say how much of them a model knows, `recall` among them.

    measure(model, tokenizer, **options): options are `max_new_tokens` and `description` of `generate_tokens`.
    """

    conversations: list[dict]
    measure: Callable[..., dict]


@contextmanager
def lesson(config: FinetuneConfig, directory: Path | None) -> Iterator[Lesson]:
    """What a run learns. directory: where its database goes, open meanwhile; None where nobody will measure."""
    if config.task == "trivia":
        with ExitStack() as stack:
            yield _trivia(config, stack)
        return
    people = people_of(config.n_facts, config.seed)
    strangers = reduce(add, _strangers(config).values())
    tool = None
    if directory is not None and config.mode != "in-weight":
        write_database(people + strangers, directory / DATABASE)
        tool = SqlTool(directory / DATABASE)
    make = _hybrid if config.task == "hybrid" else _facts
    try:
        yield make(config, people, strangers, tool)
    finally:
        if tool is not None:
            tool.close()


def _strangers(config: FinetuneConfig) -> dict[str, People]:
    """People nobody is trained on, as many of each kind: names that are new in part, in all, or as a pair."""
    kinds = unseen_people(FactsConfig(n_people=config.n_facts // 4, seed=config.seed), config.unseen_people)
    return {kind: people[i :: len(kinds)] for i, (kind, people) in enumerate(kinds.items())}


# ---- Facts


def _facts(config: FinetuneConfig, people: People, strangers: People, tool: SqlTool | None) -> Lesson:
    trained, unseen = _sample(people, config.questions, config.seed), list(strangers.facts())

    def measure(model, tokenizer, **options) -> dict:
        columns = {}
        for name, facts in (("recall", trained), ("recall_unseen", unseen)):
            columns |= measure_recall(model, tokenizer, facts, config.mode, tool, **options).columns(name)
            columns[f"n_{name.removeprefix('recall_')}"] = len(facts)
        return columns

    return Lesson(list(chats(people, config.mode)), measure)


def _sample(people: People, n: int, seed: int) -> list[tuple[str, str, str]]:
    """`n` of the facts, or all if there are no more, in their order."""
    facts = list(people.facts())
    return [facts[i] for i in sorted(Random(seed).sample(range(len(facts)), min(n, len(facts))))]


# ---- What is frequent in weights, the rest by tool

#: How often a fact is in the training data: person by person in turn.
FREQUENCIES = (1, 2, 4, 8, 16, 32, 64)
#: From here on the data answer at once; what is rarer is looked up in them.
KNOWN_FROM = 8


def _hybrid(config: FinetuneConfig, people: People, strangers: People, tool: SqlTool | None) -> Lesson:
    """Conversations of both kinds, all offering the tool or none: nothing in a question says whether it is needed."""
    groups = {f: people[i :: len(FREQUENCIES)] for i, f in enumerate(FREQUENCIES)}
    offer = {"tools": [find_tool(people.attributes)]} if config.mode == "in-tool" else {}
    conversations = [
        chat | offer
        for frequency, group in groups.items()
        for chat in chats(group, "in-weight" if frequency >= KNOWN_FROM else config.mode)
        for _ in range(frequency)
    ]
    asked = {f: _sample(group, config.questions, config.seed) for f, group in {0: strangers, **groups}.items() if group}

    def measure(model, tokenizer, **options) -> dict:
        table = [
            {"frequency": f, **_calls(model, tokenizer, facts, config.mode, tool, **options)}
            for f, facts in asked.items()
        ]
        trained = [row for row in table if row["frequency"]]
        total = sum(row["n"] for row in trained)
        recall = sum(row["accuracy"] * row["n"] for row in trained) / total
        return {
            "recall": recall,
            "recall_stderr": (recall * (1 - recall) / total) ** 0.5,
            "recall_unseen": table[0]["accuracy"],
            "by_frequency": table,
        }

    return Lesson(conversations, measure)


def _calls(model, tokenizer, facts: Sequence[tuple[str, str, str]], mode: ChatMode, tool: SqlTool, **options) -> dict:
    """How often a model calls the tool, and is right: by a call, if it made one, that really found the value."""
    questions = [question(name, attribute) for name, attribute, _ in facts]
    answers = answer_with_tool(model, tokenizer, questions, mode, tool, **{"max_new_tokens": FACT_TOKENS} | options)
    called = [answer.response is not None for answer in answers]
    right = [
        says(answer.reply, value) and (answer.response is None or answer.response.text == value)
        for answer, (*_, value) in zip(answers, facts, strict=True)
    ]
    by_call = [yes for yes, call in zip(right, called, strict=True) if call]
    return {
        "n": len(facts),
        "call_share": sum(called) / len(facts),
        "accuracy": sum(right) / len(facts),
        "accuracy_of_calls": sum(by_call) / len(by_call) if by_call else None,
    }


# ---- Trivia


def _trivia(config: FinetuneConfig, stack: ExitStack) -> Lesson:
    """Questions of general knowledge: in tool a table is asked that has the answers, to the others as well."""
    trained = load_questions(config.source, "train", config.n_facts)
    others = load_questions(config.source, "validation", config.questions)
    table = Path(stack.enter_context(TemporaryDirectory())) / "questions.sqlite"
    write_store([*trained, *others], table)
    store = stack.enter_context(Store(table))

    def look_up(i: int, said: str, call: dict | None) -> tuple[str, list[dict]] | None:
        query = read_query(said) if call is None else query_of_call(call)
        return None if query is None else (result := store(query), look_up_turns(query, result, config.mode))

    def measure(model, tokenizer, **options) -> dict:
        columns = {}
        for name, questions in (("recall", trained[: config.questions]), ("recall_unseen", others)):
            openings = [opening(each.text, config.mode) for each in questions]
            settings = {"max_new_tokens": FACT_TOKENS} | options
            answers = look_up_and_reply(model, tokenizer, openings, look_up, **settings)
            right = (
                exact_match(reply, each) and (config.mode == "in-weight" or found == each.answer)
                for (found, reply), each in zip(answers, questions, strict=True)
            )
            columns |= estimate(right).columns(name) | {f"n_{name.removeprefix('recall_')}": len(questions)}
        return columns

    return Lesson(list(trivia_chats(trained, config.mode)), measure)
