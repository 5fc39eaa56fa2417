"""Damaged and hostile input, many kinds of it: a clear error or a rebuilt cache, never a traceback and never a wrong number."""

import json
import os
import random
import warnings

import pytest
import torch

from tests.run.test_sweep import SMALL
from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.methods.registry import METHODS, make_config
from vitbench.model import artifact
from vitbench.rows.records import Row, append_rows, read_rows
from vitbench.rows.row_table import load_records
from vitbench.rows.runs import Run
from vitbench.run import cache
from vitbench.run.lessons import find_lessons, parse_setting
from vitbench.run.sweep.grid import cells, parse_sweep
from vitbench.training.config import TrainConfig


def said(call, *given):
    """What the error of a call says that refuses what it was given; "" if it takes it. No other error may come."""
    try:
        call(*given)
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    return artifact.save(base.model, tmp_path_factory.mktemp("saved") / "model")


def copy_with(saved, folder, name, change):
    """The saved model with one of its files changed."""
    for file in saved.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(change(content) if file.name == name else content)
    return folder


def flip(place):
    def change(content):
        content = bytearray(content)
        content[place % len(content)] ^= 1 << (place % 8)
        return bytes(content)

    return change


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json"])
@pytest.mark.parametrize("place", [0, 1, 7, 8, 9, 100, 333, 1009, 5003, 20011, -1, -2, -30])
def test_a_flipped_bit_in_a_model(saved, tmp_path, name, place):
    folder = copy_with(saved, tmp_path, name, flip(place))
    error = said(artifact.load, folder)
    if error:
        assert str(folder) in error
    else:  # white space of the recipe's JSON: it says the same
        assert name == "recipe.json"
        assert artifact.load(folder).recipe == artifact.load(saved).recipe


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json"])
@pytest.mark.parametrize("left", [0, 1, 8, 200, 0.5, 0.99])
def test_a_truncated_model(saved, tmp_path, name, left):
    folder = copy_with(saved, tmp_path, name, lambda content: content[: int(left * len(content) if left < 1 else left)])
    with pytest.raises(InputError, match="damaged|do not fit"):
        artifact.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"recipe": [], "sha256": 1}',
        b'{"recipe": {}}',
    ],
)
def test_a_recipe_that_is_none(saved, tmp_path, content):
    folder = copy_with(saved, tmp_path, "recipe.json", lambda _: content)
    with pytest.raises(InputError, match="damaged"):
        artifact.load(folder)


@pytest.mark.parametrize("harm", ["weights", "recipe", "history", "no weights", "history of another kind"])
def test_a_damaged_model_in_the_cache_is_made_again(digits, home, capsys, harm):
    train = TrainConfig(epochs=1, batch_size=512, warmup_epochs=0, seed=77)
    made = cache.baseline("vit_mini_patch2_8", digits, train)
    wanted = artifact.weights_hash(made.model)
    file = made.path / {"weights": "model.safetensors", "no weights": "model.safetensors"}.get(harm, "recipe.json")
    file = made.path.parent / cache.HISTORY if "history" in harm else file
    if harm == "no weights":
        file.unlink()
    else:
        file.write_bytes(b"{}, " if harm == "history of another kind" else flip(37)(file.read_bytes())[:-40])
    again = cache.baseline("vit_mini_patch2_8", digits, train)
    assert "is rebuilt" in capsys.readouterr().out
    assert artifact.weights_hash(again.model) == wanted


def fuzzed(rng, value, depth=0):
    """A mapping with some of its values, or keys, replaced by what does not belong there."""
    odd = [
        None,
        [],
        {},
        "",
        -1,
        1e308,
        True,
        "../../etc/passwd",
        "x" * 5000,
        [[[]]],
        {"a": {"b": 1}},
        "${HOME}",
        2**70,
        "\0",
    ]
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.7):
        key = rng.choice(sorted(value))
        inner = fuzzed(rng, value[key], depth + 1)
        return {**value, key: inner} if rng.random() < 0.8 else {**value, f"{key}_": value[key]}
    if isinstance(value, list) and value and rng.random() < 0.5:
        return [fuzzed(rng, value[0], depth + 1), *value[1:]]
    return rng.choice(odd)


