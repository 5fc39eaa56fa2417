"""Keys of kept work: everything that decides a result is in them, and nothing that only shows it."""

import ast
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from vitbench.base import store
from vitbench.base.code import PACKAGE_SOURCES, Sources
from vitbench.calibration import moments
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.removal import criteria
from vitbench.removal.scores import Criterion
from vitbench.run import cache
from vitbench.training import distilling, loop
from vitbench.training.config import TrainConfig

WORK = ("training", "calibration", "removal", "methods")  # the rooms whose code makes work that is kept
SHOW = ("rows", "figures", "edge", "run", "cli")


def with_another_constant(source):
    """A module's source with the first of its constants changed that is no docstring; with a new one if it has none."""
    tree = ast.parse(source)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str) and id(node) not in texts:
            node.value = node.value + type(node.value)(1)
            return ast.unparse(tree).encode()
    return source + b"\nCONSTANT = 1\n"


def digest_after_a_change(room, file):
    """The code's digest for a room after a constant in `file` was changed."""
    changed = copy.copy(PACKAGE_SOURCES)
    changed.texts = PACKAGE_SOURCES.texts | {file: with_another_constant(PACKAGE_SOURCES.texts[file])}
    changed._cache = {name: known for name, known in PACKAGE_SOURCES._cache.items() if name != file}
    return changed.digest(room)


@pytest.mark.parametrize("room", WORK)
def test_a_constant_of_any_file_of_a_deciding_room_changes_the_key(room):
    deciding = [file for file in PACKAGE_SOURCES.texts if file.partition("/")[0] in PACKAGE_SOURCES.closure(room)]
    assert {"model/vit.py", "data/splits.py", "base/store.py", f"{room}/__init__.py"} <= set(deciding)
    same = [file for file in deciding if digest_after_a_change(room, file) == PACKAGE_SOURCES.digest(room)]
    assert not same, f"a constant in these does not change the key of {room}"


@pytest.mark.parametrize("room", WORK)
def test_a_constant_of_a_room_that_shows_changes_no_key(room):
    shows = [file for file in PACKAGE_SOURCES.texts if file.partition("/")[0] in SHOW]
    assert len(shows) > 40
    other = [file for file in shows if digest_after_a_change(room, file) != PACKAGE_SOURCES.digest(room)]
    assert not other, f"a constant in these changes the key of {room}"


def test_a_method_changes_no_baseline():
    methods = [file for file in PACKAGE_SOURCES.texts if file.startswith("methods/")]
    assert len(methods) > 10
    assert all(digest_after_a_change("training", file) == PACKAGE_SOURCES.digest("training") for file in methods)


@pytest.mark.slow
def test_every_module_that_python_imports_is_in_a_room_of_the_closure():
    code = "import json, sys, vitbench.methods.registry; print(json.dumps(list(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    names = [name.split(".")[1] for name in json.loads(done.stdout.splitlines()[-1]) if name.startswith("vitbench.")]
    assert set(names) - {"version"} == set(PACKAGE_SOURCES.closure("methods"))


def test_no_module_imports_through_a_front():
    """A front imports nothing until a name is asked for, so that inside the package only modules are imported from."""
    fronts = {"vitbench", *(f"vitbench.{room}" for room in PACKAGE_SOURCES.rooms)}
    for file, text in PACKAGE_SOURCES.texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module in fronts:
                folder = node.module.replace(".", "/").removeprefix("vitbench").lstrip("/")
                asked = {alias.name for alias in node.names}
                known = {Path(name).stem for name in PACKAGE_SOURCES.texts if name.rpartition("/")[0] == folder}
                assert asked <= known | {"layers"}, (file, asked - known)


