"""Run notebooks: papermill executes, nbconvert renders, and only a success is published.

papermill alone warns about an unknown parameter and goes on, starts whatever kernel the machine calls `python3`, and
reports every cell of a notebook as completed after its kernel has died. Here parameters are checked before a kernel
starts, the kernel is the interpreter that runs this module, and a notebook has succeeded when its last code cell was
executed and every figure it declares in its metadata, `{"itl": {"produces": ["name.pdf", ...]}}`, exists. Until then
everything lives in a temporary folder: a failed run leaves earlier results as they were, and a copy to look at.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from tqdm import tqdm

from lib import paths
from lib.base import WorkError, printable
from lib.notebook.catalog import checked, find, metadata, produces, read
from lib.progress import METER

# Running --------------------------------------------------------------------------------------------------------------


def run(
    name: str | Path,
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    *,
    in_place: bool = False,
    reuse: bool = False,
    label: str = "",
) -> Path:
    """Execute one notebook, publish what it made, and return the executed notebook.

    The figures go to `paths.figures(profile)`, the executed notebook and its HTML to runs/<profile>/notebooks.
    `in_place` also writes the outputs into the source, whose cells and metadata stay as they are. `reuse` keeps the
    earlier results if they are current (`source_hash`). `label` starts the line that says what runs.

    Raises InputError before any kernel starts if the name, the profile or a parameter is wrong, and WorkError if
    the notebook fails: its message names the cell, the cause and the executed copy, NAME.failed.ipynb. Nothing else
    has changed.
    """
    source = find(name)
    values = checked(source, profile, parameters)
    executed = paths.profile_dir(profile).resolve() / "notebooks" / source.name
    figures, failed = paths.figures(profile), executed.with_suffix(".failed.ipynb")
    if reuse and _is_current(executed, figures, source_hash(source, values)):
        _say(f"{label}{source.stem}: up to date")
    else:
        _say(f"{label}{source.stem}: running ({profile})")
        start = time.perf_counter()
        executed.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{source.stem}-", dir=executed.parent) as folder:
            copy, page, drawn = Path(folder, source.name), Path(folder, "page.html"), Path(folder, "figures")
            drawn.mkdir()
            if problem := _execute(source, values, copy, drawn):
                if copy.exists():
                    problem += f"; its executed copy is {shutil.move(copy, failed)}"
                raise WorkError(f"{source.stem} failed {problem}")
            page.write_text(render(read(copy), source), encoding="utf-8")
            figures.mkdir(parents=True, exist_ok=True)
            made = {page: executed.with_suffix(".html")} | {figure: figures / figure.name for figure in drawn.iterdir()}
            for file, target in (made | {copy: executed}).items():  # the copy last: its hash says that all is there
                shutil.move(file, target)
        failed.unlink(missing_ok=True)
        _say(f"{source.stem}: done in {time.perf_counter() - start:.0f} s")
    if in_place:
        _write_back(executed, source)
    return executed


def run_many(
    names: Sequence[str | Path], profile: str = "quick", parameters: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Run several notebooks one after the other with the options of `run`; a failure does not stop those that follow.

    Raises InputError before the first one starts if any of them would be refused, and WorkError at the end.
    """
    sources = [find(name) for name in names]
    for source in sources:
        checked(source, profile, parameters)
    failures = []
    for number, source in enumerate(sources, start=1):
        try:
            run(source, profile, parameters, label=f"[{number}/{len(sources)}] ", **options)
        except WorkError as error:
            _say(f"{source.stem}: failed")
            failures.append(str(error))
    if failures:
        raise WorkError(f"{len(failures)} of {len(sources)} notebooks failed: {'; '.join(failures)}")


