"""The notebook runner: papermill executes, nbconvert renders, and only a success is published.

Papermill alone warns about an unknown parameter and goes on, starts whatever kernel the machine calls `python3`, and
reports every cell of a notebook as completed after its kernel has died. Here parameters are checked before a kernel
starts, the kernel is the interpreter that runs this module, and a notebook has succeeded when its last code cell was
executed and every figure it declares in its metadata, `{"itl": {"produces": ["name.pdf", ...]}}`, exists. Until then
everything lives in a temporary folder: a failed run leaves earlier results as they were, and a copy to look at.
"""

import ast
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import textwrap
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from pydantic import TypeAdapter, ValidationError

from lib import paths
from lib.base import InputError, WorkError


class NotebookError(WorkError):
    """A notebook did not do what it was to do; the message names the notebook, the cell, the cause and the copy."""


class Parameter(NamedTuple):
    """One line of a parameters cell: `seeds: int = 3` is `Parameter(int, 3)`."""

    type: Any
    default: Any


@dataclass(frozen=True)
class RunResult:
    """What a successful run left behind; `seconds` is 0 when an earlier run was re-used."""

    executed: Path
    html: Path | None
    products: list[Path]
    seconds: float


# --- which notebooks there are, and what they accept


def all_notebooks() -> list[Path]:
    """The project's notebooks in the order of the paper."""
    return sorted(paths.NOTEBOOKS.glob("*.ipynb"))


def paper_notebooks() -> list[Path]:
    """Those that `itl paper` runs: all but the ones whose metadata say `{"itl": {"paper": false}}`."""
    return [path for path in all_notebooks() if _read(path).metadata.get("itl", {}).get("paper", True)]


def scale_notebooks() -> list[Path]:
    """Those that `itl scale` runs: their metadata say `{"itl": {"paper": false, "scale": true}}`."""
    return [path for path in all_notebooks() if _read(path).metadata.get("itl", {}).get("scale", False)]


def find(name: str | Path) -> Path:
    """The notebook called `name`: a path, a full name, or its number ("05_1" finds 05_1_parameter_bounds).

    Raises InputError if there is none, or more than one.
    """
    if (path := Path(name)).suffix == ".ipynb" and path.is_file():
        return path.resolve()
    name = path.stem if path.suffix == ".ipynb" else str(name)
    known = all_notebooks()
    matches = [p for p in known if p.stem == name] or [p for p in known if p.stem.startswith(f"{name}_")]
    if len(matches) == 1:
        return matches[0]
    problem = "is the start of several notebooks" if matches else "is not a notebook"
    raise InputError(f"{name!r} {problem}: choose one of {', '.join(p.stem for p in matches or known)}")


def parameters(path: Path) -> dict[str, Parameter]:
    """What a notebook accepts: the annotated literals of its cell tagged `parameters`, in their order.

    Raises InputError if there is no such cell, or if it holds anything but lines like `seeds: int = 3`.
    """
    cell = next((c for c in _read(path).cells if "parameters" in c.metadata.get("tags", [])), None)
    if cell is None:
        raise InputError(f"{path.stem} has no cell tagged 'parameters', so it cannot be run with a profile")
    try:
        return dict(_parameter(line) for line in ast.parse(cell.source).body)
    except (SyntaxError, ValueError, NameError, AttributeError, TypeError):
        raise InputError(
            f"{path.stem}: the cell tagged 'parameters' takes annotated literals only, such as 'seeds: int = 3'"
        ) from None


def _parameter(line: ast.stmt) -> tuple[str, Parameter]:
    """`name: annotation = literal`; raises one of the errors that `parameters` turns into a sentence otherwise."""
    annotation = eval(ast.unparse(line.annotation), {"Literal": typing.Literal})
    default = ast.literal_eval(line.value)
    return line.target.id, Parameter(annotation, TypeAdapter(annotation).validate_python(default, strict=True))


def parse_parameter(text: str, kind: Any) -> Any:
    """A value typed on the command line, read as `kind`: "3" as an int, "[8, 16]" as a list[int].

    Raises InputError if it cannot be read so.
    """
    adapter = TypeAdapter(kind)
    for read in (adapter.validate_strings, adapter.validate_json):
        try:
            return read(text, strict=True)
        except ValidationError:
            continue
    raise InputError(f"{text!r} cannot be read as {_type_name(kind)}")


