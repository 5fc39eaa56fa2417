"""Golden files: what users rely on is what `tests/golden` holds, and what earlier versions wrote loads for ever."""

import json
import warnings

import pytest
import torch

from tests.golden import make
from vitbench import cli
from vitbench.edge.bundle import import_answers
from vitbench.methods.registry import METHODS
from vitbench.model import artifact
from vitbench.rows.records import Row, read_rows
from vitbench.rows.row_table import load_records

# Between CPUs a sum differs in its last bits. Where activations are rounded on the way, that may turn one of them into the
# next code; and without VNNI int8 layers keep activations to 7 bits of 8, which moves every one of them a little.
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.1  # of logits that go up to 0.6 to 1.5
ROUNDING = {"DynamicInt8Linear", "StaticInt8Linear", "StaticInt8Rounding", "Rounded", "Log2Rounded", "RoundedNorm"}
LEFT_OUT = "(nothing)"


def differences(wanted, found, place=""):
    """One line for each place where two JSON values differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            line
            for key in {**wanted, **found}
            for line in differences(wanted.get(key, LEFT_OUT), found.get(key, LEFT_OUT), f"{place} > {key}")
        ]
    if isinstance(wanted, list) and isinstance(found, list) and wanted != found:
        gone, new = ([each for each in one if each not in other] for one, other in ((wanted, found), (found, wanted)))
        return [f"{place.removeprefix(' > ')}: gone {gone}, new {new}" if gone or new else f"{place}: another order"]
    return [] if wanted == found else [f"{place.removeprefix(' > ')}: {wanted!r} in the file, {found!r} now"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "recipes"))
        for name in make.FILES
        if not name.startswith("old/")
    ],
)
def test_what_users_rely_on_is_as_it_was(name):
    wanted = json.loads(make.path_of(name).read_text(encoding="utf-8"))
    lines = differences(wanted, json.loads(json.dumps(make.FILES[name]())))
    assert not lines, (
        f"{make.path_of(name).relative_to(make.ROOT)} differs from what is so now:\n  "
        + "\n  ".join(lines[:20])
        + ("\n  ..." if lines[20:] else "")
        + f"\nIf that is meant, make the file anew and say why in CHANGELOG.md: python -m tests.golden.make {name}"
    )


@pytest.mark.parametrize("words", [words for words, _ in make.parsers()], ids=" ".join)
def test_help_names_every_option(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    known = json.loads(make.path_of("commands").read_text(encoding="utf-8"))[" ".join(("vitbench", *words))]
    missing = [option for option in known if option.startswith("-") and option.split(", ")[0] not in said]
    assert not missing, f"`vitbench {' '.join(words)} --help` does not say {missing}"


@pytest.mark.parametrize("name", ["baseline", *METHODS])
def test_a_model_of_an_earlier_version_loads_and_answers_as_it_did(name):
    known = json.loads(make.path_of("old/logits").read_text(encoding="utf-8"))
    assert name in known, f"no old model of {name}; make one: python -m tests.golden.make old/logits"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # int8 layers say what this CPU lacks
        model = artifact.load(make.OLD / name)
        found = torch.tensor(make.answers(model))
    recipe = model.recipe
    assert recipe.method == name
    rounds = ROUNDING & {spec["layer"] for spec in recipe.layers.values()}
    wanted = torch.tensor(known[name]["logits"])
    apart = (found - wanted).abs().max().item()
    assert apart <= (ROUNDED_TOLERANCE if rounds else TOLERANCE), (
        f"tests/golden/old/{name}, saved with commit {known[name]['made']}, answers {apart:.4f} beside what it answered "
        "then; a file that somebody has must answer the same for ever, so the code is to be mended, not this file"
    )


def test_rows_of_earlier_versions_are_read_and_have_their_keys():
    file = make.OLD / "records.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {len(line) for line in lines} == {21, 22, 23}, "without hits, without a checksum, with both"
    rows = read_rows(file)
    assert {row.status for row in rows} == {"ok", "failed", "skipped"}
    for line, row in zip(lines, rows, strict=True):
        assert row.compute_key() == row.key == line["key"], f"the row of {row.time} has another key now"
        kept = {**Row.model_construct(**line).model_dump(mode="json"), **line}
        kept.pop("check", None)
        assert row.to_dict() == kept
    table = load_records(file, latest=False)
    assert list(table["key"]) == [row.key for row in rows]
    assert [value for value in table["value"] if value == value] == [row.value for row in rows if row.value is not None]


def test_answers_of_a_device_of_an_earlier_version_give_the_rows_that_they_gave(tmp_path):
    """A bundle and answers in the form that the first version with bundles (21bb502) wrote, and the rows it made of them."""
    wanted = json.loads((make.OLD / "bundle" / "adopted.json").read_text(encoding="utf-8"))
    import_answers(make.OLD / "bundle", tmp_path / "rows")
    found = {row.key: [row.method, row.metric, row.value] for row in read_rows(tmp_path / "rows")}
    assert {key: found.get(key) for key in wanted} == wanted
