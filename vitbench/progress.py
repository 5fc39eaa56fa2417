"""Progress bars for long work, the same in a terminal and in an executed notebook."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

TIME_ONLY = "{desc}: {percentage:3.0f} %|{bar}| {elapsed} gone, {remaining} left{postfix}"


def bar(work: Iterable | None, title: str, total: float | None = None, unit: str = "it", layout: str = "") -> tqdm:
    """A bar with the time that is left. It writes to standard output, so that a notebook does not show it as an error."""
    slow = 0.1 if sys.stdout.isatty() else 2.0
    return tqdm(
        work,
        desc=title,
        total=total,
        unit=unit,
        file=sys.stdout,
        mininterval=slow,
        ncols=100,
        bar_format=layout or None,
    )
