"""Where the rows of finished runs are: in paper_data, and still in runs/. Needs no pandas, which is slow to import."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lib import paths
from lib.base import check_known
from lib.config import FINISHED, check_row, read_row
from lib.dialogs.tokenizers import load_tokenizer
from lib.experiments.plan import Search, is_file
from lib.paths import ROW

#: The table of paper_data that holds a section's rows.
TABLES = {
    "05_1": "parameter_bounds",
    "05_1_biographies": "biographies",
    "05_1_patience": "patience",
    "05_2": "generalization",
    "05_3": "compressibility",
    "decay": "decay",
    "depth_and_heads": "depth_and_heads",
}
#: Sections that a section shares runs with: their rows count for it, too, so these runs are not repeated.
SHARED = {"depth_and_heads": ("05_1", "05_2"), "05_1_patience": ("05_1",), "decay": ("05_2",)}
#: Sections with a module of their own, which reads their `rows` and sorts them by its `ORDER`.
OWN = {"06": "lib.finetune.experiments", "07_1": "lib.experiments.edits", "07_2": "lib.experiments.chains"}
#: The tables of all sections.
_TABLES = TABLES | {"06": "scale", "07_1": "edits", "07_2": "chains"}


def sweep_dir(section: str, profile: str) -> Path:
    """Return the folder of a sweep's runs: runs/<profile>/<section>, or runs/<name> for a user's file of grids."""
    return paths.runs() / Path(section).stem if is_file(section) else paths.profile_dir(profile) / section


def table_path(section: str) -> Path:
    """Return where a section's rows are committed: paper_data/<table>.csv. Other experiments are an `InputError`."""
    check_known("section", section, _TABLES, " among those with a table")
    return paths.PAPER_DATA / f"{_TABLES[section]}.csv"


def text_rows(path: Path, fields: Iterable[str] = ()) -> list[dict[str, str | None]]:
    """Return the rows of a table of runs, none before any was published. Raises `InputError` for a damaged one."""
    rows = []
    if not path.exists():
        return rows
    with (
        paths.reading(f"the table {path}, which `git checkout` restores", csv.Error),
        path.open(newline="", encoding="utf-8-sig") as file,
    ):
        reader = csv.DictReader(file, restkey="a cell too many", strict=True)
        if not {"profile", "run_id"} <= {*(reader.fieldnames or ())}:
            raise ValueError("it lacks the columns profile and run_id")
        for number, cells in enumerate(reader, start=1):
            rows.append({name: cell or None for name, cell in cells.items()})
            with paths.reading(f"row {number}"):
                check_row(rows[-1], ("profile", "run_id", *fields), strict=False)
    return rows


def rows_in_runs(section: str, profile: str, plan: Sequence[Search]) -> list[dict[str, Any]]:
    """Return the rows of a plan's finished runs in `runs/`, if their tokenizer file is unchanged."""
    planned = {run_id for search in plan for run_id in search.run_ids}
    tokenizers = {load_tokenizer(spec).name for spec in {search.base.tokenizer for search in plan}}
    finished = [path for path in sorted(sweep_dir(section, profile).glob(f"*/{ROW}")) if path.parent.name in planned]
    rows = [row | {"run_id": path.parent.name} for path, row in paths.whole(finished, read_row)]
    return [row for row in rows if row.get("tokenizer", "bytes") in tokenizers]


def known_rows(section: str, profile: str, plan: Sequence[Search]) -> dict[str, dict[str, Any]]:
    """Return by run id the rows of a profile in paper_data, as text, and of a plan in runs; `SHARED` ones too."""
    rows = []
    for each in (*SHARED.get(section, ()), section):
        rows += rows_in_runs(each, profile, plan)
        if each in TABLES:
            rows += [row for row in text_rows(table_path(each), FINISHED) if row["profile"] == profile]
    return {row["run_id"]: row for row in rows}
