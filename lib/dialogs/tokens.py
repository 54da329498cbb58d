"""Dialogs as tokens: which of them are trained, and datasets of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, repeat

import numpy as np
import torch

from lib.base import InputError
from lib.dialogs.templates import Dialog, Mode, Role, Turn, dialogs
from lib.dialogs.tokenizers import ByteTokenizer, Tokenizer
from lib.facts.people import People


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
