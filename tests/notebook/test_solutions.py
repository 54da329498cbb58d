"""The worked solutions: one for every exercise of every notebook that has any, and their code runs."""

import re

import matplotlib
import nbformat
import pytest

from lib import paths
from lib.notebook import catalog

TEACHING = [path for path in catalog.all_notebooks() if path.stem != "99_all_figures"]
each_notebook = pytest.mark.parametrize("path", TEACHING, ids=lambda path: path.stem)


def markdown(path) -> str:
    return "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


def solution(path):
    return paths.NOTEBOOKS / "solutions" / path.name


@each_notebook
def test_a_notebook_says_what_one_learns_and_ends_with_exercises_that_are_solved_word_for_word(path):
    text = markdown(path)
    assert re.search(r"^\*\*You will (learn|see)\*?\*?", text, re.M)
    exercises, link = text.partition("## Exercises\n")[2].strip().rpartition("\n\n")[::2]
    assert link == f"Worked solutions: [{path.stem}](solutions/{path.name})."
    numbered = re.split(r"^\d\. ", exercises, flags=re.M)[1:]
    assert 3 <= len(numbered) <= 5
    heads = re.findall(r"^## Exercise (\d)\n\n((?:> .*\n?)+)", markdown(solution(path)), re.M)
    assert [int(number) for number, _ in heads] == list(range(1, len(numbered) + 1))
    assert [" ".join(quote.replace("> ", "").split()) for _, quote in heads] == [" ".join(e.split()) for e in numbered]


@pytest.mark.slow
@each_notebook
def test_solutions_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict = {}
    for cell in nbformat.read(solution(path), 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.stem}, cell {cell.id}", "exec"), names)
    assert not list(tmp_path.iterdir())  # a solution leaves nothing behind


def test_there_are_no_solutions_without_a_notebook():
    assert {path.name for path in (paths.NOTEBOOKS / "solutions").glob("*")} == {path.name for path in TEACHING}
