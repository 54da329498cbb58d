"""Dialogs from files, more than memory holds: tokenized once into flat files, mapped, read while a step is computed.

A file of dialogs has one dialog a line, `[[role, text], ...]` as JSON. Its tokens lie in a folder of their own, named
after what the file holds, so that a file that changes is tokenized anew and one that was copied or moved is not.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from filelock import FileLock

from lib import paths
from lib.base import InputError
from lib.dialogs.templates import Dialog, Role, Turn
from lib.dialogs.tokenizers import Tokenizer
from lib.dialogs.tokens import TokenizedDialogs, send, tokenize

#: Changes with the tokens that `encode_dialog` makes of a dialog and with how they lie on disk.
VERSION = 1
_BLOCK = 1 << 20  # bytes of a file that are tokenized at once
_ROLES = {role.value: role for role in Role}
_ACCEPTED = (
    f"a line is one dialog as JSON, [[role, text], ...], where a role is {', '.join(_ROLES)} "
    f"and at least one is {Role.ASSISTANT}"
)


def tokenize_file(path: str | Path, tokenizer: Tokenizer) -> Path:
    """The folder with the tokens of a file of dialogs, for `open_dialogs`; they are made unless they are there.

    Takes the memory of some megabytes and of the longest line. The folder is whole or absent, whatever happens
    meanwhile; a second process waits. Its name tells what the file holds and who tokenized it. A file that cannot be
    read, a line that is no dialog, and a file without lines are an `InputError`.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            folder = paths.runs() / "tokens" / f"{digest[:32]}-{tokenizer.name}-{VERSION}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    file.seek(0)
                    temporary = folder.with_name(f".{folder.name}.tmp")
                    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
                    try:
                        _write_tokens(file, path, tokenizer, temporary, digest)
                        temporary.rename(folder)
                    finally:
                        shutil.rmtree(temporary, ignore_errors=True)
        return folder
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"cannot tokenize the dialogs of {path}: {error}") from None


def _write_tokens(file, path: str | Path, tokenizer: Tokenizer, folder: Path, digest: str) -> None:
    """One flat file for each tensor of `MappedDialogs`, its type in its name."""
    read, n_dialogs, n_tokens = hashlib.sha256(), 0, 0
    folder.mkdir()
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def append(**tensors: torch.Tensor) -> None:
            for name, tensor in tensors.items():
                array = tensor.numpy()
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.{array.dtype}").open("wb"))
                files[name].write(array)

        append(offsets=torch.zeros(1, dtype=torch.int64))
        for lines in iter(lambda: file.readlines(_BLOCK), []):
            read.update(b"".join(lines))
            block = tokenize((_parse(line, path, i) for i, line in enumerate(lines, n_dialogs + 1)), tokenizer)
            append(values=block.values, mask=block.mask, offsets=block.offsets[1:] + n_tokens)
            append(n_trained=block.trained_counts(), first=block.first_trained())
            n_dialogs, n_tokens = n_dialogs + len(block), n_tokens + len(block.values)
        if n_dialogs == 0:
            raise InputError(f"{path} holds no dialog: {_ACCEPTED}")
        if read.hexdigest() != digest:
            raise InputError(f"{path} has changed while it was read: give a file that is finished")
        for written in files.values():
            written.flush()
            os.fsync(written.fileno())


def _parse(line: bytes, path: str | Path, number: int) -> Dialog:
    """The dialog of one line, or an `InputError` that names it."""
    try:
        turns = json.loads(line.decode().rstrip("\r\n"))
        if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise ValueError("it is no list of pairs")
        for role, text in turns:
            if not isinstance(role, str) or role not in _ROLES:
                raise ValueError(f"there is no role {json.dumps(role)[:40]}")
            if not isinstance(text, str):
                raise ValueError(f"the text of the {role} is no string")
            text.encode()  # half a surrogate pair has no UTF-8
        if not any(role == Role.ASSISTANT for role, _ in turns):
            raise ValueError("there is nothing to train on")
        return [Turn(_ROLES[role], text) for role, text in turns]
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        problem = "too many lists within lists"
    except ValueError as error:  # `UnicodeError` among them
        problem = str(error)
    raise InputError(f"{path}, line {number}: {problem}: {_ACCEPTED}")


