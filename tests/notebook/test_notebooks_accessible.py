"""Every notebook can be read without seeing its pictures, and walked through by its headings and links."""

from functools import cache
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from lib.notebook import catalog, runner

ALL = catalog.all_notebooks()
MISSING = "No description has been provided for this image"  # what nbconvert says where it finds none


def problems(page: str, folder: Path) -> list[str]:
    """What is wrong with a page whose relative links start at `folder`."""
    html = BeautifulSoup(page, "html.parser")
    found = [f"picture {i}" for i, img in enumerate(html("img")) if img.get("alt", "").strip() in ("", MISSING)]
    levels = [0, *(int(heading.name[1]) for heading in html(["h1", "h2", "h3", "h4", "h5", "h6"]))]
    found += [f"h{a} after h{b}" for b, a in zip(levels, levels[1:], strict=False) if a > b + 1]
    found += ["title"] * (levels.count(1) != 1)
    anchors = {tag["id"] for tag in html.find_all(id=True)}
    for link in (a["href"] for a in html("a", href=True)):
        path, _, anchor = link.partition("#")
        if ":" in path:  # an address elsewhere
            continue
        if path and not (folder / path).exists() or not path and anchor not in anchors:
            found.append(f"link {link}")
    return found


@cache
def rendered(path: Path) -> str:
    return runner.render(nbformat.read(path, as_version=4), path)


@pytest.mark.parametrize("path", ALL, ids=[path.stem for path in ALL])
def test_pictures_have_words_headings_steps_and_links_ends(path):
    assert problems(rendered(path), path.parent) == []


@pytest.mark.parametrize("path", ALL, ids=[path.stem for path in ALL])
def test_no_output_needs_a_kernel_to_be_seen(path):
    cells = nbformat.read(path, as_version=4).cells
    kinds = [set(out.data) for cell in cells for out in cell.get("outputs", []) if "data" in out]
    assert all(kind & {"text/plain", "text/html", "image/png"} for kind in kinds)
    assert not any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds)


def test_what_is_wrong_is_found(tmp_path):
    (tmp_path / "there.md").touch()
    new = nbformat.v4
    good = "# A\n\n## B c\n\n### D\n\n## E\n\n[1](#B-c) [2](there.md) [3](https://x.org) ![a](data:image/png;base64,AA)"
    png = {"image/png": "AA"}
    outputs = [new.new_output("display_data", png, metadata={"image/png": {"alt": 'some "words" <b>'}})]
    told = new.new_notebook(cells=[new.new_markdown_cell(good), new.new_code_cell("", outputs=outputs)])
    page = runner.render(told, tmp_path / "n.ipynb")
    assert problems(page, tmp_path) == []
    assert BeautifulSoup(page, "html.parser")("img")[-1]["alt"] == 'some "words" <b>'

    bad = "# A\n\n### D\n\n# E\n\n[1](#c) [2](gone.md) ![](data:image/png;base64,AA)"
    outputs = [new.new_output("display_data", png)]
    untold = new.new_notebook(cells=[new.new_markdown_cell(bad), new.new_code_cell("", outputs=outputs)])
    found = problems(runner.render(untold, tmp_path / "n.ipynb"), tmp_path)
    assert found == ["picture 0", "picture 1", "h3 after h1", "title", "link #c", "link gone.md"]
