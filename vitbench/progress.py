"""Progress bars for long work: a line in a terminal, one output that updates itself in a notebook."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

TIME_ONLY = "{desc}: {percentage:3.0f} %|{bar}| {elapsed} gone, {remaining} left{postfix}"


def bar(work: Iterable | None, title: str, total: float | None = None, unit: str = "it", layout: str = "") -> tqdm:
    """A bar with the time that is left."""
    notebook = _in_notebook()
    return tqdm(
        work,
        desc=title,
        total=total,
        unit=unit,
        file=_Output() if notebook else sys.stdout,
        mininterval=0.1 if sys.stdout.isatty() else 2.0,
        ncols=90 if notebook else 100,
        bar_format=layout or None,
        ascii=False,
    )


def _in_notebook() -> bool:
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


class _Output:
    """A file whose last line is what one output of the cell shows, so that an executed notebook keeps only the last."""

    def __init__(self) -> None:
        self.handle: Any = None

    def write(self, text: str) -> None:
        from IPython.display import display

        line = {"text/plain": text.strip("\r\n")}
        if not line["text/plain"].strip():
            return
        if self.handle is None:
            self.handle = display(line, raw=True, display_id=True)
        else:
            self.handle.update(line, raw=True)

    def flush(self) -> None:
        """Nothing is held back."""
