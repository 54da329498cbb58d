"""Dialogs from files: the tokens of memory, made once, within bounds; read ahead, split over ranks, resumed exactly."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import full_after
from hypothesis import given
from hypothesis import strategies as st

from lib import paths
from lib.base import InputError, WorkError
from lib.config import RunConfig, override
from lib.dialogs.batches import Source
from lib.dialogs.files import ConcatDialogs, ReadAhead, open_dialogs, tokenize_file
from lib.dialogs.templates import Role, Turn, dialogs
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import TokenizedDialogs, tokenize, tokenize_people
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.training.distributed import ALONE, Ranks
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


def _folders() -> set[str]:
    return {path.name for path in (paths.runs() / "tokens").glob("*") if path.suffix != ".lock"}


@pytest.fixture(autouse=True)
def tokens(tmp_path_factory, monkeypatch) -> None:
    """No test finds what another has tokenized."""
    monkeypatch.setenv("ITL_RUNS", str(tmp_path_factory.mktemp("runs")))


# ---- The same tokens as from memory

texts = st.text(max_size=12) | st.sampled_from(["", "\n", "\r\n", "\u2028\x85\x0c", "\x00", "\ufeff", "😀", "<|end|>"])
turns = st.builds(Turn, st.sampled_from(Role), texts)
trainable = st.lists(turns, min_size=1, max_size=5).filter(lambda d: any(t.role == Role.ASSISTANT for t in d))


@given(
    st.lists(trainable, min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([TOKENIZER, OtherTokenizer()]),
    st.integers(1, 200),
)
def test_a_file_becomes_the_tokens_of_its_dialogs(tmp_path_factory, many, ascii_only, tokenizer, block):
    folder = tmp_path_factory.mktemp("file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITL_RUNS", str(folder))
        patch.setattr("lib.dialogs.files._BLOCK", block)  # of one dialog or of some
        path = _write(folder / "d.jsonl", many, ensure_ascii=ascii_only)
        _assert_same(open_dialogs(tokenize_file(path, tokenizer)), tokenize(many, tokenizer))


def test_lines_may_end_as_on_windows_and_the_last_one_not_at_all(tmp_path):
    many = list(islice(dialogs(sample_people(1), "in-tool"), 3))
    (tmp_path / "d.jsonl").write_bytes(b"\r\n".join(json.dumps(dialog).encode() for dialog in many))
    _assert_same(open_dialogs(tokenize_file(tmp_path / "d.jsonl", TOKENIZER)), tokenize(many, TOKENIZER))


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_blank_lines_and_a_mark_at_the_start_do_not_count(tmp_path, monkeypatch, block):
    monkeypatch.setattr("lib.dialogs.files._BLOCK", block)
    many, path = list(islice(dialogs(sample_people(1), "in-tool"), 3)), tmp_path / "d.jsonl"
    one, two, three = (json.dumps(dialog).encode() for dialog in many)
    path.write_bytes(b"\xef\xbb\xbf\n\r\n" + one + b"\n\n" + two + b"\n \t\n" + b"\n" * 300 + three + b"\n\n  ")
    _assert_same(open_dialogs(tokenize_file(path, TOKENIZER)), tokenize(many, TOKENIZER))
    path.write_bytes(b"\xef\xbb\xbf" + one + b"\n\n\n" + two + b"\n\n{\n")
    with pytest.raises(InputError, match=r"d\.jsonl: line 6: "):
        tokenize_file(path, TOKENIZER)
    for blank in (b"\n\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
        path.write_bytes(blank)
        with pytest.raises(InputError, match="holds no dialog"):
            tokenize_file(path, TOKENIZER)
    assert len(_folders()) == 1


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
def test_a_bad_line_is_named_and_nothing_is_left(tmp_path, line, words):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode()] * 2 + [line if isinstance(line, bytes) else line.encode(), b""]))
    with pytest.raises(InputError) as caught:
        tokenize_file(path, TOKENIZER)
    message = str(caught.value)
    for word in (
        f"cannot read the dialogs of {path}: line 3: ",
        "[[role, text], ...]",
        "user or assistant or database",
        *words,
    ):
        assert word in message
    assert "\n" not in message and len(message) < 400 + len(str(path))
    assert _folders() == set()


@pytest.mark.timeout(60)
def test_files_that_are_empty_missing_or_no_files_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("empty", "missing", ".", "pipe", "/dev/zero", "loop", "x" * 300):
        with pytest.raises(InputError, match="holds no dialog" if name == "empty" else "no such file"):
            tokenize_file(tmp_path / name, TOKENIZER)
    assert _folders() == set()


# ---- Once, and whole


def _count_dialogs(monkeypatch) -> list[int]:
    """How many dialogs each call of `tokenize` was given from here on."""
    calls = []

    def counted(items, tokenizer):
        made = tokenize(items, tokenizer)
        calls.append(len(made))
        return made

    monkeypatch.setattr("lib.dialogs.files.tokenize", counted)
    return calls


def test_a_file_is_tokenized_once_and_anew_when_its_content_or_the_tokenizer_is_another(tmp_path, monkeypatch):
    calls = _count_dialogs(monkeypatch)
    many = list(dialogs(sample_people(2), "in-weight"))
    path = _write(tmp_path / "d.jsonl", many)
    first = tokenize_file(path, TOKENIZER)
    os.utime(path, (1, 1))
    shutil.copy(path, tmp_path / "copy.jsonl")
    assert tokenize_file(path, TOKENIZER) == tokenize_file(tmp_path / "copy.jsonl", TOKENIZER) == first
    assert calls == [8]
    assert tokenize_file(path, OtherTokenizer()) != first and calls == [8, 8]
    size = path.stat()
    path.write_bytes(path.read_bytes().replace(b"born", b"BORN"))
    os.utime(path, ns=(size.st_atime_ns, size.st_mtime_ns))  # neither size nor time tell
    changed = tokenize_file(path, TOKENIZER)
    assert changed != first and calls == [8, 8, 8]
    _assert_same(open_dialogs(changed), tokenize(_read(path), TOKENIZER))


def _read(path: Path) -> list:
    return [[Turn(Role(role), text) for role, text in json.loads(line)] for line in path.read_text().splitlines()]


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = _write(tmp_path / "d.jsonl", list(dialogs(sample_people(2), "in-weight")))
    monkeypatch.setattr("lib.dialogs.files._BLOCK", 1)

    def and_append(items, tokenizer):
        with path.open("a") as file:
            file.write(GOOD + "\n")
        monkeypatch.setattr("lib.dialogs.files.tokenize", tokenize)
        return tokenize(items, tokenizer)

    monkeypatch.setattr("lib.dialogs.files.tokenize", and_append)
    with pytest.raises(InputError, match="changed while it was read"):
        tokenize_file(path, TOKENIZER)
    assert _folders() == set()
    assert len(open_dialogs(tokenize_file(path, TOKENIZER))) == 9


def test_tokens_that_do_not_fit_on_the_disk_name_their_folder_and_leave_nothing(tmp_path):
    path = _write(tmp_path / "d.jsonl", list(dialogs(sample_people(20), "in-weight")))
    with full_after(1_000), pytest.raises(WorkError, match="^cannot write .*/tokens/.*-bytes-1: File too large$"):
        tokenize_file(path, TOKENIZER)
    assert _folders() == set()


def test_a_line_without_end_is_refused_and_not_held(tmp_path, monkeypatch):
    with (tmp_path / "d.jsonl").open("wb") as file:
        file.write(GOOD.encode() + b"\n")
        file.truncate(100 << 20)  # takes no room
    monkeypatch.setattr(paths, "LARGEST_JSON", 1 << 20)
    tracemalloc.start()
    with pytest.raises(InputError, match="d.jsonl: line 2: "):
        tokenize_file(tmp_path / "d.jsonl", TOKENIZER)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def _script(code: str, *arguments) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_killed_tokenization_leaves_nothing_that_counts_and_is_made_good(tmp_path):
    path = _write(tmp_path / "d.jsonl", list(dialogs(sample_people(20_000), "in-weight")))
    process = _script(
        "import sys; from lib.dialogs import files; from lib.dialogs.tokenizers import ByteTokenizer; "
        "files._BLOCK = 1000; files.tokenize_file(sys.argv[1], ByteTokenizer()); print('done')",
        path,
    )
    wanted = random.randrange(1_000_000)
    while process.poll() is None and sum(f.stat().st_size for f in _safely(".*.tmp/values.*")) < wanted:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == "", "it had ended before"
    (leftover,) = _folders()
    assert leftover.startswith(".") and leftover.endswith(".tmp")
    folder = tokenize_file(path, TOKENIZER)
    assert _folders() == {folder.name}
    _assert_same(open_dialogs(folder), tokenize_people(sample_people(20_000), "in-weight", TOKENIZER))


def _safely(pattern: str) -> list[Path]:
    return [path for path in (paths.runs() / "tokens").glob(pattern) if path.exists()]


@pytest.mark.slow
def test_processes_that_want_the_same_tokens_make_them_once(tmp_path):
    path = _write(tmp_path / "d.jsonl", list(dialogs(sample_people(2_000), "in-weight")))
    code = (
        "import sys; from lib.dialogs import files; from lib.dialogs.tokenizers import ByteTokenizer; made = []\n"
        "write = files._write_tokens\n"
        "files._write_tokens = lambda *a: (made.append(1), write(*a))\n"
        "files.tokenize_file(sys.argv[1], ByteTokenizer()); print(len(made))"
    )
    processes = [_script(code, path) for _ in range(3)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["0", "0", "1"]


@pytest.mark.parametrize("damage", [os.unlink, lambda file: os.truncate(file, file.stat().st_size - 8)])
def test_damaged_tokens_are_noticed(tmp_path, damage):
    folder = tokenize_file(_write(tmp_path / "d.jsonl", list(dialogs(sample_people(2), "in-weight"))), TOKENIZER)
    for name in ("values.int16", "mask.bool", "offsets.int64", "n_trained.int64", "first.int64"):
        whole = (folder / name).read_bytes()
        damage(folder / name)
        with pytest.raises(InputError, match="damaged: delete the folder"):
            open_dialogs(folder)
        (folder / name).write_bytes(whole)
    open_dialogs(folder)


# ---- In bounded memory

BOUND_MB = 48


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits memory without counting maps")
def test_a_file_far_larger_than_memory_is_tokenized_and_trained_on(tmp_path):
    """The process may have `BOUND_MB` more than what it has once all is imported: beyond that allocation fails."""
    path, n_dialogs = tmp_path / "d.jsonl", 0
    text = "abcdefghij" * 100
    with path.open("w") as file:
        while file.tell() < 200e6:
            for i in range(1000):
                file.write(f'[["user", "{n_dialogs + i}"], ["assistant", "{text}"]]\n')
            n_dialogs += 1000
    code = f"""
