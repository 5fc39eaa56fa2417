"""docs/DESIGN.md shows the rooms as they are, and its picture is drawn right for any layout."""

import importlib.util

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def rooms():
    spec = importlib.util.spec_from_file_location("rooms", DOCS / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path):
    sources = {
        "__init__.py": "from pack.top import shown",
        "alone.py": "",
        "base/__init__.py": "",
        "base/files.py": "import os",
        "middle/work.py": "from ..base import files\nfrom . import other",
        "middle/other.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.top import shown",
        "top/shown.py": "import pack.middle.work\n\ndef late():\n    from pack import alone\n    from pack.base.files import x",
    }
    for name, text in sources.items():
        file = tmp_path / "pack" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "pack"


def test_page_is_up_to_date(rooms):
    assert rooms.main(["--check"]) == 0, "run: python docs/rooms.py"


def test_graph_has_relative_and_late_imports_and_none_for_type_checkers(rooms, package):
    assert rooms.graph(package) == {
        "base": set(),
        "loose": set(),
        "middle": {"base"},
        "top": {"middle", "base", "loose"},
    }


def test_reduction_leaves_out_what_a_longer_path_says_and_keeps_cycles(rooms):
    assert rooms.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert rooms.reduced({"a": {"b"}, "b": {"a"}}) == {"a": {"b"}, "b": {"a"}}


def test_check_finds_an_old_page_and_a_run_mends_it(rooms, package, tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text(f"before\n{rooms.START}\nold\n{rooms.END}\nafter\n")
    assert rooms.main(["--check"], page, package) == 1
    assert rooms.main([], page, package) == 0
    assert rooms.main(["--check"], page, package) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "    top --> middle\n" in text
    assert "top --> base" not in text
