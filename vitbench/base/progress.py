"""Progress bars for long work: one line in a terminal, one updating output in a notebook."""

import sys
from collections.abc import Iterable
from typing import IO, Any, ClassVar

from tqdm import tqdm

TIME_ONLY = "{desc}: {percentage:3.0f} %|{bar}| {elapsed} gone, {remaining} left{postfix}"


def progress_bar(
    iterable: Iterable | None, title: str, total: float | None = None, unit: str = "it", bar_format: str = ""
) -> tqdm:
    """A bar with the remaining time. A bar inside another disappears when it is done."""
    notebook = _in_notebook()
    kind, file = (_NotebookBar, _Line()) if notebook else (tqdm, sys.stdout)
    return kind(
        iterable,
        desc=title,
        total=total,
        unit=unit,
        file=file,
        mininterval=0.1 if sys.stdout.isatty() else 2.0,
        ncols=90 if notebook else 100,
        bar_format=bar_format or None,
        ascii=not (notebook or _takes_blocks(sys.stdout)),
    )


def escape_unencodable(*streams: IO[str] | None) -> None:
    """Make streams write characters that their encoding lacks as escapes, instead of raising an error."""
    for stream in streams:
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _takes_blocks(stream: IO[str] | None) -> bool:
    """Whether the stream's encoding has the block characters that a bar is drawn with."""
    try:
        "\u2588\u258f".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _in_notebook() -> bool:
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


class _NotebookBar(tqdm):
    """A bar whose file is a `_Line`."""

    def moveto(self, n: int) -> None:
        """Do nothing, since each bar has its own line."""

    def close(self) -> None:
        """Also close the bar's line."""
        super().close()
        self.fp.done()


class _Line:
    """A file for one bar. Its last text is one line of the output that all bars of a notebook cell share."""

    cell: ClassVar[tuple[int, Any, list["_Line"]]] = (-1, None, [])  # the cell's number, output and lines

    def __init__(self) -> None:
        from IPython import get_ipython

        if _Line.cell[0] != get_ipython().execution_count:
            _Line.cell = (get_ipython().execution_count, None, [])
        lines = _Line.cell[2]
        self.text, self.open, self.inner = "", True, any(line.open for line in lines)
        lines.append(self)

    def write(self, text: str) -> None:
        if text.strip():
            self.text = text.strip("\r\n")
            self._show()

    def done(self) -> None:
        self.open = False
        if self.inner and self in _Line.cell[2]:
            _Line.cell[2].remove(self)
            self._show()

    def flush(self) -> None:
        """Do nothing, since nothing is buffered."""

    def _show(self) -> None:
        from IPython.display import display

        number, handle, lines = _Line.cell
        mime_bundle = {"text/plain": "\n".join(line.text for line in lines if line.text)}
        if handle is None:
            _Line.cell = (number, display(mime_bundle, raw=True, display_id=True), lines)
        else:
            handle.update(mime_bundle, raw=True)
