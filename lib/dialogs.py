"""Facts as dialogs, dialogs as tokens (Section 3 of the paper).

A dialog is a list of turns. In-weight, the assistant answers from memory; in-tool, it writes a request, the
database answers, and it repeats the answer. The model is trained to produce what the assistant says and the
token that follows it, nothing else.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch

from lib.base import InputError
from lib.facts import People
from lib.tools import format_request

Mode = Literal["in-weight", "in-tool", "biography"]


class Role(StrEnum):
    """Who speaks in a turn."""

    USER = "user"
    ASSISTANT = "assistant"
    DATABASE = "database"


class Turn(NamedTuple):
    """One turn of a dialog."""

    role: Role
    text: str


Dialog = list[Turn]


class Template(NamedTuple):
    """How one attribute is asked for and told."""

    question: str
    answer: str


#: The paper's four attributes (Appendix on data). Any other attribute, of a CSV say, gets `GENERIC`.
TEMPLATES = {
    "birth_date": Template("When was {name} born?", "{name} was born on {value}."),
    "birth_place": Template("Where was {name} born?", "{name} was born in {value}."),
    "occupation": Template("What is {name}'s occupation?", "{name} works as an {value}."),
    "current_address": Template("Where does {name} live?", "{name} lives at {value}."),
}
GENERIC = Template("What is the {attribute} of {name}?", "The {attribute} of {name} is {value}.")
PREAMBLE = "To answer this question I will make a request to the database:"


def _fill(template: str, name: str, attribute: str, value: str = "") -> str:
    """Fill a template in one pass, so that braces in a name or a value stay what they are."""
    return template.format(name=name, attribute=attribute.replace("_", " "), value=value)


def question(name: str, attribute: str) -> str:
    """What the user asks about one attribute of one person."""
    return _fill(TEMPLATES.get(attribute, GENERIC).question, name, attribute)


def answer(name: str, attribute: str, value: str) -> str:
    """The sentence that answers `question`."""
    return _fill(TEMPLATES.get(attribute, GENERIC).answer, name, attribute, value)


def tool_call(name: str, attribute: str) -> str:
    """The assistant's turn that asks the database for one attribute of one person."""
    return f"{PREAMBLE}\n{format_request(attribute, name)}"


def in_weight_dialog(name: str, attribute: str, value: str) -> Dialog:
    """Question and answer: the fact must come from the weights."""
    return [Turn(Role.USER, question(name, attribute)), Turn(Role.ASSISTANT, answer(name, attribute, value))]


def in_tool_dialog(name: str, attribute: str, value: str) -> Dialog:
    """Question, request to the database, its answer, and the final answer."""
    return [
        Turn(Role.USER, question(name, attribute)),
        Turn(Role.ASSISTANT, tool_call(name, attribute)),
        Turn(Role.DATABASE, value),
        Turn(Role.ASSISTANT, answer(name, attribute, value)),
    ]


def biography(name: str, values: dict[str, str]) -> Dialog:
    """All that is known of one person in one turn: `values` maps attribute to value."""
    sentences = (answer(name, attribute, value) for attribute, value in values.items())
    return [Turn(Role.ASSISTANT, " ".join(sentences))]


_RENDER = {"in-weight": in_weight_dialog, "in-tool": in_tool_dialog}


def dialogs(people: People, mode: Mode) -> Iterator[Dialog]:
    """The dialogs of `people`: one a fact, person by person, or one a person if `mode` is "biography".

    Any other mode is an `InputError`.
    """
    if mode == "biography":
        for i, name in enumerate(people.names):
            yield biography(name, {attribute: people.value(i, attribute) for attribute in people.attributes})
    elif mode in _RENDER:
        for fact in people.facts():
            yield _RENDER[mode](*fact)
    else:
        raise InputError(f"unknown mode {mode!r} of dialogs: there are {', '.join(get_args(Mode))}")