def parse_assignments(names: Sequence[str | Path], assignments: Sequence[str]) -> dict[str, Any]:
    """Parameters typed as "seeds=3", each read as what the notebooks `names` declare it to be.

    Raises InputError if one of the notebooks has no such parameter, or if the value cannot be read.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} does not set a parameter: write name=value")
        for source in map(find, names):
            kind = _accepted(source, name)
            try:
                values[name] = parse_parameter(text, kind)
            except InputError as error:
                raise InputError(f"{source.stem}: parameter {name}: {error}") from None
    return values


def _accepted(path: Path, name: str) -> Any:
    """The type of one parameter of a notebook, or InputError."""
    known = parameters(path)
    if name not in known:
        listed = ", ".join(f"{key}: {_type_name(kind)}" for key, (kind, _) in known.items())
        raise InputError(f"{path.stem} has no parameter {name!r}: it accepts {listed or 'none'}")
    return known[name].type


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")


def checked(path: Path, profile: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """All values that a run would hand to the notebook, or InputError."""
    if profile not in paths.PROFILES:
        raise InputError(f"unknown profile {profile!r}: it is one of {', '.join(paths.PROFILES)}")
    if "profile" in (values or {}):
        raise InputError(f"{path.stem}: the profile is chosen with the option for it, not as a parameter")
    checked = {}
    for name, value in {"profile": profile, **(values or {})}.items():
        kind = _accepted(path, name)
        try:
            checked[name] = TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            raise InputError(f"{path.stem}: parameter {name} takes {_type_name(kind)}, got {value!r}") from None
    return checked


# --- running


def run(
    name: str | Path,
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    *,
    html: bool = True,
    in_place: bool = False,
    reuse: bool = False,
    label: str = "",
) -> RunResult:
    """Execute one notebook and publish what it made.

    The figures go to `paths.figures(profile)`, the executed notebook and its HTML to runs/<profile>/notebooks.
    `in_place` also writes the outputs into the source, whose cells and metadata stay as they are. `reuse` returns the
    earlier result if nothing it depends on has changed (see `is_current`). `label` starts the line that says what runs.

    Raises InputError before any kernel starts if the name, the profile or a parameter is wrong, and NotebookError if
    the notebook fails: then the executed copy is kept as NAME.failed.ipynb and nothing else has changed.
    """
    source = find(name)
    values = checked(source, profile, parameters)
    if reuse and is_current(source, profile, parameters, html=html):
        _say(f"{label}{source.stem}: up to date")
        result = _published(source, profile, html)
    else:
        _say(f"{label}{source.stem}: running ({profile})")
        result = _run(source, profile, values, html)
        _say(f"{source.stem}: done in {result.seconds:.0f} s")
    if in_place:
        _write_back(result.executed, source)
    return result


def run_many(
    names: Sequence[str | Path], profile: str = "quick", parameters: Mapping[str, Any] | None = None, **options: Any
) -> list[RunResult]:
    """Run several notebooks one after the other with the options of `run`; a failure does not stop those that follow.

    Raises InputError before the first one starts if any of them would be refused, and NotebookError at the end.
    """
    sources = [find(name) for name in names]
    for source in sources:
        checked(source, profile, parameters)
    results, failures = [], []
    for number, source in enumerate(sources, start=1):
        try:
            results.append(run(source, profile, parameters, label=f"[{number}/{len(sources)}] ", **options))
        except NotebookError as error:
            _say(f"{source.stem}: failed")
            failures.append(str(error))
    if failures:
        raise NotebookError(f"{len(failures)} of {len(sources)} notebooks failed: {'; '.join(failures)}")
    return results


def is_current(
    name: str | Path, profile: str = "quick", parameters: Mapping[str, Any] | None = None, *, html: bool = True
) -> bool:
    """Whether a run would only repeat what is there: same cells, parameters, `lib` and paper_data, and all outputs."""
    source = find(name)
    values = checked(source, profile, parameters)
    earlier = _published(source, profile, html)
    outputs = [earlier.executed, *earlier.products, *([earlier.html] if earlier.html else [])]
    if not all(path.is_file() for path in outputs):
        return False
    recorded = _read(earlier.executed).metadata.get("itl", {}).get("source_hash")
    return recorded == _source_hash(_read(source), values)


def _published(source: Path, profile: str, html: bool) -> RunResult:
    """Where a successful run of `source` leaves what."""
    folder = paths.profile_dir(profile).resolve() / "notebooks"
    return RunResult(
        executed=folder / source.name,
        html=folder / f"{source.stem}.html" if html else None,
        products=[paths.figures(profile) / name for name in _produces(_read(source))],
        seconds=0.0,
    )


def _run(source: Path, profile: str, values: dict[str, Any], html: bool) -> RunResult:
    target = _published(source, profile, html)
    failed = target.executed.with_suffix(".failed.ipynb")
    target.executed.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{source.stem}-", dir=target.executed.parent) as folder:
        copy, page, figures = Path(folder, source.name), Path(folder, "page.html"), Path(folder, "figures")
        figures.mkdir()
        if problem := _execute(source, values, copy, figures):
            if copy.exists():
                problem += f"; its executed copy is {_publish(copy, failed)}"
            raise NotebookError(f"{source.stem} failed {problem}")
        if target.html:
            page.write_text(_render(_read(copy), source), encoding="utf-8")
            _publish(page, target.html)
        made = sorted(path.relative_to(figures) for path in figures.rglob("*") if path.is_file())
        products = [_publish(figures / name, paths.figures(profile) / name) for name in made]
        # Last, because the hash in it says that everything else is in its place.
        _publish(copy, target.executed)
    failed.unlink(missing_ok=True)
    return replace(target, products=products, seconds=time.perf_counter() - start)


def _execute(source: Path, values: dict[str, Any], copy: Path, figures: Path) -> str | None:
    """Execute `source` into `copy`, its figures into `figures`; None, or where and why that failed."""
    source_hash = _source_hash(_read(source), values)
    cause = None
    try:
        papermill.execute_notebook(
            source,
            copy,
            values,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_this_interpreter(figures),
            extra_arguments=["--log-level=CRITICAL"],
            cwd=source.parent,
            progress_bar={"desc": source.stem, "leave": False} if sys.stderr.isatty() else False,
        )
    except PapermillExecutionError as error:
        cause = f"{error.ename}: {error.evalue}"
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
    if not copy.exists():
        return f"before its first cell: {cause}"
    notebook = _read(copy)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if cause or code[-1].execution_count is None or any(out.output_type == "error" for out in code[-1].outputs):
        # papermill calls every cell of a dead kernel's notebook completed, but only those that ran have a start time.
        ran = [cell for cell in code if cell.metadata.papermill.start_time]
        where = f"in cell [{len(ran)}] ({ran[-1].source.strip().splitlines()[0]})" if ran else "at its start"
        return f"{where}: {textwrap.shorten(cause or 'execution stopped there', 400)}"
    if missing := [name for name in _produces(notebook) if not (figures / name).is_file()]:
        return f"to produce {', '.join(missing)}, although every cell was executed"
    notebook.metadata.setdefault("itl", NotebookNode()).source_hash = source_hash
    nbformat.write(notebook, copy)
    return None


def _this_interpreter(figures: Path) -> type[AsyncKernelManager]:
    """A kernel manager that starts the interpreter running this, with this `lib`.

    Left to itself Jupyter takes the first kernelspec `python3` on its search path (JUPYTER_PATH, then the user's or the
    environment's folder, then the system's), and that file may name another Python.
    """
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")])),
        "ITL_RUNS": str(paths.runs().resolve()),
        "ITL_FIGURES": str(figures),
        "ITL_PROGRESS": "lines",
    }
    # Jupyter expands $NAME in the environment of a kernelspec.
    spec = KernelSpec(**get_kernel_dict(), env={name: value.replace("$", "$$") for name, value in environment.items()})
    return type("ThisInterpreter", (AsyncKernelManager,), {"kernel_spec": spec})


# --- files


def _read(path: Path) -> NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise InputError(f"{path} is not a notebook that can be read: {textwrap.shorten(str(error), 200)}") from None


def _produces(notebook: NotebookNode) -> list[str]:
    return notebook.metadata.get("itl", {}).get("produces", [])


def _source_hash(notebook: NotebookNode, values: dict[str, Any]) -> str:
    """A hash of all that decides a notebook's outputs: its cells, its parameters, `lib` and paper_data."""
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    digest = hashlib.sha256(json.dumps([cells, _produces(notebook), values], sort_keys=True).encode())
    for folder in (paths.ROOT / "lib", paths.PAPER_DATA):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


