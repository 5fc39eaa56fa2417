"""Other devices: the profiles' constants, the model of one inference, bytes through a limiter, bundles there and back."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from vitbench import cli
from vitbench.base.errors import InputError
from vitbench.edge import figures as edge_figures, rows as edge_rows
from vitbench.edge.bundle import import_answers, make_bundle
from vitbench.edge.model import Deployment, Workload, cost, load_profiles, weights_location
from vitbench.edge.rows import stream
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact
from vitbench.rows.records import read_rows
from vitbench.rows.row_table import load_records
from vitbench.rows.runs import Run

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra onnx is not installed",
)
PROFILES = load_profiles()
PI, LTE = PROFILES.device("raspberry_pi_5"), PROFILES.link("lte")
BIG = Workload(bytes=3.3e8, resident_bytes=3.5e8, float_macs=17.6e9)


def test_every_constant_has_a_source_and_a_basis():
    constants = [value for group in (PROFILES.devices, PROFILES.links) for one in group.values() for _, value in one]
    constants = [value for value in constants if not isinstance(value, str)]
    assert len(constants) >= 70
    assert all(len(value.source) > 7 and value.basis for value in constants)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: {toy: {title: Toy}}", "devices.toy = .* key 'memory' is missing"),
        (
            "links: {string: {title: String, bandwidth: {value: -1, basis: assumed, source: none}}}",
            "bandwidth = .* value = -1: Input should be greater than 0",
        ),
        ("devices: 3", "each a mapping"),
        ("boards: {}", "unknown group of profiles 'boards'; allowed: devices, links, operations"),
        ("devices: [", "line 1, column 11: not valid YAML"),
    ],
)
def test_wrong_profiles_name_what_is_wrong(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_profiles(tmp_path / "own.yaml")


def test_own_profiles_are_added(tmp_path):
    link = {key: value.to_dict() if key != "title" else value for key, value in LTE}
    (tmp_path / "own.yaml").write_text(json.dumps({"links": {"mine": link}}))
    assert {"mine", "lte"} <= load_profiles(tmp_path / "own.yaml").links.keys()
    with pytest.raises(InputError, match=r"unknown link 'lta' \(did you mean 'lte'\?\)"):
        PROFILES.link("lta")


def test_weights_come_from_where_they_fit():
    assert weights_location(BIG, PI) == "memory"
    assert weights_location(BIG, PI, Deployment(memory=1e8)) == "storage"
    assert weights_location(BIG, PI, Deployment(memory=1e8, storage=1e8)) == "server"


def test_an_answer_by_hand():
    """T = latency + bytes / bandwidth, bytes / storage, MACs / (MACs/s); E on a board is the radio's and power x time."""
    held = cost(BIG, PI, LTE, PROFILES.operations)
    assert held.time == {"transfer": 0, "load": 0, "infer": pytest.approx(17.6e9 / 37.9e9)}
    assert held.joules == pytest.approx(9.7 * 17.6 / 37.9)
    first = cost(BIG, PI, LTE, PROFILES.operations, Deployment(first=True))
    assert first.time["transfer"] == pytest.approx(0.055 + 3.3e8 / 2.66e6)
    assert first.time["load"] == pytest.approx(3.3e8 / 85e6)
    assert first.energy["transfer"] == pytest.approx(12.3 + 3.3e8 * 9e-7 + 2.8 * first.time["transfer"])
    chip = cost(BIG, PI, LTE, PROFILES.operations, Deployment(energy="operations"))
    assert chip.joules == pytest.approx(17.6e9 * 4.6e-12 + 3.3e8 * 1.6e-10)
    bound = Workload(bytes=4.81e9, resident_bytes=1.0, float_macs=1.0)
    assert cost(bound, PI, LTE, PROFILES.operations).seconds == pytest.approx(1.0), "every byte comes from memory once"


@pytest.mark.slow
def test_a_transfer_takes_what_the_model_says_over_three_orders_of_magnitude():
    link = PROFILES.link("wifi")
    for count in (10_000, 100_000, 1_000_000, 10_000_000):
        wanted = link.latency.value + count / link.bandwidth.value
        found = min(
            stream(bytes(count), link) for _ in range(10 if count < 1_000_000 else 3)
        )  # the machine may be busy
        assert found == pytest.approx(wanted, rel=0.1, abs=1e-3), f"{count} bytes"  # a sleep may end a millisecond late
    with pytest.raises(InputError, match="nothing to stream"):
        stream(b"", link)


