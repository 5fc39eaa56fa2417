"""Measurements: rows that are made once, intervals, timing in turn, memory of a fresh process."""

import copy
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from vitbench.base import processes
from vitbench.base.errors import InputError
from vitbench.data.batches import eval_batches
from vitbench.measurement import backends, child, timing
from vitbench.measurement.limits import peak_tensors
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.rows import statistics
from vitbench.rows.comparison_table import comparison, experiment_rows, find_row, paired_loss
from vitbench.rows.records import read_rows
from vitbench.rows.runs import Run
from vitbench.run.history import training_rows


@pytest.fixture(scope="module")
def measured(base, digits, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"))
    path = artifact.save(compress(base.model, make_config("dynamic_int8")).model, run.models / "int8")
    measure(base.path, digits, run, rounds=10, threads=1)
    rows = measure(path, digits, run, versus=base.path, rounds=10, threads=1)
    return run, path, rows


@pytest.mark.slow
def test_every_metric_has_its_row(measured):
    _, _, rows = measured
    assert set(rows["status"]) == {"ok"}
    counts = rows["metric"].value_counts()
    assert set(counts.index) >= {"top1", "top5", "params", "macs", "bytes", "latency_ratio", "peak_rss"}
    assert all(counts[f"latency_p{p}"] == 2 for p in (50, 90, 95, 99))
    assert set(rows["batch"].dropna()) == {1, 8}


@pytest.mark.slow
def test_values_make_sense(measured, base):
    _, path, rows = measured
    value = rows.set_index("metric")["value"]
    assert value["bytes"] == artifact.size_on_disk(path) <= 0.35 * artifact.size_on_disk(base.path)
    assert value["params"] == sum(p.numel() for p in base.model.parameters())
    assert value["bytes_predicted"] < value["bytes"]
    assert value["peak_rss"] >= value["import_rss"] > 1e8
    top1 = rows[rows.metric == "top1"].iloc[0]
    assert 0 <= top1.low <= top1.value <= top1.high <= 1
    timed = rows[(rows.metric == "latency_p50") & (rows.batch == 1)].iloc[0]
    assert len(timed.samples) == 10
    assert timed.value == pytest.approx(np.median(timed.samples))


@pytest.mark.slow
def test_the_cross_entropy_is_kept_image_by_image(measured, base, digits):
    rows = experiment_rows(measured[0].rows())
    own = find_row(rows, "baseline", "cross_entropy")
    x, y = (torch.cat(parts) for parts in zip(*eval_batches(digits.test, base.model.recipe.preprocess)))
    with torch.inference_mode():
        wanted = -base.model(x).log_softmax(1)[torch.arange(len(y)), y]
    assert own.samples == pytest.approx(wanted.tolist(), rel=0.01, abs=1e-5)
    assert own.value == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert own.low < own.value < own.high
    apart = paired_loss(rows, "dynamic_int8", "baseline")
    assert apart.low <= apart.difference <= apart.high
    with pytest.raises(InputError, match="no cross_entropy of 'uct'"):
        paired_loss(rows, "uct", "baseline")


def test_answers_that_are_no_numbers_are_a_failed_row(base, digits, tmp_path):
    broken = copy.deepcopy(base.model)
    broken.head.bias = torch.nn.Parameter(torch.full((10,), float("nan")))
    rows = measure(artifact.save(broken, tmp_path / "broken"), digits, Run(tmp_path / "run"), what=("accuracy",))
    assert set(rows["status"]) == {"failed"}
    assert rows["error"].str.contains("losses are not finite numbers").all()


@pytest.mark.slow
def test_the_same_again_measures_nothing(measured, base, digits, monkeypatch):
    run, path, rows = measured
    before = run.records.read_bytes()
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *_, **__: pytest.fail("measured again"))
    again = measure(path, digits, run, versus=base.path, rounds=10, threads=1)
    assert run.records.read_bytes() == before
    assert list(again["key"]) == list(rows["key"])


@pytest.mark.slow
def test_rows_name_their_environment_and_source(measured):
    run, _, rows = measured
    assert (run.folder / "environments" / f"{rows.iloc[0]['env_id']}.json").is_file()
    assert rows.iloc[0]["commit"]


