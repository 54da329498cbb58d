"""What is committed is what the tables say; a refresh that fails loses nothing and says what failed."""

import re

import nbformat
import pytest

from lib import paths
from lib.base import WorkError
from lib.notebook import refresh


def test_the_numbers_of_the_committed_readme_are_those_of_the_committed_tables():
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- begin:([\w-]+) -->", text)) == set(refresh.BLOCKS)
    assert refresh.computed(text) == text, "stale: itl refresh"


def test_only_what_stands_between_the_marks_of_a_block_changes(monkeypatch):
    monkeypatch.setattr(refresh, "BLOCKS", {"one": lambda: "1", "two": lambda: "2"})
    text = "a\n<!-- begin:one -->\nold\n<!-- end -->\nb\n<!-- begin:two -->\n<!-- end -->\nc"
    expected = "a\n<!-- begin:one -->\n1\n<!-- end -->\nb\n<!-- begin:two -->\n2\n<!-- end -->\nc"
    assert refresh.computed(text) == refresh.computed(expected) == expected
    with pytest.raises(KeyError, match="three"):
        refresh.computed("<!-- begin:three -->\n<!-- end -->")


def test_a_step_that_fails_stops_no_other_and_is_named(monkeypatch):
    said, done = [], []

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(refresh.published, "write", done.append)
    monkeypatch.setattr(refresh, "write_readme", fail)
    monkeypatch.setattr(refresh, "_draw", done.append)
    monkeypatch.setattr(refresh, "drawing_notebooks", list)
    monkeypatch.setattr(refresh, "_execute", lambda path: done.append(path.stem))
    monkeypatch.setattr(refresh.runner, "run_many", lambda *_, **__: done.append("notebooks"))
    with pytest.raises(WorkError, match="the numbers of README.md: OSError: disk full"):
        refresh.refresh(said.append)
    solutions = [path.stem for path in refresh.drawing_solutions()]
    assert done == [*refresh.published.SECTIONS, *refresh.record.FIGURES, "notebooks", *solutions]
    assert len(said) == len(done) + 1


def test_what_refresh_runs_are_the_notebooks_that_can_draw_without_training():
    names = {path.stem[:4] for path in refresh.drawing_notebooks()}
    assert {"05_1", "05_2", "05_3", "06_1", "06_2", "99_a"} <= names and not names & {"A1_t", "A2_p", "03_f"}


def test_solutions_that_read_our_rows_are_executed_in_place(tmp_path):
    assert {path.stem[:4] for path in refresh.drawing_solutions()} == {"05_1", "05_3", "06_1"}
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1", metadata={"tags": ["from-tables"]})])
    nbformat.write(source, tmp_path / "05_1.ipynb")
    refresh._execute(tmp_path / "05_1.ipynb")
    (cell,) = nbformat.read(tmp_path / "05_1.ipynb", 4).cells
    assert cell.outputs[0].data["text/plain"] == "2" and cell.metadata == {"tags": ["from-tables"]}
