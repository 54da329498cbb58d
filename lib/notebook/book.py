"""The notebooks as a book: pages that Sphinx builds as notebooks/conf.py says (extra `[book]`)."""

import io
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from lib import paths
from lib.base import InputError, WorkError, optional


def build(out: Path | None = None) -> Path:
    """Build the book into the folder `out`, by default runs/book, and return its first page.

    The notebooks are shown with the outputs they have. What was in `out` is replaced, once all pages are made.

    Raises InputError without the extra, WorkError if Sphinx warns: a link to nowhere, say.
    """
    paths.check_checkout()
    out = Path(os.path.realpath(out or paths.runs() / "book"))
    if out.exists() and not (out / "searchindex.js").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something other than a book: name a new folder")
    for package in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        optional(package, "book", f"the book needs the package {package}")
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    out.parent.mkdir(parents=True, exist_ok=True)
    with paths.writing(out), TemporaryDirectory(prefix=".book-", dir=out.parent) as folder, docutils_namespace():
        made, warnings, source = Path(folder, "made"), io.StringIO(), paths.NOTEBOOKS
        Sphinx(source, source, made, Path(folder, "doctrees"), "html", status=None, warning=warnings).build()
        if told := re.sub(r"\x1b\[[\d;]+m", "", warnings.getvalue()).strip().replace(f"{source}/", ""):
            raise WorkError(f"the book was not built: {told}")
        if out.exists():
            out.rename(Path(folder, "earlier"))
        made.rename(out)
    return out / "index.html"
