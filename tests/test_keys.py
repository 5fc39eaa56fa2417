"""Keys of kept work: everything that decides a result is in them, and nothing that only shows it."""

import ast
import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from vitbench import artifact, cache, distilling, moments, training, vit
from vitbench.base import store
from vitbench.base.code import OWN, SHOWING, Sources
from vitbench.methods import compress, make_config
from vitbench.removal import criteria
from vitbench.removal.scores import Criterion
from vitbench.training import TrainConfig

# each kind of work, and a name of the module whose code makes it
WORK = ("training", "moments", "distilling", "removal.criteria", "methods", "methods.multidimensional", "combinations")
SHOW = (
    *(
        "attention_figures",
        "bench",
        "cache",
        "closeups",
        "cli",
        "cli.run",
        "comparison",
        "equal_budgets",
        "figures",
        "gallery",
    ),
    *("kernels", "knobs", "labels", "lessons", "multiples", "policy_figures", "progress", "report", "row_table"),
    *("suite", "sweep", "sweep.drive", "tradeoff", "verify", "version"),
)


@pytest.fixture(scope="module")
def imported():
    """What Python itself imports for the one training loop, and for the methods, beside the front door's own."""
    code = (
        "import json, sys, vitbench; found, door = [], set(sys.modules)\n"
        "for name in ('vitbench.training', 'vitbench.methods'):\n"
        "    __import__(name); found.append([each for each in sys.modules if each.startswith('vitbench.') and each not in door])\n"
        "print(json.dumps(found))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return dict(zip(("training", "methods"), json.loads(done.stdout.splitlines()[-1]), strict=True))


def with_another_constant(source):
    """A module's source with the first of its constants changed that is no docstring; with a new one if it has none."""
    tree = ast.parse(source)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str) and id(node) not in texts:
            node.value = node.value + type(node.value)(1)
            return ast.unparse(tree).encode()
    return source + b"\nCONSTANT = 1\n"


def digest_after_a_change(of, module):
    """The code's digest for the module `of` after a constant in `module` was changed."""
    changed = copy.copy(OWN)
    changed.texts = OWN.texts | {module: with_another_constant(OWN.texts[module])}
    changed._known = {name: known for name, known in OWN._known.items() if name != module}
    return changed.digest(of)


@pytest.mark.parametrize("work", ["training", "methods"])
def test_a_constant_of_any_module_that_python_imports_changes_the_key(imported, work):
    of = f"vitbench.{work}"
    deciding = {name for name in imported[work] if name.split(".")[1] != SHOWING}
    assert deciding >= {"vitbench.vit", "vitbench.blocks", "vitbench.tokens", "vitbench.t2t", "vitbench.distilling"}
    same = [name for name in sorted(deciding) if digest_after_a_change(of, name) == OWN.digest(of)]
    assert not same, f"a constant in these does not change the key of {work}"


@pytest.mark.parametrize("work", ["training", "moments", "distilling", "removal.criteria", "methods"])
def test_a_constant_of_a_module_that_shows_changes_no_key(work):
    of = f"vitbench.{work}"
    other = [name for name in SHOW if digest_after_a_change(of, f"vitbench.{name}") != OWN.digest(of)]
    assert not other, f"a constant in these changes the key of {work}"


def test_a_method_changes_no_baseline():
    methods = [name for name in OWN.texts if name.startswith("vitbench.methods")]
    assert len(methods) > 10
    assert all(digest_after_a_change("vitbench.training", name) == OWN.digest("vitbench.training") for name in methods)


def test_the_room_that_shows_computes_nothing():
    for name, text in OWN.texts.items():
        if name.split(".")[1:2] == [SHOWING]:
            assert b"torch" not in text, name
            assert b"numpy" not in text, name


