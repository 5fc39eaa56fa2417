"""What is measured of a device: a process's memory and start, limits of memory, energy counters, the machine's own peaks."""

import os
import sys
import types

import pytest

from tests.edge.test_edge import needs_onnx
from vitbench.base.errors import InputError
from vitbench.measurement import energy, fresh, limits, roofline
from vitbench.measurement.child import ChildError
from vitbench.measurement.cost import count_int8_macs, count_macs
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import compress, make_config
from vitbench.rows.runs import Run

HOLD = "held = bytearray({}); held[::4096] = b'1' * len(held[::4096])"
needs_limits = pytest.mark.skipif(bool(limits.unsupported_reason()), reason="no limit of memory can be set here")


@pytest.mark.slow
@needs_onnx
def test_without_pytorch_a_process_is_smaller_and_sooner(base, digits, tmp_path):
    run = Run(tmp_path)
    rows = measure(base.path, digits, run, what=("memory", "startup"), backend="onnxruntime").set_index("metric")
    assert set(rows["status"]) == {"ok"}
    eager = measure(base.path, digits, run, what=("memory", "startup")).set_index("metric")
    assert 4 * rows.loc["peak_rss", "value"] < eager.loc["peak_rss", "value"]
    assert 4 * rows.loc["cold_start", "value"] < eager.loc["cold_start", "value"]
    for found in (rows, eager):
        assert 0 < found.loc["load_time", "value"] < found.loc["cold_start", "value"]
        assert found.loc["import_rss", "value"] <= found.loc["peak_rss", "value"]
    assert len(rows.loc["cold_start", "samples"]) == 5
    assert 3 <= len(eager.loc["cold_start", "samples"]) <= 5  # each of these takes seconds


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(ChildError, match="InputError"):
        fresh.run_inference([sys.executable, "-m", "vitbench.measurement.fresh", str(tmp_path), "eager", "1"], 1)


@pytest.mark.slow
@needs_limits
def test_the_smallest_limit_is_about_what_a_process_holds():
    command = [sys.executable, "-c", HOLD.format(60_000_000)]
    least = limits.smallest_limit(command, 100_000_000, dict(os.environ))
    assert 60e6 < least < 85e6
    assert limits.runs_within(command, 2 * least, dict(os.environ))
    assert not limits.runs_within(command, 40_000_000, dict(os.environ))


@needs_limits
def test_limits_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="too small to start Python"):
        limits.runs_within([sys.executable, "-c", "pass"], 200_000, dict(os.environ))
    with pytest.raises(InputError, match="the limit is not the cause"):
        limits.smallest_limit([sys.executable, "-c", "raise SystemExit(1)"], 1_000_000, dict(os.environ))


@pytest.mark.slow
@needs_limits
@needs_onnx
def test_whether_a_model_answers_within_a_stated_limit(base, digits, tmp_path):
    run = Run(tmp_path)
    for within, wanted in ((300_000_000, 1.0), (12_000_000, 0.0)):
        rows = measure(base.path, digits, run, what=("limit",), backend="onnxruntime", within=within)
        assert list(rows["metric"]) == ["answers_within"]
        assert rows["value"].iloc[0] == wanted
    with pytest.raises(InputError, match="too small to start Python"):
        measure(base.path, digits, run, what=("limit",), backend="onnxruntime", within=1000)


def zone(folder, name, kind, joules, whole=1000.0):
    place = folder / name
    place.mkdir(exist_ok=True)
    for file, value in (
        ("name", kind),
        ("energy_uj", f"{joules * 1e6:.0f}"),
        ("max_energy_range_uj", f"{whole * 1e6:.0f}"),
    ):
        (place / file).write_text(f"{value}\n")


def test_rapl_counts_packages_once_and_wraps_around(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.meter("eager") is None
    assert "no energy counter" in energy.unsupported_reason("eager", 0)
    assert energy.unsupported_reason("eager", 5) == ""
    for name, kind, joules in (
        ("intel-rapl:0", "package-0", 10),
        ("intel-rapl:1", "package-1", 999),
        ("intel-rapl:0:0", "core", 5),
        ("intel-rapl:2", "psys", 50),
        ("intel-rapl-mmio:0", "package-0", 10),
    ):
        zone(tmp_path, name, kind, joules)
    meter = energy.meter("eager")
    before = meter.read()
    zone(tmp_path, "intel-rapl:0", "package-0", 13)
    zone(tmp_path, "intel-rapl:1", "package-1", 1)  # went past 1000
    assert meter.joules_between(before, meter.read()) == pytest.approx(3 + 2, abs=1e-3)


def test_nvml_counts_the_card(monkeypatch):
    counts = iter((5000, 5000, 7500))
    card = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counts),
    )
    monkeypatch.setitem(sys.modules, "pynvml", card)
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: True)
    meter = energy.meter("cuda")
    assert meter.joules_between(meter.read(), meter.read()) == pytest.approx(2.5)


def test_energy_is_estimated_only_from_a_stated_power(base, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    run = Run(tmp_path / "run")
    none = measure(base.path, digits, run, what=("energy",)).iloc[-1]
    assert none["status"] == "skipped"
    assert "power=WATTS" in none["error"]
    monkeypatch.setattr(energy, "in_child", lambda *_, **__: {"joules": 0, "seconds": 5.0, "answers": 50, "source": ""})
    found = measure(base.path, digits, run, what=("energy",), power=12.0).iloc[-1]
    assert found["value"] == pytest.approx(12 * 5 / 50)
    assert found["source"].startswith("estimated: a stated 12 W")
    with pytest.raises(InputError, match="power = -1"):
        measure(base.path, digits, run, what=("energy",), power=-1)


def test_the_floor_is_the_longer_of_products_and_bytes():
    peaks = {"float_macs": 1e9, "int8_macs": 4e9, "memory_bandwidth": 1e10}
    assert roofline.latency_floor(1e9, 4e9, 1e6, peaks, 1) == pytest.approx(2000)
    assert roofline.latency_floor(1e9, 4e9, 1e6, peaks, 8) == pytest.approx(16000)
    assert roofline.latency_floor(1e6, 0, 1e9, peaks, 1) == pytest.approx(100)


def test_products_of_codes_are_counted(base, digits):
    small = compress(base.model, make_config("dynamic_int8"), digits).model
    assert count_int8_macs(base.model) == 0
    width, tokens = 64, 17
    assert count_int8_macs(small) == 4 * tokens * 12 * width**2 < count_macs(small)


@pytest.mark.slow
def test_measured_peaks_are_a_floor(base, digits, tmp_path):
    rows = measure(base.path, digits, Run(tmp_path), what=("latency", "roofline"), batches=[8], rounds=10, threads=1)
    values = rows.drop_duplicates("metric", keep="last").set_index("metric")["value"]
    assert 0 < values["latency_floor"] < values["latency_p50"]
    assert 0 < values["products_time"] < values["latency_p50"]
