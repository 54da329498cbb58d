"""Dialogs from files: the tokens of their dialogs, mixed with others, resumed exactly."""

import json
import os
import random
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.config import RunConfig, override
from lib.dialogs.batches import Source
from lib.dialogs.files import read_dialogs
from lib.dialogs.templates import Role, Turn, dialogs
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import TokenizedDialogs, join, tokenize, tokenize_people
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.training.run import run
from lib.training.trainer import Trainer

TOKENIZER = ByteTokenizer()


class OtherTokenizer:
    """Larger ids by the general path."""

    name, vocab_size, end = "other", 100_260, 100_259
    role_ids = {role: token + 100_000 for role, token in TOKENIZER.role_ids.items()}

    def encode(self, text: str) -> list[int]:
        return [token + 100_000 for token in text.encode()]


def _write(path: Path, many: list, **options) -> Path:
    path.write_bytes(b"".join(json.dumps(dialog, **options).encode() + b"\n" for dialog in many))
    return path


def _assert_same(found: TokenizedDialogs, expected: TokenizedDialogs) -> None:
    for name in ("values", "mask", "offsets", "n_trained", "first"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name


# ---- The tokens of their dialogs

texts = st.text(max_size=12) | st.sampled_from(["", "\n", "\r\n", "\u2028\x85\x0c", "\x00", "\ufeff", "😀", "<|end|>"])
turns = st.builds(Turn, st.sampled_from(Role), texts)
trainable = st.lists(turns, min_size=1, max_size=5).filter(lambda d: any(t.role == Role.ASSISTANT for t in d))


@given(
    st.lists(trainable, min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([TOKENIZER, OtherTokenizer()]),
)
def test_a_file_becomes_the_tokens_of_its_dialogs(tmp_path_factory, many, ascii_only, tokenizer):
    path = _write(tmp_path_factory.mktemp("file") / "d.jsonl", many, ensure_ascii=ascii_only)
    _assert_same(read_dialogs(path, tokenizer)[0], tokenize(many, tokenizer))


def test_lines_may_end_as_on_windows_and_the_last_one_not_at_all(tmp_path):
    many = list(islice(dialogs(sample_people(1), "in-tool"), 3))
    (tmp_path / "d.jsonl").write_bytes(b"\r\n".join(json.dumps(dialog).encode() for dialog in many))
    _assert_same(read_dialogs(tmp_path / "d.jsonl", TOKENIZER)[0], tokenize(many, TOKENIZER))


def test_blank_lines_and_a_mark_at_the_start_do_not_count(tmp_path):
    many, path = list(islice(dialogs(sample_people(1), "in-tool"), 3)), tmp_path / "d.jsonl"
    one, two, three = (json.dumps(dialog).encode() for dialog in many)
    path.write_bytes(b"\xef\xbb\xbf\n\r\n" + one + b"\n\n" + two + b"\n \t\n" + b"\n" * 300 + three + b"\n\n  ")
    _assert_same(read_dialogs(path, TOKENIZER)[0], tokenize(many, TOKENIZER))
    path.write_bytes(b"\xef\xbb\xbf" + one + b"\n\n\n" + two + b"\n\n{\n")
    with pytest.raises(InputError, match=r"d\.jsonl: line 6: "):
        read_dialogs(path, TOKENIZER)
    for blank in (b"\n\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
        path.write_bytes(blank)
        with pytest.raises(InputError, match="holds no dialog"):
            read_dialogs(path, TOKENIZER)


GOOD = '[["user", "Hi"], ["assistant", "Hello"]]'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["Invalid JSON", "EOF"]),
        ("[" * 100_000, ["Invalid JSON", "recursion limit"]),
        ("7", ["valid array"]),
        ('[{"user": 1, "assistant": 2}]', ["[0] ", "valid array"]),
        ('[["user"]]', ["[0][1] ", "required"]),
        ('[["user", "a", "b"]]', ["[0] ", "at most 2 items"]),
        ('[["robot", "a"]]', ["[0][0] ", "'user', 'assistant' or 'database'"]),
        ('[["user", null]]', ["[0][1] ", "valid string"]),
        ("[]", ["nothing to train on"]),
        ('[["user", "Hi"]]', ["nothing to train on"]),
        ('[["assistant", "\\ud800"]]', ["Invalid JSON", "hex escape"]),
        (b'[["assistant", "\xff"]]', ["Invalid JSON", "unicode"]),
        (GOOD.encode("utf-16-le"), ["Invalid JSON", "in UTF-8"]),
        ('\ufeff[["assistant", "a"]]', ["Invalid JSON"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode()] * 2 + [line if isinstance(line, bytes) else line.encode(), b""]))
    with pytest.raises(InputError) as caught:
        read_dialogs(path, TOKENIZER)
    message = str(caught.value)
    for word in (
        f"cannot read the dialogs of {path}: line 3: ",
        "[[role, text], ...]",
        "user or assistant or database",
        *words,
    ):
        assert word in message
    assert "\n" not in message and len(message) < 400 + len(str(path))


@pytest.mark.timeout(60)
def test_files_that_are_empty_missing_or_no_files_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("empty", "missing", ".", "pipe", "/dev/zero", "loop", "x" * 300):
        with pytest.raises(InputError, match="holds no dialog" if name == "empty" else "no such file"):
            read_dialogs(tmp_path / name, TOKENIZER)


def _read(path: Path) -> list:
    return [[Turn(Role(role), text) for role, text in json.loads(line)] for line in path.read_text().splitlines()]


def test_a_line_without_end_is_refused_and_not_held(tmp_path, monkeypatch):
    with (tmp_path / "d.jsonl").open("wb") as file:
        file.write(GOOD.encode() + b"\n")
        file.truncate(100 << 20)  # takes no room
    monkeypatch.setattr("lib.dialogs.files.LARGEST_JSON", 1 << 20)
    tracemalloc.start()
    with pytest.raises(InputError, match="d.jsonl: line 2: "):
        read_dialogs(tmp_path / "d.jsonl", TOKENIZER)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


# ---- Trained on


@pytest.fixture
def parts(tmp_path) -> list[TokenizedDialogs]:
    """Own questions, and two files."""
    people = sample_people(30)
    own = tokenize_people(people[:10], "in-weight", TOKENIZER)
    files = [
        _write(tmp_path / f"{i}.jsonl", list(dialogs(people[part], "in-tool")))
        for i, part in enumerate((slice(10, 20), slice(20, 30)))
    ]
    return [own, *(read_dialogs(path, TOKENIZER)[0] for path in files)]


def test_joined_datasets_hold_the_dialogs_of_their_parts(parts):
    _assert_same(join(parts), _joined())


def _config(**training) -> RunConfig:
    return RunConfig.parse({
        "model": {"d_model": 8},
        "optim": {"name": "adamw"},
        "training": {"steps": 24, "batch_size": 12, "grad_accumulation": 2, "checkpoint_every": 5, **training},
        "evaluation": {"every": None},
    })  # fmt: skip


def _joined() -> TokenizedDialogs:
    """The same dialogs as `parts`, tokenized at once."""
    people = sample_people(30)
    return tokenize([*dialogs(people[:10], "in-weight"), *dialogs(people[10:], "in-tool")], TOKENIZER)


def _trainer(parts, directory: Path, init: int = 0) -> Trainer:
    config = _config()
    sources = [Source(len(part), weight) for part, weight in zip(parts, (0.5, 0.3, 0.2), strict=True)]
    model = Transformer(config.model, torch.Generator().manual_seed(init))
    return Trainer(model, join(parts), config, directory, sources=sources)


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _identical(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_from_files_that_was_interrupted_anywhere_ends_with_the_same_weights(parts, tmp_path):
    whole = _trainer(parts, tmp_path / "whole")
    whole.train()
    for stop in sorted(random.sample(range(1, 24), 3)):
        part = _trainer(parts, tmp_path / "parts")
        part.resume()
        while part.counters["step"] < stop:
            part.step()
        part.save()
    last = _trainer(parts, tmp_path / "parts", init=1)
    last.train()
    assert _identical(_weights(whole), _weights(last))


def _epoch(trainer: Trainer) -> list[int]:
    return torch.cat([trainer.batches[step] for step in range(trainer.batches.per_epoch)]).tolist()


# ---- As part of a run


def _cell(files: dict[Path, float], **assignments) -> RunConfig:
    values = {"training.files": {str(path): share for path, share in files.items()}, **assignments}
    return override(_config(steps=6, grad_accumulation=1), {"facts.n_people": 4, **values})


@pytest.fixture
def files(tmp_path) -> list[Path]:
    people = sample_people(30)
    return [
        _write(tmp_path / name, list(dialogs(people[part], "in-tool")))
        for name, part in (("a.jsonl", slice(10, 20)), ("b.jsonl", slice(20, 30)))
    ]


def test_a_run_takes_of_each_file_the_share_that_was_asked_for(files, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("lib.training.run.Trainer", lambda *args: made.append(Trainer(*args)) or made[0])
    config = _cell({files[1]: 0.25, files[0]: 0.125}, **{"training.biographies": 0.125})
    row = run(config, tmp_path / "run")
    counts = np.bincount(_epoch(made[0]), minlength=16 + 4 + 80)
    # Questions 16, biographies of the four people, then the files in the order of their names.
    assert [int(part.sum()) for part in np.split(counts, [16, 20, 60])] == [16, 4, 4, 8]
    data = made[0].data
    people = sample_people(4)
    texts = [*dialogs(people, config.mode), *dialogs(people, "biography")]
    _assert_same(data, tokenize([*texts, *_read(files[0]), *_read(files[1])], TOKENIZER))
    assert row["steps"] == 6 and row["n_questions"] == 16


def test_the_order_in_which_files_are_named_makes_no_difference(files, tmp_path):
    one, other = _cell({files[0]: 0.2, files[1]: 0.1}), _cell({files[1]: 0.1, files[0]: 0.2})
    assert one == other and one.run_id == other.run_id
    assert run(one, tmp_path / "one")["loss"] == run(other, tmp_path / "other")["loss"]


def test_a_run_goes_on_from_files_where_it_was_and_from_changed_ones_not_at_all(files, tmp_path, monkeypatch):
    config = _cell({files[0]: 0.5})
    reference = run(config, tmp_path / "whole")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lib.training.run.save_model", die)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run")
    before = files[0].read_bytes()
    files[0].write_bytes(before + before.splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="other people or dialogs"):
        run(config, tmp_path / "run")
    files[0].write_bytes(before)
    row = run(config, tmp_path / "run")
    assert {name: row[name] for name in ("loss", "recall", "steps")} == {
        name: reference[name] for name in ("loss", "recall", "steps")
    }


def test_a_share_of_less_than_a_dialog_is_refused(files, tmp_path):
    with pytest.raises(InputError, match="a.jsonl: 0.01 is less than one dialog a pass"):
        run(_cell({files[0]: 0.01}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"files": {"a": 0.0}}, ["training.files", "greater than 0", "0.0"]),
        ({"files": {"a": float("nan")}}, ["training.files", "finite", "nan"]),
        ({"files": ["a.jsonl"]}, ["training.files", "dictionary"]),
        ({"files": {"a": 0.5, "b": 0.5}}, ["training.files", "less than 1"]),
        (
            {"files": {"a": 0.5}, "biographies": 0.6},
            ["training.files and training.biographies add up to 1.1", "less than 1"],
        ),
    ],
)
def test_impossible_shares_are_refused(training, words):
    with pytest.raises(InputError) as caught:
        RunConfig.parse({"training": training})
    for word in words:
        assert word in str(caught.value)
