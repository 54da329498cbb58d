"""Facts as dialogs, dialogs as tokens (Section 3 of the paper).

A dialog is a list of turns. In-weight, the assistant answers from memory; in-tool, it writes a request, the
database answers, and it repeats the answer. The model is trained to produce what the assistant says and the
token that follows it, nothing else.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate, chain, islice, repeat
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

    name: str  # tells its tokens from those of any other
    vocab_size: int
    role_ids: dict[Role, int]
    end: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes and four special tokens: 256 user, 257 assistant, 258 database, 259 end of dialog."""

    name = "bytes"
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


_CHUNK = 1024  # how many people or dialogs NumPy works on at once: what it makes stays in the processor's cache


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

    def trained_counts(self) -> torch.Tensor:
        """(D,) int64, on the CPU: how many tokens of each dialog are trained."""
        counts = [np.add.reduceat(mask, bounds[:-1], dtype=np.int64) for mask, bounds in self._parts()]
        return torch.from_numpy(np.concatenate(counts))

    def first_trained(self) -> torch.Tensor:
        """(D,) int64, on the CPU: where in each dialog its first trained token stands.

        A dialog without one is an `InputError`.
        """
        firsts = []
        for mask, bounds in self._parts():
            # A dialog's first token is never trained, so this one stands where the mask rises.
            rises = np.append(np.flatnonzero(mask[1:] > mask[:-1]) + 1, len(mask))
            firsts.append(rises[np.searchsorted(rises, bounds[:-1])] - bounds[:-1])
        first = torch.from_numpy(np.concatenate(firsts))
        if (first >= self.lengths().cpu()).any():
            raise InputError("a dialog has nothing to train on: every dialog takes a turn of the assistant")
        return first

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Mask and offsets, from 0, of some dialogs at a time: what NumPy makes of all at once outgrows the data."""
        mask, offsets = self.mask.cpu().numpy(), self.offsets.cpu().numpy()
        for row in range(0, len(self), _CHUNK):
            bounds = offsets[row : row + _CHUNK + 1]
            yield mask[bounds[0] : bounds[-1]], bounds - bounds[0]

    def batch(self, rows: torch.Tensor, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, S) int64 and mask (B, S) of the dialogs `rows` (B,), padded on the right to the longest.

        Padding is what follows in the dataset, for any token would do: causal attention hides it, the mask is False.
        Finding the longest makes the host wait for an accelerator; `length`, if given, is taken for S instead. It
        must be at least the longest, which is not checked: longer dialogs would be cut.
        """
        rows = send(rows, self.values.device)
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        if length is None:
            length = int((ends - starts).max())
        index = starts[:, None] + torch.arange(length, device=rows.device)
        inside = index < ends[:, None]
        index = index.clamp_(max=len(self.values) - 1)
        return self.values[index].long(), self.mask[index] & inside

    def to(self, device: torch.device | str) -> "TokenizedDialogs":
        """The same dialogs with their tensors on `device`."""
        return TokenizedDialogs(self.values.to(device), self.mask.to(device), self.offsets.to(device))


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`; the host does not wait for a GPU to take it."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def join(parts: Sequence[TokenizedDialogs]) -> TokenizedDialogs:
    """All dialogs of several datasets, one after the other: the sources of `Batches`."""
    if len(parts) == 1:
        return parts[0]
    starts = [0, *accumulate(len(part.values) for part in parts)]
    ends = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return TokenizedDialogs(
        torch.cat([part.values for part in parts]),
        torch.cat([part.mask for part in parts]),
        torch.cat([torch.zeros(1, dtype=torch.int64), *ends]),
    )


def tokenize(items: Iterable[Dialog], tokenizer: Tokenizer) -> TokenizedDialogs:
    """Tokenize a whole dataset once. An empty dataset is an `InputError`.

    The byte tokenizer has a fast path: dialogs become byte strings in which the special tokens are bytes that UTF-8
    never uses, so that NumPy does the rest.
    """
    if isinstance(tokenizer, ByteTokenizer):
        marked = map(_mark, items)
        return _concatenate(map(_read_marked, iter(lambda: b"".join(islice(marked, _CHUNK)), b"")), torch.int16)
    encoded = (encode_dialog(dialog, tokenizer) for dialog in items)
    return _concatenate(
        ((np.array(tokens, np.int32), np.array(mask), np.array([len(tokens)])) for tokens, mask in encoded), torch.int32
    )


def tokenize_people(people: People, mode: Mode, tokenizer: Tokenizer) -> TokenizedDialogs:
    """`tokenize(dialogs(people, mode), tokenizer)`, with the byte tokenizer many times as fast.

    There the dialogs are rendered once, for a person with gaps for name and values, and joined with everyone's bytes.
    """
    if not isinstance(tokenizer, ByteTokenizer):
        return tokenize(dialogs(people, mode), tokenizer)
    template = _template(people.attributes, mode)
    parts = (people[start : start + _CHUNK] for start in range(0, len(people), _CHUNK))
    return _concatenate((_read_marked(_fill_template(template, part)) for part in parts), torch.int16)


_Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]  # values and mask (T,) and lengths (D,) int64 of some dialogs


def _concatenate(chunks: Iterable[_Chunk], dtype: torch.dtype) -> TokenizedDialogs:
    """All chunks as one dataset, in buffers that grow in place: joining a list of arrays would hold them twice."""
    values, mask, lengths = bytearray(), bytearray(), bytearray(8)  # the offsets begin with an int64 zero
    for chunk in chunks:
        values += chunk[0].data
        mask += chunk[1].data
        lengths += chunk[2].data
    if not values:
        raise InputError("there is no dialog to tokenize: give at least one person with one attribute")
    return TokenizedDialogs(
        torch.frombuffer(values, dtype=dtype),
        torch.frombuffer(mask, dtype=torch.bool),
        torch.frombuffer(lengths, dtype=torch.int64).cumsum(0),
    )


_SPECIAL = 0xFC  # 0xFC-0xFF never occur in UTF-8; byte _SPECIAL + k stands for token 256 + k
_ROLE_BYTE = {role: bytes([_SPECIAL + token - 256]) for role, token in ByteTokenizer.role_ids.items()}
_END_BYTE = bytes([_SPECIAL + ByteTokenizer.end - 256])


def _mark(dialog: Dialog) -> bytes:
    """The bytes of a dialog, special tokens among them."""
    return b"".join([_ROLE_BYTE[role] + text.encode() for role, text in dialog]) + _END_BYTE


def _read_marked(marked: bytes) -> _Chunk:
    """Tokens, mask and lengths of whole dialogs that `_mark` wrote."""
    raw = np.frombuffer(marked, dtype=np.uint8)
    values = raw.astype(np.int16)
    special = np.flatnonzero(raw >= _SPECIAL)
    values[special] += 256 - _SPECIAL
    kinds = values[special]
    # The assistant's turns, role tokens included: trained are the tokens one further on. An end, the last, is in none.
    turns = np.repeat(kinds == ByteTokenizer.role_ids[Role.ASSISTANT], np.diff(special, append=len(raw)))
    return values, np.roll(turns, 1), np.diff(special[kinds == ByteTokenizer.end], prepend=-1)


def _template(attributes: Sequence[str], mode: Mode) -> list[bytes]:
    """Anyone's dialogs, marked and cut: at even places fixed bytes, at odd ones which column goes there (0: the name).

    A dialog holds name and values as they are, and depends on them in no other way.
    """
    cut = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in "".join(attributes))
    values = {attribute: [f"{cut}{column}{cut}"] for column, attribute in enumerate(attributes, start=1)}
    marked = b"".join(map(_mark, dialogs(People([f"{cut}0{cut}"], values), mode)))
    return marked.split(cut.encode())


def _fill_template(template: list[bytes], people: People) -> bytes:
    """Everyone's dialogs, marked."""
    columns = [[text.encode() for text in column] for column in (people.names, *people.columns.values())]
    pieces = [columns[int(piece)] if i % 2 else repeat(piece, len(people)) for i, piece in enumerate(template)]
    return b"".join(chain.from_iterable(zip(*pieces, strict=True)))


class Source(NamedTuple):
    """Some consecutive dialogs of a dataset that are drawn more or less often than others."""

    n_dialogs: int
    weight: float  # of a dialog that is trained on to be from here, relative to other sources


class Batches:
    """The order in which a dataset is trained on: batch `step` for any step, without state.

    Every epoch is a fresh seeded shuffle, cut into batches of equal size (give or take one dialog), at most
    `batch_size`. Dialogs of similar length share a batch: each `pool` of so many batches is sorted by length and cut
    again, then the batches are shuffled. Less padding, but a batch then asks about one or two attributes only, which
    optimizers that level their steps, as Muon does, learn worse from; with a pool of 1 batches are random.

    With several `sources`, which make up the dataset in their order, an epoch is one pass over the first, and of each
    other one as many dialogs as its weight asks for: all of them as often as that is, and a random choice of the rest.
    """

    def __init__(
        self, lengths: torch.Tensor, batch_size: int, seed: int, sources: Sequence[Source] = (), pool: int = 8
    ):
        self.lengths, self.pool = lengths.cpu(), pool
        self.seed = seed
        sources = sources or [Source(len(lengths), 1.0)]
        starts = accumulate((source.n_dialogs for source in sources), initial=0)
        self._parts = [  # first row, how many there are, and how many of them an epoch takes
            (start, n, round(sources[0].n_dialogs * weight / sources[0].weight))
            for start, (n, weight) in zip(starts, sources, strict=False)
        ]
        #: Dialogs an epoch.
        self.n_dialogs = sum(count for *_, count in self._parts)
        self.per_epoch = -(-self.n_dialogs // batch_size)
        #: Of two epochs, for who reads ahead may have begun the next.
        self._batches = lru_cache(maxsize=2)(self._shuffle)

    def __getitem__(self, step: int) -> torch.Tensor:
        """Rows (B,) of the dataset that make the batch of `step`, counted from 0."""
        epoch, batch = divmod(step, self.per_epoch)
        return self._batches(epoch)[batch]

    def _shuffle(self, epoch: int) -> list[torch.Tensor]:
        rng = np.random.default_rng([self.seed, epoch])
        rows = np.concatenate([start + _take(n, count, rng) for start, n, count in self._parts])
        batches = list(torch.from_numpy(rng.permutation(rows)).tensor_split(self.per_epoch))
        for start in range(0, self.per_epoch, self.pool):
            pool = slice(start, start + self.pool)
            sizes = [len(batch) for batch in batches[pool]]
            rows = torch.cat(batches[pool])
            batches[pool] = rows[self.lengths[rows].argsort(stable=True)].split(sizes)
        return [batches[i] for i in rng.permutation(self.per_epoch)]


def _take(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the numbers below `n`: all of them as often as that is, and a random choice of the rest."""
    passes, rest = divmod(count, n)
    return np.concatenate([*[np.arange(n)] * passes, rng.choice(n, rest, replace=False)])
