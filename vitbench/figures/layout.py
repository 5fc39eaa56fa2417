"""Where a figure goes: its width in print, its title, and the names in it. `drawing.style` and all figures read it."""

import contextlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pandas as pd

from vitbench.base.errors import InputError
from vitbench.rows.experiment import Experiment
from vitbench.rows.words import display_labels, method_name

NARROW = 5.0  # inches; narrower figures have smaller fonts, panels below each other, and the legend below
MIN_WIDTH, MAX_WIDTH = 2.5, 20.0  # inches
POINTS_PER_INCH = 72
LETTER = 0.58  # mean width of a letter, in font sizes


@dataclass(frozen=True)
class Page:
    """What the user wants of a figure.

    Attributes:
        width: in inches; None means each figure's own.
        title: whether figures have a title.
        labels: label -> what to write instead of its display label.
        methods: method -> what to write instead of its name.
    """

    width: float | None = None
    title: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_narrow(self) -> bool:
        """Whether the figure is one column of a paper."""
        return self.width is not None and self.width < NARROW

    @property
    def font_size(self) -> float:
        """Points of usual text."""
        return 7.0 if self.is_narrow else 10.0

    @property
    def small_font_size(self) -> float:
        """Points of dense labels and small print."""
        return 6.0 if self.is_narrow else 8.0


_page = Page()


def current() -> Page:
    """The page that figures are drawn for."""
    return _page


@contextlib.contextmanager
def page(
    width: float | None = None,
    title: bool = True,
    labels: Mapping[str, str] | None = None,
    methods: Mapping[str, str] | None = None,
) -> Iterator[Page]:
    """Draw figures for a `Page` of these attributes.

    Raises:
        InputError: a width that no figure can have.
    """
    global _page
    if width is not None and not MIN_WIDTH <= width <= MAX_WIDTH:
        raise InputError(f"width = {width:g} inches; give {MIN_WIDTH:g} to {MAX_WIDTH:g}")
    before = _page
    _page = Page(width, title, labels or {}, methods or {})
    try:
        yield _page
    finally:
        _page = before


def figure_size(width: float, height: float, narrow_height: float | None = None) -> tuple[float, float]:
    """The size in inches of a figure whose own is `width` x `height`.

    A wide page keeps the proportions, a narrow one has `narrow_height`, by default `height`.
    """
    if _page.width is None:
        return width, height
    if _page.is_narrow:
        return _page.width, height if narrow_height is None else narrow_height
    return _page.width, height * _page.width / width


def figure_width(width: float) -> float:
    """The width in inches of a figure whose own is `width`; its height does not depend on it, as that of a list."""
    return width if _page.width is None else _page.width


def fold(text: str, width: float | None, font_size: float) -> str:
    """Break a text into lines of so many inches; None breaks nothing, and neither are words broken."""
    if width is None:
        return text
    letters = max(8, int(width * POINTS_PER_INCH / (LETTER * font_size)))
    return "\n".join(textwrap.fill(line, letters, break_on_hyphens=False) for line in text.split("\n"))


def texts_of(rows: pd.DataFrame | Experiment, labels: Iterable[str] | None = None) -> dict[str, str]:
    """`display_labels` of a figure's models, with the page's names in their places."""
    return {label: _page.labels.get(label, text) for label, text in display_labels(rows, labels).items()}


def method_text(method: str) -> str:
    """`method_name`, or the page's name in its place."""
    return _page.methods.get(method) or method_name(method)