def test_no_module_asks_the_front_door():
    """It imports nothing until a name is asked for, so a closure does not enter it."""
    for name, text in OWN.texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "vitbench":
                asked = {alias.name for alias in node.names if f"vitbench.{alias.name}" not in OWN.texts}
                assert not asked - ({"__version__"} if name == "vitbench" else set()), name


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
        ("import toy.b", ["toy.b"]),
        ("from toy import b", ["toy.b"]),
        ("from toy.b import X", ["toy.b"]),
        ("from . import b", ["toy.b"]),
        ("from .room import inner", ["toy.room", "toy.room.inner"]),
        ("def f():\n    from toy import b", ["toy.b"]),
        ("import toy.room.inner as i", ["toy.room", "toy.room.inner"]),
        ("from toy import room", ["toy.room"]),
        ("from toy import all_of", ["toy.all_of", "toy.all_of.one", "toy.all_of.two"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy import b", []),
        ("from toy.progress import bar", []),
        ("import torch", []),
    ],
)
def test_what_an_import_brings_in(tmp_path, text, found):
    every = "import pkgutil\nfor each in pkgutil.iter_modules(__path__):\n    __import__(each.name)"
    own = package(
        tmp_path,
        **{"a": text, "b": "X = 1", "room.__init__": "", "room.inner": "", "progress.__init__": ""},
        **{"all_of.__init__": every, "all_of.one": "", "all_of.two": ""},
    )
    assert own.closure("toy.a") == ["toy.a", *found]


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
    first = package(tmp_path / "one", a='"""A."""\nX = 1\n\n\ndef f():\n    return X\n')
    assert (first.digest("toy.a") == package(tmp_path / "two", a=text).digest("toy.a")) == same


def test_a_process_keeps_the_code_that_it_began_with(tmp_path):
    own = package(tmp_path, a="X = 1")
    (tmp_path / "toy" / "a.py").write_text("X = 2")
    assert own.digest("toy.a") == package(tmp_path / "other", a="X = 1").digest("toy.a")


def test_every_part_of_a_key_counts(monkeypatch):
    first = store.work_key("vitbench.moments", {"a": 1})
    assert first == store.work_key("vitbench.moments", {"a": 1})
    others = [
        store.work_key("vitbench.moments", {"a": 2}),
        store.work_key("vitbench.training", {"a": 1}),
        store.work_key("vitbench.moments", {"a": 1}, "cuda"),
        store.work_key("vitbench.moments", {"a": 1}, packages=("scipy",)),
    ]
    for name in store.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(f"{name}.__version__", "0")
            others.append(store.work_key("vitbench.moments", {"a": 1}))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.append(store.work_key("vitbench.moments", {"a": 1}))
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
    return compress(model, [make_config(name, values) for name, values in steps.items()])


def test_models_of_one_set_of_tensors_have_digests_and_keys_of_their_own(micro, few_digits):
    models = [made(micro, steps) for steps in ONE_SET_OF_TENSORS]
    assert len({artifact.weights_hash(model) for model in models}) == 1
    assert len({artifact.model_digest(model) for model in models}) == len(models)
    assert len({training.training_key(model, few_digits, TrainConfig()) for model in models}) == len(models)
    teachers = {training.training_key(micro, few_digits, TrainConfig(), model) for model in models}
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
        other.recipe = other.recipe.having(preprocess=other.recipe.preprocess.having(mean=(0.5, 0.5, 0.1)))
    assert artifact.model_digest(other) != artifact.model_digest(micro)


def test_code_that_changed_makes_every_kind_of_work_anew(micro, few_digits, home, tmp_path, monkeypatch):
    """The modules that are asked for are those that do the work: another digest of theirs, other files."""
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path))
    train = TrainConfig(epochs=1, batch_size=32, warmup_epochs=0)
    scored = make_config("multidimensional", SMALL_SEARCH)
    asked = set()

    def work():
        base = cache.baseline("vit_micro_patch2_8", few_digits, train)
        cache.compressed(base, make_config("dynamic_int8"))
        moments.collect(micro, vit.linears(micro), few_digits)
        criteria.score(micro, few_digits, Criterion(name="activation", samples=16))
        distilling.kept_answers(
            micro, few_digits, train, 0, torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False)
        )
        compress(micro, scored, few_digits)
        files = {
            path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".jsonl")
        }
        return files - before

    before = set()
    for code in ("one", "two"):
        monkeypatch.setattr(store, "code_digest", lambda module, code=code: asked.add(module) or code)
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
    assert asked == {f"vitbench.{name}" for name in WORK} - {"vitbench.combinations"}


SMALL_SEARCH = {
    "search": {"evaluations": 3, "first": 2, "pool": 20},
    "keep": 0.8,
    "tolerance": 0.2,
    "criterion": {"name": "activation", "samples": 16},
    "train": {"epochs": 0},
}
