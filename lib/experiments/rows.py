"""Where the rows of finished runs are: in paper_data, and still in runs. Needs no pandas, which is slow to import."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import paths
from lib.base import InputError
from lib.dialogs.tokenizers import load_tokenizer
from lib.experiments.plan import is_file
from lib.experiments.search import Search
from lib.paths import ROW

#: The table of paper_data that holds a section's rows.
TABLES = {
    "05_1": "parameter_bounds",
    "05_1_biographies": "biographies",
    "05_1_patience": "patience",
    "05_2": "generalization",
    "05_3": "compressibility",
}
#: Sections with a module of their own, which has their table.
OWN = {"06": "lib.finetune.experiments", "07_1": "lib.experiments.edits", "07_2": "lib.experiments.chains"}


def sweep_dir(section: str, profile: str) -> Path:
    """Return the folder of a sweep's runs: runs/<profile>/<section>, or runs/<name> for a user's file of grids."""
    return paths.runs() / Path(section).stem if is_file(section) else paths.profile_dir(profile) / section


def table_path(section: str) -> Path:
    """Return where a section's rows are committed: paper_data/<table>.csv. Other experiments are an `InputError`."""
    if section not in TABLES:
        raise InputError(
            f"there is no table for section {section}: there are {', '.join(TABLES)}; other rows stay in runs"
        )
    return paths.PAPER_DATA / f"{TABLES[section]}.csv"


def read_row(path: Path) -> dict[str, Any]:
    """Return the row of a finished run. Raises `DamagedFile`."""
    return paths.read_json(path, fields=("recall",))


def rows_in_runs(section: str, profile: str, plan: Sequence[Search]) -> list[dict[str, Any]]:
    """Return the rows of a plan's finished runs in runs, if their tokenizer file is unchanged."""
    planned = {run_id for search in plan for run_id in search.run_ids}
    tokenizers = {load_tokenizer(spec).name for spec in {search.base.tokenizer for search in plan}}
    finished = [path for path in sorted(sweep_dir(section, profile).glob(f"*/{ROW}")) if path.parent.name in planned]
    rows = [row | {"run_id": path.parent.name} for path, row in paths.whole(finished, read_row)]
    return [row for row in rows if row.get("tokenizer", "bytes") in tokenizers]


def known_rows(section: str, profile: str, plan: Sequence[Search]) -> dict[str, dict[str, Any]]:
    """Return by run id all rows of a profile: those in paper_data, as text, and those of a plan in runs."""
    rows = rows_in_runs(section, profile, plan)
    if section in TABLES and (path := table_path(section)).exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows += [row for row in csv.DictReader(file) if row["profile"] == profile]
    return {row["run_id"]: row for row in rows}
