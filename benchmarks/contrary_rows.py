"""Show that the lessons' sentences follow their rows: run the lessons again on rows that say the contrary.

    vitbench run quick
    python benchmarks/contrary_rows.py results/runs/quick

Every row of accuracy, bytes, multiply-accumulates and time is turned round: what was more accurate is less accurate by as
much, what was smaller is larger. The lessons run on these rows with the models of the cache, so nothing is measured again.
A sentence that compares and stays as it was is printed, and the exit status is 1.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import nbformat

import vitbench as vb

TURNED = ("bytes", "macs", "params", "latency_ratio", "latency_p50", "top1")
COMPARES = re.compile(r"\b(more|less|fewer|smaller|larger|faster|slower) (accurate|than)\b|\btimes (smaller|larger)\b")


def contrary(rows: list[vb.Row]) -> list[vb.Row]:
    """The rows with the order of the models turned round in every metric."""
    largest = {
        (row.metric, str(row.context.get("batch")), row.context.get("backend")): 0.0
        for row in rows
        if row.status == "ok"
    }
    for row in rows:
        if row.status == "ok":
            key = row.metric, str(row.context.get("batch")), row.context.get("backend")
            largest[key] = max(largest[key], row.high or row.value)
    turned = []
    for row in rows:
        if row.status == "ok" and row.metric in TURNED:
            top = (
                1.0
                if row.metric == "top1"
                else 1.1 * largest[row.metric, str(row.context.get("batch")), row.context.get("backend")]
            )
            low, high = (None if end is None else top - end for end in (row.high, row.low))
            hits = ""
            if row.hits:
                count = row.context["images"]
                right = ~vb.rows.unpack_hits(row.hits, count)
                hits = vb.rows.pack_hits(right)
            row = row.replace(value=top - row.value, low=low, high=high, hits=hits, samples=None)
        turned.append(row)
    return turned


def sentences(path: Path) -> list[str]:
    """The sentences that compare, in the order in which a lesson shows them."""
    shown = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            shown += output.get("data", {}).get("text/markdown", "").split("\n")
    return [text for text in shown if COMPARES.search(text)]


def main() -> int:
    """Turn the rows round, run the lessons, and compare the sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="results folder of a finished run of the lessons")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--out", type=Path, default=Path("results/runs/contrary"))
    options = parser.parse_args()
    if not (options.out / "records.jsonl").exists():
        vb.rows.append_rows(options.out / "records.jsonl", contrary(vb.rows.read_rows(options.run)))
    command = [sys.executable, "-m", "vitbench", "run", options.profile, "--out", str(options.out), "--workers", "2"]
    status = subprocess.run(command, check=False).returncode
    wrong = 0
    for path in sorted((options.run / "notebooks").glob("*.ipynb")):
        before, after = sentences(path), set(sentences(options.out / "notebooks" / path.name))
        stayed = [text for text in before if text in after]
        wrong += len(stayed)
        print(f"{path.stem}: {len(before)} sentences that compare, {len(stayed)} stayed as they were")
        for text in stayed:
            print(f"    {text}")
    return 1 if wrong or status else 0


if __name__ == "__main__":
    sys.exit(main())
