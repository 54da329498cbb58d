"""Checkpoints: tensors as safetensors, the rest as JSON, nothing that could run code.

A checkpoint is a folder. It is written under a temporary name, its marker file last, and then renamed, so a folder
with a marker is complete. The marker holds a checksum of every file, so damage is noticed. Files that it does not name
are not read. Ranks that shard the weights (FSDP2) write a file each; any number of ranks, or a
single process, can read them.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch.distributed.checkpoint.api import CheckpointException

from lib.base import DamagedFile, InputError, WorkError, to_json
from lib.paths import read_json, reading, sync, whole, writing
from lib.training.distributed import ALONE, Ranks

# torch warns on every save that no process group exists. That is intended here, so silence it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

TENSORS, STATE, MARKER = "tensors.safetensors", "state.json", "COMPLETE.json"
#: The name of a folder of `save_step`. Folders of other names are left alone.
_STEP = r"step_\d{8,}"


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Write a checkpoint atomically: after a crash at any moment `folder` is whole or absent, never a mixture.

    The next writer deletes what a crashed writer left. There must be only one writer at a time.
    """
    with writing(folder, "the checkpoint "):
        temporary = _begin(folder)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        (temporary / TENSORS).write_bytes(to_bytes(tensors))  # `save_file` would hide a full disk
        _commit(temporary, folder, to_json(state))


def _begin(folder: Path) -> Path:
    temporary = folder.with_name(f".{folder.name}.tmp")
    for leftover in (temporary, temporary.with_suffix(".old")):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True, exist_ok=True)  # another rank may create it first
    return temporary


def _commit(temporary: Path, folder: Path, state: str) -> None:
    """Complete the checkpoint in `temporary` and rename it to `folder`."""
    (temporary / STATE).write_text(state, encoding="utf-8")
    # Some systems put hidden files beside those that are written.
    written = sorted(path for path in temporary.iterdir() if not path.name.startswith("."))
    sums = {path.name: _checksum(path) for path in written}
    for name in sums:
        sync(temporary / name)
    (temporary / MARKER).write_text(json.dumps(sums), encoding="utf-8")
    sync(temporary / MARKER)
    replaced = temporary.with_suffix(".old")
    if folder.exists():
        folder.rename(replaced)  # in one step: deleting takes several
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load(folder: Path, expect: Callable | None = None, ranks: Ranks = ALONE) -> tuple[dict[str, torch.Tensor], dict]:
    """Return a checkpoint's expected tensors and its state, if it passes `check`; of a DTensor, this rank's shard.

    Expected tensors are loaded in place, those on the meta device into new ones.
    """
    state, expected, reader = check(folder, expect)
    tensors = {name: torch.empty_like(x, device="cpu") if x.is_meta else x for name, x in expected.items()}
    with reading(f"the checkpoint {folder}", SafetensorError, CheckpointException):
        dcp.load(tensors, storage_reader=reader, no_dist=ranks.size == 1)
    return tensors, state


