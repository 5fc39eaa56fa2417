"""Tables of int8 files in several backends, and of other tools' quantizers beside ours."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from docs.results import BATCHES, Difference, MissingRow, Results, points
from docs.tables.common import Cells, known, table
from vitbench.rows.comparison_table import accuracy_text


@table
def files_in_backends(results: Results) -> Iterator[Cells]:
    """A line for each file and backend: MB, and times over eager fp32's at batch 1 and 8."""
    rows = results.every[results.every["status"] == "ok"]
    timed = rows[rows["metric"] == "latency_ratio"]
    timed, sizes = (part.assign(file=_files(part)) for part in (timed, rows[rows["metric"] == "bytes"]))
    for (file, backend), group in timed.groupby(["file", "backend"], sort=False):
        size = sizes[sizes["file"] == file]["value"].iloc[-1]
        cells = [f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in group.sort_values("batch").itertuples()]
        yield file, backend, f"{size / 1e6:.1f}", *cells


def _files(rows: pd.DataFrame) -> list[str]:
    """The name of each row's file on the page."""
    suffixes = [
        "attention" if any(step["config"].get("attention") for step in config["methods"]) else ""
        for config in rows["config"]
    ]
    return [f"{method}, {suffix} too" if suffix else method for method, suffix in zip(rows["method"], suffixes)]


@known
def in_backend(results: Results, file: str, backend: str) -> list[float]:
    """Times over eager fp32's at batch 1 and 8 of a file in a backend."""
    rows = results.every[(results.every["status"] == "ok") & (results.every["metric"] == "latency_ratio")]
    rows = rows.assign(file=_files(rows))
    rows = rows[(rows["file"] == file) & (rows["backend"] == backend)].sort_values("batch")
    if list(rows["batch"]) != list(BATCHES):
        raise MissingRow(f"{results.name} has no times of {file} in {backend} at both batch sizes")
    return list(rows["value"])


PEERS = {  # another tool's quantizer and its backend -> ours of the same kind and its backend
    ("peer_nncf", "openvino"): ("static_int8", "openvino"),
    ("peer_onnxruntime_static", "onnxruntime"): ("static_int8", "onnxruntime"),
    ("peer_pt2e", "inductor"): ("static_int8", "openvino"),
    ("peer_onnxruntime_dynamic", "onnxruntime"): ("dynamic_int8", "onnxruntime"),
    ("peer_torch_dynamic", "eager"): ("dynamic_int8", "eager"),
    ("peer_torchao_dynamic", "inductor"): ("dynamic_int8", "eager"),
}


class Pair:
    """A model of another tool's quantizer and ours of the same kind.

    Attributes:
        theirs, ours: name with backend, and the rows of top-1 and bytes.
        gained: by how many points of top-1 ours is above theirs.
        larger: by how many per cent ours is larger.
        saves_fp32: whether theirs keeps its weights in fp32.
    """

    def __init__(self, results: Results, theirs: tuple[str, str], ours: tuple[str, str]):
        rows = results.every[results.every["status"] == "ok"]
        rows = rows.assign(file=_files(rows))

        def last_row(file: str, backend: str, metric: str) -> Any:
            of_file = rows[(rows["file"] == file) & (rows["metric"] == metric)]
            in_backend = of_file[of_file["backend"] == backend]
            return (in_backend if len(in_backend) else of_file[of_file["backend"].isna()]).iloc[-1]

        self.theirs, self.ours = (
            (f"{name} ({backend})", last_row(name, backend, "top1"), last_row(name, backend, "bytes"))
            for name, backend in (theirs, ours)
        )
        self.gained: Difference = points(self.ours[1], self.theirs[1])
        self.saves_fp32 = theirs[0] == "peer_pt2e"
        self.larger = 100 * (self.ours[2]["value"] / self.theirs[2]["value"] - 1)


@known
def peer_pairs(results: Results) -> dict[str, Pair]:
    """Each of the other tools' quantizers beside ours, by its name."""
    return {theirs[0]: Pair(results, theirs, ours) for theirs, ours in PEERS.items()}


@table
def ours_and_theirs(pairs: dict[str, Pair]) -> Iterator[Cells]:
    """A line for each pair: MB and top-1 of theirs and of ours, and the gain of ours."""
    for pair in pairs.values():
        sides = pair.theirs, pair.ours
        cells = [
            cell for name, top1, size in sides for cell in (name, f"{size['value'] / 1e6:.2f}", accuracy_text(top1))
        ]
        yield *cells, pair.gained
