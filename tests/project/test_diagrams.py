"""The diagrams in docs/ and in the lessons are those that docs/diagrams.py draws."""

import base64

import nbformat

from docs import diagrams
from tests.conftest import ROOT


def test_drawing_again_changes_nothing():
    assert [path.name for path, _ in diagrams.outdated_files()] == []


def test_every_diagram_is_shown_in_a_lesson():
    shown = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            shown |= set(cell.get("attachments", {}))
    assert shown == {f"{name}.svg" for name in diagrams.DIAGRAMS}


def test_an_outdated_lesson_is_found_and_mended(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    text = "![a block](attachment:block.svg)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, tmp_path / "notebooks" / "00.ipynb")
    monkeypatch.setattr(diagrams, "ROOT", tmp_path)
    monkeypatch.setattr(diagrams, "FOLDER", tmp_path / "diagrams")
    monkeypatch.setattr("sys.argv", ["diagrams", "--check"])
    assert diagrams.main() == 1
    assert not (tmp_path / "diagrams").exists()
    monkeypatch.setattr("sys.argv", ["diagrams"])
    assert diagrams.main() == 0
    capsys.readouterr()
    cell = nbformat.read(tmp_path / "notebooks" / "00.ipynb", as_version=4).cells[0]
    drawing = base64.b64decode(cell.attachments["block.svg"]["image/svg+xml"])
    assert drawing == (tmp_path / "diagrams" / "block.svg").read_bytes()
    assert b"quantization: fewer bits" in drawing
