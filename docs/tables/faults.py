"""Rows from before a fault was mended: which fault touches which rows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from docs.results import Results
from docs.tables.common import known

IN_HALF = {
    "weight_only",
    "uct",
    "diffq",
    "lsq",
    "simulated_integer",
}  # methods that store other weights in float16 by default
SCORES = {"top1", "top5", "cross_entropy", "output_error", "weight_error"}
OF_CODES = {"int8_macs", "latency_floor", "edge_time", "edge_energy"}
MENDED = "2026-11-28T20:49"  # later rows are without the faults
NEW_KINDS = ("t2t", "_gap_", "so150m2", "miil", "_rpn_", "_reg")  # no bias, post-norm, registers


class Faulty:
    """The rows that a fault touches, from before it was mended, by folder, most first."""

    def __init__(self, touched: Sequence[tuple[str, Any]]):
        self.count = len(touched)
        self.folders = dict(Counter(name for name, _ in touched).most_common())
        self.by_folder: dict[str, list[Any]] = {}
        for name, row in touched:
            self.by_folder.setdefault(name, []).append(row)

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.folders.items())

    def in_full(self) -> str:
        """The text of the folders with backends and metrics of their rows."""
        parts = []
        for name, rows in self.by_folder.items():
            metrics = (f"{row.metric} in {row.context.get('backend', 'eager')}" for row in rows)
            parts.append(f"{name} ({', '.join(metrics)})")
        return "; ".join(parts)


@known
def faulty(runs: Iterable[Results]) -> dict[str, Faulty]:
    """The rows that each fault touches: "half" (small values in float16), "batches" (of 8), "codes" or "kinds"."""
    rows_by_fault: dict[str, list[tuple[str, Any]]] = {fault: [] for fault in ("half", "batches", "codes", "kinds")}
    for results in runs:
        rows = results.measured[["status", "time", "config", "metric", "context", "model"]]
        for row in rows[(rows["status"] == "ok") & (rows["time"] < MENDED)].itertuples():
            steps = {step["method"]: step["config"] for step in row.config.get("methods", ())}
            for fault, touched in rows_by_fault.items():
                if _touched(results.name, row, steps, fault):
                    touched.append((results.name, row))
    return {fault: Faulty(touched) for fault, touched in rows_by_fault.items()}


def _touched(folder: str, row: Any, steps: dict[str, Any], fault: str) -> bool:
    if fault == "half":
        half = any(method in IN_HALF and config.get("rest") != "float32" for method, config in steps.items())
        return row.metric in SCORES and half
    if fault == "batches":
        other = row.context.get("backend", "eager") != "eager" or folder.startswith("int8-peers")
        return row.metric in ("top1", "top5", "cross_entropy") and "dynamic_int8" in steps and other
    if fault == "codes":
        return steps.get("static_int8", {}).get("attention", False) and row.metric in OF_CODES
    return any(kind in row.model for kind in NEW_KINDS)
