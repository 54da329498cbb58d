"""A transformer whose weights are set by hand, not trained: with a tool it recalls any number of facts (Section 4).

It is a `Transformer` of three blocks, of width O(|A|) and with O(|A|^2) parameters for attributes A, and its weights
hold no fact. It copies by position, never by content, so any name will do:

1. *Count.* Attention is uniform, so position p sees 1/p of the first token, in a coordinate so large that the norm
   divides by it. That turns a constant 1 into p; products in the feed-forward give p^2.
2. *Read.* Heads look at the places where the questions differ, at the first and the last assistant token, and at the
   database token. The feed-forward finds the attribute, and says the text that does not depend on it.
3. *Copy.* Three heads point at a byte: a query (2x, -1) and a key (p, p^2) give the score x^2 - (p - x)^2, largest at
   p = x. The feed-forward says the rest of the text, louder than the copied bytes.

Linear forms of the residual stream are vectors of its width; positions p count from 1. The construction is exact: a
norm is the identity if one coordinate is a huge constant, silu(64 z) / 64 is max(z, 0) for integers z, and rotary pairs
of frequency 1e-15 or less do not turn. float32 is precise enough for about 1,000 tokens of dialog, float16 for none.
"""

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from os.path import commonprefix
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from lib.base import InputError
from lib.config import ModelConfig
from lib.dialogs.templates import Role, answer, question, tool_call
from lib.dialogs.tokenizers import ByteTokenizer
from lib.facts.people import ATTRIBUTES
from lib.model.transformer import Transformer

#: The length of every embedding; the first norm divides by it.
_NORM = 3.0
#: In units of the embeddings: position p sees _COUNT / p of the first token; later norms divide by _ANCHOR.
_COUNT, _ANCHOR = 2.0**24, 2.0**50
#: How steep: softmax picks one key where scores differ by _SHARP; silu(_STEEP z) / _STEEP is max(z, 0).
_SHARP, _STEEP = 32.0, 64.0
#: More than any position: closes a gate, and makes one kind of token preferred to any other.
_FAR = 2.0**13
#: More than the square of any distance by which a pointer of the last block is off.
_FAR_SQUARED = 2.0**18
#: Scale of the logits of name, value and text. When one of them is due, the others are zero or weaker, so it wins.
_NAME, _VALUE, _TEXT = 1.0, 2.0, 4.0

_SPECIAL, _END = ByteTokenizer().role_ids, ByteTokenizer().end


class Phrases(NamedTuple):
    """The bytes around name and value in question, request and answer about one attribute."""

    before: bytes  # question: before name after
    after: bytes
    call: bytes  # request: call name close
    close: bytes
    opening: bytes  # answer: opening name middle value end
    middle: bytes
    end: bytes


def phrases(attribute: str) -> Phrases:
    """Cut the templates of one attribute. A template that holds name or value more than once is an `InputError`."""
    texts = question("\0", attribute), tool_call("\0", attribute), answer("\0", attribute, "\1")
    if [re.sub("[^\0\1]", "", text) for text in texts] != ["\0", "\0", "\0\1"]:
        raise InputError(f"the templates of {attribute!r} must hold the name once, the answer then the value once")
    return Phrases(*(part.encode() for text in texts for part in re.split("[\0\1]", text)))


def made_up_attributes(n: int) -> list[str]:
    """Return names of `n` attributes, eight letters each; the first ones are the same for any n."""
    digests = (hashlib.sha256(str(i).encode()).hexdigest()[:8] for i in range(n))
    return [digest.translate(str.maketrans("0123456789", "ghijklmnop")) for digest in digests]


def telling_places(befores: Sequence[bytes]) -> list[int]:
    """Return few positions that tell the texts apart: any two differ at one of them, within both texts.

    If one text begins with another it is an `InputError`: a name could continue the shorter one like the longer one.
    """
    for a, b in pairwise(sorted(befores)):
        if b.startswith(a):
            raise InputError(f"the question {b.decode()!r}... begins like {a.decode()!r}...: no place tells them apart")
    codes = np.array(list(zip_longest(*befores, fillvalue=-1))).T  # (A, width)
    differ = (codes[:, None] != codes) & (np.minimum(codes[:, None], codes) >= 0)  # (A, A, width)
    left = ~np.eye(len(befores), dtype=bool)
    places = []
    while left.any():
        places.append(int(differ[left].sum(axis=0).argmax()))
        left &= ~differ[..., places[-1]]
    return sorted(places)


