"""Small vocabularies, made here: one BPE, as Hugging Face and as tiktoken keep it."""

import base64
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lib.dialogs.templates import dialogs
from lib.dialogs.tokenizers import PATTERN
from lib.facts.sampling import sample_people

#: Bytes, and what was merged of them.
N_TEXT = 400


def train_bpe(n_people: int = 50) -> Tokenizer:
    """`N_TEXT` tokens learnt from in-tool dialogs, cut as `lib.dialogs.tokenizers` cuts texts for tiktoken."""
    tokenizer = Tokenizer(models.BPE())
    cut, to_bytes = pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [turn.text for dialog in dialogs(sample_people(n_people), "in-tool") for turn in dialog]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_TEXT, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer_json(path: Path, tokenizer: Tokenizer, **fields) -> Path:
    """The file that Hugging Face keeps, with some of its fields replaced."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | fields))
    return path


def write_ranks(path: Path, tokenizer: Tokenizer) -> Path:
    """The file that tiktoken keeps: every token's bytes in base64, and its rank."""
    # In a vocabulary of byte-level BPE a byte that is no printable character is written as one from 0x100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    by_rank = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [(bytes(byte_of[character] for character in token), rank) for token, rank in by_rank]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokens))
    return path
