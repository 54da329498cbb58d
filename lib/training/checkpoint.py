"""Checkpoints: tensors as safetensors, the rest as JSON, nothing that could run code.

A checkpoint is a folder. It is written under a temporary name and then renamed, so a folder with a marker is complete.
The marker holds a checksum of every file, so damage is noticed. Files that it does not name are not read.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lib.base import DamagedFile, InputError, WorkError, printable, to_json
from lib.paths import read_json, reading, sync, writing

TENSORS, STATE, MARKER = "tensors.safetensors", "state.json", "COMPLETE.json"
#: The name of a folder of `save_step`. Folders of other names are left alone.
_STEP = r"step_\d{8,}"


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Write a checkpoint atomically: after a crash at any moment `folder` is whole or absent, never a mixture.

    The next writer deletes what a crashed writer left. There must be only one writer at a time. Raises `WorkError`
    where the disk is full.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = temporary.with_suffix(".old")
    with writing(folder, "the checkpoint "):
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        (temporary / TENSORS).write_bytes(to_bytes(tensors))  # `save_file` would hide a full disk
        (temporary / STATE).write_text(to_json(state), encoding="utf-8")
        sums = {name: _checksum(temporary / name) for name in (TENSORS, STATE)}
        (temporary / MARKER).write_text(json.dumps(sums), encoding="utf-8")
        for name in (*sums, MARKER):
            sync(temporary / name)
        if folder.exists():
            folder.rename(replaced)  # in one step: deleting takes several
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return a checkpoint's tensors, on the CPU, and its state. Raises `InputError` if it is missing or damaged."""
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint at {folder}")
    with reading(f"the checkpoint {folder}"):
        problem = damage(folder)
    if problem:
        raise InputError(f"the checkpoint {folder} {problem}: use an earlier one or train again")
    with reading(f"the checkpoint {folder}", SafetensorError, DamagedFile):
        tensors = {}
        for name in read_json(folder / MARKER):
            if name.endswith(".safetensors"):  # several in checkpoints of earlier versions
                tensors |= load_file(folder / name)
        return tensors, read_json(folder / STATE)


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder; None if it is whole. Raises `OSError` where the disk fails."""
    try:
        sums = read_json(folder / MARKER, fields=(STATE,))
    except (FileNotFoundError, NotADirectoryError, DamagedFile):
        return f"is incomplete or damaged ({MARKER} is missing or not readable)"
    for name, checksum in sums.items():
        with suppress(FileNotFoundError, ValueError):
            is_file = Path(name).name == name and stat.S_ISREG(os.stat(folder / name).st_mode)  # a pipe would never end
            if is_file and _checksum(folder / name) == checksum:
                continue
        return f"is damaged ({name} is missing or has changed since it was written)"
    return None


def save_step(root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> None:
    """Write the checkpoint of one step below `root`; then delete all but the latest `keep`."""
    try:
        save(root / f"step_{step:08d}", tensors, state)
    except WorkError as error:
        raise WorkError(f"{error}: fix that, then the same command resumes from the one before") from error
    found = steps(root)
    here = [step_of(folder) for folder in found].index(step) + 1
    for folder in found[: max(0, here - keep)] + found[here:]:  # later ones are damaged: this run skipped them
        shutil.rmtree(folder, ignore_errors=True)


def latest(root: Path) -> Path | None:
    """Return the latest whole checkpoint below `root`; damaged ones are reported and skipped.

    Raises `WorkError` where the disk cannot be read: such a checkpoint may be whole.
    """
    for folder in reversed(steps(root)):
        try:
            if not (problem := damage(folder)):
                return folder
        except OSError as error:
            hint = "repeat the command when it can be read, or delete its folder to resume from the one before"
            raise WorkError(f"cannot read the checkpoint {folder}: {error}; it may be whole: {hint}") from error
        print(printable(f"skipped: the checkpoint {folder} {problem}"), file=sys.stderr)
    return None


def steps(root: Path) -> list[Path]:
    """Return the checkpoints of `save_step` below `root`, oldest first, whole or not."""
    names = os.listdir(root) if root.exists() else []  # `glob` finds nothing where it may not read
    return sorted((root / name for name in names if re.fullmatch(_STEP, name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step after which one of `steps` was written."""
    return int(folder.name.removeprefix("step_"))


def delete_steps(root: Path) -> None:
    """Delete all checkpoints of `save_step` below `root`, and what a crashed writer left."""
    for folder in root.glob("*step_*"):
        if re.fullmatch(rf"{_STEP}|\.{_STEP}\.(tmp|old)", folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # missing, or other files are in it
        root.rmdir()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