#: Pictures keep the alternative text that their metadata hold. The page needs no network: require.js and mermaid are
#: left out, and MathJax is asked for only by equations.
_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block data_png scoped -%}
{%- set alt = output | get_metadata('alt', 'image/png') -%}
{{ super() | replace('<img ', '<img alt="' ~ (alt | escape_html) ~ '" ' if alt else '<img ', 1) }}
{%- endblock -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- if resources.equations -%}{{ super() }}{%- endif -%}{%- endblock -%}
"""


def _render(notebook: NotebookNode, source: Path) -> str:
    """The executed notebook as one self-contained HTML page."""
    equations = any("$" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    resources = {"metadata": {"name": source.stem, "path": str(source.parent)}, "equations": equations}
    exporter = HTMLExporter(raw_template=_TEMPLATE, embed_images=True)
    return exporter.from_notebook_node(notebook, resources)[0]


def _write_back(executed: Path, source: Path) -> None:
    """Copy the outputs into the source and nothing else: no timings, no injected parameters, so diffs stay small."""
    notebook = _read(source)
    ran = [cell for cell in _read(executed).cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = itertools.count(1)
    for cell, done in zip(notebook.cells, ran, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = next(count) if done.execution_count else None
            cell.outputs = done.outputs
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count
    part = executed.with_suffix(".part")
    nbformat.write(notebook, part)
    _publish(part, source)


def _publish(made: Path, target: Path) -> Path:
    """Move a finished file to its place, whole or not at all, from any file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.move(made, part)
    os.replace(part, target)
    return target


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
