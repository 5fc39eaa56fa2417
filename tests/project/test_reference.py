"""The committed results: rows name where and with what they were made, and the figures are drawn from them."""

import json

import pytest
from matplotlib.testing.compare import compare_images

from docs.figures import FIGURES, draw_figure
from tests.conftest import ROOT
from vitbench.rows.comparison_table import experiment_rows
from vitbench.rows.records import read_rows
from vitbench.rows.row_table import load_records
from vitbench.rows.statistics import quiet_latency_ratio

pytestmark = pytest.mark.slow

REFERENCE = ROOT / "results" / "reference"
FOLDERS = sorted(file.parent.name for file in REFERENCE.glob("*/records.jsonl"))
FOUND = sorted(file.parent.name for file in REFERENCE.glob("*/found.json"))
TWICE = [
    f"edge-deit-tiny{how}-{run}" for how in ("", "-one-thread", "-faults", "-longer") for run in ("first", "again")
]


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_name_their_environment_and_a_commit_that_holds_their_source(name):
    for row in read_rows(REFERENCE / name / "records.jsonl"):
        assert (REFERENCE / name / "environments" / f"{row.env_id}.json").is_file()
        assert not row.commit.endswith(("+changes", "-dirty")), "a reference row names a commit that holds its source"


@pytest.mark.parametrize("name", FOUND)
def test_what_a_benchmark_found_names_a_commit_that_holds_its_source(name):
    assert not json.loads((REFERENCE / name / "found.json").read_text())["commit"].endswith(("+changes", "-dirty"))


@pytest.mark.parametrize("file", FIGURES)
def test_the_figures_of_pages_are_drawn_again_from_committed_rows(file, tmp_path):
    committed = REFERENCE / "figures" / file
    name = str(committed.relative_to(ROOT / "results"))
    assert any(name in page.read_text() for page in (ROOT / "README.md", ROOT / "results" / "measured.md"))
    assert compare_images(str(committed), str(draw_figure(file, tmp_path)), tol=1) is None


@pytest.mark.parametrize("name", TWICE)
def test_a_ratio_over_the_quietest_rounds_is_that_of_its_samples(name):
    rows = experiment_rows(load_records(REFERENCE / name))
    own = rows[rows["metric"] == "latency_p50"].set_index(["method", "backend", "batch"])["samples"]
    ratios = rows[(rows["metric"] == "latency_ratio") & (rows["method"] != "baseline")]
    assert len(ratios)
    for row in ratios.itertuples():
        assert "quietest quarter" in row.source
        times = own.loc[(row.method, row.backend, row.batch)]
        assert quiet_latency_ratio(times, row.samples)[0] == pytest.approx(row.value)
