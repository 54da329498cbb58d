"""Where things live. Works from any current folder; `ITL_RUNS` moves everything that is not committed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.base import InputError, to_json

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PAPER_DATA = ROOT / "paper_data"
PUBLISHED = PAPER_DATA / "published"
CHECKPOINTS = PAPER_DATA / "checkpoints"
#: Lists of names and values, prompts and questions: part of the package.
DATA = Path(__file__).parent / "data"

#: Profiles change sizes and recipe, never code. `smoke` is for the tests; only the last two publish.
PROFILES = ("smoke", "quick", "laptop", "paper")
PUBLISHING = ("laptop", "paper")

#: What a run's folder holds.
CLAIM, DATABASE, ROW, MODEL = "config.json", "people.sqlite", "row.json", "model"
ROWS = "rows.json"  # of a fine-tuning: a row a checkpoint
#: Copies, in a run's folder, of files that its configuration names: what becomes of those does not matter to it.
PEOPLE, TOKENIZER = "people.csv", "tokenizer"  # and the suffix of its kind


def runs() -> Path:
    """The folder of everything that can be made again: checkpoints, logs, rows, executed notebooks."""
    return Path(os.environ.get("ITL_RUNS", ROOT / "runs"))


def profile_dir(profile: str) -> Path:
    """runs/<profile>: the working folder of one profile. An unknown profile is an `InputError`."""
    if profile not in PROFILES:
        raise InputError(f"unknown profile {profile!r}: it is one of {', '.join(PROFILES)}")
    return runs() / profile


def figures(profile: str) -> Path:
    """Where a profile's figures go: figures/ for those that publish, runs/<profile>/figures for the others.

    `ITL_FIGURES` overrides both: the notebook runner collects figures there until the notebook has succeeded.
    """
    if "ITL_FIGURES" in os.environ:
        return Path(os.environ["ITL_FIGURES"])
    return ROOT / "figures" if profile in PUBLISHING else profile_dir(profile) / "figures"


@contextmanager
def replacing(path: Path, kind: str = "") -> Iterator[Path]:
    """Give a temporary file beside `path` that takes its place at the end, or is gone after an error.

    Raises `InputError`, which calls the file a `kind`, where `path` is a device or a folder, or in no folder.
    """
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():  # a device would be replaced, too
        raise InputError(f"cannot write {kind}{path}: a file name in an existing folder is expected")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON under a temporary name, then rename: the file is whole or absent."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(content, indent=1))
