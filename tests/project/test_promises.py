"""SECURITY.md: every promise names the tests that hold it, and those that nothing else holds are held here."""

import ast
import json
import re

import pytest

from tests.conftest import ROOT
from tests.run.test_sweep import SMALL
from vitbench.base.errors import InputError
from vitbench.model import vit
from vitbench.run import cache
from vitbench.run.sweep.grid import cells, parse_sweep

PACKAGE = sorted((ROOT / "vitbench").rglob("*.py"))
PROMISES = re.split(r"^- ", (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("\n\nPlease")[0], flags=re.M)[
    1:
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.partition("**")[2].partition("**")[0])
def test_every_promise_names_tests_that_exist(promise):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
    assert named, "it names no test"
    for file, name in named:
        found = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert name in {node.name for node in found if isinstance(node, ast.FunctionDef)}, (file, name)


def test_a_cell_travels_as_json():
    for cell in cells(parse_sweep(SMALL)):
        assert type(cell)(**json.loads(json.dumps(cell.to_dict()))) == cell


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "a\\b", "..", "", "$(id)", "a\nb", "a\0b", "~root"])
def test_names_from_data_do_not_decide_where_a_file_goes(name):
    used = f"model-{cache._safe_folder_name(name)}-key"
    assert re.fullmatch(r"[\w.-]+", used)
    assert (ROOT / used).resolve().parent == ROOT


def test_no_code_of_a_hub_is_trusted():
    for file in PACKAGE:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        asked = {word.arg for call in ast.walk(tree) if isinstance(call, ast.Call) for word in call.keywords}
        assert "trust_remote_code" not in asked, file
        loads = [
            call
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads")
        ]
        for call in loads:
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords), file
    for name in ("hf-hub:someone/model", "hf_hub:someone/model", "local-dir:/tmp", "https://example.org/model"):
        with pytest.raises(InputError, match="unknown model"):
            vit.create_model(name)