class _Head(NamedTuple):
    """One head: the score of a key is the product of the forms in `query` and `key`; `value` goes into `to`."""

    name: str
    query: list[np.ndarray]
    key: list[np.ndarray]
    value: list[np.ndarray] | np.ndarray
    to: list[np.ndarray] | np.ndarray


class Circuit:
    """The construction for some attributes: what each head and each hidden unit reads and writes.

    `model` makes the weights; `config` and `n_params` need none. No attributes, and attributes whose questions cannot
    be told apart, are an `InputError`.
    """

    #: One-dimensional axes of the residual stream.
    scalars = ("one", "anchor", "position", "square", "first", "last", "database", "seen", "hand_over")
    n_blocks = 3
    #: Axes that the second block's feed-forward cannot read yet.
    late = ("attribute",)

    def __init__(self, attributes: Sequence[str] = ATTRIBUTES):
        if not attributes:
            raise InputError("there are no attributes: give at least one")
        self.phrases = [phrases(attribute) for attribute in attributes]
        self.places = telling_places([each.before for each in self.phrases])
        #: The residual stream. A byte is 8 signs; the first telling letter is kept in `said` until something is said.
        letters = 8 * max(0, len(self.places) - 1)
        sizes = {"byte": 8, "role": 3, "letters": letters, "attribute": len(attributes), "said": 8}
        axes = np.eye(sum(sizes.values()) + len(self.scalars))
        *groups, scalar = np.split(axes, np.cumsum(list(sizes.values())))
        self.axes = SimpleNamespace(**dict(zip([*sizes, *self.scalars], [*groups, *scalar], strict=True)))
        #: Heads and hidden units of each block. For a unit (gate, up, to), max(gate, 0) * up goes to `to`.
        self.blocks: list[tuple[list[_Head], list[tuple]]] = [([], []) for _ in range(self.n_blocks)]
        self._count()
        self._read()
        self._find_turns()
        self._copy()

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """Block and head, counted from 0, by the name of the head."""
        return {head.name: (b, h) for b, (heads, _) in enumerate(self.blocks) for h, head in enumerate(heads)}

    @property
    def config(self) -> ModelConfig:
        """The smallest model with room for stream, heads and hidden units."""
        n_heads = max(len(heads) for heads, _ in self.blocks)
        n_units = max(len(units) for _, units in self.blocks)
        width = max(len(self.axes.one), 8 * n_heads, -(-n_units // 4))
        width += -width % (2 * n_heads)
        return ModelConfig(d_model=width, n_layers=len(self.blocks), n_heads=n_heads, rope_theta=1e30)

    @property
    def n_params(self) -> int:
        return self.config.n_params

    def model(self) -> Transformer:
        """Return the model with its weights."""
        model = Transformer(self.config).requires_grad_(False).eval()
        head_dim, root = self.config.head_dim, self.config.d_model**0.5
        for parameter in model.parameters():
            parameter.fill_(0 if parameter.dim() == 2 else _ANCHOR / root)
        # Embeddings have the length _NORM, except for the end, which nothing reads; a logit compares signs of bytes.
        bits, roles = _signs(range(256)), np.sqrt(8) * self.axes.role
        embeddings = self.axes.one + np.concatenate([bits @ self.axes.byte, roles, 0 * roles[:1]])
        silent, hand_over = np.zeros((2, len(self.axes.one))), 8 * self.axes.hand_over
        readings = 8 * np.concatenate([bits @ self.axes.said, silent, [hand_over, -hand_over]])
        _put(model.embedding.weight, 0, embeddings)
        _put(model.output.weight, 0, readings)
        for block, (heads, units) in zip(model.blocks, self.blocks, strict=True):
            for h, head in enumerate(heads):
                start = h * head_dim
                still = start + head_dim // 2 - len(head.query)  # the last pairs do not turn
                _put(block.attention.q_proj.weight, still, head_dim**0.5 * np.array(head.query[::-1]))
                _put(block.attention.k_proj.weight, still, head.key[::-1])
                _put(block.attention.v_proj.weight, start, head.value)
                _put(block.attention.o_proj.weight.T, start, head.to)
            gates, ups, outputs = map(np.array, zip(*units, strict=True))
            _put(block.ffn.gate_proj.weight, 0, _STEEP * gates)
            _put(block.ffn.up_proj.weight, 0, ups / _STEEP)
            _put(block.ffn.down_proj.weight.T, 0, outputs)
        model.blocks[0].attention_norm.weight.fill_((_NORM**2 / self.config.d_model + self.config.norm_eps) ** 0.5)
        model.blocks[0].ffn_norm.weight.fill_(_COUNT / root)
        return model

    def _is(self, role: Role) -> np.ndarray:
        """Return the form that is 1 at the tokens of a role, else 0."""
        return self.axes.role[_SPECIAL[role] - 256] / np.sqrt(8)

    def _count(self) -> None:
        """Build the first block."""
        heads, units = self.blocks[0]
        one, anchor = self.axes.one, self.axes.anchor
        heads.append(_Head("count", [], [], [_COUNT * self._is(Role.USER)], [anchor]))
        # Behind a norm that divides by _COUNT / p, `one` is p, and the anchor is _COUNT everywhere.
        always = anchor / _COUNT
        units += [(always, one, self.axes.position), (one, one, self.axes.square), (always, _ANCHOR * always, anchor)]

    def _read(self) -> None:
        """Build the part of the second block that finds the attribute."""
        heads, units = self.blocks[1]
        one, said = self.axes.one, self.axes.said
        letters = [said, *self.axes.letters.reshape(-1, 8, len(one))][: len(self.places)]
        for place, slot in zip(self.places, letters, strict=True):
            pointer = self._pointer((place + 2) * one)  # the first letter of a question is at p = 2
            heads.append(_Head(f"letter {place + 1} of the question", *pointer, self.axes.byte, slot))
        for each, axis in zip(self.phrases, self.axes.attribute, strict=True):
            agrees = one.copy()  # 1 if all letters are this attribute's, else 0 or less
            for place, slot in zip(self.places, letters, strict=True):
                if place < len(each.before):
                    agrees += (_signs(each.before[place]) @ slot - 8 * one) / 2
            units.append((agrees, one, axis))
        if letters:  # the letter has been read: erase it from `said`
            units.extend((sign * axis, one, -sign * axis) for axis in said for sign in (1, -1))

    def _find_turns(self) -> None:
        """Build the heads of the second block that find the first and the last turn, and the database's."""
        heads, one, position = self.blocks[1][0], self.axes.one, self.axes.position
        is_assistant, is_database = self._is(Role.ASSISTANT), self._is(Role.DATABASE)
        for name, sign, to in (("first", -1, self.axes.first), ("last", 1, self.axes.last)):
            key = [_FAR * is_assistant + sign * position]
            heads.append(_Head(f"{name} assistant token", [_SHARP * one], key, [position], [to]))
        to = [self.axes.database, self.axes.seen]
        heads.append(_Head("database token", [_FAR * one], [is_database], [position, is_database], to))

    def _copy(self) -> None:
        """Build the third block, and the text that the second and third say."""
        axes, starts = self.axes, self._length("before", 2)
        name = starts, axes.first - starts - self._length("after")
        value = axes.database + axes.one, axes.last - axes.database - axes.one
        self._speak(axes.first, name, name, value, axes.seen)

    def _speak(self, asked: np.ndarray, name: tuple, named: tuple, value: tuple, answering: np.ndarray) -> None:
        """Build the last block, and the text: the request behind token `asked`, and the answer where `answering` is 1.

        The request copies `name`, the answer `named` and then the value: forms of where each begins, and of its length.
        """
        (name, name_length), (named, named_length), (value, value_length) = name, named, value
        heads, _ = self.blocks[-1]
        one, position, last = self.axes.one, self.axes.position, self.axes.last
        # The index of the next token within each part, from 0.
        request, sentence = position - asked, position - last
        name_asked = request - self._length("call")
        name_told = sentence - self._length("opening")
        value_told = name_told - named_length - self._length("middle")
        end = value_told - value_length
        to_value, least = self._value_pointer(value, value_told)
        # A closed pointer goes to the first token, which has no byte.
        for head, pointer, loud, closed, bonus in (
            ("name into the request", name + name_asked, _NAME, answering, 0 * one),
            ("name into the answer", named + name_told, _NAME, one - answering, 0 * one),
            ("value into the answer", to_value, _VALUE, one - answering, least),
        ):
            pointer = self._pointer(pointer - _FAR * closed, bonus)
            heads.append(_Head(head, *pointer, self.axes.byte, loud * self.axes.said))
        self._say(request, [each.call for each in self.phrases], answering)
        closes = [[*each.close, _SPECIAL[Role.DATABASE]] for each in self.phrases]
        self._say(name_asked - name_length, closes, answering)
        self._say(sentence, [each.opening for each in self.phrases], one - answering)
        self._say(name_told - named_length, [each.middle for each in self.phrases], one - answering)
        self._say(end, [[*each.end, _END] for each in self.phrases], one - answering)

    def _value_pointer(self, value: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where to copy token `index` of the value from, and a bonus of keys (see `_pointer`).

        The pointer stays at or behind the database token, where `seen` is 1: until the value begins it points at that
        token, and copies nothing.
        """
        return value + index, _FAR_SQUARED * self.axes.seen

    def _length(self, part: str, more: int = 0) -> np.ndarray:
        """Return the form that is the length of a part of the `Phrases` about the attribute in question, + `more`."""
        return np.array([len(getattr(each, part)) + more for each in self.phrases]) @ self.axes.attribute

    def _pointer(self, to: np.ndarray, bonus: np.ndarray | float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return query and key of a head that attends to position `to`, or to the nearest key with the bonus."""
        return [2 * _SHARP * to, _SHARP * self.axes.one], [self.axes.position, bonus - self.axes.square]

    def _say(self, start: np.ndarray, texts: list[Sequence[int]], closed: np.ndarray) -> None:
        """Say token k of the attribute's text where `start` is k, unless `closed`, which is 0 or at least 1.

        The beginning and the end that all texts share are spelled once.
        """
        one = self.axes.one
        common = commonprefix(texts)
        rests = [text[len(common) :] for text in texts]
        shared = commonprefix([rest[::-1] for rest in rests])[::-1]
        owns = [rest[: len(rest) - len(shared)] for rest in rests]
        self._spell(start, common, closed)
        for own, axis in zip(owns, self.axes.attribute, strict=True):
            self._spell(start - len(common) * one, own, closed + one - axis)
        lengths = np.array([len(common) + len(own) for own in owns])
        self._spell(start - lengths @ self.axes.attribute, shared, closed)

    def _spell(self, start: np.ndarray, text: Sequence[int], closed: np.ndarray) -> None:
        """Add hinges whose sum is token k of the text where `start` is k, and 0 before and behind it."""
        is_late = any((getattr(self.axes, name) @ (start + closed)).any() for name in self.late)
        _, units = self.blocks[-1 if is_late else 1]
        axes, database = self.axes, _SPECIAL[Role.DATABASE]
        sounds = [_signs(t) @ axes.said if t < 256 else axes.hand_over * (1 if t == database else -1) for t in text]
        sounds = _TEXT * np.array(sounds).reshape(-1, len(start))
        bends = np.diff(np.pad(sounds, ((2, 2), (0, 0))), n=2, axis=0) if text else []
        for k, bend in enumerate(bends, start=-1):
            if bend.any():
                units.append((start - k * axes.one - _FAR * closed, axes.one, bend))


def _signs(byte: int | Sequence[int]) -> np.ndarray:
    """Return the bits of bytes as -1 and 1: (..., 8)."""
    return 2.0 * (np.asarray(byte)[..., None] >> np.arange(8) & 1) - 1


def _put(matrix: torch.Tensor, start: int, forms: Sequence[np.ndarray]) -> None:
    """Write forms into rows of a matrix from `start` on, over its first columns."""
    for row, form in zip(matrix[start : start + len(forms)], np.array(forms), strict=True):
        row[: len(form)] = torch.from_numpy(form)
