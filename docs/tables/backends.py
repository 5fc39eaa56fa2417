"""Tables of shapes and backends: sizes, times, distances from eager's logits, and the floor of the machine."""

import statistics
from collections.abc import Iterator, Sequence

import pandas as pd

from docs.results import BATCHES, Results
from docs.tables.common import Cells, known, table
from vitbench.edge.rows import backend_table, fastest


@table
def shapes(runs: Sequence[Results]) -> Iterator[Cells]:
    """A line for each method; for each shape MB, multiply-accumulates (G), and the time in eager mode."""
    for method in runs[0].experiment.timed_labels:
        cells = [method]
        for results in runs:
            times = "1 / 1" if method == "baseline" else results.times(method)
            cells += [f"{results.mb(method):.1f}", f"{results.value(method, 'macs') / 1e9:.2f}", times]
        yield cells


@known
def all_backends(results: Results) -> str:
    """The table of all models in all backends."""
    return backend_table(results.every)


@table
def logit_distances(runs: Sequence[Results]) -> Iterator[Cells]:
    """A line for each backend and tolerance: how many models, and the largest distance from eager's logits."""
    rows = pd.concat([results.every for results in runs])
    rows = rows[(rows["metric"] == "logit_distance") & (rows["status"] == "ok")]
    allowed = rows["source"].str.extract(r"; ([\d.]+) is allowed$")[0].astype(float)
    if not (rows["value"] <= allowed).all():
        raise ValueError("a model has a time although its logits are further from eager's than the tolerance")
    for (backend, tolerance), group in rows.groupby(["backend", allowed]):
        yield backend, f"{tolerance:g}", len(group), f"{group['value'].max():.1e}"


@known
def largest_distance(results: Results) -> float:
    """The largest distance of a model's logits from eager's, over the largest logit."""
    rows = results.every
    return float(rows["value"][(rows["metric"] == "logit_distance") & (rows["status"] == "ok")].max())


@table
def executorch_times(results: Results) -> Iterator[Cells]:
    """A line for each model that ExecuTorch runs: times over eager fp32's and over fp32's in ExecuTorch."""
    for method in results.experiment.timed_labels:
        same_backend = "1 / 1" if method == "baseline" else results.times(method, backend="executorch")
        yield method, results.times(method, backend="executorch", versus="eager"), same_backend


@table
def floors(runs: Sequence[Results]) -> Iterator[Cells]:
    """A line for each shape and batch size, in latency floors: the fastest fp32, its products, the median and the slowest method."""
    for results in runs:
        rows, shape = results.rows, results.name.rpartition("-")[2]
        for batch in BATCHES:
            fastest_backends = {name: fastest(rows, name, batch) for name in results.experiment.timed_labels}
            best, floor = fastest_backends["baseline"], results.value("baseline", "latency_floor", batch)
            products = results.value("baseline", "products_time", batch) / floor
            slowest = max(fastest_backends, key=lambda name: fastest_backends[name][1])
            median = statistics.median(factor for _, factor in fastest_backends.values())
            cells = (
                f"{best[1]:.2f} ({best[0]})",
                f"{products:.2f}",
                f"{median:.2f}",
                f"{fastest_backends[slowest][1]:.2f} ({slowest})",
            )
            yield f"DeiT-{shape.title()}", batch, *cells


@known
def share_slower_than_dense_in(results: Results, backend: str, batch: int) -> float:
    """The share of the methods whose time in eager mode is above that of the dense model in a backend."""
    dense = results.time("baseline", batch, backend, "eager")
    times = [results.time(method, batch) for method in results.experiment.timed_labels if method != "baseline"]
    return sum(time > dense for time in times) / len(times)
