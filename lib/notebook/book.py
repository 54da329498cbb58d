"""The notebooks as a book: a site of pages that can be searched and read without a network (extra `[book]`).

Sphinx builds it from notebooks/ as it is: the notebooks, the worked solutions, the pages in Markdown. This module is
also the extension that Sphinx loads. It adds to pages as they are read what they lack, makes equations MathML, which
browsers draw themselves, and folds solutions away.
"""

import io
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import nbformat

from lib import paths
from lib.base import InputError, WorkError
from lib.notebook.catalog import all_notebooks

REPOSITORY = "in-tool-learning/in-tool-learning"

#: Links below the title of each page; `{download}` is MyST's for a file that lies beside the page.
_OFFERS = (
    f"[Binder](https://mybinder.org/v2/gh/{REPOSITORY}/main?labpath=notebooks%2F{{path}}) · "
    f"[Colab](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{{path}}) · "
    "{{download}}`the notebook <{name}>`"
)
#: The tables of contents, which the first page ends with; README and JupyterLab show that page without them.
_CONTENTS = """

```{toctree}
:caption: Notebooks
:glob:

[0-9A-Z][0-9]_*
```

```{toctree}
:caption: Teaching
:glob:

*_plan
```

```{toctree}
:caption: Worked solutions
:glob:

solutions/*
```
"""
_CONFIGURATION = {
    "project": "In-tool learning",
    "html_title": "In-tool learning",
    "extensions": ["myst_nb", "lib.notebook.book"],
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_ipywidgets_js": {},  # they would come from a server; what is in the book are pictures
    "myst_enable_extensions": ["dollarmath"],
    "html_math_renderer": "mathml",
    "html_theme": "furo",
    "html_theme_options": {"navigation_with_keys": True},
    "html_show_sourcelink": False,
    "html_show_copyright": False,
    "html_use_index": False,  # nothing is marked for one
    "html_copy_source": False,
    "html_show_search_summary": False,  # asks for pages, which a browser refuses to one that was opened as a file
    "html_css_files": ["book.css"],
}
#: Wide tables scroll by themselves rather than move the page of a phone; pictures stay white in the dark.
_CSS = """\
.cell_output { overflow-x: auto; }
.cell_output img { background: white; }
.cell_output p > em:only-child { font-size: var(--font-size--small); }
table.docutils td { vertical-align: top; }
div.cell div.cell_output table { color: inherit; font-size: var(--font-size--small); }
details.solution { border-left: 3px solid var(--color-brand-primary); padding-left: 1em; margin: 1em 0; }
details.solution > summary { cursor: pointer; font-weight: bold; }
math { font-size: 1.1em; }
math[display="block"] { display: block math; overflow-x: auto; overflow-y: hidden; padding: 0.4em 0; }
"""


def build(out: Path | None = None, profile: str | None = None) -> Path:
    """Build the book into the folder `out`, by default runs/book, and return its first page.

    The notebooks are the committed ones with the outputs they have; with `profile`, the executed copies of that
    profile where there are any. What was in `out` is replaced, once all pages are made.

    Raises InputError without the extra or for an unknown profile, WorkError if Sphinx warns: a link to nowhere, say.
    """
    executed = str(paths.profile_dir(profile) / "notebooks") if profile else ""
    out = out or paths.runs() / "book"
    if out.exists() and any(out.iterdir()) and not (out / "searchindex.js").is_file():
        raise InputError(f"{out} holds something else than a book: name a folder that is not there yet")
    for package in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        if not find_spec(package):
            raise InputError(f"the book takes the package {package}: pip install -e '.[book]'")
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=out.parent) as folder, docutils_namespace():
        made, static, warnings = Path(folder, "made"), Path(folder, "static"), io.StringIO()
        static.mkdir()
        (static / "book.css").write_text(_CSS)
        pages = [path.name for path in all_notebooks()] + ["solutions/*.ipynb", "*.md"]
        configuration = {
            **_CONFIGURATION,
            "include_patterns": pages,  # and no copies or checkpoints that lie around
            "html_static_path": [str(static.resolve())],
            "executed": executed,
        }
        places = paths.NOTEBOOKS, None, made, Path(folder, "doctrees")
        Sphinx(*places, "html", configuration, status=None, warning=warnings).build()
        if told := re.sub(r"\x1b\[[\d;]+m", "", warnings.getvalue()).strip().replace(f"{paths.NOTEBOOKS}/", ""):
            raise WorkError(f"the book was not built: {told}")
        for leftover in (".buildinfo", "objects.inv"):
            (made / leftover).unlink(missing_ok=True)
        if out.exists():
            out.rename(Path(folder, "earlier"))
        made.rename(out)
    return out / "index.html"


# The extension that Sphinx loads --------------------------------------------------------------------------------------


def setup(app) -> dict[str, bool]:
    """Register this module with Sphinx."""
    app.add_config_value("executed", "", "env")
    app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
    app.connect("source-read", _complete)
    app.connect("doctree-read", _fold_solutions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _complete(app, page: str, source: list[str]) -> None:
    """Add contents to the first page; to notebooks their offers, links to others, and alternative text of pictures."""
    if page == "index":
        source[0] += _CONTENTS
    path = app.env.doc2path(page)
    if path.suffix != ".ipynb":
        return
    copy = Path(app.config.executed, f"{page}.ipynb")
    notebook = nbformat.reads(copy.read_text("utf-8") if app.config.executed and copy.is_file() else source[0], 4)
    notebook.metadata.pop("widgets", None)  # live only where there is a kernel
    known = "|".join(re.escape(other) for other in app.env.found_docs if "/" not in other)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(rf"(?<!\[)`({known})`", r"[`\1`](/\1.ipynb)", cell.source)
        for output in cell.get("outputs", []):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
    offers = _OFFERS.format(path=f"{page.replace('/', '%2F')}.ipynb", name=path.name)
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{title}\n\n{offers}\n{rest}"
    source[0] = nbformat.writes(notebook)


def _math(translator, node) -> None:
    from docutils import nodes
    from latex2mathml.converter import convert

    translator.body.append(convert(node.astext(), display="inline" if isinstance(node, nodes.math) else "block"))
    raise nodes.SkipNode


def _fold_solutions(app, doctree) -> None:
    """On the pages of solutions, fold what follows the exercise, which is the first thing below each heading."""
    from docutils import nodes

    if app.env.docname.startswith("solutions/"):
        for section in doctree.findall(nodes.section):
            if isinstance(section.parent, nodes.section):
                opening = '<details class="solution"><summary>Solution</summary>'
                section.insert(2, nodes.raw("", opening, format="html"))
                section.append(nodes.raw("", "</details>", format="html"))
