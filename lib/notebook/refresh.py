"""Recompute all that follows from paper_data, without training: `itl refresh`. Publishing ends with it.

That is paper_data/compared, the numbers in README.md, figures/, and the notebooks and solutions that draw from tables.
They are executed in place, notebooks with `recompute=False` and the profile laptop, whose rows the tables hold.
"""

import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

from lib import paths
from lib.base import WorkError
from lib.experiments import published
from lib.figures import record, style
from lib.figures.parameter_bounds import BOUND, bounds_in_words
from lib.model.bounds import MEASURED_BITS
from lib.notebook import catalog, runner

PROFILE = "laptop"


def refresh(say: Callable[[str], None] = print) -> None:
    """Run every step, even after a failure. Raises `WorkError` naming those that failed. Does not write the tables."""
    paths.check_checkout()
    steps = {f"paper_data/compared, {section}": partial(published.write, section) for section in published.SECTIONS}
    steps["the numbers of README.md"] = write_readme
    steps |= {f"figures/{name}": partial(_draw, name) for name in record.FIGURES}
    steps["the notebooks that draw from tables"] = lambda: runner.run_many(
        drawing_notebooks(), PROFILE, {"recompute": False}, in_place=True, reuse=True
    )
    steps |= {f"solutions/{path.stem}": partial(_execute, path) for path in drawing_solutions()}
    failed = []
    for name, step in steps.items():
        say(f"refreshing {name}")
        try:
            step()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    if failed:
        raise WorkError(f"not all could be refreshed, the tables are as they were: {'; '.join(failed)}")


def drawing_notebooks() -> list:
    """Return the notebooks that can draw without training: those with a parameter `recompute`."""
    return [path for path in catalog.all_notebooks() if "recompute" in catalog.parameters(path)]


def drawing_solutions() -> list:
    """Return the solutions whose text depends on our rows: those with a cell tagged `from-tables`."""
    solutions = sorted((paths.NOTEBOOKS / "solutions").glob("*.ipynb"))
    return [path for path in solutions if "from-tables" in path.read_text(encoding="utf-8")]


def _execute(path: Path) -> None:
    notebook = catalog.read(path)
    manager = runner.this_interpreter(paths.figures(PROFILE))
    options = {"extra_arguments": ["--log-level=CRITICAL"], "record_timing": False}
    ExecutePreprocessor(kernel_manager_class=manager, **options).preprocess(
        notebook, {"metadata": {"path": path.parent}}
    )
    with paths.replacing(path) as part:
        nbformat.write(notebook, part)


def _draw(name: str) -> None:
    style.save(record.draw(name, PROFILE), name, PROFILE)


# README.md ------------------------------------------------------------------------------------------------------------


def write_readme() -> None:
    """Replace the text between `<!-- begin:NAME -->` and `<!-- end -->` by what `BLOCKS[NAME]` computes."""
    path = paths.ROOT / "README.md"
    text = computed(path.read_text(encoding="utf-8"))
    with paths.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def computed(text: str) -> str:
    """Return `text` with its blocks computed anew; a block that `BLOCKS` lacks is a `KeyError`."""
    block = re.compile(r"(<!-- begin:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def _main_figure() -> str:
    told = (
        "*Parameters of the smallest model that recalls 95% of the facts. Lines: published means and standard "
        "deviations, over the seeds (of 10) that reach 95%. Points: ours, one per seed; pale: an earlier "
        "recipe; triangles: a seed that needs more parameters (pointing up), or for which fewer may do (down). "
        "Thin lines: fits to our seeds of today's plan or of one earlier recipe. Dots: seeds in such a fit whose "
        "place a newer recipe has taken. "
        f"Dashed: Section 4's lower bound in weights, at {MEASURED_BITS[BOUND]:g} bits per parameter. "
        "Dash-dotted: a transformer whose weights are set by hand. "
        "Ours are trained by Muon with focal loss, the paper's by AdamW with cross-entropy."
    )
    return textwrap.fill(" ".join([told, *bounds_in_words(PROFILE)]) + "*", 118, break_on_hyphens=False)


#: What README.md computes, by name.
BLOCKS: dict[str, Callable[[], str]] = {"main-figure": _main_figure}
