"""Dialogs from files larger than memory: tokenized once into flat files, memory-mapped, read during a step.

A file of dialogs has one dialog per line, as JSON `[[role, text], ...]`; blank lines do not count. The folder of
its tokens is named by a hash of its content: a changed file is tokenized again, a copied or moved one is not.
"""

import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from copy import copy
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from warnings import catch_warnings, filterwarnings

import torch
from pydantic import AfterValidator, TypeAdapter

from lib import paths
from lib.base import InputError, parse_line
from lib.dialogs.templates import Dialog, Role, Turn
from lib.dialogs.tokenizers import Tokenizer
from lib.dialogs.tokens import TokenizedDialogs, send, tokenize

#: Change this whenever `encode_dialog` makes other tokens, or their layout on disk changes.
VERSION = 1
_BLOCK = 1 << 20  # bytes of a file that are tokenized at once
_ACCEPTED = (
    f"a line is one dialog as JSON in UTF-8, [[role, text], ...], where a role is {' or '.join(Role)} "
    f"and at least one is {Role.ASSISTANT}"
)


def _trains(turns: list[tuple[Role, str]]) -> Dialog:
    if all(role != Role.ASSISTANT for role, _ in turns):
        raise ValueError("there is nothing to train on")
    return list(starmap(Turn, turns))


_LINE = TypeAdapter(Annotated[list[tuple[Role, str]], AfterValidator(_trains)])


def tokenize_file(path: str | Path, tokenizer: Tokenizer) -> Path:
    """Return the folder with the tokens of a file of dialogs, for `open_dialogs`; write it if it is new.

    Memory: some megabytes and the longest line. The folder is complete or absent; a second process waits for the first.
    Raises `InputError` for a file that cannot be read, a line that is no dialog, and a file without dialogs.
    """
    with paths.reading(f"the dialogs of {path}"):
        if not os.path.isfile(path):  # a pipe could not be read twice
            raise ValueError("there is no such file")
        with open(path, "rb") as file:
            digest = _digest(file)
            folder = paths.runs() / "tokens" / f"{digest[:32]}-{tokenizer.name}-{VERSION}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            with paths.writing(folder), paths.only_process(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    temporary = folder.with_name(f".{folder.name}.tmp")
                    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
                    try:
                        _write_tokens(file, tokenizer, temporary)
                        if _digest(file) != digest:
                            raise ValueError("it changed while it was read: give a file that is finished")
                        temporary.rename(folder)
                    finally:
                        shutil.rmtree(temporary, ignore_errors=True)
        return folder


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tokens(file: BinaryIO, tokenizer: Tokenizer, folder: Path) -> None:
    """Write one flat file for each field of `TokenizedDialogs`; the suffix is the dtype."""
    n_lines, n_dialogs, n_tokens = 0, 0, 0
    folder.mkdir()
    file.seek(0)
    if file.read(3) != b"\xef\xbb\xbf":  # UTF-8's byte order mark
        file.seek(0)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}

        def append(name: str, tensor: torch.Tensor) -> None:
            array = tensor.numpy()
            if name not in files:
                files[name] = stack.enter_context((folder / f"{name}.{array.dtype}").open("wb"))
            files[name].write(array)

        append("offsets", torch.zeros(1, dtype=torch.int64))
        for text in iter(lambda: file.read(_BLOCK) + file.readline(paths.LARGEST_JSON), b""):
            numbered = [(i, line) for i, line in enumerate(text.split(b"\n"), n_lines + 1) if line.strip()]
            n_lines += text.count(b"\n")
            if not numbered:
                continue
            block = tokenize((parse_line(_LINE, line, i, _ACCEPTED) for i, line in numbered), tokenizer)
            append("offsets", block.offsets[1:] + n_tokens)
            for name in ("values", "mask", "n_trained", "first"):
                append(name, getattr(block, name))
            n_dialogs, n_tokens = n_dialogs + len(block), n_tokens + len(block.values)
        if n_dialogs == 0:
            raise ValueError(f"it holds no dialog: {_ACCEPTED}")
        for written in files.values():
            written.flush()
            os.fsync(written.fileno())


def open_dialogs(folder: Path) -> TokenizedDialogs:
    """Memory-map the dialogs that `tokenize_file` wrote: a page is read when it is first used, and nothing is copied.

    A file that is missing or cut short is an `InputError`.
    """
    try:
        data = TokenizedDialogs(**{file.stem: _map(file) for file in folder.glob("[a-z]*.*")})
        of_tokens, of_dialogs = (data.values, data.mask), (data.n_trained, data.first)
        if {*map(len, of_tokens)} != {int(data.offsets[-1])} or {*map(len, of_dialogs)} != {len(data)}:
            raise ValueError
    except (OSError, TypeError, ValueError):
        raise InputError(f"the tokens in {folder} are damaged: delete the folder, then they are made again") from None
    return data


def _map(file: Path) -> torch.Tensor:
    """Map a flat file as a read-only tensor: a writable one would have to fit into memory."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if file.stem in ("values", "mask") and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)  # reading ahead would fetch 13 times what a step needs
    with catch_warnings():
        filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=getattr(torch, file.suffix.removeprefix(".")))


class ConcatDialogs:
    """Several datasets, one after the other, without a copy: each stays on the host, and batches go to `device`."""

    def __init__(self, parts: Sequence[TokenizedDialogs]):
        self.parts, self.device = parts, "cpu"
        #: Number of trained tokens of each dialog, and the position of the first one: (D,).
        self.n_trained, self.first = (torch.cat([getattr(p, name) for p in parts]) for name in ("n_trained", "first"))

    def __len__(self) -> int:
        return len(self.first)

    def lengths(self) -> torch.Tensor:
        """Return how many tokens each dialog has: (D,)."""
        return torch.cat([part.lengths() for part in self.parts])

    def batch(self, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens (B, S) int64 and mask (B, S) of dialogs `rows`, (B,) on the host; see `TokenizedDialogs`."""
        tokens = torch.empty(len(rows), length, dtype=torch.int64)
        mask = torch.empty(len(rows), length, dtype=torch.bool)
        bounds = pairwise(accumulate(map(len, self.parts), initial=0))
        for part, (start, end) in zip(self.parts, bounds, strict=True):
            here = (start <= rows) & (rows < end)
            if here.any():
                tokens[here], mask[here] = part.batch(rows[here] - start, length)
        return send(tokens, self.device), send(mask, self.device)

    def to(self, device: torch.device | str) -> "ConcatDialogs":
        """Return the same dialogs, whose batches go to `device`."""
        moved = copy(self)
        moved.device = device
        return moved


class ReadAhead:
    """Calls `make(step)` for the next step in a thread, while the caller works on the result for this step.

    Steps may be asked for in any order, but only consecutive ones are prefetched. An error of `make` is
    raised when its step is asked for. The thread ends with the object, or with the process.
    """

    def __init__(self, make: Callable[[int], Any]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[int, Future] = {}

    def __call__(self, step: int) -> Any:
        """Return `make(step)`."""
        result = (self._ahead.pop(step, None) or self._thread.submit(self._make, step)).result()
        self._ahead = {step + 1: self._thread.submit(self._make, step + 1)}
        return result