def package(folder, **files):
    """The sources of a small package."""
    for name, text in ({"__init__": ""} | files).items():
        file = folder / "toy" / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Sources(folder / "toy")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import toy.b", ["b"]),
        ("from toy import b", ["b"]),
        ("from toy.b import X", ["b"]),
        ("from toy.b.inner import X", ["b"]),
        ("from .. import b", ["b"]),
        ("from ..b import inner", ["b"]),
        ("from .other import X", []),
        ("def f():\n    from toy import b", ["b"]),
        ("import toy.b.inner as i", ["b"]),
        ("from toy import c", ["b", "c"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy import b", []),
        ("from toy import version", []),
        ("import torch", []),
    ],
)
def test_what_an_import_brings_in(tmp_path, text, found):
    rooms = {
        "b.__init__": "",
        "b.inner": "X = 1",
        "c.__init__": "",
        "c.inner": "from toy.b import inner",
        "version": "",
    }
    own = package(tmp_path, **{"a.__init__": "", "a.first": text, "a.other": ""}, **rooms)
    assert own.closure("a") == ["a", *found]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Another."""\nX = 1  # why\n\n\ndef f():\n    """So."""\n    return X\n', True),
        ("X = 1\ndef f(): return X\n", True),
        ("X = 2\ndef f(): return X\n", False),
        ("X = 1\ndef f(): return -X\n", False),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path, text, same):
    first = package(tmp_path / "one", **{"a.one": '"""A."""\nX = 1\n\n\ndef f():\n    return X\n'})
    assert (first.digest("a") == package(tmp_path / "two", **{"a.one": text}).digest("a")) == same


def test_a_process_keeps_the_code_that_it_began_with(tmp_path):
    own = package(tmp_path, **{"a.one": "X = 1"})
    (tmp_path / "toy" / "a" / "one.py").write_text("X = 2")
    assert own.digest("a") == package(tmp_path / "other", **{"a.one": "X = 1"}).digest("a")


def test_every_part_of_a_key_counts(monkeypatch):
    first = store.work_key("calibration", {"a": 1})
    assert first == store.work_key("calibration", {"a": 1})
    others = [
        store.work_key("calibration", {"a": 2}),
        store.work_key("training", {"a": 1}),
        store.work_key("calibration", {"a": 1}, "cuda"),
        store.work_key("calibration", {"a": 1}, packages=("scipy",)),
    ]
    for name in store.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(f"{name}.__version__", "0")
            others.append(store.work_key("calibration", {"a": 1}))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.append(store.work_key("calibration", {"a": 1}))
    assert len({first, *others}) == 1 + len(others)


ONE_SET_OF_TENSORS = [
    {},
    {"token_merging": {"r": 2}},
    {"token_merging": {"r": 3}},
    {"nystroem": {"landmarks": 4}},
    {"nystroem": {"landmarks": 8}},
    {"linear_attention": {"train": {"epochs": 0}}},
]


def made(model, steps):
    return compress(model, [make_config(name, values) for name, values in steps.items()]).model


def test_models_of_one_set_of_tensors_have_digests_and_keys_of_their_own(micro, few_digits):
    models = [made(micro, steps) for steps in ONE_SET_OF_TENSORS]
    assert len({artifact.weights_hash(model) for model in models}) == 1
    assert len({artifact.model_digest(model) for model in models}) == len(models)
    assert len({loop.training_key(model, few_digits, TrainConfig()) for model in models}) == len(models)
    teachers = {loop.training_key(micro, few_digits, TrainConfig(), model) for model in models}
    assert len(teachers) == len(models)


@pytest.mark.parametrize("steps", ONE_SET_OF_TENSORS)
def test_a_model_that_was_saved_and_loaded_has_its_digest(micro, tmp_path, steps):
    model = made(micro, steps)
    loaded = artifact.load(artifact.save(model, tmp_path / "model"))
    again = artifact.load(artifact.save(loaded, tmp_path / "again"))
    assert artifact.model_digest(loaded) == artifact.model_digest(again)


@pytest.mark.parametrize("changed", ["a tensor", "an input's mean"])
def test_tensors_and_recipe_are_in_the_digest(micro, changed):
    other = copy.deepcopy(micro)
    if changed == "a tensor":
        other.head.bias.data[3] += 1e-7
    else:
        other.recipe = other.recipe.replace(preprocess=other.recipe.preprocess.replace(mean=(0.5, 0.5, 0.1)))
    assert artifact.model_digest(other) != artifact.model_digest(micro)


def test_code_that_changed_makes_every_kind_of_work_anew(micro, few_digits, home, tmp_path, monkeypatch):
    """The rooms that are asked for are those that do the work: another digest of theirs, other files."""
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path))
    train = TrainConfig(epochs=1, batch_size=32, warmup_epochs=0)
    scored = make_config("multidimensional", SMALL_SEARCH)
    asked = set()

    def work():
        base = cache.baseline("vit_micro_patch2_8", few_digits, train)
        cache.compress_cached(base, make_config("dynamic_int8"))
        moments.collect_moments(micro, vit.linear_layers(micro), few_digits)
        criteria.score(micro, few_digits, Criterion(name="activation", samples=16))
        distilling.cached_teacher_logits(
            micro, few_digits, train, 0, torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False)
        )
        compress(micro, scored, few_digits)
        files = {
            path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".jsonl")
        }
        return files - before

    before = set()
    for code in ("one", "two"):
        monkeypatch.setattr(store, "code_digest", lambda room, code=code: asked.add(room) or code)
        found = work()
        assert {path.parts[2].partition("-")[0] for path in found} == {
            "vit_micro_patch2_8",
            "moments",
            "scores",
            "answers",
            "searches",
        }
        before |= found
        assert not work(), "nothing is made twice"
    assert asked == set(WORK)


SMALL_SEARCH = {
    "search": {"evaluations": 3, "first": 2, "pool": 20},
    "keep": 0.8,
    "tolerance": 0.2,
    "criterion": {"name": "activation", "samples": 16},
    "train": {"epochs": 0},
}
