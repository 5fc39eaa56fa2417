"""Rows that are recomputed: those within tolerance, and those that were changed."""

import json
import shutil

import pytest
import yaml

import vitbench as vb
from tests.conftest import ROOT
from tests.run.test_sweep import SMALL
from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.rows.row_table import load_records
from vitbench.run.suite import open_data
from vitbench.run.verification import verify

pytestmark = pytest.mark.slow

SPLITS = [f"{key}={value}" for key, value in SMALL["datasets"][0]["splits"].items()]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["run", str(folder / "sweep.yaml"), "--out", str(folder / "rows")]) == 0
    return folder / "rows"


def changed(folder, kept, metric, factor):
    """The folder with the first row of a metric changed, as someone does who leaves the checksum out."""
    shutil.copytree(kept, folder)
    lines = (folder / "records.jsonl").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if f'"metric":"{metric}"' in line)
    row = json.loads(lines[place])
    row.pop("check")
    row["value"] *= factor
    if row["low"] is not None:
        row["low"], row["high"] = row["low"] * factor, row["high"] * factor
    lines[place] = json.dumps(row, separators=(",", ":"))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return row["key"]


def test_rows_come_out_again(kept, capsys):
    assert main(["verify", str(kept), "--models", "0", "--splits", *SPLITS]) == 0
    said = capsys.readouterr().out
    assert "16 of 16 rows within tolerance" in said
    assert "OUTSIDE" not in said


@pytest.mark.parametrize(("metric", "factor"), [("top1", 3.0), ("bytes", 1.01), ("macs", 1.0001)])
def test_a_changed_row_is_named(kept, tmp_path, capsys, metric, factor):
    key = changed(tmp_path / "changed", kept, metric, factor)
    assert main(["verify", str(tmp_path / "changed"), "--models", "0", "--splits", *SPLITS]) == 1
    outside = [line for line in capsys.readouterr().out.splitlines() if line.startswith("OUTSIDE")]
    assert len(outside) == 1
    assert key in outside[0]
    assert metric in outside[0]


def test_some_models_only(kept):
    data = open_data("digits", "", SMALL["datasets"][0]["splits"])
    rows = load_records(kept)
    assert {check.row["method"] for check in verify(rows, data, models=1)} == {"baseline"}
    assert {check.row["method"] for check in verify(rows, data, only=["weight_only"], models=2)} == {"weight_only"}
    assert {check.row["metric"] for check in verify(rows, data, metrics=["bytes"], models=1)} == {"bytes"}


def test_a_row_names_the_images_that_its_method_used_and_they_are_cut_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path))
    data = open_data("digits", "", {"train": 200, "test": 60, "calibration": 64})
    base = vb.baseline("vit_micro_patch2_8", data, vb.TrainConfig(epochs=1, warmup_epochs=0, batch_size=50))
    run, gptq = vb.Run(tmp_path / "rows"), vb.methods.WeightOnly(bits=2, rounding="second_order")
    for used in (data, data.reload(calibration=32), data.reload(train=100)):
        vb.measure(vb.compress_cached(base, gptq, used).path, data, run, what=("accuracy",))
        vb.measure(vb.compress_cached(base, vb.methods.DynamicInt8(), used).path, data, run, what=("accuracy",))
    models = vb.rows.Experiment.of(run.rows()).rows.drop_duplicates("label")
    images = [row["config"]["methods"][0].get("images") for _, row in models.iterrows()]
    assert [each and {**each, "fingerprint": ""} for each in images] == [
        None,
        None,  # dynamic int8 needs no images, so it is one model
        {"fingerprint": "", "calibration": 32},
        {"fingerprint": "", "train": 100},
    ]
    checks = verify(run.rows(), data, models=0, metrics=["top1"])
    assert [check.measured for check in checks] == [check.row["value"] for check in checks]
    models["config"] = [
        json.loads(json.dumps(config).replace('"train": 100', '"train": 99')) for config in models["config"]
    ]
    with pytest.raises(InputError, match="used other images .* than can be cut from digits"):
        verify(models, data, models=0, metrics=["top1"])


def test_what_cannot_be_made_again(kept, digits):
    rows = load_records(kept)
    with pytest.raises(InputError, match="no row of .* is on these images"):
        verify(rows, digits)
    data = open_data("digits", "", SMALL["datasets"][0]["splits"])
    with pytest.raises(InputError, match="unknown method among the rows 'uct'"):
        verify(rows, data, only=["uct"])
    with pytest.raises(InputError, match="unknown metric 'speed'"):
        verify(rows, data, metrics=["speed"])
    rows["config"] = [config | {"origin": config["origin"] | {"start": "w.safetensors:1"}} for config in rows["config"]]
    with pytest.raises(InputError, match="starts from w.safetensors:1, and this one from random"):
        verify(rows, data)


def test_committed_rows_come_out_again(capsys):
    """The reference rows of the quick run: the first baseline, and what was rounded to int8 without training."""
    folder = str(ROOT / "results" / "reference" / "digits-quick")
    assert main(["verify", folder, "--only", "baseline", "dynamic_int8", "--models", "2"]) == 0, capsys.readouterr().out