import resource, sys, torch
from pathlib import Path
from lib.config import RunConfig
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.batches import Source
from lib.dialogs.tokens import tokenize_people
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.dialogs.files import ConcatDialogs, open_dialogs, tokenize_file
from lib.training.trainer import Trainer

def trainer(data, name, sources=()):
    config = RunConfig.parse({{"model": {{"d_model": 8}}, "training": {{"steps": 3, "batch_size": 4}},
                              "evaluation": {{"every": None}}}})
    return Trainer(Transformer(config.model), data, config, Path(sys.argv[2]) / name, sources=sources)

torch.set_num_threads(1)
own = tokenize_people(sample_people(64), "in-tool", ByteTokenizer())
trainer(ConcatDialogs([own]), "warm").train()
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((used + {BOUND_MB} * 1024) * 1024,) * 2)
data = open_dialogs(tokenize_file(sys.argv[1], ByteTokenizer()))
assert data.values.nbytes + data.mask.nbytes > 10 * {BOUND_MB} * 2**20
print(len(data))
trainer(ConcatDialogs([own, data]), "run", [Source(len(own), 0.5), Source(len(data), 0.5)]).train()
print(int(data.n_trained.sum()))
try:
    data.values.clone(), data.mask.clone()
except (MemoryError, RuntimeError):
    print("refused")
