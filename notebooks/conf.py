"""How Sphinx makes the book of this folder: its notebooks, the worked solutions, and the pages in Markdown.

`itl book` builds it. The pages need no network: equations are MathML, which browsers draw themselves.
"""

import re
from pathlib import Path

import nbformat
from docutils import nodes
from latex2mathml.converter import convert

from lib.notebook.catalog import all_notebooks

project = html_title = "In-tool learning"
include_patterns = [path.name for path in all_notebooks()] + ["solutions/*.ipynb", "*.md"]  # no copies that lie around
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # they would come from a server; what is in the book are pictures
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sourcelink = html_copy_source = html_show_copyright = html_use_index = False
html_show_search_summary = False  # asks for pages, which a browser refuses to one that was opened as a file

#: Links below the title of each notebook; `{download}` is MyST's for a file that lies beside the page.
OFFERS = (
    "[Binder](https://mybinder.org/v2/gh/in-tool-learning/in-tool-learning/main?labpath=notebooks%2F{path}) · "
    "[Colab](https://colab.research.google.com/github/in-tool-learning/in-tool-learning/blob/main/notebooks/{path}) · "
    "{{download}}`the notebook <{name}>`"
)
#: The tables of contents, which the first page ends with; GitHub and JupyterLab show that page without them.
CONTENTS = "".join(
    f"\n\n```{{toctree}}\n:caption: {caption}\n:glob:\n\n{pages}\n```"
    for caption, pages in {
        "Notebooks": "[0-9A-Z][0-9]_*",
        "Teaching": "*_plan",
        "Worked solutions": "solutions/*",
    }.items()
)


def setup(app) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
    app.connect("source-read", _complete)
    app.connect("doctree-read", _fold_solutions)


def _complete(app, page: str, source: list[str]) -> None:
    """Add contents to the first page; to notebooks their offers, links to others, and alternative text of pictures."""
    path = Path(app.env.doc2path(page))
    if page == "index":
        source[0] += CONTENTS
    if path.suffix != ".ipynb":
        return
    notebook = nbformat.reads(source[0], 4)
    notebook.metadata.pop("widgets", None)  # live only where there is a kernel
    known = "|".join(re.escape(other) for other in app.env.found_docs if "/" not in other)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(rf"(?<!\[)`({known})`", r"[`\1`](/\1.ipynb)", cell.source)
        for output in cell.get("outputs", []):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
    title, _, rest = notebook.cells[0].source.partition("\n")
    offers = OFFERS.format(path=f"{page.replace('/', '%2F')}.ipynb", name=path.name)
    notebook.cells[0].source = f"{title}\n\n{offers}\n{rest}"
    source[0] = nbformat.writes(notebook)


def _math(translator, node) -> None:
    translator.body.append(convert(node.astext(), display="inline" if isinstance(node, nodes.math) else "block"))
    raise nodes.SkipNode


def _fold_solutions(app, doctree) -> None:
    """On the pages of solutions, fold what follows the exercise, which is the first thing below each heading."""
    if app.env.docname.startswith("solutions/"):
        for section in doctree.findall(nodes.section):
            if isinstance(section.parent, nodes.section):
                opening = '<details class="solution"><summary>Solution</summary>'
                section.insert(2, nodes.raw("", opening, format="html"))
                section.append(nodes.raw("", "</details>", format="html"))
