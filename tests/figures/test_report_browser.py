"""The report in a real browser: it opens from disk, sorts, filters and prints."""

import re
import shutil
import subprocess

import pytest

from tests.figures.test_figures_report import make_rows, rows_of
from vitbench.figures.report import write_report
from vitbench.rows.records import append_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]
METHODS = ("baseline", "uct", "dynamic_int8", "lsq")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a report, ä")
    rows = make_rows(METHODS[:2], (0.9, 0.8), (800_000, 90_000))
    for method, size in zip(METHODS[2:], (240_000, 130_000), strict=True):
        rows += make_rows(("baseline", method), (0.9, 0.85), (800_000, size))[6:]
    append_rows(folder / "records.jsonl", [row for row in rows if not (row.method == "lsq" and row.metric == "macs")])
    return write_report(folder)


def browse(report, view, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={report.parent / 'browser'}"]
    address = f"{report.as_uri()}{'#' + view if view else ''}"
    return subprocess.run([*command, *options, address], capture_output=True, text=True, timeout=120, check=True).stdout


def shown(report, view):
    """The methods of the table's lines that are to be seen, in order."""
    page = browse(report, view, "--dump-dom")
    table = page[page.index('<table id="comparison"') : page.index("</table>")]
    lines = re.findall(r"<tr([^>]*)><td>([^<]+)</td>", table)
    return [name for attributes, name in lines if "hidden" not in attributes], page


@pytest.mark.parametrize(
    ("view", "names"),
    [
        ("", ["baseline", "UCT, 8 bits", "dynamic int8", "LSQ"]),
        ("sort=MB", ["UCT, 8 bits", "LSQ", "dynamic int8", "baseline"]),
        ("sort=MB&order=descending", ["baseline", "dynamic int8", "LSQ", "UCT, 8 bits"]),
        ("sort=method", ["baseline", "dynamic int8", "LSQ", "UCT, 8 bits"]),
        ("sort=M+MACs&order=descending", ["baseline", "UCT, 8 bits", "dynamic int8", "LSQ"]),
        ("filter=INT8", ["dynamic int8"]),
        ("sort=MB&filter=l", ["LSQ", "baseline"]),
        ("filter=nothing+such", []),
    ],
)
def test_it_sorts_and_filters(report, view, names):
    found, page = shown(report, view)
    assert found == names
    assert page.count("<img") >= 4
    assert ("of 4" in page) == ("filter" in view)


def test_what_was_not_measured_is_last_in_either_order(report):
    for order in ("", "&order=descending"):
        assert shown(report, f"sort=M+MACs{order}")[0][-1] == "LSQ"


def test_it_prints_and_is_a_picture(report, tmp_path):
    browse(report, "", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    browse(report, "sort=MB", f"--screenshot={tmp_path / 'report.png'}", "--window-size=1200,1600")
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_many_methods_with_long_names(tmp_path):
    append_rows(tmp_path / "records.jsonl", rows_of(31))
    names, _ = shown(write_report(tmp_path), "sort=MB")
    assert len(names) == 31
