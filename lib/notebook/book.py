"""The notebooks as a book: pages that Sphinx builds as notebooks/conf.py says (extra `[book]`)."""

import io
from contextlib import redirect_stderr
from pathlib import Path

from lib import paths
from lib.base import WorkError, optional


def build(out: Path | None = None) -> Path:
    """Build the book into the folder `out`, by default runs/book, and return its first page.

    The notebooks are shown with the outputs they have. Raises InputError without the extra, WorkError if Sphinx warns:
    a link to nowhere, say.
    """
    paths.check_checkout()
    out, said = out or paths.runs() / "book", io.StringIO()
    for package in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        optional(package, "book", f"the book needs the package {package}")
    from sphinx.cmd.build import build_main

    with redirect_stderr(said):
        if build_main(["-E", "-W", "-q", "-N", "-b", "html", str(paths.NOTEBOOKS), str(out)]):
            raise WorkError(f"the book was not built: {said.getvalue().strip()}")
    return out / "index.html"