"""
    process = _script(code, path, tmp_path)
    printed = process.communicate()[0].split()
    assert printed == [str(n_dialogs), str(n_dialogs * (len(text) + 1)), "refused"]


# ---- Several datasets as one


@pytest.fixture
def parts(tmp_path) -> list[TokenizedDialogs]:
    """Own questions, and two files, mapped."""
    people = sample_people(30)
    own = tokenize_people(people[:10], "in-weight", TOKENIZER)
    files = [
        _write(tmp_path / f"{i}.jsonl", list(dialogs(people[part], "in-tool")))
        for i, part in enumerate((slice(10, 20), slice(20, 30)))
    ]
    return [own, *(open_dialogs(tokenize_file(path, TOKENIZER)) for path in files)]


# ---- Reading ahead


def test_what_is_read_ahead_is_what_was_asked_for_in_any_order():
    made = []
    ahead = ReadAhead(lambda step: made.append((step, threading.current_thread())) or step * step)
    steps = [0, 1, 2, 7, 8, 3, 3, 4]
    assert [ahead(step) for step in steps] == [step * step for step in steps]
    assert threading.main_thread() not in {thread for _, thread in made}


def test_the_next_step_is_made_while_this_one_is_worked_on():
    begun = [threading.Event() for _ in range(5)]
    ahead = ReadAhead(lambda step: begun[step].set())
    for step in range(4):
        ahead(step)
        assert begun[step + 1].wait(10)
        assert not any(event.is_set() for event in begun[step + 2 :])


def test_what_fails_ahead_fails_when_its_turn_comes_and_can_be_asked_for_again():
    broken = True

    def make(step: int) -> int:
        if step == 1 and broken:
            raise OSError("the disk is gone")
        return step

    ahead = ReadAhead(make)
    assert ahead(0) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(1)
    broken = False
    assert [ahead(1), ahead(2)] == [1, 2]


@pytest.mark.slow
def test_a_process_that_fails_or_ends_while_it_reads_ahead_does_not_hang(tmp_path):
    for last_words, code in (("raise SystemExit(3)", 3), ("1 / 0", 1), ("pass", 0)):
        process = _script(
            "import time; from lib.dialogs.files import ReadAhead\n"
            "ahead = ReadAhead(lambda step: time.sleep(0.2 * step)); ahead(0)\n" + last_words
        )
        process.communicate(timeout=60)
        assert process.returncode == code


def test_the_thread_ends_with_its_reader():
    ahead = ReadAhead(lambda step: threading.current_thread())
    thread = ahead(0)
    assert thread.is_alive()
    del ahead
    thread.join(10)
    assert not thread.is_alive()


# ---- Trained on


def _config(**training) -> RunConfig:
    return RunConfig.parse({
        "model": {"d_model": 8},
        "optim": {"name": "adamw"},
        "training": {"steps": 24, "batch_size": 12, "grad_accumulation": 2, "checkpoint_every": 5, **training},
        "evaluation": {"every": None},
    })  # fmt: skip


def _joined() -> TokenizedDialogs:
    """The same dialogs as `parts`, in memory."""
    people = sample_people(30)
    return tokenize([*dialogs(people[:10], "in-weight"), *dialogs(people[10:], "in-tool")], TOKENIZER)


def _trainer(parts, directory: Path, ranks: Ranks = ALONE, joined: bool = False, init: int = 0) -> Trainer:
    config = _config()
    sources = [Source(len(part), weight) for part, weight in zip(parts, (0.5, 0.3, 0.2), strict=True)]
    model = Transformer(config.model, torch.Generator().manual_seed(init))
    data = _joined() if joined else ConcatDialogs(parts)
    return Trainer(model, data, config, directory, None, False, sources, ranks)


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _identical(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_training_from_files_ends_with_the_weights_of_training_from_memory(parts, tmp_path):
    mapped, held = _trainer(parts, tmp_path / "mapped"), _trainer(parts, tmp_path / "held", joined=True)
    ends = [trainer.train() for trainer in (mapped, held)]
    assert _identical(_weights(mapped), _weights(held))
    assert [(e.steps, e.loss, e.dialogs_seen) for e in ends] == [(24, ends[0].loss, ends[0].dialogs_seen)] * 2


def test_a_run_from_files_that_was_interrupted_anywhere_ends_with_the_same_weights(parts, tmp_path):
    whole = _trainer(parts, tmp_path / "whole")
    whole.train()
    for stop in sorted(random.sample(range(1, 24), 3)):
        part = _trainer(parts, tmp_path / "parts")
        part.resume()
        while part.counters["step"] < stop:
            part.step()
        part.save()
        part.finish_saving()
    last = _trainer(parts, tmp_path / "parts", init=1)
    last.train()
    assert _identical(_weights(whole), _weights(last))


def test_a_run_that_reads_ahead_ends_early_and_with_an_error_as_any_other(parts, tmp_path):
    trainer = _trainer(parts, tmp_path)
    trainer.evaluate = lambda model: 1 / 0
    trainer.config = override(trainer.config, {"evaluation.every": 3})
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    again = _trainer(parts, tmp_path)
    again.evaluate, again.config = lambda model: 1.0, override(again.config, {"evaluation.every": 3})
    assert again.train().stopped == "recall"


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
    assert [len(part) for part in data.parts] == [16 + 4, 40, 40]
    _assert_same(data.parts[1], tokenize(_read(files[0]), TOKENIZER))
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
    shutil.rmtree(paths.runs() / "tokens")  # they can be made again
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
