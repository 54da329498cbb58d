"""The transformer with hand-set weights, for questions of any number of hops (our Section 7.2; `lib.model.circuit`).

Two more blocks find out how many hops a question has. The numbers of blocks and weights depend neither on the hops nor
on the facts:

1. *Count* positions, and the assistant's turns so far.
2. *Read* the attribute. Of several requests and answers of the database, find the last ones.
3. *Match.* Each position compares the last letters with "the boss of ", in two steps: heads of the second block compare
   the last three letters, heads of this block combine such results from further back.
4. *Plan.* Attention to the last match in the question gives the number of letters between "Where was " and the
   name. This and the number of turns so far tell what is due: ask for the boss, ask for the attribute, or answer.
5. *Copy* as in `Circuit`. Each request copies what was said last: the name in the question, or the database's answer.

Names must not contain "the boss of".
"""

from collections.abc import Sequence

import numpy as np

from lib.base import InputError
from lib.dialogs.chains import PHRASE
from lib.dialogs.templates import Role, tool_call
from lib.facts.people import ATTRIBUTES, LINK
from lib.model.circuit import _COUNT, _FAR, _SHARP, Circuit, Phrases, _Head, _signs

#: The letters of the phrase, the last first, in rows of equal length, which the third block combines.
_SIDE = 3
_ROWS = [PHRASE.encode()[::-1][start : start + _SIDE] for start in range(0, len(PHRASE), _SIDE)]


class ChainCircuit(Circuit):
    """The construction for chains that end with one of `attributes`. Raises `InputError` if `LINK` is among them."""

    scalars = (
        *("one", "anchor", "position", "square", "last", "database", "seen", "hand_over", "share", "turns"),
        *("matches", "skip", "skipped", "previous", "link", "done", "start", "length", "into_value"),
        *(f"row_{i}" for i in range(len(_ROWS))),
    )
    n_blocks = 5
    late = ("attribute", "done")

    def __init__(self, attributes: Sequence[str] = ATTRIBUTES):
        if LINK in attributes:
            raise InputError(f"a chain cannot end with {LINK!r}: it would read like a longer one")
        super().__init__(attributes)

    def _count(self) -> None:
        super()._count()
        heads, units = self.blocks[0]
        heads.append(_Head("turns", [], [], [self._is(Role.ASSISTANT)], [self.axes.share]))
        # Position p sees a share of turns / p, and the norm multiplies by p.
        units.append((self.axes.anchor / _COUNT, self.axes.share, self.axes.turns))

    def _find_turns(self) -> None:
        """Build the heads that find the last turns of assistant and database, and the request before the latter."""
        heads, one, position = self.blocks[1][0], self.axes.one, self.axes.position
        is_assistant, is_database = self._is(Role.ASSISTANT), self._is(Role.DATABASE)
        for name, role, value, to in (
            ("last assistant token", is_assistant, [position], [self.axes.last]),
            ("last database token", is_database, [position, is_database], [self.axes.database, self.axes.seen]),
        ):
            heads.append(_Head(name, [_SHARP * one], [_FAR * role + position], value, to))
        pointer = self._pointer(self.axes.database)
        self.blocks[2][0].append(_Head("last request", *pointer, [self.axes.last], [self.axes.previous]))

    def _match(self) -> None:
        """Build the rest of the third block: write at each match in the question how far behind `before` it ends."""
        one, position, byte = self.axes.one, self.axes.position, self.axes.byte
        rows = [getattr(self.axes, f"row_{i}") for i in range(len(_ROWS))]
        for back in range(1, _SIDE):
            pointer = self._pointer(position - back * one)
            agrees = [_signs(letters[back]) @ byte for letters in _ROWS]
            self.blocks[1][0].append(_Head(f"{back} letters back", *pointer, agrees, rows))
        heads, units = self.blocks[2]
        found = [row + _signs(letters[0]) @ byte for letters, row in zip(_ROWS, rows, strict=True)]
        for i, form in enumerate(found[1:], start=1):
            pointer = self._pointer(position - i * _SIDE * one)
            heads.append(_Head(f"{i * _SIDE} letters back", *pointer, [form], [self.axes.matches]))
        wrong = 4 * len(PHRASE) * one - (self.axes.matches + found[0]) / 2  # bits
        behind = position + one - self._length("before", 2)
        units.append((one - wrong - self.axes.turns, behind, self.axes.skip))

    def _copy(self) -> None:
        """Build the third block, the fourth, which plans, and the last."""
        self._match()
        heads, units = self.blocks[3]
        axes, one, last, database = self.axes, self.axes.one, self.axes.last, self.axes.database
        heads.append(_Head("last match", [_SHARP * one], [axes.skip], [axes.skip], [axes.skipped]))
        # What was said last, which is copied next: the name in the question, or the database's answer.
        starts = axes.skipped + self._length("before", 2)
        length = last - starts - self._length("after")
        for axis, of_question, of_database in (
            (axes.start, starts, database + one),
            (axes.length, length, last - database - one),
        ):
            units += [(one - axes.seen, of_question, axis), (axes.seen, of_database, axis)]
        # The name in the last request. When the answer is due, that request asked for `attribute`.
        named = axes.previous + one + self._length("call")
        named = named, database - named - self._length("close")
        # How many links are still to be requested (-1 in the answer). While one is due, the attribute is not.
        due = axes.skipped / len(PHRASE) + one - axes.turns
        self._if_positive(due, one, axes.link)
        self._if_positive(-due, one, axes.done)
        for axis in axes.attribute:
            self._if_positive(due, axis, -axis)
        axes.attribute = np.vstack([axes.attribute, axes.link])
        call, close = (text.encode() for text in tool_call("\0", LINK).split("\0"))
        self.phrases.append(Phrases(b"", b"", call, close, b"", b"", b""))  # no question or answer is about a link
        said_last = axes.start, axes.length
        self._speak(last, said_last, named, said_last, axes.done)

    def _if_positive(self, number: np.ndarray, form: np.ndarray, to: np.ndarray) -> None:
        """Add units that write `form` into `to` where an integer, known up to a rounding error of 1/4, is positive."""
        for least, sign in ((1 / 4, 2), (3 / 4, -2)):
            self.blocks[3][1].append((number - least * self.axes.one, sign * form, to))

    def _value_pointer(self, value: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the position to copy from: the database token's until the value begins, then the value's."""
        one, into_value = self.axes.one, self.axes.into_value
        self.blocks[3][1].append((index + one, one, into_value))
        return value - one + into_value, 0 * one
