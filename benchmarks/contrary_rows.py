"""Show that the lessons' sentences follow their rows: run the lessons again on rows that say the contrary.

    vitbench run quick
    python benchmarks/contrary_rows.py results/runs/quick

Every row of accuracy, bytes and relative time is turned round: what was more accurate is less accurate by as much, what was
smaller is larger. The lessons run on these rows with the models of the cache, so nothing is measured again. A sentence that
compares, and says the same but for its numbers, is printed, and the exit status is 1. Multiply-accumulates are not turned,
since lessons compute settings from them.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import nbformat

import vitbench as vb

TURNED = ("bytes", "latency_ratio", "top1")
NUMBER = re.compile(r"[-+]?\d[\d.,e-]*")
# "neither faster nor slower" says that an interval holds 1, and a turned interval still does
COMPARES = re.compile(
    r"(?<!nor )\b(more|less|fewer|smaller|larger|faster|slower) (accurate|than)\b|\btimes (smaller|larger)\b"
)


def contrary(rows: list[vb.Row]) -> list[vb.Row]:
    """The rows with the order of the models turned round in every metric."""
    largest: dict[str, float] = {}
    for row in rows:
        if row.status == "ok":
            largest[row.metric] = max(largest.get(row.metric, 0.0), row.high or row.value)
    turned = []
    for row in rows:
        if row.status == "ok" and row.metric in TURNED:
            # what takes f times the baseline's time takes 2 - f times, so that faster is slower
            top = {"top1": 1.0, "latency_ratio": 2.0}.get(row.metric, 1.1 * largest[row.metric])
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
    """The sentences that compare, without their numbers, in the order in which a lesson shows them."""
    shown = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            shown += output.get("data", {}).get("text/markdown", "").split("\n")
    return [NUMBER.sub("#", text) for text in shown if COMPARES.search(text) and "multiply-accumulates" not in text]


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
