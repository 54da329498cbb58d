"""Checkpoints: whole or absent whatever happens while they are written, and never loaded damaged."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib.base import InputError, WorkError
from lib.training import checkpoint

FILES = (checkpoint.TENSORS, checkpoint.STATE, checkpoint.MARKER)
STATE = {"step": 10, "lr": 0.1 + 0.2, "betas": [0.9, 0.95], "name": "é", "none": None}


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": torch.randn(3, 4, generator=generator),
        "transposed": torch.randn(5, 2, generator=generator).T,
        "half": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(float(seed)),
        "bytes": torch.get_rng_state(),
        "counts": torch.arange(5),
        "empty": torch.empty(0, 3),
    }


def _is(folder: Path, seed: int) -> bool:
    tensors, state = checkpoint.load(folder)
    expected = _tensors(seed)
    same = all(torch.equal(tensors[name], tensor) for name, tensor in expected.items() if name != "bytes")
    return same and tensors.keys() == expected.keys() and state == STATE | {"seed": seed}


def _save(folder: Path, seed: int) -> None:
    checkpoint.save(folder, _tensors(seed), STATE | {"seed": seed})


def test_what_is_loaded_is_what_was_saved(tmp_path):
    _save(tmp_path / "model", 3)
    assert _is(tmp_path / "model", 3)
    tensors, _ = checkpoint.load(tmp_path / "model")
    for name, tensor in _tensors(3).items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape


def test_on_disk_there_are_tensors_and_json_and_no_pickle(tmp_path):
    _save(tmp_path / "model", 0)
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(FILES)
    raw = (tmp_path / "model" / checkpoint.TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])  # the whole format: a length, a JSON header, plain numbers
    assert {name for name in header if name != "__metadata__"} == _tensors().keys()
    assert len(raw) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    for name in (checkpoint.STATE, checkpoint.MARKER):
        json.loads((tmp_path / "model" / name).read_text())


# ---- Crashes


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture
def crash_at(monkeypatch):
    """A function: from now on, die in the n-th operation on the file system, half-way through if `torn`."""
    counter = {"left": -1, "torn": False}

    def crashing(function, half=None):
        def wrapper(*arguments, **options):
            counter["left"] -= 1
            if counter["left"] == -1:
                if counter["torn"] and half:
                    half(*arguments, **options)
                raise Crash
            return function(*arguments, **options)

        return wrapper

    def half_text(path, text, encoding):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])

    def half_bytes(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])

    def half_delete(path, ignore_errors=False):
        for file in sorted(path.glob("*"))[:1]:
            file.unlink()

    monkeypatch.setattr(Path, "write_bytes", crashing(Path.write_bytes, half_bytes))
    monkeypatch.setattr(Path, "write_text", crashing(Path.write_text, half_text))
    monkeypatch.setattr(Path, "mkdir", crashing(Path.mkdir))
    monkeypatch.setattr(Path, "rename", crashing(Path.rename))
    monkeypatch.setattr(os, "fsync", crashing(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", crashing(shutil.rmtree, half_delete))

    def arm(n: int, torn: bool) -> None:
        counter.update(left=n, torn=torn)

    return arm


def _until_it_succeeds(crash_at, action, torn: bool):
    """Yields after a crash in each operation of `action` in turn; ends when `action` ran through."""
    for n in range(100):
        crash_at(n, torn)
        try:
            action()
        except Crash:
            crash_at(-1, torn)
            yield n
        else:
            assert n > 10  # the operations were really intercepted
            return
    raise AssertionError("it never succeeded")


@pytest.mark.parametrize("torn", [False, True])
def test_after_a_crash_anywhere_the_latest_checkpoint_is_the_old_or_the_new_one(tmp_path, crash_at, torn):
    reference = tmp_path / "reference"
    for seed in (1, 2):
        _save_step(reference, seed, keep=2)

    def third() -> None:
        _save_step(root, 3, keep=2)

    root = tmp_path / "run"
    shutil.copytree(reference, root)
    for n in _until_it_succeeds(crash_at, third, torn):
        latest = checkpoint.latest(root)
        assert _is(latest, 3 if latest.name == "step_00000003" else 2), n
        third()  # whatever was left lying about, the next attempt succeeds and clears it away
        assert _is(checkpoint.latest(root), 3)
        assert sorted(path.name for path in root.iterdir()) == ["step_00000002", "step_00000003"], n
        shutil.rmtree(root)
        shutil.copytree(reference, root)


@pytest.mark.parametrize("torn", [False, True])
def test_after_a_crash_anywhere_a_replaced_checkpoint_is_old_or_new_or_absent(tmp_path, crash_at, torn):
    folder = tmp_path / "model"
    _save(folder, 1)
    for n in _until_it_succeeds(crash_at, lambda: _save(folder, 2), torn):
        if folder.exists():
            assert _is(folder, 1) or _is(folder, 2), n
        else:
            with pytest.raises(InputError, match="there is no checkpoint"):
                checkpoint.load(folder)
        _save(folder, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- Damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    _save(folder, 4)
    return folder


def _assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", ["nothing", "half", "all but one byte"])
def test_a_truncated_file_is_noticed(saved, tmp_path, name, keep):
    folder = shutil.copytree(saved, tmp_path / "model")
    size = (folder / name).stat().st_size
    os.truncate(folder / name, {"nothing": 0, "half": size // 2, "all but one byte": size - 1}[keep])
    _assert_refused(folder, "damaged", name, "use an earlier one or train again")


@given(st.sampled_from([checkpoint.TENSORS, checkpoint.STATE]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_bit_is_noticed(saved, name, where, flip):
    content = bytearray((saved / name).read_bytes())
    intact = bytes(content)
    content[int(where * len(content))] ^= flip
    try:
        (saved / name).write_bytes(content)
        _assert_refused(saved, "damaged", name, "has changed")
    finally:
        (saved / name).write_bytes(intact)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_bit_of_the_marker_never_lets_anything_else_be_loaded(saved, where, flip):
    path = saved / checkpoint.MARKER
    intact = path.read_bytes()
    content = bytearray(intact)
    content[int(where * len(content))] ^= flip
    try:
        path.write_bytes(content)
        try:
            assert _is(saved, 4)  # one kind of white space became another
        except InputError as error:
            assert "damaged" in str(error)
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"tensors.safetensors": 1}'])
def test_a_marker_that_says_something_else_is_noticed(saved, tmp_path, content):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / checkpoint.MARKER).write_text(content)
    _assert_refused(folder, "damaged", checkpoint.MARKER)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / name).unlink()
    _assert_refused(folder, name, "missing")


def test_a_missing_folder_and_a_file_in_its_place_are_noticed(tmp_path):
    _assert_refused(tmp_path / "nothing", "there is no checkpoint")
    (tmp_path / "file").write_text("")
    _assert_refused(tmp_path / "file", "there is no checkpoint")


@pytest.mark.parametrize("name", ["a.safetensors", "zz.safetensors", "._tensors.safetensors", "notes.json"])
def test_files_that_the_marker_does_not_name_are_not_read(saved, tmp_path, name):
    """Other weights under the same names, what macOS puts beside a file, and notes."""
    folder = shutil.copytree(saved, tmp_path / "model")
    if name.startswith(("a", "z")):
        save_file({"weights": torch.zeros(3, 4), "more": torch.zeros(2)}, folder / name)
    else:
        (folder / name).write_bytes(b"\0\5\x16\7 is no tensor")
    assert _is(folder, 4)


def test_hidden_files_that_appear_while_a_checkpoint_is_written_are_no_part_of_it(tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def beside(path, content):
        write_bytes(path.with_name(f"._{path.name}"), b"\0\5\x16\7")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", beside)
    _save(tmp_path / "model", 3)
    (hidden,) = (tmp_path / "model").glob("._*")
    hidden.unlink()
    assert _is(tmp_path / "model", 3)


# ---- Steps


def _save_steps(root: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        _save_step(root, step, keep)


def _save_step(root: Path, step: int, keep: int) -> None:
    checkpoint.save_step(root, step, _tensors(step), STATE | {"seed": step}, keep)


def test_the_latest_checkpoint_is_that_of_the_greatest_step(tmp_path, capsys):
    _save_steps(tmp_path, 5, 10, 20, 100)
    assert checkpoint.latest(tmp_path).name == "step_00000100"
    assert checkpoint.latest(tmp_path / "nothing") is None
    assert capsys.readouterr().err == ""


def test_incomplete_and_damaged_checkpoints_are_reported_and_skipped(tmp_path, capsys):
    _save_steps(tmp_path, 10, 20, 30)
    (tmp_path / "step_00000030" / checkpoint.MARKER).unlink()
    (tensors,) = (tmp_path / "step_00000020").glob("*.safetensors")
    os.truncate(tensors, 100)
    (tmp_path / "step_00000040").write_text("not a folder")
    assert checkpoint.latest(tmp_path).name == "step_00000010"
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 3
    for message, step in zip(messages, (40, 30, 20), strict=True):
        assert f"step_{step:08d}" in message
    shutil.rmtree(tmp_path / "step_00000010")
    assert checkpoint.latest(tmp_path) is None


def test_a_checkpoint_on_a_disk_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    checkpoint.save_step(tmp_path, 10, _tensors(), STATE, keep=2)
    marker = tmp_path / "step_00000010" / checkpoint.MARKER
    content = marker.read_bytes()
    marker.unlink()
    marker.symlink_to(marker)  # the operating system refuses to open it
    with pytest.raises(WorkError, match="it may be whole: repeat the command when it can be read"):
        checkpoint.latest(tmp_path)
    marker.unlink()
    marker.write_bytes(content)
    (tensors,) = marker.parent.glob("*.safetensors")
    looked_at = os.stat
    fails = lambda path, **of: looked_at("/dev/full/x" if Path(path) == tensors else path, **of)  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(WorkError, match="it may be whole"):
        patch.setattr(os, "stat", fails)
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path).name == "step_00000010"


def test_damaged_checkpoints_that_were_passed_over_are_not_kept_in_place_of_new_ones(tmp_path):
    _save_steps(tmp_path, 10, 20, 30, keep=2)
    for folder in checkpoint.steps(tmp_path):
        (folder / checkpoint.MARKER).unlink()
    _save_steps(tmp_path, 5, keep=1)  # a run that began again
    assert _is(checkpoint.latest(tmp_path), 5) and [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_latest_few_are_kept(tmp_path, keep):
    _save_steps(tmp_path, 1, 2, 3, 4, keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{n:08d}" for n in range(5 - keep, 5)]
    assert _is(checkpoint.latest(tmp_path), 4)


FOREIGN = ("step_best", "step_00000030_copy", "step_00000099 2", "step_99", "best")


def test_only_what_has_the_name_of_a_step_is_gone_on_from_or_deleted(tmp_path):
    _save_steps(tmp_path, 10, 20, keep=2)
    for name in FOREIGN:
        _save(tmp_path / name, 7)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_00000010", "step_00000020"]
    assert _is(checkpoint.latest(tmp_path), 20)
    _save_steps(tmp_path, 30, 100_000_000, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {*FOREIGN, "step_100000000"}
    (tmp_path / ".step_00000040.tmp").mkdir()  # what a crashed writer left
    (tmp_path / ".step_mine.tmp").mkdir()
    checkpoint.delete_steps(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*FOREIGN, ".step_mine.tmp"}
    assert all(_is(tmp_path / name, 7) for name in FOREIGN)


def test_without_anything_else_the_folder_of_steps_goes_too(tmp_path):
    _save_steps(tmp_path / "checkpoints", 1, 2)
    for _ in range(2):
        checkpoint.delete_steps(tmp_path / "checkpoints")
        assert not (tmp_path / "checkpoints").exists()


def test_a_disk_that_takes_no_more_is_one_sentence_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    _save_steps(tmp_path, 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(WorkError, match="the same command") as caught:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(full))
        checkpoint.save_step(tmp_path, 2, _tensors(), STATE, keep=1)
    assert "No space left on device" in str(caught.value) and "\n" not in str(caught.value)
    assert _is(checkpoint.latest(tmp_path), 1)