@dataclass(frozen=True)
class MappedDialogs(TokenizedDialogs):
    """Dialogs whose tensors lie in files: a page is read where it is touched, and memory holds no copy.

    What a pass over all masks would find lies there, too.
    """

    n_trained: torch.Tensor  # (D,) int64
    first: torch.Tensor  # (D,) int64

    def trained_counts(self) -> torch.Tensor:
        """As of any `TokenizedDialogs`."""
        return self.n_trained

    def first_trained(self) -> torch.Tensor:
        """As of any `TokenizedDialogs`."""
        return self.first


def open_dialogs(folder: Path) -> MappedDialogs:
    """The dialogs that `tokenize_file` wrote. A file that is missing or cut short is an `InputError`."""
    try:
        data = MappedDialogs(**{file.stem: _map(file) for file in folder.glob("[a-z]*.*")})
        of_tokens, of_dialogs = (data.values, data.mask), (data.n_trained, data.first)
        if {*map(len, of_tokens)} != {int(data.offsets[-1])} or {*map(len, of_dialogs)} != {len(data)}:
            raise ValueError
    except (OSError, TypeError, ValueError):
        raise InputError(f"the tokens in {folder} are damaged: delete the folder, they are made again") from None
    return data


def _map(file: Path) -> torch.Tensor:
    """A flat file as a tensor that is only read: one that could be written would have to fit into memory."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if file.stem in ("values", "mask") and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)  # or each row would bring its neighbourhood, 13 times what a step needs
    with catch_warnings():
        filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=getattr(torch, file.suffix.removeprefix(".")))


@dataclass(frozen=True)
class ConcatDialogs:
    """Several datasets, one after the other, as `join` makes them, but each left where it lies: on the host.

    Held in memory is what a step must know of every dialog: 8 bytes for each number of `lengths` and the like.
    """

    parts: Sequence[TokenizedDialogs]
    device: torch.device | str = "cpu"  # where batches go

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def lengths(self) -> torch.Tensor:
        """(D,) tokens a dialog."""
        return torch.cat([part.lengths() for part in self.parts])

    def trained_counts(self) -> torch.Tensor:
        """(D,) tokens that are trained a dialog."""
        return torch.cat([part.trained_counts() for part in self.parts])

    def first_trained(self) -> torch.Tensor:
        """(D,) the place of each dialog's first trained token; a dialog without one is an `InputError`."""
        return torch.cat([part.first_trained() for part in self.parts])

    def batch(self, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, S) int64 and mask (B, S) of the dialogs `rows` (B,) on the host, as `TokenizedDialogs.batch`."""
        tokens = torch.empty(len(rows), length, dtype=torch.int64)
        mask = torch.empty(len(rows), length, dtype=torch.bool)
        bounds = pairwise(accumulate(map(len, self.parts), initial=0))
        for part, (start, end) in zip(self.parts, bounds, strict=True):
            here = (start <= rows) & (rows < end)
            if here.any():
                tokens[here], mask[here] = part.batch(rows[here] - start, length)
        return send(tokens, self.device), send(mask, self.device)

    def to(self, device: torch.device | str) -> "ConcatDialogs":
        """The same dialogs, whose batches go to `device`."""
        return ConcatDialogs(self.parts, device)


class ReadAhead:
    """Calls `make(step)` with the next step's number in a thread, while the caller works on what this step's gave.

    Steps may be asked for in any order; one after the other they have been made when they are asked for. What `make`
    raises is raised when its step is asked for. The thread ends with the object, or with the process.
    """

    def __init__(self, make: Callable[[int], Any]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[int, Future] = {}

    def __call__(self, step: int) -> Any:
        """What `make(step)` returns."""
        made = self._ahead.pop(step, None) or self._thread.submit(self._make, step)
        result = made.result()
        self._ahead = {step + 1: self._thread.submit(self._make, step + 1)}
        return result
