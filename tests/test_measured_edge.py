"""What the pages say of devices are the rows' numbers."""

import pytest

from tests.conftest import ROOT
from tests.measured_words import MEASURED
from vitbench.comparison import MEGA, methods, subject, value
from vitbench.records import load_records

README = " ".join((ROOT / "README.md").read_text().split())
REFERENCE = ROOT / "results" / "reference"
SHAPES = ("tiny", "small", "base")


def lines():
    """One line a method: for each shape MB on disk, multiply-accumulates (G), and time at batch 1 and 8 in eager."""
    rows = {shape: subject(load_records(REFERENCE / f"edge-deit-{shape}")) for shape in SHAPES}
    for method in methods(rows["tiny"]):
        cells = []
        for own in rows.values():
            size, macs = value(own, method, "bytes")["value"] / MEGA, value(own, method, "macs")["value"] / 1e9
            times = [value(own, method, "latency_ratio", batch)["value"] for batch in (1, 8)]
            cells.append(
                f"{size:.1f} | {macs:.2f} | " + ("1 / 1" if method == "baseline" else "{:.2f} / {:.2f}".format(*times))
            )
        yield f"| {method} | {' | '.join(cells)} |"


@pytest.mark.parametrize("line", list(lines()))
def test_the_table_of_shapes(line):
    assert line in MEASURED


def test_memory_with_and_without_pytorch():
    rows = load_records(REFERENCE / "edge-bundle-deit-tiny").set_index(["method", "metric"])["value"] / MEGA
    peak, floor = rows["dynamic_int8", "peak_rss"], rows["dynamic_int8", "import_rss"]
    eager = value(subject(load_records(REFERENCE / "edge-deit-tiny")), "dynamic_int8", "peak_rss")["value"] / MEGA
    assert f"took {peak:.0f} MB at the peak in a bundle's process, of which {floor:.0f} are" in README
    assert f"a process with PyTorch took {eager:.0f}" in README


def test_memory_under_a_real_limit():
    rows = load_records(REFERENCE / "edge-limit-deit-tiny").set_index(["method", "metric"])
    assert rows.loc[("dynamic_int8", "answers_within"), "value"] == 1
    within = rows.loc[("dynamic_int8", "answers_within"), "context"]["limit"] / MEGA
    least, dense = (rows.loc[(method, "memory_limit"), "value"] / MEGA for method in ("dynamic_int8", "baseline"))
    assert f"it answers in {within:.0f} MB, and down to {least:.0f} (fp32: {dense:.0f};" in README
