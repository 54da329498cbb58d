"""Tokens other than bytes: vocabularies from files, for tiktoken and for Hugging Face's tokenizers.

Behind the tokens of the file come four of our own, the roles and the end: no text can write them.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

from lib.base import InputError
from lib.dialogs.templates import Role


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


#: How a text is cut before tiktoken merges bytes, which a file of ranks does not say: as for GPT-4 and Llama 3.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ACCEPTED = 'give "bytes", a file of BPE ranks (*.tiktoken), or a tokenizer.json or the folder that holds one'
#: Blanks, marks, letters and a request that a tokenizer which lowers, trims or drops something does not give back.
_PROBE = " Zoë  O'Neil,\t李 😀 <|end|>\n```sql\nFIND birth_place FOR Zoë O'Neil\n```"


class SubwordTokenizer:
    """A vocabulary of `n_text` tokens, and the special ones: user, assistant, database, end."""

    def __init__(self, name: str, n_text: int, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]):
        self.name, self.n_text, self._encode, self._decode = name, n_text, encode, decode
        self.role_ids = {role: n_text + i for i, role in enumerate(Role)}
        self.end = n_text + len(Role)
        self.vocab_size = self.end + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all below `n_text`."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; a special token among them is a ValueError, invalid UTF-8 becomes U+FFFD."""
        ids = list(ids)
        if not all(0 <= token < self.n_text for token in ids):
            raise ValueError(f"special tokens have no text: ids of text are below {self.n_text}")
        return self._decode(ids)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `RunConfig.tokenizer` names; its own name tells what its file holds.

    spec: "bytes", a `.tiktoken` file of BPE ranks, a `tokenizer.json`, or the folder that holds one. Special tokens of
    the file are plain text here. A file that is none of these, that cannot be read or whose tokens do not give a text
    back is an `InputError`, and so is a library that is not installed. (Some Hugging Face tokenizers bring Unicode
    into a normal form: what comes back of a text in another one is that form.)
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = tokenizer_file(spec)
    if path.suffix not in _KINDS or not path.is_file():
        raise InputError(f"tokenizer = {spec!r} is no tokenizer (nothing is downloaded): {_ACCEPTED}")
    try:
        content = path.read_bytes()
        kind, load = _KINDS[path.suffix]
        tokenizer = SubwordTokenizer(f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}", *load(content))
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not a tokenizer that can be used ({error}): {_ACCEPTED}") from None
    back = tokenizer.decode(tokenizer.encode(_PROBE))
    if back != _PROBE:
        raise InputError(f"{path} does not give a text back, {_PROBE!r} becomes {back!r}: give one of bytes, as BPE is")
    return tokenizer


def tokenizer_file(spec: str) -> Path:
    """The file that a `RunConfig.tokenizer` other than "bytes" names."""
    return Path(spec, "tokenizer.json") if Path(spec).is_dir() else Path(spec)


def _read_ranks(content: bytes) -> tuple[int, Callable, Callable]:
    """A file of lines `base64 rank`. Read here, for tiktoken's own reader goes on using what it has read before."""
    tiktoken = _library("tiktoken")
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise ValueError("a line is a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(pairs))):
        raise ValueError("ranks count from 0, each once")
    if missing := {bytes([byte]) for byte in range(256)} - ranks.keys():
        raise ValueError(f"{len(missing)} of the 256 bytes have no rank")
    encoding = tiktoken.Encoding("ranks", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return len(ranks), encoding.encode_ordinary, encoding.decode


def _read_hugging_face(content: bytes) -> tuple[int, Callable, Callable]:
    """A tokenizer.json, without what would cut texts, pad them or make their tokens random."""
    tokenizers = _library("tokenizers")
    description = json.loads(content)
    try:
        description |= {"truncation": None, "padding": None}
        if description["model"].get("dropout"):
            description["model"]["dropout"] = None
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(error) from None
    tokenizer.encode_special_tokens = True  # as if they were any text
    n_text = 1 + max(tokenizer.get_vocab().values())
    return (
        n_text,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
    )


_KINDS = {".tiktoken": ("tiktoken", _read_ranks), ".json": ("huggingface", _read_hugging_face)}


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"this tokenizer takes the package {name}: pip install -e '.[scale]'") from None


# Tokens ---------------------------------------------------------------------------------------------------------------
