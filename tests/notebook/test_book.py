"""The book: built from the committed notebooks as they are; every page read as a browser would."""

import json
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup

from lib import paths
from lib.base import InputError, WorkError
from lib.notebook import book, catalog

pytestmark = pytest.mark.filterwarnings("ignore:.*MystReferenceResolver.app")  # of what MyST uses of Sphinx

SOLUTIONS = sorted((paths.NOTEBOOKS / "solutions").glob("*.ipynb"))


class Site:
    """The pages of a book, parsed, by their path below its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pages = {
            str(path.relative_to(folder)): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
            for path in sorted(folder.rglob("*.html"))
        }

    def references(self, page: str) -> list[tuple[str, str]]:
        """What a page points to, links apart from what a browser loads by itself: ("link" or "load", address)."""
        soup = self.pages[page]
        loaded = [tag.get("src") or tag.get("href") for tag in soup.select("[src], link[href]:not([rel=canonical])")]
        linked = [tag["href"] for tag in soup.select("a[href]")]
        return [("load", address) for address in loaded] + [("link", address) for address in linked]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    start = time.perf_counter()
    first = book.build(tmp_path_factory.mktemp("book") / "site")
    assert time.perf_counter() - start < 240
    assert first.name == "index.html"
    return Site(first.parent)


@pytest.mark.slow
def test_every_notebook_has_a_page_with_its_title_that_the_contents_name_once(site):
    contents = [tag["href"] for tag in site.pages["index.html"].select(".sidebar-tree a.reference.internal[href]")]
    for path in catalog.all_notebooks():
        title = nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ")
        assert site.pages[f"{path.stem}.html"].h1.text.removesuffix("¶").strip("# ") == title
        assert contents.count(f"{path.stem}.html") == 1
    for path in SOLUTIONS:
        assert contents.count(f"solutions/{path.stem}.html") == 1
    assert contents.count("lesson_plan.html") == 1


@pytest.mark.slow
def test_outputs_of_notebooks_are_on_their_pages_with_alternative_text(site):
    pictures = 0
    for path in catalog.all_notebooks():
        told = [
            " ".join(output.metadata["image/png"]["alt"].split())
            for cell in nbformat.read(path, 4).cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        shown = [tag["alt"] for tag in site.pages[f"{path.stem}.html"].select("article .cell_output img")]
        assert shown == told, path
        pictures += len(shown)
    assert pictures > 10
    assert site.pages["05_1_parameter_bounds.html"].select("article .cell_output table")


@pytest.mark.slow
def test_links_lead_to_what_is_there_and_nothing_is_loaded_from_a_network(site):
    for page in site.pages:
        for kind, address in site.references(page):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                assert kind == "link" or parts.scheme == "data", f"{page} loads {address}"
                continue
            target = (site.folder / page).parent / unquote(parts.path) if parts.path else site.folder / page
            assert target.is_file(), f"{page} points to {address}"
            if parts.fragment and target.suffix == ".html":
                there = site.pages[str(target.resolve().relative_to(site.folder.resolve()))]
                assert there.find(id=unquote(parts.fragment)), f"{page} points to {address}"
    for style in site.folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert "@import" not in text and not any(f"url({quote}http" in text for quote in ("", '"', "'")), style


@pytest.mark.slow
def test_equations_are_mathml(site):
    equations = site.pages["04_theory.html"].find_all("math")
    sources = [cell.source for cell in nbformat.read(catalog.find("04"), 4).cells if cell.cell_type == "markdown"]
    assert len([tag for tag in equations if tag["display"] == "block"]) == "\n".join(sources).count("$$") / 2
    assert {"∑", "≥"} <= {tag.text for tag in site.pages["04_theory.html"].select("math mo")}
    assert not any("MathJax" in str(page) for page in site.pages.values())


@pytest.mark.slow
def test_the_search_index_knows_words_of_a_notebook(site):
    text = (site.folder / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    for word, page in (("famili", "05_3_compressibility"), ("hellaswag", "06_2_capabilities_at_scale")):
        found = index["terms"][word]
        assert index["docnames"].index(page) in (found if isinstance(found, list) else [found])


@pytest.mark.slow
def test_solutions_are_folded_below_their_exercises(site):
    for path in SOLUTIONS:
        page = site.pages[f"solutions/{path.stem}.html"]
        exercises = page.select("article section section")
        assert len(exercises) >= 3
        for exercise in exercises:
            question, solution = exercise.find(["blockquote", "details"]), exercise.find("details")
            assert question.name == "blockquote" and question.text.strip()
            assert not solution.has_attr("open") and len(solution.text.split()) > 20


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with notebooks/, in which there is a short one, and the book of it in runs/book."""
    folder = tmp_path_factory.mktemp("small") / "notebooks"
    (folder / "solutions").mkdir(parents=True)
    shutil.copy(paths.NOTEBOOKS / "conf.py", folder)
    shutil.copytree(paths.NOTEBOOKS / "_static", folder / "_static")
    (folder / "index.md").write_text("# Small\n")
    (folder / "lesson_plan.md").write_text("# Plan\n")
    parameters = nbformat.v4.new_code_cell("profile: str = 'quick'", metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell("# One\n\nText."), parameters, nbformat.v4.new_code_cell("2 * 21")]
    source = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    for path in ("01_one.ipynb", "01_one-Copy1.ipynb", "Untitled.ipynb", "solutions/01_one.ipynb"):
        nbformat.write(source, folder / path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "NOTEBOOKS", folder)
        patch.setenv("ITL_RUNS", str(folder.with_name("runs")))
        book.build()
    return folder.parent


@pytest.fixture
def small_house(small, tmp_path, monkeypatch) -> Path:
    """A copy of these notebooks and of their book, in place of the project's."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "notebooks"


@pytest.fixture
def first(small_house) -> Path:
    """The first page of their book."""
    return paths.runs() / "book" / "index.html"


def test_a_second_build_replaces_the_first(small_house, first, itl):
    page = first.with_name("01_one.html")
    assert "forty-two" not in page.read_text()
    assert {path.stem for path in page.parent.glob("*_*.html")} == {"01_one", "lesson_plan"}  # no copies
    notebook = nbformat.read(small_house / "01_one.ipynb", 4)
    output = nbformat.v4.new_output("execute_result", {"text/plain": "forty-two"}, execution_count=1)
    notebook.cells[2].outputs = [output]
    nbformat.write(notebook, small_house / "01_one.ipynb")
    assert itl("book").code == 0
    assert "forty-two" in page.read_text()


def test_a_link_to_nowhere_is_an_error(small_house, first):
    (small_house / "index.md").write_text("# Small\n\n[lost](two.ipynb)\n")
    with pytest.raises(WorkError, match="the book was not built: .*two.ipynb"):
        book.build()


def test_a_book_is_built_where_a_link_leads_and_in_the_current_folder(small_house, first, tmp_path, monkeypatch):
    first.parent.rename(tmp_path / "there")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "there" / "index.html").write_text("earlier")
    assert book.build(tmp_path / "link").read_text() != "earlier"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "index.html").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert book.build(Path(".")).is_file()


def test_a_file_is_not_replaced_by_a_book(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkError, match="the book was not built: "):
        book.build(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_without_the_extra_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "furo", None)
    with pytest.raises(InputError, match=r"package furo: pip install -e '\.\[book\]'"):
        book.build(tmp_path / "new")
    assert not list(tmp_path.iterdir())
