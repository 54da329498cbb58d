"""Tasks of fine-tuning (`FinetuneConfig.task`): conversations to train on, and how much a model recalls of them."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from random import Random
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.agent.server import Find
from lib.agent.tools import SqlTool
from lib.dialogs.request import parse_request
from lib.dialogs.templates import question, tool_call
from lib.evaluation.recall import Fact
from lib.facts.database import temporary_database
from lib.facts.people import FactsConfig, People
from lib.facts.sampling import unseen_people
from lib.finetune import triviaqa
from lib.finetune.config import ChatMode, FinetuneConfig
from lib.finetune.conversations import chats, look_up_turns, opening, people_of, read_call
from lib.finetune.evaluation import mean_columns
from lib.finetune.generation import look_up_and_reply
from lib.finetune.triviaqa import Question, Store, exact_match, load_questions, read_query

#: Hybrid: how often a fact is in the training data; people get these frequencies in turn.
FREQUENCIES = (1, 2, 4, 8, 16, 32, 64)
#: Facts at least this frequent are answered from memory in the data; rarer ones are looked up.
KNOWN_FROM = 8


class Task(NamedTuple):
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
    with temporary_database(people + unseen) as path, SqlTool(path) as tool:
        yield (_hybrid if config.task == "hybrid" else _facts)(config, people, unseen, tool)


def _sample(people: People, config: FinetuneConfig) -> list[Fact]:
    """Return `config.questions` facts, or all if there are fewer, in their order."""
    facts = list(people.facts())
    return [facts[i] for i in sorted(Random(config.seed).sample(range(len(facts)), min(config.questions, len(facts))))]


def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    mode: ChatMode,
    tool: SqlTool | None = None,
    **options,
) -> list[tuple[bool, bool]]:
    """Return for each fact, (name, attribute, value), whether a chat model looked it up, and whether it recalls it.

    In mode in-tool the model calls the function `find`, in in-tool-text it writes the paper's request, one call a
    question; in-weight there is no tool. The model alone decides what the tool is asked: requests that are trained
    serve only as drafts. A fact is recalled if the last reply `says` the value. If the tool answers with anything but
    the value, the fact is not recalled, and the model does not speak again. options: those of `generate_tokens`, for
    each turn.
    """
    find = Find(tool.attributes if tool else ())

    def look_up(i: int, said: str) -> tuple[bool, list[dict]] | None:
        if mode == "in-tool" and (call := read_call(said)):
            query = find.query_of_call(call)
            result = tool.find(**query).text if query else None
        elif mode == "in-tool-text" and parse_request(said):
            call, result = None, tool(said).text
        else:
            return None
        return (True, look_up_turns(mode, call, said, result)) if result == facts[i][2] else (False, [])

    questions = [(name, attribute) for name, attribute, _ in facts]
    openings = [opening(question(*each), mode, find.declaration) for each in questions]
    # Drafts are requests only, which are long: decoding a short answer takes no longer than checking a draft of it.
    drafts = [tool_call(*each) for each in questions] if mode == "in-tool-text" else ()
    answers = look_up_and_reply(model, tokenizer, openings, look_up, drafts=drafts, **options)
    return [
        (found is not None, found is not False and says(reply, value))
        for (found, reply), (*_, value) in zip(answers, facts, strict=True)
    ]


def says(reply: str, value: str) -> bool:
    """Return whether `value` occurs in `reply`, verbatim and not as part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) is not None


def _measuring(right: Callable[..., list[bool]], trained: Sequence, unseen: Sequence) -> Callable[..., dict]:
    """Return `Task.measure`. right(model, tokenizer, questions, **options): which of them are answered correctly."""

    def measure(model, tokenizer, **options) -> dict:
        recall = mean_columns("recall", right(model, tokenizer, trained, **options))
        of_unseen = mean_columns("recall_unseen", right(model, tokenizer, unseen, **options))
        return recall | {"n_recall": len(trained)} | of_unseen | {"n_unseen": len(unseen)}

    return measure


def _facts(config: FinetuneConfig, people: People, unseen: People, tool: SqlTool) -> Task:
    def right(model, tokenizer, facts: list[Fact], **options) -> list[bool]:
        found = measure_recall(model, tokenizer, facts, config.mode, tool, **options)
        return [recalled and looked_up == (config.mode != "in-weight") for looked_up, recalled in found]

    asked = _sample(people, config), list(unseen.facts())
    return Task(list(chats(people, config.mode)), _measuring(right, *asked))


def _hybrid(config: FinetuneConfig, people: People, unseen: People, tool: SqlTool) -> Task:
    """Return the hybrid task. All prompts offer the tool, or none, so they do not show which facts are looked up."""
    groups = {f: people[i :: len(FREQUENCIES)] for i, f in enumerate(FREQUENCIES)}
    offer = {"tools": [Find(people.attributes).declaration]} if config.mode == "in-tool" else {}
    conversations = [
        chat | offer
        for frequency, group in groups.items()
        for chat in chats(group, "in-weight" if frequency >= KNOWN_FROM else config.mode)
        for _ in range(frequency)
    ]
    asked = {f: _sample(group, config) for f, group in {0: unseen, **groups}.items() if group}

    def measure(model, tokenizer, **options) -> dict:
        """Measure how often the model calls and how often it is right; a call must have found the value."""
        table = []
        for frequency, facts in asked.items():
            found, n = measure_recall(model, tokenizer, facts, config.mode, tool, **options), len(facts)
            by_call = [recalled for looked_up, recalled in found if looked_up]
            shares = {"call_share": len(by_call) / n, "accuracy": sum(recalled for _, recalled in found) / n}
            shares["accuracy_of_calls"] = sum(by_call) / len(by_call) if by_call else None
            table.append({"frequency": frequency, "n": n, **shares})
        of_unseen, *trained = table
        total = sum(row["n"] for row in trained)
        recall = sum(row["accuracy"] * row["n"] for row in trained) / total
        error = (recall * (1 - recall) / total) ** 0.5
        return {"recall": recall, "recall_stderr": error, "recall_unseen": of_unseen["accuracy"], "by_frequency": table}

    return Task(conversations, measure)


def _trivia(config: FinetuneConfig) -> Task:
    """Return the task of general knowledge: in tool, a table answers the trained and the held-out questions."""
    trained = load_questions(config.source, "train", config.n_facts)
    held_out = load_questions(config.source, "validation", config.questions)
    store = Store([*trained, *held_out])

    def look_up(i: int, said: str) -> tuple[str, list[dict]] | None:
        if (query := read_query(said, config.mode)) is not None:
            return (result := store(query)), triviaqa.look_up_turns(query, result, config.mode)

    def right(model, tokenizer, questions: list[Question], **options) -> list[bool]:
        openings = [triviaqa.opening(each.text, config.mode) for each in questions]
        answers = look_up_and_reply(model, tokenizer, openings, look_up, **options)
        return [
            exact_match(reply, each) and (config.mode == "in-weight" or found == each.answer)
            for (found, reply), each in zip(answers, questions, strict=True)
        ]

    conversations = list(triviaqa.trivia_chats(trained, config.mode))
    return Task(conversations, _measuring(right, trained[: config.questions], held_out))
