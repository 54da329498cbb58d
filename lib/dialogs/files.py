"""Dialogs from files: one dialog per line, as JSON `[[role, text], ...]`; blank lines do not count."""

import hashlib
import os
from itertools import chain, starmap
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter

from lib.base import parse_line
from lib.dialogs.templates import Dialog, Role, Turn
from lib.dialogs.tokenizers import Tokenizer
from lib.dialogs.tokens import TokenizedDialogs, tokenize
from lib.paths import LARGEST_JSON, reading

_ACCEPTED = (
    f"a line is one dialog as JSON in UTF-8, [[role, text], ...], where a role is {' or '.join(Role)} "
    f"and at least one is {Role.ASSISTANT}"
)


def _trains(turns: list[tuple[Role, str]]) -> Dialog:
    if all(role != Role.ASSISTANT for role, _ in turns):
        raise ValueError("there is nothing to train on")
    return list(starmap(Turn, turns))


_LINE = TypeAdapter(Annotated[list[tuple[Role, str]], AfterValidator(_trains)])


def read_dialogs(path: str | Path, tokenizer: Tokenizer) -> tuple[TokenizedDialogs, str]:
    """Return the tokens of a file of dialogs (3 to 5 bytes each), and a hash of its content.

    Raises `InputError` for a file that cannot be read, a line that is no dialog, and a file without dialogs.
    """
    with reading(f"the dialogs of {path}"):
        if not os.path.isfile(path):  # a pipe could not be read twice
            raise ValueError("there is no such file")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if file.read(3) != b"\xef\xbb\xbf":  # UTF-8's byte order mark
                file.seek(0)
            numbered = enumerate(iter(lambda: file.readline(LARGEST_JSON), b""), start=1)
            dialogs = (parse_line(_LINE, line, i, _ACCEPTED) for i, line in numbered if line.strip())
            if (one := next(dialogs, None)) is None:
                raise ValueError(f"it holds no dialog: {_ACCEPTED}")
            return tokenize(chain([one], dialogs), tokenizer), digest
