"""The project's notebooks: which there are, and which parameters they accept."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat import NotebookNode
from pydantic import TypeAdapter, ValidationError

from lib import paths
from lib.base import InputError

#: Types of parameters.
TYPES = {"int": int, "float": float, "bool": bool, "str": str}


def all_notebooks(group: str | None = None) -> list[Path]:
    """Return the project's notebooks, called like 05_1_name, in the order of the paper.

    group: "paper" (all without the metadata `{"itl": {"paper": false}}`) or "scale" (those with
    `{"itl": {"scale": true}}`); None for all.
    """
    paths.check_checkout()
    files = filter(Path.is_file, paths.NOTEBOOKS.glob("*.ipynb"))
    known = sorted(path for path in files if re.fullmatch(r"[0-9A-Z]\d_\w+", path.stem))
    return [path for path in known if group is None or metadata(read(path)).get(group, group == "paper")]


def find(name: str | Path) -> Path:
    """Return the notebook called `name`: a path, a full name, or its number ("05_1" finds 05_1_parameter_bounds).

    Raises InputError if there is none, or more than one.
    """
    if (path := Path(name)).suffix == ".ipynb" and path.is_file():
        return path.resolve()
    name = path.stem if path.suffix == ".ipynb" else str(name)
    known = all_notebooks()
    matches = [p for p in known if p.stem == name] or [p for p in known if p.stem.startswith(f"{name}_")]
    if len(matches) == 1:
        return matches[0]
    raise InputError(f"{name!r} is not a notebook: choose one of {', '.join(p.stem for p in matches or known)}")


def parameters(path: Path) -> dict[str, str]:
    """Return the names of a notebook's parameters and of their types, from its cell tagged `parameters`."""
    with paths.reading(f"the notebook {path}", Exception):
        return {name: about["inferred_type_name"] for name, about in papermill.inspect_notebook(path).items()}


def parse_assignments(sources: Sequence[Path], assignments: Sequence[str]) -> dict[str, Any]:
    """Return parameters written as "seeds=3", read as the types that the notebooks `sources` declare.

    Raises InputError if one of the notebooks has no such parameter, or if the value cannot be read.
    """
    values = {}
    for assignment, source in product(assignments, sources):
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} does not set a parameter: write name=value")
        kind = _type(source, name)
        try:
            values[name] = TypeAdapter(TYPES.get(kind, str)).validate_strings(text, strict=True)
        except ValidationError:
            raise InputError(f"{source.stem}: parameter {name} takes {kind}, got {text!r}") from None
    return values


def checked(path: Path, profile: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all values that a run would hand to the notebook; InputError if it has no parameters of their names."""
    paths.profile_dir(profile)
    if "profile" in (values or {}):
        raise InputError(f"{path.stem}: the profile is chosen with the option for it, not as a parameter")
    values = {"profile": profile, **(values or {})}
    for name in values:
        _type(path, name)
    return values


def _type(path: Path, name: str) -> str:
    known = parameters(path)
    if name not in known:
        listed = ", ".join(map(": ".join, known.items()))
        raise InputError(f"{path.stem} has no parameter {name!r}: it accepts {listed or 'none'}")
    return known[name]


def read(path: Path) -> NotebookNode:
    """Return a notebook; InputError if the file is not one."""
    with paths.reading(f"the notebook {path}", Exception):
        return nbformat.read(path, as_version=4)


def metadata(notebook: NotebookNode) -> dict[str, Any]:
    """Return this project's part of a notebook's metadata."""
    return notebook.metadata.get("itl", {})


def produces(notebook: NotebookNode) -> list[str]:
    """Return the files of figures that a notebook declares to draw."""
    return metadata(notebook).get("produces", [])