# Tokens ---------------------------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer: text to ids and back, and one id for each role and the end."""

    vocab_size: int
    role_ids: dict[Role, int]
    end: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes and four special tokens: 256 user, 257 assistant, 258 database, 259 end of dialog."""

    vocab_size = 260
    role_ids = {Role.USER: 256, Role.ASSISTANT: 257, Role.DATABASE: 258}
    end = 259

    def encode(self, text: str) -> list[int]:
        """Bytes of `text`; special tokens have no text and cannot be written by it."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of byte ids; a special token among them is a ValueError, invalid UTF-8 becomes U+FFFD."""
        return bytes(ids).decode(errors="replace")


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Tokens of `turns` followed by the assistant's role token: what a model is given to answer."""
    tokens = []
    for turn in turns:
        tokens += [tokenizer.role_ids[turn.role], *tokenizer.encode(turn.text)]
    return [*tokens, tokenizer.role_ids[Role.ASSISTANT]]


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a dialog and, for each, whether the model is trained to produce it.

    A turn begins with its role token; the dialog ends with `tokenizer.end`. Trained are the assistant's tokens and
    the token that follows its turn: the hand-over to the database, or the end.
    """
    tokens, trained = [], []
    follows_assistant = False
    for turn in dialog:
        text = tokenizer.encode(turn.text)
        tokens += [tokenizer.role_ids[turn.role], *text]
        trained += [follows_assistant, *[turn.role == Role.ASSISTANT] * len(text)]
        follows_assistant = turn.role == Role.ASSISTANT
    return [*tokens, tokenizer.end], [*trained, follows_assistant]


@dataclass(frozen=True)
class TokenizedDialogs:
    """A ragged tensor of D dialogs: dialog i is `values[offsets[i]:offsets[i + 1]]`, with its loss mask beside it."""

    values: torch.Tensor  # (T,) int16 for bytes, int32 for larger vocabularies
    mask: torch.Tensor  # (T,) bool: the model is trained to produce this token
    offsets: torch.Tensor  # (D + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> torch.Tensor:
        """(D,) tokens a dialog."""
        return self.offsets.diff()

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask of dialog i."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.values[span], self.mask[span]

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, S) int64 and mask (B, S) of the dialogs `rows` (B,), padded on the right to the longest.

        Padding is what follows in the dataset, for any token would do: causal attention hides it, the mask is False.
        """
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        index = starts[:, None] + torch.arange(int((ends - starts).max()), device=rows.device)
        inside = index < ends[:, None]
        index = index.clamp_(max=len(self.values) - 1)
        return self.values[index].long(), self.mask[index] & inside

    def to(self, device: torch.device | str) -> "TokenizedDialogs":
        """The same dialogs with their tensors on `device`."""
        return TokenizedDialogs(self.values.to(device), self.mask.to(device), self.offsets.to(device))


def tokenize(items: Iterable[Dialog], tokenizer: Tokenizer) -> TokenizedDialogs:
    """Tokenize a whole dataset once. An empty dataset is an `InputError`.

    The byte tokenizer has a fast path: the dialogs are joined to one byte string in which the special tokens are bytes
    that UTF-8 never uses, so that NumPy does the rest.
    """
    if isinstance(tokenizer, ByteTokenizer):
        values, mask, offsets = _tokenize_bytes(items)
    else:
        encoded = [encode_dialog(dialog, tokenizer) for dialog in items]
        values = np.array([token for tokens, _ in encoded for token in tokens], dtype=np.int32)
        mask = np.array([trained for _, flags in encoded for trained in flags], dtype=bool)
        offsets = np.cumsum([0, *(len(tokens) for tokens, _ in encoded)])
    if len(offsets) < 2:
        raise InputError("there is no dialog to tokenize: give at least one person with one attribute")
    return TokenizedDialogs(torch.from_numpy(values), torch.from_numpy(mask), torch.from_numpy(offsets))


_SPECIAL = 0xFC  # 0xFC-0xFF never occur in UTF-8; byte _SPECIAL + k stands for token 256 + k
_ROLE_BYTE = {role: bytes([_SPECIAL + token - 256]) for role, token in ByteTokenizer.role_ids.items()}
_END_BYTE = bytes([_SPECIAL + ByteTokenizer.end - 256])


def _tokenize_bytes(items: Iterable[Dialog]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    joined = bytearray()
    for dialog in items:
        for role, text in dialog:
            joined += _ROLE_BYTE[role]
            joined += text.encode()
        joined += _END_BYTE
    raw = np.frombuffer(joined, dtype=np.uint8)
    values = raw.astype(np.int16)
    special = np.flatnonzero(raw >= _SPECIAL)
    values[special] += 256 - _SPECIAL
    # A token is trained if the last special token before it opened an assistant turn.
    opens_assistant = values[special] == ByteTokenizer.role_ids[Role.ASSISTANT]
    reach = np.diff(special, append=len(raw) - 1)
    mask = np.repeat(np.concatenate(([False], opens_assistant)), np.concatenate(([1], reach)))
    offsets = np.concatenate(([0], special[values[special] == ByteTokenizer.end] + 1))
    return values, mask, offsets


class Batches:
    """The order in which a dataset is trained on: batch `step` for any step, without state.

    Every epoch is a fresh seeded shuffle, cut into batches of equal size (give or take one dialog), at most
    `batch_size`. Dialogs of similar length share a batch: each pool of `POOL` batches is sorted by length and cut
    again, then the batches are shuffled.
    """

    POOL = 8

    def __init__(self, lengths: torch.Tensor, batch_size: int, seed: int):
        self.lengths = lengths.cpu()
        self.seed = seed
        self.per_epoch = -(-len(lengths) // batch_size)
        self._epoch: int | None = None
        self._batches: list[torch.Tensor] = []

    def __getitem__(self, step: int) -> torch.Tensor:
        """Rows (B,) of the dataset that make the batch of `step`, counted from 0."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[batch]

    def _shuffle(self, epoch: int) -> list[torch.Tensor]:
        rng = np.random.default_rng([self.seed, epoch])
        batches = list(torch.from_numpy(rng.permutation(len(self.lengths))).tensor_split(self.per_epoch))
        for start in range(0, self.per_epoch, self.POOL):
            pool = slice(start, start + self.POOL)
            sizes = [len(batch) for batch in batches[pool]]
            rows = torch.cat(batches[pool])
            batches[pool] = rows[self.lengths[rows].argsort(stable=True)].split(sizes)
        return [batches[i] for i in rng.permutation(self.per_epoch)]
