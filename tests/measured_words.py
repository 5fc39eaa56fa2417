"""Rows in the words of results/measured.md."""

from tests.conftest import ROOT
from vitbench.comparison import paired_rows, value

MEASURED = (ROOT / "results" / "measured.md").read_text()
WORDS = " ".join(MEASURED.split())  # wherever the lines break


def times_of(rows, label):
    """A model's time over the baseline's at batch 1 / 8 in eager mode, as the page says it; - where it was not taken."""
    found = (value(rows, label, "latency_ratio", batch) for batch in (1, 8))
    return " / ".join("-" if row is None else f"{row['value']:.2f}" for row in found)


def apart(first, second):
    """Two rows of top-1 on the same images, as the page says it."""
    found = paired_rows(first, second)
    return f"{100 * found.difference:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}] (p = {found.p:.2g})"