@pytest.fixture(scope="module")
def measured(base, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edge")
    small = artifact.save(compress(base.model, make_config("dynamic_int8"), digits).model, folder / "int8")
    run = Run(folder / "run")
    for path in (base.path, small):
        measure(path, digits, run, versus=base.path, what=("accuracy", "size", "memory"))
    return run, small


def test_a_figure_of_rows_that_hold_nothing_modelled():
    rows = load_records(ROOT / "results" / "reference" / "edge-deit-base")
    with pytest.raises(InputError, match="the rows hold no edge_time with link = lte, first = False, memory = None"):
        edge_figures.fit_heatmap(rows, PROFILES, "lte")


@pytest.mark.slow
def test_modelled_rows_follow_from_measured_ones(measured, capsys):
    run, _ = measured
    made = edge_rows.modelled(run.rows(), PROFILES, ["raspberry_pi_5"], ["lte"], Deployment(memory=4e5, storage=0))
    found = {(row.method, row.metric): row for row in made}
    assert "weights from server" in found["baseline", "edge_time"].source
    assert "weights from memory" in found["dynamic_int8", "edge_time"].source
    assert all(row.value == pytest.approx(sum(row.samples)) and row.source.startswith("modelled") for row in made)
    assert edge_rows.workloads(run.rows())["dynamic_int8"].int8_macs > 0
    other = PROFILES.replace(links={"lte": LTE.replace(latency=LTE.latency.replace(value=9.0)).to_dict()})
    again = edge_rows.modelled(run.rows(), other, ["raspberry_pi_5"], ["lte"], Deployment(memory=4e5, storage=0))
    assert {row.compute_key() for row in made}.isdisjoint(row.compute_key() for row in again), (
        "other constants, other rows"
    )
    folder = str(run.folder)
    assert cli.main(["edge", folder, "--devices", "raspberry_pi_5", "--links", "lte"]) == 0
    assert "raspberry_pi_5" in capsys.readouterr().out
    assert cli.main(["edge", folder, "--devices", "raspberry_pi_6"]) == 2
    assert cli.main(["edge", folder, "--profiles", "/nowhere.yaml"]) == 2


@pytest.mark.slow
@needs_onnx
def test_a_bundle_goes_to_a_device_and_its_answers_come_back(measured, base, digits, tmp_path):
    run, small = measured
    bundle = make_bundle([base.path, small], tmp_path / "bundle", digits, runtimes=["onnxruntime"], rows=run.folder)
    with pytest.raises(InputError, match="run measure.py on the device"):
        import_answers(bundle, tmp_path / "board")
    # -I: nothing but the folder and the packages; torch is blocked
    (bundle / "torch.py").write_text("raise ImportError('a device has no torch')")
    done = subprocess.run(
        [sys.executable, "measure.py", "--threads", "1", "--rounds", "10"],
        cwd=bundle,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # as in a lesson's kernel: its folder is not on Python's path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = import_answers(bundle, tmp_path / "board", "test board")
    rows = load_records(tmp_path / "board")
    assert count == 10 + 11, "the baseline has no ratio to itself"
    assert {"top1", "bytes", "latency_ratio", "peak_rss"} <= set(rows["metric"])
    timed = rows[rows["metric"] == "latency_p50"]
    assert set(timed["device"]) == {"cpu: test board"}
    assert len(timed["samples"].iloc[0]) == 10
    assert rows[rows["metric"] == "peak_rss"]["value"].max() < 90e6
    with pytest.raises(InputError, match="give another --out"):
        import_answers(bundle, tmp_path / "board", "another board")
    answers = json.loads((bundle / "answers.json").read_text())
    answers["results"][0]["load"] = []
    (bundle / "answers.json").write_text(json.dumps(answers))
    import_answers(bundle, tmp_path / "torn")
    torn = load_records(tmp_path / "torn")
    assert set(torn[torn["status"] == "failed"]["error"]) == {"the device's result has no load"}
    assert (torn["status"] == "ok").sum() == (rows["status"] == "ok").sum() - 10
    for change, message in (({"schema_version": 99}, "schema version 99"), ({"bundle": "0"}, "is of bundle 0")):
        (bundle / "answers.json").write_text(json.dumps(answers | change))
        with pytest.raises(InputError, match=message):
            import_answers(bundle, tmp_path / "other")


@pytest.mark.slow
@needs_onnx
def test_a_damaged_bundle_is_refused_on_the_device(measured, base, tmp_path):
    bundle = make_bundle([base.path], tmp_path / "bundle")
    whole = tmp_path / "whole"
    shutil.copytree(bundle, whole)
    weights = next(bundle.glob("*.data"))
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    manifest = json.loads((whole / "bundle.json").read_text())
    (whole / "bundle.json").write_text(json.dumps(manifest | {"schema_version": 0}))
    for folder, message in ((bundle, "missing or damaged"), (whole, "schema version 0")):
        done = subprocess.run([sys.executable, "measure.py"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (folder / "answers.json").exists()


def test_what_cannot_be_bundled_says_why(base, tmp_path):
    with pytest.raises(
        InputError, match="a bundle runs without PyTorch, 'eager' does not; allowed: onnxruntime, openvino"
    ):
        make_bundle([base.path], tmp_path / "b", runtimes=["eager"])
    assert cli.main(["bundle", str(tmp_path), "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()
    assert cli.main(["adopt", str(tmp_path), "--out", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r" / "records.jsonl").exists() or not read_rows(tmp_path / "r")
