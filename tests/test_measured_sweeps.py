"""What the pages say of sweeps is what the benchmarks wrote."""

import json

from tests.conftest import ROOT
from tests.measured_words import WORDS

FOUND = {
    name: json.loads((ROOT / "results" / "reference" / name / "found.json").read_text())
    for name in ("sweep-faults", "sweep-scaling", "many-rows")
}


def test_what_was_killed_and_what_was_left():
    found = FOUND["sweep-faults"]
    assert found["whole"]
    assert (found["cells"], found["doubled"], found["rows doubled"], found["failed"]) == (200, 0, 0, 0)
    assert (
        f"{found['workers killed']} workers were killed, and after {found['cells done when the scheduler was killed']} cells the process that gives them out"
        in WORDS
    )
    assert f"all 200 cells with {found['rows']:,} rows, none twice, none lost, in {found['seconds']:.0f} s" in WORDS


def test_what_a_second_worker_is_worth():
    found = FOUND["sweep-scaling"]
    assert (
        f"A second worker on two cores: {found['throughput, 2 workers over 1']:.2f} times the throughput of one"
        in WORDS
    )
    beyond, start = found["seconds a cell beyond its work, worker kept"], found["seconds to start a worker"]
    assert f"{beyond:.3f} s beyond its own work with a worker that is kept; to start one takes {start:.1f} s" in WORDS


def test_a_million_rows():
    found = FOUND["many-rows"]
    assert found["rows"] == 1_000_000
    assert (
        f"A million rows ({found['MB']:.0f} MB): loaded, filtered and drawn in {found['in all, s']:.1f} s with {found['peak, GiB']:.2f} GiB"
        in WORDS
    )


def test_they_are_of_a_commit():
    assert all(not found["commit"].endswith(("+changes", "-dirty")) for found in FOUND.values())
