"""Pages are made from rows: a rendering of the committed rows is the committed page, and a sentence needs rows that support it."""

import json
import shutil
import subprocess
import sys

import pytest

from docs import render
from docs.render import ClaimError, Pages, claim
from docs.results import MissingRow
from tests.conftest import ROOT
from vitbench.rows.records import split_checksum

REFERENCE = ROOT / "results" / "reference"
PAGES = Pages()


@pytest.mark.parametrize("name", PAGES.names())
def test_rendering_again_changes_nothing(name):
    assert PAGES.render(name) == (ROOT / name).read_text(), "run `make pages`; a page is changed in docs/pages"


def test_every_page_with_numbers_from_rows_has_a_template():
    whole = ("README.md", "REVIEWING.md", "results/measured.md", "results/papers.md", "results/reference/README.md")
    tables = (f"results/reference/edge-deit-{shape}/table.md" for shape in ("tiny", "small", "base"))
    assert {*whole, *tables} <= set(PAGES.names())


@pytest.fixture
def other_rows(tmp_path):
    """Makes pages of the committed rows with one folder changed: each of its rows goes through a function."""

    def pages(folder, change):
        for each in REFERENCE.iterdir():
            if each.name != folder:
                (tmp_path / each.name).symlink_to(each)
        shutil.copytree(REFERENCE / folder, tmp_path / folder)
        file = tmp_path / folder / "records.jsonl"
        rows = [json.loads(split_checksum(line)[0]) for line in file.read_bytes().splitlines()]
        file.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
        return Pages(tmp_path)

    return pages


@pytest.mark.slow
def test_a_changed_row_changes_the_page(other_rows):
    def larger(row):
        return row | {"value": row["value"] + 1e6} if row["metric"] == "bytes" and row["method"] == "uct" else row

    before, after = (pages.render("REVIEWING.md").splitlines() for pages in (PAGES, other_rows("digits-quick", larger)))
    [(old, new)] = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert old.startswith("| uct |")
    assert old.endswith("| 0.08 |")
    assert new == old.replace("| 0.08 |", "| 1.08 |")


def test_a_claim_gives_its_text_only_where_its_condition_holds():
    assert claim(True, "it is faster") == claim(2 > 1, caller=lambda: "it is faster") == "it is faster"
    with pytest.raises(ClaimError, match="no longer support this: 'it is faster'"):
        claim(False, "it is\n  faster")
    with pytest.raises(ClaimError):
        claim([], caller=lambda: "some are faster")


@pytest.mark.slow
def test_rows_that_do_not_support_a_sentence_stop_the_page(other_rows):
    def worse(row):
        return row | {"value": 0.5, "low": 0.49, "high": 0.51} if row["method"] == "weight_only" else row

    with pytest.raises(ClaimError, match="the factor is the worse half of the method"):
        other_rows("cifar10-deit", worse).render("results/papers.md")


@pytest.mark.slow
def test_a_row_that_is_not_there_stops_the_page(other_rows):
    def failed(row):
        return row | {"status": "failed", "error": "x"} if row["method"] == "dynamic_int8" else row

    with pytest.raises(MissingRow, match="digits-quick has no bytes of 'dynamic_int8'"):
        other_rows("digits-quick", failed).render("REVIEWING.md")


def test_another_backends_row_does_not_stand_in():
    with pytest.raises(MissingRow, match="torch_compile"):
        PAGES.rows("digits-quick").value("uct", "latency_p50", 1, "torch_compile")


@pytest.mark.slow
def test_a_folder_without_its_command_stops_the_page(other_rows):
    pages = other_rows("digits-quick", lambda row: row)
    (pages.reference / "digits-quick" / "command.md").unlink()
    with pytest.raises(FileNotFoundError, match="digits-quick/command.md"):
        pages.render("results/reference/README.md")


def test_the_command_checks_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(Pages, "names", lambda self: ["REVIEWING.md"])
    monkeypatch.setattr(render, "Pages", lambda: PAGES)
    page, whole = tmp_path / "REVIEWING.md", (ROOT / "REVIEWING.md").read_text()
    page.write_text(whole.replace("359 test images", "360 test images"))
    assert render.main(["--check"]) == 1
    assert "+The three come from committed rows (`results/reference/digits-quick`), 359" in capsys.readouterr().out
    assert "360 test images" in page.read_text()
    assert render.main([]) == 0
    assert page.read_text() == whole
    assert render.main(["--check"]) == 0


def test_a_page_that_cannot_be_made_is_named_with_its_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.md.j2").write_text('fine\n{{ claim(1 > 2, "one is more") }}\n')
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "TEMPLATES", tmp_path)
    assert render.main(["--check"]) == 1
    assert "broken.md.j2:2: ClaimError: the rows no longer support this" in capsys.readouterr().err


def test_pages_are_made_without_torch():
    code = "import sys; from docs.render import Pages; Pages().render('REVIEWING.md'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
