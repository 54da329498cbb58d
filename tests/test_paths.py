"""Files that a run wrote: read with a check, written whole."""

import errno
import fcntl
import os
import re
from contextlib import nullcontext as does_not_raise

import pytest
from filelock import Timeout

from lib import paths
from lib.base import DamagedFile, InputError, WorkError


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"n": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "cut", "a list", "null", "not UTF-8", "100,000 deep", "10,000 digits"],
)
def test_json_that_a_run_cannot_have_written_is_one_error(tmp_path, content):
    (tmp_path / "row.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"row\.json is damaged \(.*\): delete it"):
        paths.read_json(tmp_path / "row.json")


def test_json_is_read_from_files_alone_and_not_without_end(tmp_path):
    with pytest.raises(DamagedFile):
        paths.read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DamagedFile, match="it is no file"):
        paths.read_json(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(paths.LARGEST_JSON + 1)  # takes no room
    with pytest.raises(DamagedFile, match="larger than 256 MB"):
        paths.read_json(tmp_path / "large.json")
    with pytest.raises(FileNotFoundError):
        paths.read_json(tmp_path / "none.json")


@pytest.mark.parametrize("path", ["/dev/full", "/dev/zero", "pipe", ".", "link"])
def test_what_may_have_no_end_is_not_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("/dev/zero", "link")
    with pytest.raises(ValueError, match="it is no file"):
        paths.read_bytes(path)


def test_a_pipe_of_the_shell_is_read_up_to_a_limit():
    """As `--csv <(...)` gives one."""
    for limit, shown in (4, does_not_raise(b"name")), (3, pytest.raises(ValueError, match="it is larger")):
        ours, theirs = os.pipe()
        os.write(theirs, b"name")
        os.close(theirs)
        with shown as expected:
            assert paths.read_bytes(f"/dev/fd/{ours}", limit) == expected
        os.close(ours)


def test_a_file_that_cannot_be_read_is_told_and_passed_over(tmp_path, capsys):
    damaged, gone, good = (tmp_path / name for name in ("damaged.json", "gone.json", "good.json"))
    damaged.write_text("{")
    paths.write_json(good, {"n": 1})
    assert list(paths.whole([damaged, gone, good], paths.read_json)) == [(good, {"n": 1})]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "damaged.json is damaged" in said[0] and "gone.json" in said[1]


def test_what_is_written_is_read_again_and_nothing_else_is_left(tmp_path):
    paths.write_json(tmp_path / "row.json", {"name": "Zoë"})
    assert paths.read_json(tmp_path / "row.json") == {"name": "Zoë"}
    paths.write_json(tmp_path / "rows.json", [1])
    assert paths.read_json(tmp_path / "rows.json", list) == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"row.json", "rows.json"}


def test_a_write_that_fails_names_the_file_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "row.json"
    paths.write_json(path, {"n": 1})
    with pytest.raises(WorkError, match=r"cannot write .*row\.json: No space left"), paths.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(WorkError, match="not finite"):
        paths.write_json(path, {"n": float("nan")})
    assert paths.read_json(path) == {"n": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("place", ["/dev/null", "", "none/row.json"])
def test_only_files_in_folders_that_exist_are_replaced(tmp_path, place):
    with pytest.raises(InputError, match="cannot write"), paths.replacing(tmp_path / place):
        pass


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    paths.write_json(tmp_path / "there" / "old", {"n": 1})
    for name in ("old", "new"):
        paths.write_json(tmp_path / name, {"n": 2})
        assert (tmp_path / name).is_symlink() and paths.read_json(tmp_path / "there" / name) == {"n": 2}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "new", "old", "old", "there"]


@pytest.mark.parametrize("leads_to", ["circle", "/dev/null", "none/row.json", "."])
def test_a_link_to_what_is_no_file_is_left_alone(tmp_path, leads_to):
    (tmp_path / "circle").symlink_to(leads_to)
    with pytest.raises(InputError, match="cannot write the row .*circle: a file name"):
        with paths.replacing(tmp_path / "circle", "the row "):
            pass
    assert os.readlink(tmp_path / "circle") == leads_to


@pytest.mark.parametrize("letter", ["n", "é", "名", "🙂"])
def test_every_name_that_the_system_takes_is_written(tmp_path, letter):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    paths.write_json(path, {"n": 1})
    assert paths.read_json(path) == {"n": 1}


def test_two_files_of_a_command_are_told_to_be_one_whatever_they_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "to come").symlink_to("new")
    os.link("a", "hard")
    for one, other in [
        ("a", "a"), ("a", tmp_path / "a"), ("./a", "folder/../a"), ("a", "link"), ("link", "hard"), ("new", "./new"),
        ("new", "to come"),
    ]:  # fmt: skip
        for files in ({"csv": one, "out": other}, {"csv": other, "none": None, "out": one}):
            with pytest.raises(InputError, match="--csv and --out name the same file, which would be lost"):
                paths.check_distinct(**files)
    paths.check_distinct(csv="a", out="new", dialogs="folder/a", config=None)


def test_an_empty_variable_for_runs_or_figures_is_none(monkeypatch):
    monkeypatch.setenv("ITL_RUNS", "")
    monkeypatch.setenv("ITL_FIGURES", "")
    assert paths.runs() == paths.ROOT / "runs" and paths.figures("paper") == paths.ROOT / "figures"


def test_lib_reads_and_writes_text_as_utf_8_whatever_the_system_takes():
    opens = re.compile(r"\.(?:read_text|write_text)\(|\bopen\([^)\n]*\"[wax]\"")
    lines = [line for path in (paths.ROOT / "lib").rglob("*.py") for line in path.read_text("utf-8").splitlines()]
    assert sum(map(bool, map(opens.search, lines))) > 20
    assert not [line for line in lines if opens.search(line) and not re.search(r"utf-8|ascii", line)]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch, number):
    """As some network file systems answer."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(WorkError, match=f"cannot lock .*{os.strerror(number)}.*: use a disk with locks") as caught:
        with paths.only_process(tmp_path / ".lock"):
            raise AssertionError("it is not locked")
    assert "\n" not in str(caught.value)


def test_a_lock_is_held_within_and_free_after(tmp_path):
    with paths.only_process(tmp_path / ".lock"):
        assert not _is_free(tmp_path / ".lock")
    assert _is_free(tmp_path / ".lock")
    with pytest.raises(ZeroDivisionError), paths.only_process(tmp_path / ".lock"):
        1 / 0  # noqa: B018
    assert _is_free(tmp_path / ".lock")


def _is_free(lock) -> bool:
    try:
        with paths.only_process(lock, timeout=0):
            return True
    except Timeout:
        return False


def test_all_of_lib_locks_by_one_function():
    """So that a file system without locks is one sentence everywhere."""
    locking = [path for path in (paths.ROOT / "lib").rglob("*.py") if "FileLock" in path.read_text("utf-8")]
    assert [path.name for path in locking] == ["paths.py"]
