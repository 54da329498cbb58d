"""Checkpoints that hold what no run writes, with correct checksums."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib.training import checkpoint


def seal(folder: Path) -> None:
    """Write a marker that fits the files it names as they are now."""
    marker = folder / checkpoint.MARKER
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in json.loads(marker.read_text())}
    marker.write_text(json.dumps(sums))


def state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A forgery: the state is what `change` returns."""

    def forge(folder: Path) -> None:
        path = folder / checkpoint.STATE
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        seal(folder)

    return forge


def tensors(change: Callable[[str, dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A forgery: `change` is given the name of the first weight and all tensors, which it changes."""

    def forge(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name).clone() for name in file.keys()}
        change(next(name for name in found if name.endswith("q_proj.weight")), found)
        save_file(found, path)
        seal(folder)

    return forge


def _of_type(dtype: torch.dtype) -> Callable[[Path], None]:
    return tensors(lambda name, found: found.update({name: found[name].to(dtype)}))


def _pipe(name: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.unlink()
        os.mkfifo(path)

    return forge


def _names(*names: str) -> Callable[[Path], None]:
    """A forgery: the marker names other files as well."""

    def forge(folder: Path) -> None:
        marker = folder / checkpoint.MARKER
        marker.write_text(json.dumps(json.loads(marker.read_text()) | dict.fromkeys(names, "0" * 64)))

    return forge


#: Whatever it is a checkpoint of.
FORGED: dict[str, Callable[[Path], None]] = {
    "an empty state": state(lambda _: {}),
    "a state that is a list": state(lambda _: []),
    "int8": _of_type(torch.int8),
    "another shape": tensors(lambda name, found: found.update({name: found[name][1:].clone()})),
    "a weight less": tensors(lambda name, found: found.pop(name)),
    "a weight more": tensors(lambda name, found: found.update({name.replace(".0.", ".7."): found[name].clone()})),
    "no tensors": tensors(lambda _, found: found.clear()),
    "a pipe in place of tensors": _pipe("*.safetensors"),
    "a pipe in place of the state": _pipe(checkpoint.STATE),
    "a pipe in place of the marker": _pipe(checkpoint.MARKER),
    "a file without a name": _names(""),
}