def test_training_curves_are_rows(base, digits):
    rows = {row.metric: row for row in training_rows(base, digits)}
    assert len(rows["val_top1"].samples) == 10
    assert rows["train_loss"].value == base.history[-1]["loss"]


@pytest.mark.slow
def test_parts_and_errors_of_a_compressed_model(measured, base):
    _, path, rows = measured
    held = rows[rows.metric == "part_bytes"]
    assert held["value"].sum() == artifact.size_on_disk(path)
    (error,) = rows[rows.metric == "weight_error"].itertuples()
    assert len(error.samples) == len(error.context["layers"]) == 16
    assert min(error.samples) <= error.value <= max(error.samples)
    assert 0.001 < error.value < 0.02  # eight bits
    alive = rows.set_index("metric")["value"]["peak_tensors"]
    assert alive > artifact.size_on_disk(path) - 20_000


def test_tensors_alive_at_once_are_counted():
    class Chain(torch.nn.Module):
        def forward(self, x):
            for _ in range(5):
                x = x + 1  # the one before is let go
            return x.view(-1)

    x = torch.zeros(1000)
    assert peak_tensors(Chain(), x) == 3 * x.nbytes  # the input, and two in turn


def test_the_mean_over_seeds_and_its_interval():
    mean, low, high = statistics.mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert np.isnan(statistics.mean_interval([1.0])[1])


@pytest.mark.slow
def test_a_job_that_fails_becomes_failed_rows(base, digits, tmp_path, monkeypatch):
    run = Run(tmp_path)
    monkeypatch.setattr(child, "TIME_LIMIT", 0.01)
    measure(base.path, digits, run, what=("latency", "size"), batches=[1], rounds=10)
    status = {row.metric: (row.status, row.error) for row in read_rows(run.records)}
    assert status["bytes"][0] == "ok"
    assert status["latency_p50"][0] == "failed"
    assert "took more than" in status["latency_p50"][1]
    monkeypatch.setattr(child, "TIME_LIMIT", 600)
    rows = measure(base.path, digits, run, what=("latency",), batches=[1], rounds=10)
    assert set(rows["status"]) == {"ok"}


@pytest.mark.slow
def test_the_child_says_why_it_failed():
    with pytest.raises(child.ChildError, match="not a saved model"):
        child.in_child("count_joules", 1, path="/nowhere", backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["_forked", "_started"])
