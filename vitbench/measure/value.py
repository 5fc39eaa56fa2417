"""One measured number, before it is a row."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Value:
    """A metric's value in the unit of its group, how it was had, and its interval and raw samples where there are some."""

    metric: str
    value: float
    source: str
    low: float | None = None
    high: float | None = None
    samples: Sequence[float] | None = None
    hits: str = ""

    def fields(self) -> dict[str, Any]:
        """What goes into the row."""
        return {key: value for key, value in asdict(self).items() if key != "metric"}
