"""Where things live, and how files are read and written whole.

Works from any current folder; `ITL_RUNS` moves everything that is not committed.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import FileLock, Timeout

from lib.base import DamagedFile, InputError, WorkError, check_known, printable, to_json

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PAPER_DATA = ROOT / "paper_data"
PUBLISHED = PAPER_DATA / "published"
CHECKPOINTS = PAPER_DATA / "checkpoints"
#: Lists of names and values, prompts, questions and fine-tunings: part of the package.
DATA = Path(__file__).parent / "data"

#: Profiles change sizes and recipe, never code. `smoke` is for the tests; only the last two publish.
PROFILES = ("smoke", "quick", "laptop", "paper")
PUBLISHING = ("laptop", "paper")

#: What a run's folder holds.
CLAIM, DATABASE, ROW, MODEL = "config.json", "people.sqlite", "row.json", "model"
ROWS = "rows.json"  # of a fine-tuning: one row per checkpoint
#: A run's copies of the files that its configuration names; the originals may change or go.
PEOPLE, TOKENIZER = "people.csv", "tokenizer"  # plus the suffix of its format
#: Maximum bytes of a file read at once; a run's own files take far less.
LARGEST_JSON = 256 << 20
#: Maximum bytes of a configuration or plan; nobody types more.
LARGEST_TEXT = 1 << 20


def check_checkout() -> None:
    """Raise `InputError` where `lib` was installed alone, from a wheel say."""
    if not (NOTEBOOKS.is_dir() and PAPER_DATA.is_dir()):
        raise InputError("this needs a checkout: git clone https://github.com/in-tool-learning/in-tool-learning")


def runs() -> Path:
    """The folder of everything reproducible: runs/ of the checkout or, without one, of the current folder."""
    return Path(os.environ.get("ITL_RUNS") or (ROOT if NOTEBOOKS.is_dir() else Path.cwd()) / "runs")


def profile_dir(profile: str) -> Path:
    """runs/<profile>: the working folder of one profile. An unknown profile is an `InputError`."""
    check_known("profile", profile, PROFILES)
    return runs() / profile


def figures(profile: str) -> Path:
    """The folder of a profile's figures: figures/ for those that publish, runs/<profile>/figures for the others.

    `ITL_FIGURES` overrides both: the notebook runner collects figures there until the notebook has succeeded.
    """
    if folder := os.environ.get("ITL_FIGURES"):
        return Path(folder)
    return ROOT / "figures" if profile in PUBLISHING else profile_dir(profile) / "figures"


def check_output(path: Path, kind: str = "") -> Path:
    """Return `path` with links resolved. Raises `InputError` unless it is a file, or new in an existing folder."""
    target = Path(os.path.realpath(path))
    # Refuse a device, which would be replaced, and a cycle of links, which does not resolve.
    if (os.path.lexists(target) and not target.is_file()) or not target.parent.is_dir():
        raise InputError(f"cannot write {kind}{path}: a file name in an existing folder is expected")
    return target


def check_distinct(**files: str | Path | None) -> None:
    """Raise `InputError` if two options of a command name the same file: it would be lost."""
    for (one, a), (other, b) in combinations(((name, path) for name, path in files.items() if path), 2):
        if os.path.realpath(a) == os.path.realpath(b) or all(map(os.path.exists, (a, b))) and os.path.samefile(a, b):
            raise InputError(f"--{one} and --{other} name the same file, which would be lost: give another")


@contextmanager
def writing(path: Path, kind: str = "") -> Iterator[None]:
    """Turn an `OSError` into a `WorkError` that names the file, which the error of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise WorkError(f"cannot write {kind}{path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path, kind: str = "") -> Iterator[Path]:
    """Yield a temporary file that replaces `path` at the end, or is deleted after an error.

    Raises `InputError` as `check_output` does, and `WorkError` where the disk is full or the folder read-only.
    """
    target = check_output(path, kind)
    temporary = target.with_name(f".{target.name[:50]}.{os.getpid()}.tmp")
    try:
        with writing(path, kind):
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_process(lock: str | Path, timeout: float = -1) -> Iterator[None]:
    """Keep other processes out: they wait for the `lock`. Raises `WorkError` where a file system has no locks."""
    try:
        held = FileLock(lock).acquire(timeout)
    except Timeout:
        raise
    except OSError as error:  # some network file systems have no locks
        raise WorkError(f"cannot lock {lock} ({error.strerror}): use a disk with locks (--out, ITL_RUNS)") from error
    with held:
        yield


def sync(file: Path) -> None:
    """Flush a file to disk; else a rename may survive a power cut and the content may not."""
    with file.open("r+b") as opened:  # Windows flushes only writable files
        os.fsync(opened.fileno())


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON atomically, by a rename: the file is whole or absent."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(content, indent=1), encoding="utf-8")


def read_bytes(path: str | Path, largest: int = LARGEST_JSON) -> bytes:
    """Return the bytes of a file or a shell's pipe. Raises `OSError`, or `ValueError` if it is no file or too large."""
    # Devices have no end, and pipes may have no writer; those of the shell, `<(...)`, have one.
    if os.path.exists(path) and not (os.path.isfile(path) or str(path).startswith(("/dev/fd/", "/dev/stdin"))):
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        if len(content := file.read(largest + 1)) > largest:
            raise ValueError(f"it is larger than {largest >> 20} MB")
    return content


@contextmanager
def reading(what: str, *others: type[Exception]) -> Iterator[None]:
    """Turn errors of the system, of parsers and `others` into an `InputError`: `what` cannot be read, and why."""
    try:
        yield
    except (OSError, ValueError, RecursionError, *others) as error:
        raise InputError(f"cannot read {what}: {shorten(str(error), 1_000) or type(error).__name__}") from None


def read_json(path: Path, kind: type = dict, fields: Iterable[str] = (), check: Callable[[Any], Any] = id) -> Any:
    """Return the content of a JSON file that a run wrote: an object with `fields` or, if `kind` is list, such objects.

    Raises `DamagedFile` for anything else, an empty list, and what `check` raises a `ValueError` for; `OSError` if
    there is no file or it may not be read.
    """
    try:
        content = json.loads(read_bytes(path).decode())
        if not isinstance(content, kind):
            raise ValueError(f"it holds no {'object' if kind is dict else 'list'}")
        if content == []:
            raise ValueError("it is empty")
        for each in content if fields and kind is list else [content]:
            if lacking := [field for field in fields if not isinstance(each, dict) or field not in each]:
                raise ValueError(f"it lacks {lacking[0]}")
            check(each)
        return content
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, str(error)) from None


def whole(paths: Iterable[Path], read: Callable[[Path], Any]) -> Iterator[tuple[Path, Any]]:
    """Yield each file with what `read` returns for it; an unreadable one is reported and skipped."""
    for path in paths:
        try:
            yield path, read(path)
        except (InputError, DamagedFile, OSError) as error:
            print(printable(f"skipped: {error}"), file=sys.stderr)
