"""Tokenizers: bytes, and vocabularies from files, for tiktoken and for Hugging Face's tokenizers.

Ids of text come first. Four special ids follow, three roles and the end of a dialog: no text encodes to them.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from lib.base import InputError, optional
from lib.dialogs.templates import Role
from lib.paths import read_bytes, reading


class Tokenizer:
    """A vocabulary of `n_text` tokens, and the special ones: user, assistant, database, end.

    name: unique to the vocabulary. encode and decode turn text into ids below `n_text` and back.
    """

    def __init__(self, name: str, n_text: int, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]):
        self.name, self.n_text, self._encode, self._decode = name, n_text, encode, decode
        self.role_ids = {role: n_text + i for i, role in enumerate(Role)}
        self.end = n_text + len(Role)
        self.vocab_size = self.end + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; a special token is a ValueError, invalid UTF-8 becomes U+FFFD."""
        ids = list(ids)
        if not all(0 <= token < self.n_text for token in ids):
            raise ValueError(f"special tokens have no text: ids of text are below {self.n_text}")
        return self._decode(ids)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes and four special tokens: 256 user, 257 assistant, 258 database, 259 end of dialog."""

    def __init__(self):
        super().__init__("bytes", 256, lambda text: [*text.encode()], lambda ids: bytes(ids).decode(errors="replace"))


#: The pre-tokenizer of GPT-4 and Llama 3, run before tiktoken merges bytes: a file of ranks does not name one.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ACCEPTED = 'give "bytes", a file of BPE ranks (*.tiktoken), or a tokenizer.json or the folder that holds one'
#: A text that every tokenizer must give back. One that changes case, trims or drops something does not.
_PROBE = " Zoë  O'Neil,\t李 😀 <|end|>\n```sql\nFIND birth_place FOR Zoë O'Neil\n```"


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer that `RunConfig.tokenizer` names; its `name` holds a hash of its file.

    spec: "bytes", a `.tiktoken` file of BPE ranks, a `tokenizer.json`, or the folder that holds one. Special tokens of
    the file are plain text here. Raises `InputError` if the file is none of these, cannot be read or does not decode to
    the text that it encoded, or if a library is missing. (Some Hugging Face tokenizers normalize Unicode: they return
    the normalized text.)
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = tokenizer_file(spec)
    kinds = {".tiktoken": ("tiktoken", _read_ranks), ".json": ("huggingface", _read_hugging_face)}
    if path.suffix not in kinds or not os.path.isfile(path):  # False for a name too long, too
        raise InputError(f"tokenizer = {spec!r} is no tokenizer (nothing is downloaded): {_ACCEPTED}")
    kind, load = kinds[path.suffix]
    with reading(f"the tokenizer {path}", Exception):  # libraries raise plain `Exception`
        content = read_bytes(path)
        tokenizer = Tokenizer(f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}", *load(content))
        if (back := tokenizer.decode(tokenizer.encode(_PROBE))) != _PROBE:
            raise ValueError(f"it changes a text, {_PROBE!r} becomes {back!r}: give a byte-level tokenizer")
    return tokenizer


def tokenizer_file(spec: str) -> Path:
    """Return the file that a `RunConfig.tokenizer` other than "bytes" names."""
    return Path(spec, "tokenizer.json") if os.path.isdir(spec) else Path(spec)


def _read_ranks(content: bytes) -> tuple[int, Callable, Callable]:
    """Read lines of `base64 rank`. tiktoken's own reader caches by path, so it would miss a changed file."""
    tiktoken = optional("tiktoken", "scale", "this tokenizer needs the package tiktoken")
    with reading("lines of base64 token and rank"):
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(len(pairs))) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError("each of the 256 bytes needs a rank, and ranks count from 0, each once")
    encoding = tiktoken.Encoding("ranks", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return len(ranks), encoding.encode_ordinary, encoding.decode


def _read_hugging_face(content: bytes) -> tuple[int, Callable, Callable]:
    """Read a tokenizer.json, without truncation, padding and BPE dropout."""
    tokenizers = optional("tokenizers", "scale", "this tokenizer needs the package tokenizers")
    description = json.loads(content) | {"truncation": None, "padding": None}
    description["model"] |= {"dropout": None} if "dropout" in description["model"] else {}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    tokenizer.encode_special_tokens = True  # encode their text like any other
    return (
        1 + max(tokenizer.get_vocab().values()),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
    )