@pytest.mark.parametrize("seed", range(40))
def test_fuzzed_sweeps(seed):
    rng = random.Random(seed)
    whole = SMALL | {"seeds": [0], "measures": {"what": ["size"]}, "retries": 1, "resources": {"memory": 1.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = said(lambda: cells(parse_sweep(fuzzed(rng, whole))))
    assert len(error) < 2000
    assert "\n" not in error


@pytest.mark.parametrize("seed", range(30))
def test_fuzzed_settings_of_methods(seed):
    rng = random.Random(seed)
    name = rng.choice(sorted(METHODS))
    assert len(said(make_config, name, fuzzed(rng, METHODS[name].config().to_dict()))) < 2000


@pytest.mark.parametrize(
    "text", ["", "=", "=1", "a", "a=[1", "a={", "a=!!python/object/apply:os.system [id]", "a=&x [*x, *x"]
)
def test_settings_that_are_refused(text):
    with pytest.raises(InputError, match="setting|YAML"):
        parse_setting(text)


HOSTILE = "<script>alert(1)</script> {{7*7}} ' \" ; $(id) ../ \u202e ä 漢"


def rows_of(name):
    facts = {"model": name, "dataset": name, "data_fingerprint": "f", "method": "baseline", "source": "measured: x"}
    return [
        Row(**facts, metric="top1", value=0.5, unit="fraction"),
        Row(**facts, metric="bytes", value=10.0, unit="bytes"),
    ]


def test_names_from_outside_are_text_in_the_report(tmp_path):
    folder = tmp_path / "results of ä' <b>"
    append_rows(folder / "records.jsonl", rows_of(HOSTILE))
    warnings.filterwarnings("ignore", "Glyph .* missing")  # a figure's font has not every letter
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert "7*7" in page


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"null\n",
        b"[]\n",
        b"{}\n",
        b'{"schema_version": 1}\n',
        b"\xff\xff\n",
        b"{" * 5000 + b"\n",
        b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"\n",
        b'{"schema_version":1,"config":{},"seed":1,"metric":"x","context":{},"samples":null}\n',
    ],
)
def test_lines_that_are_no_rows(tmp_path, line):
    file = tmp_path / "records.jsonl"
    append_rows(file, rows_of("m"))
    file.write_bytes(file.read_bytes() + line)
    for read in (read_rows, load_records):
        with pytest.raises(InputError, match="line 3 .*the 2 rows before it are valid"):
            read(file)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"7"', "true", "[1]", "{}", "null", "1e999", "1" + "0" * 400])
def test_values_that_are_no_numbers(tmp_path, value):
    file = tmp_path / "records.jsonl"
    append_rows(file, rows_of("m")[:1])
    text = file.read_text().split(',"check"')[0] + "}\n"  # a forger leaves the checksum out
    file.write_text(text.replace('"value":0.5', f'"value":{value}'))
    for read in (read_rows, load_records):
        with pytest.raises(InputError, match="line 1 "):
            read(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", "[1]"),
        ("schema_version", "2"),
        ("status", "[]"),
        ("low", "1" + "0" * 400),
        ("samples", '["a"]'),
    ],
)
def test_fields_of_another_kind(tmp_path, field, value):
    file = tmp_path / "records.jsonl"
    append_rows(file, rows_of("m")[:1])
    row = json.loads(file.read_text())
    row.pop("check")
    text = json.dumps(row | {field: "HERE"}, separators=(",", ":")).replace('"HERE"', value)
    file.write_text(text + "\n")
    for read in (read_rows, load_records):
        with pytest.raises(InputError, match="line 1 "):
            read(file)


@pytest.mark.parametrize(
    "name", ["a b", "ä", "漢字", "it's", 'quo"te', "semi;colon", "$HOME", "-dash", "per%cent", "new\nline"]
)
def test_folders_of_any_name(base, tmp_path, name):
    path = artifact.save(base.model, tmp_path / name / name)
    assert artifact.load(path).recipe == base.model.recipe
    run = Run(tmp_path / name / "rows")
    run.append(rows_of("m"))
    assert len(run.rows()) == 2


def test_a_results_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Run(tmp_path / "file")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot be written"):
            Run(tmp_path / "closed" / "x")


def test_a_pickle_is_never_opened(tmp_path, digits):
    class Harm:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'harmed'}",))

    torch.save({"model": Harm()}, tmp_path / "weights.pt")
    with pytest.raises(InputError):
        cache.baseline("vit_mini_patch2_8", digits, checkpoint=tmp_path / "weights.pt")
    assert not (tmp_path / "harmed").exists()


def test_yaml_makes_no_objects(tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text("models: !!python/object/apply:os.system [id]\nmethods: [baseline]\ndatasets: [digits]\n")
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "vitbench: " in capsys.readouterr().err


def test_a_notebook_in_a_results_folder_is_not_run(tmp_path, monkeypatch):
    Run(tmp_path).append(rows_of("m"))
    (tmp_path / "notebooks").mkdir()
    strange = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "notebooks" / "99_strange.ipynb").write_text(json.dumps(strange))
    monkeypatch.delenv("VITBENCH_HOME")
    monkeypatch.chdir(tmp_path)
    names = [lesson.name for lesson in find_lessons()]
    assert "01_baseline" in names
    assert "99_strange" not in names
