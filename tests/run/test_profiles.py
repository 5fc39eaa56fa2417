"""Profiles: values for all lessons, and for single ones."""

from contextlib import nullcontext
from types import SimpleNamespace

import nbformat
import pytest

from vitbench.base.errors import InputError
from vitbench.rows.runs import Run
from vitbench.run import suite
from vitbench.run.lessons import Lesson, find_lessons, read_profile, values_of

OF_ANY_MODEL = {"out", "batch", "device", "link", "profiles_file", "streamed", "power"}
LESSON = Lesson(None, "", "method", 1, {"rounds": "int", "tuned": "dict", "model": "str"}, 1)


def lesson(name, folder):
    path = folder / f"{name}.ipynb"
    cell = nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {name}"), cell]), path)
    return Lesson(path, name, "method", 1, LESSON.parameters, 1)


@pytest.fixture
def two(tmp_path):
    return [lesson("04_pruning", tmp_path), lesson("12_your_model", tmp_path)]


def read(tmp_path, lessons, text, *settings):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    values = read_profile(str(file), list(settings), lessons)
    return [values_of(lesson, values) for lesson in lessons]


TEXT = """rounds: 20
tuned: {epochs: 5}
lessons:
  12_your_model: {tuned: {epochs: 3, lr: 0.1}}
"""


def test_a_lessons_own_value_goes_before_that_of_all(tmp_path, two):
    first, second = read(tmp_path, two, TEXT)
    assert first == {"rounds": 20, "tuned": {"epochs": 5}}
    assert second == {"rounds": 20, "tuned": {"epochs": 3, "lr": 0.1}}
    assert read(tmp_path, two, TEXT.replace("12_your_model", '"12"')) == [first, second]


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        (["tuned={epochs: 1}"], {"epochs": 1}, {"epochs": 1}),
        (["tuned.epochs=1"], {"epochs": 1}, {"epochs": 1, "lr": 0.1}),
        (["12.tuned.epochs=1"], {"epochs": 5}, {"epochs": 1, "lr": 0.1}),
        (["04.tuned.lr=0.2"], {"epochs": 5, "lr": 0.2}, {"epochs": 3, "lr": 0.1}),
        (["04_pruning.tuned={}"], {}, {"epochs": 3, "lr": 0.1}),
        (["12.tuned={}", "tuned.epochs=2"], {"epochs": 2}, {"epochs": 2}),
    ],
)
def test_settings_are_of_all_lessons_or_of_one(settings, first, second, tmp_path, two):
    assert [values["tuned"] for values in read(tmp_path, two, TEXT, *settings)] == [first, second]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lessons: {13: {}}", "the key '13' is not text; write it in quotes"),
        ("lessons: {13_pruning: {}}", "unknown lesson of profile 'own.yaml' '13_pruning' .did you mean '04_pruning'"),
        ("lessons: [04_pruning]", "lessons of profile 'own.yaml' is not a mapping"),
        ("lessons:", "lessons of profile 'own.yaml' is not a mapping"),
        ("lessons: {04_pruning: 5}", "04_pruning of profile 'own.yaml' is not a mapping"),
        ("lessons: {04_pruning: {}, '04': {}}", "has lesson 04_pruning twice"),
        ("lessons: {04_pruning: {turned: {}}}", "unknown parameter of 04_pruning 'turned' .did you mean 'tuned'"),
        ("lessons: {04_pruning: {rounds: many}}", "rounds = 'many' is a str; the notebooks declare it as int"),
        ("lessons: {04_pruning: {model: vit}}", "model is one for all lessons; set it outside of 04_pruning"),
    ],
)
def test_what_is_wrong_in_a_lessons_part_is_named(text, message, tmp_path, two):
    with pytest.raises(InputError, match=message):
        read(tmp_path, two, text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("04.rounds.x=1", "--set 04.rounds.x: rounds is not a mapping"),
        ("04.turned=1", "unknown parameter of 04_pruning 'turned'"),
        ("05.tuned={}", "unknown parameter '05'"),
        ("lessons={}", "unknown parameter 'lessons'"),
    ],
)
def test_wrong_settings_of_one_lesson(setting, message, tmp_path, two):
    with pytest.raises(InputError, match=message):
        read(tmp_path, two, TEXT, setting)


def test_a_value_of_one_lesson_makes_that_lesson_alone_anew(two):
    before = {"tuned": {"epochs": 5}}
    after = before | {"lessons": {"12_your_model": {"tuned": {"epochs": 6}}}}
    keys = [[suite._key(lesson, values, "", "", "") for lesson in two] for values in (before, after)]
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_the_notebook_gets_its_own_values(tmp_path, two, monkeypatch):
    given = {}

    def execute(source, target, parameters, **options):
        given[source] = parameters

    monkeypatch.setattr("papermill.execute_notebook", execute)
    values = {"rounds": 2, "tuned": {}, "lessons": {"04_pruning": {"tuned": {"epochs": 9}}}}
    kernels = SimpleNamespace(kernel=nullcontext, stopped=False)
    for lesson in two:
        suite._run_one(lesson, "key", values, Run(tmp_path / "run"), kernels)
    assert [{**parameters, "out": ""} for parameters in given.values()] == [
        {"rounds": 2, "tuned": {"epochs": 9}, "out": ""},
        {"rounds": 2, "tuned": {}, "out": ""},
    ]


def test_the_digits_run_leaves_nothing_of_its_model_to_the_defaults():
    values = read_profile("digits", [], find_lessons())
    for lesson in find_lessons():
        assert set(lesson.parameters) - set(values_of(lesson, values)) <= OF_ANY_MODEL, f"{lesson.name}: add them"
