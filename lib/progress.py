"""Progress: a bar, a widget or lines of text."""

import os
import re
import sys

from tqdm import tqdm

#: Seconds between two lines of progress in logs.
LINE_INTERVAL = 10.0
#: Matches lines of progress, and hardly any other line.
METER = re.compile(r": \d+/\d+ \[\d+:\d+")


class _Lines(tqdm):
    """Progress as lines of text, ten seconds apart, for logs and batch-run notebooks; short work prints none."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        print(self, file=self.fp, flush=True)

    def close(self) -> None:
        self.disable = True  # or the last line is printed again


def _in_kernel() -> bool:
    """Return whether this code runs in a Jupyter kernel; the notebook runner imports ipykernel without being one."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def is_watched() -> bool:
    """Return whether somebody may use widgets: in a Jupyter kernel, except in a batch run of a notebook."""
    return _in_kernel() and not os.environ.get("ITL_PROGRESS")


def progress(total: int, description: str | None, initial: int = 0):
    """Return a context manager with `update(n)` and `set_postfix_str`.

    It shows a bar in a terminal, a widget in JupyterLab, and lines of text elsewhere; without a description, nothing.
    The variable ITL_PROGRESS asks for lines (`lines`, in batch-run notebooks) or nothing (`off`).
    """
    asked = os.environ.get("ITL_PROGRESS", "")
    if description is None or asked == "off":
        return tqdm(total=total, disable=True)
    if is_watched():
        return _widget(total, description, initial)
    if asked == "lines" or not sys.stderr.isatty():
        options = {"delay": LINE_INTERVAL, "mininterval": LINE_INTERVAL, "miniters": 0, "smoothing": 0}
        shown = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        file = sys.stdout if _in_kernel() else sys.stderr
        return _Lines(total=total, desc=description, initial=initial, file=file, bar_format=shown, **options)
    return tqdm(total=total, desc=description, initial=initial, leave=False)


def _widget(total: int, description: str, initial: int) -> tqdm:
    """Return tqdm's bar for JupyterLab, which is gone from the notebook once it is closed.

    By default a closed bar reads "Error displaying widget" when the notebook is opened again, and a bar that was closed
    before its end (early stopping) stays, in red.
    """
    from IPython.display import display
    from tqdm.notebook import tqdm as tqdm_notebook  # brings all of IPython and the widgets

    class Widget(tqdm_notebook):
        def close(self):
            if not self.disable:
                super().close()
                shown.update({"text/plain": ""}, raw=True)

    bar = Widget(total=total, desc=description, initial=initial, leave=False, display=False)
    shown = display(bar.container, display_id=True)
    return bar
