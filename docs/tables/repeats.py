"""How far repeated timings of the same models are from each other, and what the placement of cores does."""

import statistics
from collections.abc import Iterator
from typing import Any

import pandas as pd

from docs.results import Results
from docs.tables.common import Cells, known, table


class TimedTwice:
    """The differences of the latency ratios between two runs of one comparison.

    Attributes:
        count: of ratios.
        differences: as fractions, by method, backend, batch and baseline; column all is over all rounds, quiet over the
            quietest quarter.
    """

    def __init__(self, first: Results, again: Results):
        ratios = [self._values(results) for results in (first, again)]
        self.differences = (ratios[1] / ratios[0] - 1).abs()
        self.count = len(self.differences)

    @staticmethod
    def _values(results: Results) -> pd.DataFrame:
        rows = results.rows.fillna({"versus_backend": "same"})
        rows = rows[rows["method"] != "baseline"]
        samples = rows[rows["metric"] == "latency_p50"].set_index(["method", "backend", "batch"])["samples"]
        values = {}
        for row in rows[rows["metric"] == "latency_ratio"].itertuples():
            if "quietest quarter" not in row.source:
                raise ValueError(f"{results.name}: {row.method} has a ratio over all rounds")
            times = zip(samples.loc[(row.method, row.backend, row.batch)], row.samples, strict=True)
            over_all = statistics.median(x / y for x, y in times)
            values[row.method, row.backend, row.batch, row.versus_backend] = over_all, row.value
        return pd.DataFrame(values, index=["all", "quiet"]).T

    def near(self, rounds: str = "quiet") -> int:
        """How many ratios are within 10 % of each other."""
        return int((self.differences[rounds] <= 0.1).sum())

    def furthest(self, rounds: str = "quiet") -> float:
        """The largest difference, in per cent."""
        return 100 * float(self.differences[rounds].max())

    def half(self) -> float:
        """The median difference, in per cent."""
        return 100 * float(self.differences["quiet"].median())

    def off(self) -> list[tuple[str, int]]:
        """Backend and batch size of the ratios that differ by more than 10 %, each once."""
        quiet = self.differences["quiet"]
        return sorted({(backend, int(batch)) for _, backend, batch, _ in quiet.index[quiet > 0.1]})

    def in_backend(self, backend: str) -> pd.Series:
        """The differences of the ratios in one backend, in per cent."""
        quiet = self.differences["quiet"]
        return 100 * quiet[quiet.index.get_level_values(1) == backend]


@known
def timed_twice(first: Results, again: Results) -> TimedTwice:
    """The differences of the latency ratios between two runs of one comparison."""
    return TimedTwice(first, again)


@known
def dense_times(results: Results, backend: str, batch: int) -> list[float]:
    """Medians of eager fp32, timed in turn with a backend, one for each process (ms)."""
    rows = results.every.fillna({"versus_backend": "eager"})
    rows = rows[(rows["metric"] == "latency_ratio") & (rows["backend"] == backend) & (rows["batch"] == batch)]
    last = rows[rows["versus_backend"] == "eager"].iloc[-1]
    times, count = last["samples"], len(last["samples"]) // last["context"]["starts"]
    return [statistics.median(times[k : k + count]) for k in range(0, len(times), count)]


@table
def near_and_far(results: Results) -> Iterator[Cells]:
    """A line for each model, backend and number of threads: time and ratio with near cores and with far cores."""
    rows = results.every[results.every["metric"] != "core_journey"]
    rows = rows.join(pd.DataFrame(list(rows["context"]), index=rows.index)[["cores"]])
    for (method, backend, threads), group in rows.groupby(["method", "backend", "threads"]):
        values = group.set_index(["cores", "metric"])["value"]
        times = [f"{values[cores, 'latency_p50']:.1f}" for cores in ("near", "far")]
        ratios = [f"{values[cores, 'latency_ratio']:.2f}" for cores in ("near", "far")]
        yield method, backend, f"{threads:.0f}", " / ".join(times), " / ".join(ratios)


@known
def core_journey(results: Results, cores: str) -> Any:
    """The row of the time of a byte between the two cores, which are near or far."""
    rows = results.every[results.every["metric"] == "core_journey"]
    return next(row for row in rows.itertuples() if row.context["cores"] == cores)
