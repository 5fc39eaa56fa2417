"""What the modules of tables share: the decorators that make a function known to templates, and means over seeds."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from docs.results import MissingRow
from vitbench.rows.statistics import mean_interval

TABLES: dict[str, Callable[..., Any]] = {}  # name in templates -> function
Cells = Sequence[object]


def known(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function known to templates by its name."""
    TABLES[function.__name__] = function
    return function


def table(function: Callable[..., Iterable[Cells]]) -> Callable[..., str]:
    """Make a function that yields the cells of each line known to templates, which get the text of the lines."""

    @functools.wraps(function)
    def text(*arguments: Any, **options: Any) -> str:
        lines = [f"| {' | '.join(map(str, cells))} |" for cells in function(*arguments, **options)]
        if not lines:
            raise MissingRow(f"no row for the table {function.__name__}")
        return "\n".join(lines)

    return known(text)


class Mean:
    """A mean over seeds with its 95 % Student t interval."""

    def __init__(self, values: Iterable[float]):
        self.values = list(values)
        self.seeds = len(self.values)
        self.mean, self.low, self.high = mean_interval(self.values)


def rounded_accuracy(row: Any) -> str:
    """Top-1 in per cent with its 95 % interval, with one decimal."""
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
