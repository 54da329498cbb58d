"""The project's notebooks: which there are, and which parameters they accept."""

import ast
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from pydantic import TypeAdapter, ValidationError

from lib import paths
from lib.base import InputError, printable

#: Types of parameters.
TYPES = {"int": int, "float": float, "bool": bool, "str": str}


def all_notebooks(group: str | None = None) -> list[Path]:
    """Return the project's notebooks in the order of the paper: called like 05_1_name, with a cell of parameters.

    Others, a copy or a damaged one, are skipped with one line that names them. group: "paper" (all
    without the metadata `{"itl": {"paper": false}}`) or "scale" (those with `{"itl": {"scale": true}}`); None for all.
    """
    notebooks = {}
    for path in _named():
        with suppress(InputError):
            notebooks[path] = read(path)
    ours = [path for path, notebook in notebooks.items() if _parameters_cell(notebook)]
    if others := sorted(path.name for path in {*paths.NOTEBOOKS.glob("*.ipynb")} - {*ours}):
        told = "not called like 05_1_name, not readable, or without a cell tagged 'parameters'"
        print(printable(f"skipping {', '.join(others)}: {told}"), file=sys.stderr)
    return [path for path in ours if group is None or metadata(notebooks[path]).get(group, group == "paper")]


def _named() -> list[Path]:
    paths.check_checkout()
    files = filter(Path.is_file, paths.NOTEBOOKS.glob("*.ipynb"))
    return sorted(path for path in files if re.fullmatch(r"[0-9A-Z]\d_\w+", path.stem))


def find(name: str | Path) -> Path:
    """Return the notebook called `name`: a path, a full name, or its number ("05_1" finds 05_1_parameter_bounds).

    Raises InputError if there is none, or more than one.
    """
    if (path := Path(name)).suffix == ".ipynb" and path.is_file():
        return path.resolve()
    name = path.stem if path.suffix == ".ipynb" else str(name)
    known = _named()
    matches = [p for p in known if p.stem == name] or [p for p in known if p.stem.startswith(f"{name}_")]
    if len(matches) == 1:
        return matches[0]
    raise InputError(f"{name!r} is not a notebook: choose one of {', '.join(p.stem for p in matches or known)}")


def parameters(path: Path) -> dict[str, type]:
    """Return the type of each of a notebook's parameters: its cell tagged `parameters` holds lines `seeds: int = 3`.

    Raises InputError if there is no such cell, if it holds anything else, or if a value is not of its type.
    """
    cell = _parameters_cell(read(path))
    if cell is None:
        raise InputError(f"{path.stem} has no cell tagged 'parameters', so it cannot be run with a profile")
    kinds = {}
    with paths.reading(f"the parameters of {path.stem}, annotated literals such as 'seeds: int = 3'", Exception):
        for line in ast.parse(cell.source).body:
            kind = kinds[line.target.id] = TYPES[line.annotation.id]
            TypeAdapter(kind).validate_python(ast.literal_eval(line.value), strict=True)
    return kinds


def _parameters_cell(notebook: NotebookNode) -> NotebookNode | None:
    return next((cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), None)


def parse_assignments(sources: Sequence[Path], assignments: Sequence[str]) -> dict[str, Any]:
    """Return parameters written as "seeds=3", read as the types that the notebooks `sources` declare.

    Raises InputError if one of the notebooks has no such parameter, or if the value cannot be read.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} does not set a parameter: write name=value")
        for source in sources:
            values[name] = _validated(source, name, text, TypeAdapter.validate_strings)
    return values


def checked(path: Path, profile: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all values that a run would hand to the notebook; InputError if it does not accept them."""
    paths.profile_dir(profile)
    values = values or {}
    if "profile" in values:
        raise InputError(f"{path.stem}: the profile is chosen with the option for it, not as a parameter")
    values = {"profile": profile, **values}
    return {name: _validated(path, name, value, TypeAdapter.validate_python) for name, value in values.items()}


def _validated(path: Path, name: str, value: Any, read: Callable) -> Any:
    """Return what `read`, a method of TypeAdapter, makes of a parameter's value. Raises InputError if it refuses it."""
    known = parameters(path)
    if name not in known:
        listed = ", ".join(f"{key}: {kind.__name__}" for key, kind in known.items())
        raise InputError(f"{path.stem} has no parameter {name!r}: it accepts {listed or 'none'}")
    try:
        return read(TypeAdapter(known[name]), value, strict=True)
    except ValidationError:
        raise InputError(f"{path.stem}: parameter {name} takes {known[name].__name__}, got {value!r}") from None


def read(path: Path) -> NotebookNode:
    """Return a notebook; InputError if the file is not one."""
    with paths.reading(f"the notebook {path}", Exception):
        notebook = nbformat.reads(paths.read_bytes(path, 64 << 20).decode(), as_version=4)
        nbformat.validate(notebook)  # `reads` only logs what is invalid
        TypeAdapter(list[str]).validate_python(produces(notebook))
        return notebook


def metadata(notebook: NotebookNode) -> dict[str, Any]:
    """Return this project's part of a notebook's metadata."""
    found = notebook.metadata.get("itl")
    return found if isinstance(found, dict) else {}


def produces(notebook: NotebookNode) -> list[str]:
    """Return the files of figures that a notebook declares to draw."""
    return metadata(notebook).get("produces", [])