def test_a_job_s_process_is_forked_or_started(base, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(child, "_forked", getattr(child, kind))
    for _ in range(2):
        how = {"batch": 1, "rounds": 10, "exported": str(tmp_path)}
        found = child.in_child("time_models", 1, models=[[str(base.path), "eager"]], **how)
        assert len(found["timed"][0]["times"]) == 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked here")
def test_jobs_are_forked_from_one_process_and_get_another_when_that_is_gone():
    def run():
        return child.in_child("measure_peaks", 1)

    run()
    first = child._server
    run()
    assert child._server is first
    first._process.process.kill()
    first._process.process.wait()
    run()
    assert child._server is not first


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked here")
def test_who_asks_and_is_killed_leaves_no_process_behind(base):
    """Nor does an interrupt from the keyboard, which goes to all of its group, print anything."""
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from vitbench.measurement import child; "
    code = start + "child.in_child('time_models', 1, models=[[{!r}, 'eager']], batch=1, exported='', rounds={})"
    for rounds, end in ((10**7, signal.SIGKILL), (10, signal.SIGINT)):
        asking = subprocess.Popen(
            [sys.executable, "-c", code.format(str(base.path), rounds) + "; import time; print('timed', flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        )  # fmt: skip
        others = set()
        while len(others) < (2 if rounds > 10 else 1):
            others = set(psutil.Process(asking.pid).children(recursive=True))
            time.sleep(0.1)
        if rounds == 10:
            assert asking.stdout.readline() == "timed\n"
        os.killpg(asking.pid, end)
        said = asking.communicate(timeout=60)[1]
        psutil.wait_procs(others, timeout=30)
        assert not [other for other in others if other.is_running() and other.status() != psutil.STATUS_ZOMBIE]
        assert said.count("KeyboardInterrupt") == (end == signal.SIGINT)


def test_wrong_settings(base, digits, tmp_path):
    with pytest.raises(InputError, match="rounds = 3"):
        measure(base.path, digits, Run(tmp_path), rounds=3)
    with pytest.raises(InputError, match="unknown group of metrics 'speed'"):
        measure(base.path, digits, Run(tmp_path), what=("speed",))
    with pytest.raises(InputError, match="not a saved model"):
        measure(tmp_path, digits, Run(tmp_path))
    other = artifact.save(vit.create_model("vit_mini_patch2_8", num_classes=7), tmp_path / "seven")
    with pytest.raises(InputError, match="has 7 outputs and digits has 10 classes"):
        measure(other, digits, Run(tmp_path))


@pytest.mark.slow
def test_peak_memory_grows_with_what_is_held():
    """In a fresh process: this one's peak may lie far above what it holds now, and then nothing would be seen."""
    code = """
import torch
from vitbench.base.standalone import peak_bytes
before = peak_bytes()
held = torch.ones(100 * 2**20 // 4)
print(peak_bytes() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 90 * 2**20 < int(found.stdout) < 150 * 2**20


def test_wilson_against_a_known_interval():
    low, high = statistics.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert statistics.wilson(10, 10)[1] == 1.0


def test_the_ratio_is_inside_its_interval_and_sees_through_a_slow_spell_of_half_the_rounds():
    rng = np.random.default_rng(0)
    spell = np.where(np.arange(60) < 30, 3.0, 1.0)  # a ratio of the medians would be anywhere between the two halves
    b = spell * rng.normal(10, 0.3, 60)
    a = 0.5 * spell * rng.normal(10, 0.3, 60)
    ratio, low, high = statistics.quiet_latency_ratio(a, b)
    assert low <= ratio <= high
    assert high - low < 0.04
    assert ratio == pytest.approx(0.5, abs=0.02)


def test_a_ratio_is_that_of_the_undisturbed_rounds():
    """A spell that slows one of two models more than the other, in one run for a third of its rounds, in another for two thirds."""
    rng = np.random.default_rng(0)
    found = []
    for share in (0.33, 0.67):
        spell = np.arange(60) < share * 60
        a, b = (
            np.where(spell, slowed, 1) * rng.normal(base, 0.01 * base, 60) for slowed, base in ((2.0, 5), (1.3, 10))
        )
        assert (np.median(a / b) > 0.7) == (share > 0.5)
        found.append(statistics.quiet_latency_ratio(a, b)[0])
    assert found == pytest.approx([0.5, 0.5], abs=0.01)


def test_what_moves_a_whole_process_widens_the_interval_only_if_processes_are_told_apart():
    rng = np.random.default_rng(0)
    ratios = np.repeat([0.4, 0.5, 0.5, 0.6], 10) * rng.normal(1, 0.01, 40)
    b = 1 / np.sqrt(ratios)  # no process is quieter than another
    found = {starts: statistics.quiet_latency_ratio(ratios * b, b, starts) for starts in (1, 4)}
    widths = {starts: high - low for starts, (_, low, high) in found.items()}
    assert found[1][0] == found[4][0] == pytest.approx(0.5, abs=0.01)
    assert widths[1] < 0.02 < 0.08 < widths[4]


@pytest.mark.slow
def test_rounds_are_shared_by_several_processes(base, digits, tmp_path):
    run = Run(tmp_path)
    rows = measure(base.path, digits, run, versus=base.path, what=("latency",), batches=[1], rounds=10, starts=3)
    assert set(rows["status"]) == {"ok"}
    assert all(context["starts"] == 3 and context["rounds"] == 10 for context in rows["context"])
    ratio = rows.set_index("metric").loc["latency_ratio"]
    assert len(ratio["samples"]) == 12  # as many in each
    assert "12 calls in 3 fresh processes" in ratio["source"]
    with pytest.raises(InputError, match="starts = 11: more than rounds = 10"):
        measure(base.path, digits, run, what=("latency",), rounds=10, starts=11)


def test_a_model_that_fails_in_one_of_the_processes_has_no_time():
    fine = {"times": [1.0, 2.0], "logit_distance": 0.1, "tolerance": 1.0}
    assert timing._pool_starts([fine, "no memory"]) == "no memory"
    assert timing._pool_starts([fine, fine | {"times": [3.0], "logit_distance": 0.2}]) == timing.BackendTiming(
        [1.0, 3.0], 0.2, 1.0
    )


def test_pareto_front_by_hand():
    cost, gain = [3, 1, 2, 2, 5], [0.9, 0.5, 0.8, 0.7, 0.9]
    assert statistics.pareto_front(cost, gain).tolist() == [1, 2, 0]


def test_answers_come_back_from_their_digits():
    hits = np.random.default_rng(0).random(359) < 0.9
    assert (statistics.unpack_hits(statistics.pack_hits(hits), len(hits)) == hits).all()


def test_paired_means_against_t_by_hand():
    first, second = [1.0, 2.0, 4.0, 3.0], [0.5, 1.0, 2.5, 3.5]
    gaps = np.subtract(first, second)
    spread = gaps.std(ddof=1) / 2
    found = statistics.compare_means(first, second)
    assert found.difference == pytest.approx(gaps.mean())
    assert found.high - found.difference == pytest.approx(3.182446 * spread, rel=1e-5)  # t of 3 degrees at 97.5 %
    with pytest.raises(ValueError, match="not of the same images"):
        statistics.compare_means(first, second[:3])


def test_paired_answers_against_mcnemar_by_hand():
    first = np.array([1, 1, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    second = np.array([1, 1, 1, 0, 0, 0, 1, 0, 0, 0], bool)
    found = statistics.compare_hits(first, second)
    assert found.difference == pytest.approx(0.4)  # five gained, one lost
    assert found.p == pytest.approx(2 * (1 + 6) / 2**6)
    assert found.low < 0.4 < found.high
    assert statistics.compare_hits(first, first).p == 1.0
    with pytest.raises(ValueError, match="not of the same images"):
        statistics.compare_hits(first, second[:5])


@pytest.mark.slow
def test_accuracy_rows_hold_every_answer(measured, digits, base):
    _, _, rows = measured
    row = rows[rows["metric"] == "top1"].iloc[-1]
    hits = statistics.unpack_hits(row["hits"], row["context"]["images"])
    assert hits.mean() == pytest.approx(row["value"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_another_backend_answers_the_same_and_stands_in_columns_of_its_own(base, digits, tmp_path, backend):
    for module in backends.BACKENDS[backend].packages:
        pytest.importorskip(module, reason=f"the extra {backends.BACKENDS[backend].extra} is not installed")
    run = Run(tmp_path)
    rows = measure(base.path, digits, run, what=("latency",), batches=(1,), rounds=10, backend=backend)
    assert set(rows["status"]) == {"ok"}
    assert f"p50 ms b1 {backend}" in comparison(run.rows())


@pytest.mark.slow
def test_errors_of_outputs_layer_by_layer(base, digits, tmp_path):
    small = artifact.save(compress(base.model, make_config("mixed_rank", {"keep": 0.5}), digits).model, tmp_path / "s")
    run = Run(tmp_path)
    rows = measure(small, digits, run, versus=base.path, what=("outputs",)).set_index("metric")
    assert rows.loc["layer_keep", "value"] == pytest.approx(0.5, abs=0.02)
    names = rows.loc["output_error", "context"]["layers"]
    assert names[:4] == [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    errors = dict(zip(names, rows.loc["output_error", "samples"], strict=True))
    assert 0 < errors["blocks.0.attn.qkv"] < errors["blocks.3.mlp.fc2"] < 1, "errors grow with depth"
    same = measure(base.path, digits, run, versus=base.path, what=("outputs",)).set_index("metric")
    assert same.loc["output_error", "value"] == 0
    assert same.loc["layer_keep", "samples"] == [1.0] * 16


@pytest.mark.slow
def test_a_backend_that_cannot_run_a_model_says_why_in_its_row(measured, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "import_optional", lambda *_: None)
    rows = measure(measured[1], digits, Run(tmp_path), what=("latency",), batches=(1,), rounds=10, backend="openvino")
    assert set(rows["status"]) == {"skipped"}
    assert "openvino does not support DynamicInt8Linear" in rows.iloc[0]["error"]


def test_a_backend_with_another_answer_is_refused(base, monkeypatch):
    wrong = backends.Backend(lambda model, x: lambda images: model(images) + 1)
    monkeypatch.setitem(backends.BACKENDS, "wrong", wrong)
    with pytest.raises(RuntimeError, match="wrong differs from eager"):
        backends.prepare("wrong", base.model, torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="unknown backend 'turbo'; allowed: eager, cuda, torch_compile"):
        backends.require_backend("turbo")
