"""Which committed rows a mended fault touches: the table in results/reference/README.md, from the rows themselves."""

import json
from collections import Counter

from tests.conftest import ROOT

REFERENCE = ROOT / "results" / "reference"
IN_HALF = {"weight_only", "uct", "diffq", "lsq", "simulated_integer"}  # what stores its rest in float16, by default
SCORES = {"top1", "top5", "cross_entropy", "output_error", "weight_error"}
OF_CODES = {"int8_macs", "latency_floor", "edge_time", "edge_energy"}
MENDED = "2026-11-28T20:49"  # rows made later are made without the faults
NEW_KINDS = ("t2t", "_gap_", "so150m2", "miil", "_rpn_", "_reg")  # no bias, post-norm, registers


def rows():
    for path in sorted(REFERENCE.glob("*/records.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["status"] == "ok" and row["time"] < MENDED:
                yield (
                    path.parent.name,
                    row,
                    {step["method"]: step["config"] for step in row["config"].get("methods", ())},
                )


def line_of(words):
    text = (REFERENCE / "README.md").read_text()
    return next(line for line in text.splitlines() if line.startswith("|") and words in line)


def test_rows_of_a_rest_in_float16():
    found = Counter(
        folder
        for folder, row, steps in rows()
        if row["metric"] in SCORES
        and any(method in IN_HALF and config.get("rest") != "float32" for method, config in steps.items())
    )
    line = line_of("6.1e-5 became")
    assert f"{found.total()} of accuracy" in line
    assert all(f"{folder} {count}" in line for folder, count in found.items()), found


def test_rows_scored_in_batches_of_8():
    def other(folder, row):
        return row["context"].get("backend", "eager") != "eager" or folder.startswith("int8-peers")

    found = [
        folder
        for folder, row, steps in rows()
        if row["metric"] in ("top1", "top5", "cross_entropy") and "dynamic_int8" in steps and other(folder, row)
    ]
    line = line_of("batches of 8")
    assert f"| {len(found)}: " in line
    assert all(folder in line for folder in found), found


def test_no_row_is_of_another_kind():
    for folder, row, steps in rows():
        assert not any(kind in row["model"] for kind in NEW_KINDS), (folder, row["key"])
        coded = steps.get("static_int8", {}).get("attention", False) and row["metric"] in OF_CODES
        assert not coded, (folder, row["key"])
    assert "| 0 |" in line_of("`int8_macs`")
    assert "| 0 |" in line_of("without a bias")
