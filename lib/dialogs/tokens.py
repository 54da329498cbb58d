"""Dialogs as tokens, their loss mask, and tokenized datasets."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lib.base import InputError
from lib.dialogs.templates import Dialog, Mode, Role, Turn, dialogs
from lib.dialogs.tokenizers import Tokenizer
from lib.facts.people import People


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Return the prompt of a model's next turn: the tokens of `turns`, then the assistant's role token."""
    tokens = []
    for role, text in turns:
        tokens += [tokenizer.role_ids[role], *tokenizer.encode(text)]
    return [*tokens, tokenizer.role_ids[Role.ASSISTANT]]


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer, repeats: bool = True) -> tuple[list[int], list[bool]]:
    """Return the tokens of a dialog and, for each, whether the model is trained to produce it.

    A turn begins with its role token; the dialog ends with `tokenizer.end`. The model is trained on
    the assistant's tokens and on the token that follows its turn (the database's role, or the end). Without `repeats`,
    it is not trained on the tokens where a turn last repeats the database's answer.
    """
    tokens, trained = [], []
    follows_assistant, result = False, []
    for role, text in dialog:
        ids = tokenizer.encode(text)
        tokens.append(tokenizer.role_ids[role])
        tokens += ids
        trained.append(follows_assistant)
        follows_assistant = role == Role.ASSISTANT
        flags = [follows_assistant] * len(ids)
        if result and not repeats:
            places = (i for i in reversed(range(len(ids))) if ids[i : i + len(result)] == result)
            start = next(places, len(ids))
            flags[start : start + len(result)] = [False] * len(ids[start : start + len(result)])
        result = ids if role == Role.DATABASE else []
        trained += flags
    return [*tokens, tokenizer.end], [*trained, follows_assistant]


@dataclass(frozen=True)
class TokenizedDialogs:
    """A ragged tensor of D dialogs: dialog i is `values[offsets[i]:offsets[i + 1]]`, with its loss mask beside it."""

    values: torch.Tensor  # (T,) int16, or int32 for large vocabularies
    mask: torch.Tensor  # (T,) bool: the model is trained to produce this token
    offsets: torch.Tensor  # (D + 1,) int64
    n_trained: torch.Tensor  # (D,) int64, always on the CPU: how many tokens of each dialog are trained
    first: torch.Tensor  # (D,) int64, always on the CPU: position of each dialog's first trained token

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> torch.Tensor:
        """Return how many tokens each dialog has: (D,)."""
        return self.offsets.diff()

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and mask of dialog i."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.values[span], self.mask[span]

    def batch(self, rows: torch.Tensor, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens (B, S) int64 and mask (B, S) of the dialogs `rows` (B,), padded on the right to the longest.

        Padding is what follows in the dataset; any token would do, for causal attention hides it and the mask is False.
        Without `length`, the host waits for an accelerator to find the longest. `length` sets S instead; it is not
        checked, and longer dialogs would be cut.
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
        """Return the same dialogs with tokens, mask and offsets on `device`."""
        tensors = (tensor.to(device) for tensor in (self.values, self.mask, self.offsets))
        return TokenizedDialogs(*tensors, self.n_trained, self.first)


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return `tensor` on `device`; the host does not wait for the copy to a GPU."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def tokenize(items: Iterable[Dialog], tokenizer: Tokenizer, repeats: bool = True) -> TokenizedDialogs:
    """Tokenize a whole dataset once: 4,000,000 in-tool dialogs take one to two minutes and 2.6 GB.

    repeats: as `encode_dialog` takes it. An empty dataset is an `InputError`, and so is a dialog without a turn of the
    assistant.
    """
    code, dtype = ("h", torch.int16) if tokenizer.vocab_size <= 2**15 else ("i", torch.int32)
    # Arrays grow in place: to join a list of them at the end would hold the dataset twice.
    values, mask, offsets, n_trained, first = array(code), bytearray(), array("q", [0]), array("q"), array("q")
    for dialog in items:
        tokens, trained = encode_dialog(dialog, tokenizer, repeats)
        flags = bytes(trained)
        values.fromlist(tokens)
        mask += flags
        offsets.append(len(values))
        n_trained.append(flags.count(1))
        first.append(flags.find(1))
    if not values:
        raise InputError("there is no dialog to tokenize: give at least one person with one attribute")
    if min(first) < 0:
        raise InputError("a dialog has nothing to train on: every dialog needs a turn of the assistant")
    counts = (torch.frombuffer(numbers, dtype=torch.int64) for numbers in (offsets, n_trained, first))
    return TokenizedDialogs(torch.frombuffer(values, dtype=dtype), torch.frombuffer(mask, dtype=torch.bool), *counts)


def join(parts: Sequence[TokenizedDialogs]) -> TokenizedDialogs:
    """Return several datasets as one, in their order."""
    starts = accumulate((len(part.values) for part in parts), initial=0)
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    values, mask, n_trained, first = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("values", "mask", "n_trained", "first")
    )
    return TokenizedDialogs(values, mask, torch.cat([parts[0].offsets[:1], *offsets]), n_trained, first)


def tokenize_people(people: People, mode: Mode, tokenizer: Tokenizer) -> TokenizedDialogs:
    """Return the tokens of the `dialogs` of people. No people, or an unknown mode, is an `InputError`."""
    return tokenize(dialogs(people, mode), tokenizer)