def check(folder: Path, expect: Callable | None = None) -> tuple[dict, Mapping, dcp.HuggingFaceStorageReader]:
    """Return a checkpoint's state, its expected tensors and their reader; allocate no memory for them.

    expect(state): returns tensors of the shapes and types that the file must have. Names with another prefix than the
    expected ("model.", say) are not read. None: accept all.

    Raises `InputError` if it is missing, damaged or not as expected, or holds numbers that are not finite.
    """
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint at {folder}")
    with reading(f"the checkpoint {folder}"):
        problem = damage(folder)
    if problem:
        raise InputError(f"the checkpoint {folder} {problem}: use an earlier one or train again")
    with reading(f"the checkpoint {folder}", Exception):  # readers raise whatever they like for malformed content
        files = [str(folder / name) for name in read_json(folder / MARKER)]
        reader, found = dcp.HuggingFaceStorageReader(str(folder)), {}
        reader.fs.ls = lambda _: files  # others in the folder are not read
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            if sum(math.prod(part.sizes) for part in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"parts of {name} are missing")
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        state = read_json(folder / STATE)
        expected = expect(state) if expect else found
        groups = {name.split(".")[0] for name in expected} - {"random"}  # earlier versions saved the GPU's, too
        has, wants = ({name: f"{x.dtype} {list(x.shape)}" for name, x in some.items()} for some in (found, expected))
        for name in sorted({*expected, *(name for name in found if name.split(".")[0] in groups)}):
            if (here := has.get(name, "missing")) != (there := wants.get(name, "missing")):
                raise ValueError(f"its tensors do not fit its configuration: {name} is {here}, not {there}")
        for file in (file for file in files if file.endswith(".safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in expected.keys() & tensors.keys():
                    if name == "random.cpu":
                        torch.Generator().set_state(tensors.get_tensor(name))  # raises for an invalid state
                    # Squared gradients may overflow without harm to the weights.
                    elif not name.startswith("optim.") and not tensors.get_tensor(name).isfinite().all():
                        raise ValueError(f"{name} is not finite")
        return state, expected, reader


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder; None if it is whole. Raises `OSError` where the disk fails."""
    try:
        sums = read_json(folder / MARKER, fields=(STATE,))
    except (FileNotFoundError, DamagedFile):
        return f"is incomplete or damaged ({MARKER} is missing or not readable)"
    for name, checksum in sums.items():
        if Path(name).name != name or not _is_file(folder / name) or _checksum(folder / name) != checksum:
            return f"is damaged ({name} is missing or has changed since it was written)"
    return None


def _is_file(path: Path) -> bool:
    """Return whether it is a file: reading a pipe would never end. Raises where the disk fails, unlike `is_file`."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, ValueError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


class _StepWriter(dcp.HuggingFaceStorageWriter):
    """Lets every rank write a file; then the first rank completes the checkpoint and deletes old ones."""

    def __init__(self, folder: Path, state: str, keep: int):
        super().__init__(str(folder.with_name(f".{folder.name}.tmp")), save_distributed=True)
        self.per_thread_copy_ahead = 0  # the tensors are in memory: copying ahead would open a context on GPU 0
        self.folder, self.state, self.keep = folder, state, keep

    def set_up_storage_writer(self, is_coordinator: bool, *arguments, **options) -> None:
        super().set_up_storage_writer(is_coordinator, *arguments, **options)
        if is_coordinator:  # before any rank writes, for they wait for the coordinator's plan
            _begin(self.folder)

    def finish(self, metadata, results) -> None:
        _commit(Path(self.path), self.folder, self.state)
        found = steps(self.folder.parent)
        here = found.index(self.folder) + 1
        # Later ones are damaged: this run skipped them.
        for folder in found[: max(0, here - self.keep)] + found[here:]:
            shutil.rmtree(folder, ignore_errors=True)


def save_step(
    root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int, ranks: Ranks = ALONE
) -> Future:
    """Begin to write the checkpoint of one step below `root`; then all but the latest `keep` are deleted.

    Tensors and state are copied at once and may change afterwards; `finish` waits for the write.
    """
    writer = _StepWriter(root / f"step_{step:08d}", to_json(state), keep)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return dcp.async_save(tensors, storage_writer=writer, process_group=ranks.saving_group, no_dist=ranks.size == 1)


def finish(saving: Future) -> None:
    """Wait for `save_step`. Raises `WorkError` if writing failed (a full disk); earlier checkpoints are intact."""
    try:
        saving.result()
    except CheckpointException as error:
        (cause, *_) = (failure[0] for failure in error.failures.values())
        if not isinstance(cause, OSError):
            raise cause from error
        raise WorkError(
            f"a checkpoint could not be written ({cause}): fix that, then the same command resumes from the one before"
        ) from error


def latest(root: Path, expect: Callable | None = None) -> Path | None:
    """Return the latest checkpoint below `root` that passes a `check`; others are reported and skipped.

    Raises `WorkError` where the disk cannot be read: such a checkpoint may be whole.
    """

    def passes(folder: Path) -> None:
        try:
            check(folder, expect)
        except InputError as error:
            reason = error.__context__
            if isinstance(reason, (OSError, MemoryError)) and not isinstance(reason, FileNotFoundError):
                hint = "repeat the command when it can be read, or delete its folder to resume from the one before"
                raise WorkError(f"{error}; it may be whole: {hint}") from error
            raise

    return next((folder for folder, _ in whole(reversed(steps(root)), passes)), None)


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
