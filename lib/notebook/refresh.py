"""Make again all that is computed from paper_data: `itl refresh`, which every publishing ends with.

That is paper_data/compared, the numbers in README.md, figures/, and the notebooks that draw from tables. Those are
executed in place with `recompute=False` in the profile laptop, whose rows the tables hold: in it the committed outputs
are what the tables say, and the figures go to figures/. Nothing is trained.
"""

import re
from collections.abc import Callable
from functools import partial

import pandas as pd

from lib import paths
from lib.base import WorkError
from lib.experiments import published, tables
from lib.figures import captions, from_scratch, style
from lib.notebook import runner

PROFILE = "laptop"


def refresh(say: Callable[[str], None] = print) -> None:
    """Do every step, whatever fails, and say each; `WorkError` names those that failed. The tables are only read."""
    steps: dict[str, Callable[[], object]] = {
        f"paper_data/compared, {section}": partial(published.write, section) for section in published.SECTIONS
    }
    steps["the numbers of README.md"] = write_readme
    steps |= {f"figures/{name}": partial(_draw, name) for name in from_scratch.FIGURES}
    steps["the notebooks that draw from tables"] = _run_notebooks
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
    """The notebooks that can draw without training: those with a parameter `recompute`."""
    return [path for path in runner.all_notebooks() if "recompute" in runner.parameters(path)]


def _draw(name: str) -> None:
    style.save(from_scratch.draw(name, PROFILE), name, PROFILE)


def _run_notebooks() -> None:
    options = {"in_place": True, "reuse": True, "html": False}
    runner.run_many(drawing_notebooks(), PROFILE, {"recompute": False}, **options)


# README.md ------------------------------------------------------------------------------------------------------------


def write_readme() -> None:
    """Replace what stands between `<!-- begin:NAME -->` and `<!-- end -->` by what `BLOCKS[NAME]` computes."""
    path = paths.ROOT / "README.md"
    text = computed(path.read_text(encoding="utf-8"))
    with paths.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def computed(text: str) -> str:
    """Return `text` with its blocks computed anew; a block that `BLOCKS` lacks is a `KeyError`."""
    block = re.compile(r"(<!-- begin:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def _main_figure() -> str:
    lines = [
        "*Parameters of the smallest model that recalls 95% of the facts. Lines: published, mean and standard",
        "deviation over the seeds of 10 that get there. Points: trained by this repository, pale by an earlier recipe.",
        *captions.bounds_in_words(PROFILE),
    ]
    return "\n".join(lines) + "*"


def _rows() -> str:
    """The state of the tables: rows, seeds and facts of each section and profile (takes the extra `scale`)."""
    from lib.finetune import experiments

    table = [
        "| section | profile | rows | not in today's plan | seeds | facts |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for section in (*tables.TABLES, experiments.SECTION):
        known = experiments.committed_rows() if section == experiments.SECTION else tables.committed_rows(section)
        for profile in known.profile.unique() if len(known) else ():
            read = partial(tables.read_rows, section) if section in tables.TABLES else experiments.rows
            table.append(_row_of(section, profile, read(profile)))
    return "\n".join(table)


def _row_of(section: str, profile: str, rows: pd.DataFrame) -> str:
    low, high = rows.n_facts.min(), rows.n_facts.max()
    facts = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    cells = section, profile, f"{len(rows):,}", f"{rows.superseded.sum():,}", f"{rows.seed.nunique()}", facts
    return f"| {' | '.join(cells)} |"


#: What README.md computes, by name.
BLOCKS: dict[str, Callable[[], str]] = {"main-figure": _main_figure, "rows": _rows}
