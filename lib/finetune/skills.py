"""General skills as conversations: what the embedded base model of Section 6 learns before it is told any fact.

Plain questions (`questions`) and the use of functions (`tool_use`) are drawn from here. Nothing of the facts of Section
5 occurs: no name, no value, no question about a person, no function `find`. A tenth of all questions, by a hash of
their text, is never trained on.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from zlib import crc32

from lib.facts import FIRST_NAMES, LAST_NAMES, VALUES
from lib.finetune.questions import QUESTIONS, Item, Random
from lib.finetune.tool_use import TOOL_USE

#: One question in so many is held out.
HELD_OUT = 10
#: So many times the same held-out questions again: there are no others.
_TRIES = 200


def conversations(n: int, seed: int, only: str | None = None) -> Iterator[dict]:
    """`n` conversations to train on, rows of `lib.finetune.data`; the first ones are the same whatever `n` is.

    They are of the skill `only`, or of all in proportion to `WEIGHTS`.
    """
    for skill, r in _draw_skills(n, seed, only):
        yield _draw(SKILLS[skill], r, held_out=False)


def prompts(n: int, seed: int) -> list[tuple[str, dict]]:
    """`n` held-out conversations with their skill, each up to the user's question."""
    drawn = []
    for skill, r in _draw_skills(n, seed):
        row = _draw(SKILLS[skill], r, held_out=True)
        drawn.append((skill, row | {"messages": row["messages"][: _question_at(row) + 1]}))
    return drawn


def multiple_choice(n: int, seed: int) -> list[dict]:
    """`n` different held-out questions in HellaSwag's form: `ctx`, four `endings`, the true one's `label`, `skill`.

    `QUESTIONS` take turns; a skill whose held-out questions are used up drops out.
    """
    rows, asked, left, r = [], set(), list(QUESTIONS), Random(f"choice {seed}")
    while len(rows) < n:
        for skill in tuple(left):
            drawn = (_draw_item(QUESTIONS[skill], r, held_out=True) for _ in range(_TRIES))
            item = next((item for item in drawn if item.question not in asked), None)
            if item is None:
                left.remove(skill)
                continue
            asked.add(item.question)
            endings = [item.answer, *r.sample(item.wrong, 3)]
            r.shuffle(endings)
            label = endings.index(item.answer)
            rows.append({"ctx": item.question, "endings": endings, "label": label, "skill": skill})
    return rows[:n]


# ---- What may be said, and when

_WORD = re.compile(r"[^\W\d_]+")
_NAMES_AND_VALUES = [
    *FIRST_NAMES.values(),
    *LAST_NAMES.values(),
    *(VALUES[key] for key in VALUES if key != "birth_date"),
]
#: Every word of a name or a value of Section 5. Dates are told by their form.
FACT_WORDS = frozenset(word for texts in _NAMES_AND_VALUES for text in texts for word in _WORD.findall(text))
_DATE = re.compile(r"\d/\d+/\d{4}")


def tells_facts(text: str) -> bool:
    """Whether `text` has a word of any name or value of Section 5, or a date as it writes them."""
    return _DATE.search(text) is not None or not FACT_WORDS.isdisjoint(_WORD.findall(text))


def _is_held_out(question: str) -> bool:
    return crc32(question.encode()) % HELD_OUT == 0


def _draw_skills(n: int, seed: int, only: str | None = None) -> Iterator[tuple[str, Random]]:
    """A skill for each of `n` conversations, and the random numbers to make it of."""
    r = Random(f"{only} {seed}")
    names = [only] if only else list(SKILLS)
    weights = [WEIGHTS.get(name, 1) for name in names]
    for _ in range(n):
        yield r.choices(names, weights)[0], r


def _question_at(row: dict) -> int:
    return next(i for i, message in enumerate(row["messages"]) if message["role"] == "user")


def _draw(make: Callable[[Random], dict], r: Random, held_out: bool) -> dict:
    """The first conversation drawn that is held out, or is not, and tells no facts."""
    while True:
        row = make(r)
        question = row["messages"][_question_at(row)]["content"]
        if _is_held_out(question) == held_out and not any(tells_facts(m["content"]) for m in row["messages"]):
            return row


def _draw_item(make: Callable[[Random], Item], r: Random, held_out: bool) -> Item:
    """The first question drawn that is held out, or is not, and none of whose answers tells facts."""
    while True:
        item = make(r)
        if _is_held_out(item.question) == held_out and not tells_facts(" ; ".join([*item[:2], *item.wrong])):
            return item


# ---- All skills


def _plain(make: Callable[[Random], Item], r: Random) -> dict:
    item = make(r)
    return {"messages": [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}]}


#: Every skill, and what makes a conversation of it.
SKILLS: dict[str, Callable[[Random], dict]] = {
    **{name: partial(_plain, make) for name, make in QUESTIONS.items()},
    **TOOL_USE,
}
#: How often each is trained, 1 where nothing is said: to copy and to use tools takes most of the practice.
WEIGHTS = {"copying": 4, "search": 3, "search as text": 3, "functions": 4, "inspection": 4}
