"""Sweeps: what a file stands for, and that cells are done once whatever happens to those who do them."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import yaml

from tests.conftest import ROOT
from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.rows import records
from vitbench.rows.records import Row, read_rows
from vitbench.rows.runs import Run
from vitbench.run.sweep import drive, worker
from vitbench.run.sweep.drive import estimate_sweep, sweep_status
from vitbench.run.sweep.executors import open_workers
from vitbench.run.sweep.grid import Cell, cells, parse_sweep, read_sweep_file

SMALL = {
    "models": ["vit_mini_patch2_8"],
    "datasets": [{"dataset": "digits", "splits": {"train": 128, "val": 32, "test": 64, "calibration": 32}}],
    "train": {"epochs": 1, "batch_size": 64, "warmup_epochs": 0},
    "methods": ["baseline", {"weight_only": {"bits": [2, 4, 8], "rounding": "nearest"}}],
}


def names(sweep):
    return [cell.method for cell in cells(parse_sweep(sweep))]


def test_a_list_in_place_of_a_value_stands_for_as_many_cells():
    sweep = SMALL | {
        "seeds": [0, 1],
        "methods": ["dynamic_int8", {"weight_only": {"bits": [2, 4], "group": [None, 32]}}],
    }
    assert names(sweep) == ["dynamic_int8", *["weight_only"] * 4] * 2
    settings = [cell.steps[0].config for cell in cells(parse_sweep(sweep))[1:5]]
    assert [(each["bits"], each["group"]) for each in settings] == [(2, None), (2, 32), (4, None), (4, 32)]


def test_combinations_keep_their_order_and_a_list_valued_setting_takes_a_list_of_lists():
    both = [{"pruning": {"neurons": [0.2, 0.4]}}, {"weight_only": {"layers": [["qkv"], ["fc1", "fc2"]]}}]
    found = cells(parse_sweep(SMALL | {"methods": [both, {"weight_only": {"layers": ["qkv", "proj"]}}]}))
    assert [cell.method for cell in found] == ["pruning+weight_only"] * 4 + ["weight_only"]
    assert [cell.steps[-1].config["layers"] for cell in found] == [["qkv"], ["fc1", "fc2"]] * 2 + [["qkv", "proj"]]


def test_a_seed_is_that_of_all_that_draws_and_of_nothing_else():
    trained = {"lsq": {"train": {"epochs": 1}}}
    found = cells(parse_sweep(SMALL | {"seeds": [0, 7], "methods": [trained]}))
    assert [(cell.train.seed, cell.steps[0].config["train"]["seed"]) for cell in found] == [(0, 0), (7, 7)]
    asis = SMALL | {"train": {"epochs": 0}, "seeds": [0, 7], "methods": [{"lsq": {"train": {"epochs": 0}}}]}
    assert len(cells(parse_sweep(asis))) == 1


def test_a_key_is_that_of_the_content():
    first, second = cells(parse_sweep(SMALL))[:2]
    assert first.key != second.key
    assert first.base == second.base
    assert first.key == Cell(**first.to_dict()).key
    assert first.key != first.replace(fingerprint="0").key


BAD = [
    ({"models": []}, "models"),
    ({"modles": ["a"]}, "unknown key 'modles'"),
    ({"methods": ["dynamic_int9"]}, "did you mean 'dynamic_int8'"),
    ({"methods": [7]}, "neither a method's name nor a mapping"),
    ({"methods": [["baseline", "dynamic_int8"]]}, "it stands alone"),
    ({"methods": [{"weight_only": 4}]}, "not a mapping of settings"),
    ({"methods": [{"weight_only": {"bits": []}}]}, "give at least one value"),
    ({"methods": [{"weight_only": {"bits": 40}}]}, "bits = 40"),
    ({"methods": [{"weight_only": {"bitz": 4}}]}, "unknown key 'bitz'"),
    ({"train": {"epochs": -1}}, "epochs = -1"),
    ({"train": {"epoch": 1}}, "unknown key 'epoch'"),
    ({"seeds": []}, "seeds"),
    ({"seconds": 0}, "seconds = 0"),
    ({"retries": -1}, "retries = -1"),
    ({"measures": {"what": ["speed"]}}, "unknown group of metrics 'speed'"),
    ({"measures": {"threads": 0}}, "threads = 0"),
    ({"measures": {"backend": "openvine"}}, "did you mean 'openvino'"),
    ({"measures": {"versus_backend": ["fast"]}}, "unknown backend 'fast'"),
    ({"resources": {"GPU": 0}}, "give an amount above 0"),
    ({"datasets": [{"dataset": "digits", "split": {}}]}, "unknown key 'datasets.0.split'|unknown key"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_wrong_file_is_refused_before_anything_starts(changes, message):
    with pytest.raises(InputError, match=message):
        cells(parse_sweep(SMALL | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["vit_nope"]}, "vit_nope"),
        ({"datasets": ["/not/there"]}, "/not/there"),
        ({"datasets": [{"dataset": "digits", "splits": {"tests": 1}}]}, "unknown key of splits"),
        ({"train": {"epochs": 0}}, "random head"),
        ({"models": [{"name": "vit_mini_patch2_8", "checkpoint": "no.safetensors"}]}, "no.safetensors"),
    ],
)
def test_every_cell_is_checked_against_its_model_and_images(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        drive.plan(parse_sweep(SMALL | changes), Run(tmp_path))


def swept(tmp_path, sweep=SMALL, workers=1, scheduler=""):
    run = Run(tmp_path / "rows")
    return drive.run_sweep(drive.plan(parse_sweep(sweep), run), run, workers, scheduler), run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return swept(tmp_path_factory.mktemp("sweep"), workers=2)


@pytest.mark.slow
def test_every_cell_has_its_rows(done):
    outcome, run = done
    assert dict(outcome) == {"finished before": 0, "done": 4}
    rows = read_rows(run.records)
    assert sorted(
        row.config["methods"][0]["config"]["bits"] for row in rows if row.metric == "top1" and row.config["methods"]
    ) == [2, 4, 8]
    assert len({row.key for row in rows}) == len(rows)
    assert {row.env_id for row in rows} == {path.stem for path in (run.folder / "environments").glob("*.json")}


@pytest.mark.slow
def test_a_finished_cell_is_not_run_again_and_what_is_left_is_told(done, tmp_path):
    _, run = done
    again = drive.plan(parse_sweep(SMALL), run)
    assert again.remaining == []
    more = drive.plan(parse_sweep(SMALL | {"seeds": [0, 1]}), run)
    assert len(more.remaining) == 4
    expected = estimate_sweep(more, run)
    assert 0 < expected.seconds < 600
    assert 1e5 < expected.bytes < 1e8
    assert estimate_sweep(drive.plan(parse_sweep(SMALL), Run(tmp_path)), Run(tmp_path)).seconds is None
    assert sweep_status(run.folder).startswith("4 cells: 4 done, 0 failed, 0 left\nno run is at work here")


@pytest.mark.slow
def test_a_cell_that_fails_is_a_row_and_does_not_stop_the_others(tmp_path):
    sweep = SMALL | {"methods": [{"uct": {"rank": 10_000, "start": "weights", "train": {"epochs": 0}}}, "baseline"]}
    outcome, run = swept(tmp_path, sweep)
    assert dict(outcome) == {"finished before": 0, "failed": 1, "done": 1}
    (failed,) = (row for row in drive.latest_cell_rows(run.records) if row.status == "failed")
    assert "rank" in failed.error
    assert "Traceback" in (run.folder / "errors" / f"{failed.context['cell']}.txt").read_text()


@pytest.mark.slow
def test_a_baseline_that_fails_fails_its_cells(tmp_path):
    outcome, run = swept(tmp_path, SMALL | {"train": {"epochs": 1, "batch_size": 4096}})
    assert dict(outcome) == {"finished before": 0, "failed": 4}
    assert all(
        "its baseline: InputError: batch_size = 4096" in row.error for row in drive.latest_cell_rows(run.records)
    )


@pytest.mark.slow
def test_a_cell_that_hangs_is_stopped_and_its_neighbours_are_done(tmp_path, monkeypatch):
    usual = worker.Worker.run

    def slow(self, request, seconds):
        steps = request["cell"]["steps"]
        return usual(self, request, 0.05 if steps and steps[0]["config"]["bits"] == 4 else seconds)

    monkeypatch.setattr(worker.Worker, "run", slow)
    outcome, run = swept(tmp_path)
    assert (outcome["done"], outcome["failed"]) == (3, 1)
    (failed,) = (row for row in drive.latest_cell_rows(run.records) if row.status == "failed")
    assert failed.error == "took more than 0.05 s and was stopped"


def sweep_workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "vitbench.run.sweep.worker" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_killed_workers_lose_and_double_nothing(tmp_path):
    run, killed, stop = Run(tmp_path / "rows"), [], threading.Event()
    found = drive.plan(parse_sweep(SMALL | {"retries": 20, "seeds": [0, 1]}), run)

    def kill():
        while not stop.wait(0.3) and len(killed) < 4:
            for process in sweep_workers()[:1]:
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = drive.run_sweep(found, run, workers=2)
    stop.set()
    killer.join()
    assert killed
    assert outcome["done"] == 8
    assert len([row for row in read_rows(run.records) if row.metric == drive.CELL_METRIC]) == 8


def test_a_cell_whose_worker_always_dies_fails_in_the_end(tmp_path, monkeypatch):
    def die(self, request, seconds):
        raise worker.WorkerDied("the worker died: it was ended by signal 9 (out of memory?)")

    monkeypatch.setattr(worker.Worker, "run", die)
    outcome, run = swept(tmp_path, SMALL | {"retries": 1})
    assert outcome["failed"] == 4
    assert all("out of memory?); tried 2 times" in row.error for row in drive.latest_cell_rows(run.records))


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_goes_on(tmp_path):
    file = tmp_path / "ä sweep's.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    out = tmp_path / "rows of ä"
    command = [sys.executable, "-m", "vitbench.cli", "run", str(file), "--out", str(out)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not drive.latest_cell_rows(out / "records.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = sweep_workers()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    psutil.wait_procs(workers, timeout=10)
    assert not any(process.is_running() for process in workers)
    before = len(drive.latest_cell_rows(out / "records.jsonl"))
    assert "`vitbench run` of the same file takes up" in sweep_status(out)
    assert main(["run", str(file), "--out", str(out)]) == 0
    rows = [row for row in read_rows(out / "records.jsonl") if row.metric == drive.CELL_METRIC]
    assert before >= 1
    assert len(rows) == 4


def test_two_sweeps_in_one_folder(tmp_path):
    from vitbench.base.locks import locked

    run = Run(tmp_path)
    found = drive.plan(parse_sweep(SMALL), run)
    with locked(run.folder / "sweep.lock"), pytest.raises(InputError, match="another sweep is at work"):
        drive.run_sweep(found, run)


@pytest.mark.slow
def test_a_worker_runs_requests_in_one_process_until_it_dies():
    own = worker.Worker()
    request = {"what": "base", "cell": {"no": "cell"}, "threads": 1}
    try:
        first, second = own.run(request, 60), own.run(request, 60)
        assert first["starting"] > second["starting"] == 0
        assert "Cell: " in first["error"]
        own.process.process.kill()
        own.process.process.wait()
        assert own.run(request, 60)["starting"] > 0
    finally:
        own.close()


def test_workers_fit_into_memory():
    with open_workers("", 3, {"memory": psutil.virtual_memory().total / 2.5}) as engine:
        assert engine.alive()
    with pytest.raises(InputError, match="a cell needs memory = 1e"):
        open_workers("", 1, {"memory": 1e18})
    with pytest.raises(InputError, match="unknown resource of this machine 'TPU'"):
        open_workers("", 1, {"TPU": 1})


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"methods": ["baseline"]}))
    assert read_sweep_file(file)
    assert not read_sweep_file(ROOT / "notebooks" / "profiles" / "quick.yaml")
    out = str(tmp_path / "out")
    assert main(["run", str(file), "--out", out, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 cells, 0 of them finished before" in said
    assert "GB are free" in said
    assert "nothing to go by" in said
    assert main(["run", str(file), "--out", out]) == 0
    assert "1 done, 0 finished before, 0 failed" in capsys.readouterr().out
    assert main(["status", out]) == 0
    assert capsys.readouterr().out.startswith("1 cells: 1 done")
    assert main(["run", str(file), "--out", out, "--only", "01"]) == 2
    assert "--only is for notebooks" in capsys.readouterr().err
    assert main(["run", "quick", "--dry-run"]) == 2
    assert "are for sweeps" in capsys.readouterr().err
    assert main(["run", str(file), "--out", out, "--scheduler", "slrum"]) == 2
    assert "did you mean 'slurm'" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / drive.STATE_FILE).read_text())["busy"] == []


def test_the_benchmarks_sweep_has_200_cells():
    assert len(cells(parse_sweep(yaml.safe_load((ROOT / "benchmarks" / "sweep_digits.yaml").read_text())))) == 200


@pytest.mark.slow
def test_a_dask_cluster_does_the_same(tmp_path):
    pytest.importorskip("distributed", reason="the dask extra is not installed")
    outcome, run = swept(tmp_path, SMALL, workers=1, scheduler="dask")
    assert outcome["done"] == 4
    with pytest.raises(InputError, match="does not answer"):
        drive.run_sweep(drive.plan(parse_sweep(SMALL | {"seeds": [1]}), run), run, 1, "tcp://127.0.0.1:1")
    with pytest.raises(InputError, match="unknown scheduler 'slrum' .did you mean 'slurm'"):
        open_workers("slrum", 1, {}).__enter__()


@pytest.fixture
def cluster(tmp_path):
    """`cluster("scheduler")` and `cluster("worker")` start a process of a Dask cluster, at one address."""
    pytest.importorskip("distributed", reason="the dask extra is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, started = f"tcp://127.0.0.1:{port}", []
    own = {
        "scheduler": ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
        "worker": [address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path / "dask")],
    }

    def start(kind):
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *own[kind]]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    start.address = address
    yield start
    for process in started:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else ():
            each.kill()
        process.wait()


@pytest.mark.slow
def test_a_scheduler_that_is_killed_and_comes_back(cluster, tmp_path):
    first, run = cluster("scheduler"), Run(tmp_path / "rows")
    cluster("worker")
    found = drive.plan(parse_sweep(SMALL | {"seeds": [0, 1]}), run)
    outcome = []
    sweep = threading.Thread(target=lambda: outcome.append(drive.run_sweep(found, run, 1, cluster.address)))
    sweep.start()
    deadline = time.monotonic() + 120
    while not drive.latest_cell_rows(run.records) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    before = len(drive.latest_cell_rows(run.records))
    cluster("scheduler")
    cluster("worker")
    sweep.join(timeout=180)
    assert 1 <= before < 8
    assert outcome[0]["done"] == 8
    assert len([row for row in read_rows(run.records) if row.metric == drive.CELL_METRIC]) == 8


@pytest.mark.slow
def test_a_full_disk_ends_the_sweep_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(SMALL))
    usual, room = records.append_bytes, [2]

    def append(path, lines):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(records, "append_bytes", append)
        assert main(["run", str(file), "--out", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert len(drive.latest_cell_rows(out / "records.jsonl")) == 2
    assert not sweep_workers()
    assert main(["run", str(file), "--out", str(out)]) == 0
    assert "2 done, 2 finished before, 0 failed" in capsys.readouterr().out


def test_a_clock_that_goes_back_changes_nothing(tmp_path):
    run = Run(tmp_path)
    facts = {"model": "m", "dataset": "d", "data_fingerprint": "f", "method": "baseline", "metric": "top1"}
    later = Row(**facts, value=0.5, source="measured: x", context={"artifact": "new"}).with_provenance()
    earlier = (
        later.replace(value=0.4, context={"artifact": "old"}, key="")
        .with_provenance()
        .replace(time="2031-01-01T00:00:00+00:00")
    )
    run.append([earlier])
    run.append([later.replace(time="2001-01-01T00:00:00+00:00")])
    assert list(run.rows()["value"]) == [0.5]


@pytest.mark.slow
def test_nothing_is_written_beside_the_sources(tmp_path):
    """Rows, models and caches go below the results folder and `VITBENCH_HOME`, and nothing beside the sources."""
    before = {
        path: path.stat().st_mtime_ns for path in (ROOT / "vitbench").rglob("*") if "__pycache__" not in path.parts
    }
    swept(tmp_path, SMALL | {"methods": ["baseline"], "seeds": [9]})
    after = {
        path: path.stat().st_mtime_ns for path in (ROOT / "vitbench").rglob("*") if "__pycache__" not in path.parts
    }
    assert before == after


@pytest.mark.slow
def test_the_same_sweep_in_another_place_gives_the_same_files_and_accuracies(tmp_path):
    sweep = SMALL | {
        "methods": [{"weight_only": {"bits": 2, "rounding": "second_order", "train": {"epochs": 1, "batch_size": 64}}}]
    }
    found = []
    for place in ("here", "there"):
        file = tmp_path / f"{place}.yaml"
        file.write_text(yaml.safe_dump(sweep))
        command = [sys.executable, "-m", "vitbench.cli", "run", str(file), "--out", str(tmp_path / place / "rows")]
        subprocess.run(
            command, env=os.environ | {"VITBENCH_HOME": str(tmp_path / place)}, check=True, capture_output=True
        )
        rows = read_rows(tmp_path / place / "rows")
        found.append({row.key: row.value for row in rows if row.metric in ("top1", "bytes")})
        assert all(len(row.context["artifact"]) == 12 for row in rows if row.metric == "top1")
    assert found[0] == found[1]
    assert len(found[0]) == 2