def source_hash(source: Path, values: Mapping[str, Any]) -> str:
    """Return a hash of all that decides a notebook's outputs: cells, parameters, code beside it, `lib`, paper_data."""
    notebook = read(source)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    digest = hashlib.sha256(json.dumps([cells, produces(notebook), dict(values)], sort_keys=True).encode())
    files = [file for folder in (paths.ROOT / "lib", paths.PAPER_DATA) for file in sorted(folder.rglob("*"))]
    for path in [*files, *sorted(source.parent.glob("*.py"))]:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _is_current(executed: Path, figures: Path, now: str) -> bool:
    if not (executed.is_file() and executed.with_suffix(".html").is_file()):
        return False
    earlier = metadata(read(executed))
    return earlier.get("source_hash") == now and all((figures / name).is_file() for name in earlier["produces"])


def _execute(source: Path, values: dict[str, Any], copy: Path, figures: Path) -> str | None:
    """Execute `source` into `copy`, its figures into `figures`; return None, or where and why that failed."""
    now, cause = source_hash(source, values), None
    try:
        papermill.execute_notebook(
            source,
            copy,
            values,
            kernel_name="python3",
            language="python",
            kernel_manager_class=this_interpreter(figures),
            extra_arguments=["--log-level=CRITICAL"],
            cwd=source.parent,
            progress_bar={"desc": source.stem, "leave": False} if sys.stderr.isatty() else False,
            stdout_file=_ProgressLines(),
        )
    except Exception as error:  # of a cell, with its name and value; of papermill or the kernel
        cause = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        if isinstance(error, OSError):
            copy.unlink(missing_ok=True)  # what a full disk left of it
    if not copy.exists():
        return f"and left no copy: {cause}"
    notebook = read(copy)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if cause or code[-1].execution_count is None or any(out.output_type == "error" for out in code[-1].outputs):
        # papermill calls every cell of a dead kernel's notebook completed, but only those that ran have a start time.
        ran = [cell for cell in code if cell.metadata.papermill.start_time]
        where = f"in cell [{len(ran)}] ({ran[-1].source.strip().splitlines()[0]})" if ran else "at its start"
        return f"{where}: {textwrap.shorten(cause or 'execution stopped there', 400)}"
    if missing := [name for name in produces(notebook) if not (figures / name).is_file()]:
        return f"to produce {', '.join(missing)}, although every cell was executed"
    notebook.metadata["itl"] = {"produces": produces(notebook), "source_hash": now}
    nbformat.write(notebook, copy)
    return None


class _ProgressLines(io.TextIOBase):
    """A file that prints the progress lines of a notebook's output as they come."""

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if METER.search(line):
                _say(line)


def this_interpreter(figures: Path) -> type[AsyncKernelManager]:
    """Return a kernel manager that starts the interpreter running this, with this `lib`."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")])),
        "ITL_RUNS": str(paths.runs().resolve()),
        "ITL_FIGURES": str(figures),
        "ITL_PROGRESS": "lines",
    }
    # Jupyter expands $NAME in the environment of a kernelspec.
    spec = KernelSpec(**get_kernel_dict(), env={name: value.replace("$", "$$") for name, value in environment.items()})
    return type("ThisInterpreter", (AsyncKernelManager,), {"kernel_spec": spec})


# Files ----------------------------------------------------------------------------------------------------------------


def render(notebook: NotebookNode, source: Path) -> str:
    """Return the executed notebook as one self-contained HTML page."""
    resources = {"metadata": {"name": source.stem, "path": str(source.parent)}}
    exporter = HTMLExporter(template_file=str(Path(__file__).with_name("page.html.j2")), embed_images=True)
    return exporter.from_notebook_node(notebook, resources)[0]


def _write_back(executed: Path, source: Path) -> None:
    """Copy the outputs into the source and nothing else: no timings, no injected parameters, so diffs stay small."""
    notebook = read(source)
    ran = [cell for cell in read(executed).cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell, done in zip(notebook.cells, ran, strict=True):
        if cell.cell_type == "code":
            # The cell of injected parameters is the second to run.
            cell.execution_count = done.execution_count and max(1, done.execution_count - 1)
            cell.outputs = done.outputs
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count
    with paths.replacing(source) as part:
        nbformat.write(notebook, part)


def _say(line: str) -> None:
    tqdm.write(printable(line), file=sys.stderr)  # beside papermill's bar
