"""Checkpoints: tensors as safetensors, the rest as JSON, nothing that could run code.

A checkpoint is a folder. It is written under a temporary name, its completeness marker last, and then renamed, so a
folder with a marker is whole; the marker holds a checksum of every file, so damage is noticed, not loaded.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.base import InputError

TENSORS, STATE, MARKER = "tensors.safetensors", "state.json", "COMPLETE.json"


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Write a checkpoint atomically: after a crash at any moment `folder` is whole or absent, never a mixture.

    What a crashed writer left is cleared away by the next one; there must be only one at a time.
    """
    temporary, replaced = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
    (temporary / STATE).write_text(json.dumps(state))
    sums = {name: _checksum(temporary / name) for name in (TENSORS, STATE)}
    for name in sums:
        _flush_to_disk(temporary / name)
    (temporary / MARKER).write_text(json.dumps(sums))
    _flush_to_disk(temporary / MARKER)
    if folder.exists():
        folder.rename(replaced)  # in one step: deleting takes several
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and state of a checkpoint; an `InputError` says what is missing or damaged."""
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint at {folder}")
    problem = damage(folder)
    if problem:
        raise InputError(f"the checkpoint {folder} {problem}: use an earlier one or train again")
    try:
        return load_file(folder / TENSORS, device=str(device)), json.loads((folder / STATE).read_text())
    except (SafetensorError, ValueError) as error:
        raise InputError(f"the checkpoint {folder} cannot be read: {error}") from None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if it is whole."""
    try:
        sums = json.loads((folder / MARKER).read_text())
        expected = {name: sums[name] for name in (TENSORS, STATE)}
    except OSError:
        return f"is incomplete ({MARKER} is missing)"
    except (ValueError, KeyError, TypeError):
        return f"is damaged ({MARKER} is not readable)"
    for name, checksum in expected.items():
        if not (folder / name).is_file():
            return f"is damaged ({name} is missing)"
        if _checksum(folder / name) != checksum:
            return f"is damaged ({name} has changed since it was written)"
    return None


def save_step(root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> None:
    """Write the checkpoint of one step below `root` and delete all but the latest `keep`."""
    save(root / f"step_{step:08d}", tensors, state)
    for old in _steps(root)[:-keep]:
        shutil.rmtree(old)


def latest(root: Path) -> Path | None:
    """The latest whole checkpoint below `root`; what is incomplete or damaged is skipped with a warning."""
    for folder in reversed(_steps(root)):
        problem = damage(folder)
        if problem is None:
            return folder
        warnings.warn(f"skipping the checkpoint {folder}: it {problem}", stacklevel=2)
    return None


def _steps(root: Path) -> list[Path]:
    return sorted(root.glob("step_*"))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())
