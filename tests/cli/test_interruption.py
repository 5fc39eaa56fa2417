"""Ctrl-C and SIGTERM: every long command ends within seconds, with its children, and goes on from what was finished."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from vitbench.base import store
from vitbench.cli import interrupts, main
from vitbench.edge import bundle
from vitbench.measurement import backends
from vitbench.model import artifact, vit
from vitbench.run.sweep import drive

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of this kind are not there")]

SECONDS = 5.0
MICRO = "vit_micro_patch2_8"
ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
SHORT = ["model=vit_micro_patch2_8", "train.epochs=1", "threads=1", "rounds=10"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return artifact.save(vit.create_model(MICRO), tmp_path_factory.mktemp("model") / "m")


if os.name == "posix":  # each command is a fork of one process that has imported what they import, which takes seconds
    SERVER = multiprocessing.get_context("forkserver")
    LONG = (
        "vitbench.training.loop",
        "vitbench.methods.registry",
        "vitbench.run.combinations",
        "vitbench.run.suite",
        "vitbench.figures.report",
    )
    SERVER.set_forkserver_preload([__name__, *LONG, "optuna", "papermill", "scipy.stats", "sklearn.datasets"])


def run(file, arguments, instead):
    """What a command's process does: its output goes to `file`, `instead` puts stand-ins for what it lacks."""
    os.setpgid(0, 0)
    said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if instead:
        instead()
    sys.exit(main(arguments))


class Command:
    """A command of vitbench in a process and a process group of its own; `said` is what it printed."""

    def __init__(self, folder, *arguments, instead=None):
        self.file = folder / "said.txt"
        self.file.touch()
        self.process = SERVER.Process(target=run, args=(self.file, list(map(str, arguments)), instead))
        self.process.start()

    @property
    def said(self):
        return self.file.read_text()

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def until(self, at_work, seconds=240):
        deadline = time.monotonic() + seconds
        while not at_work():
            assert self.process.is_alive(), f"it ended too early: {self.said}"
            assert time.monotonic() < deadline, f"it is not at work: {self.said}"
            time.sleep(0.05)

    def end(self, number):
        """Send a signal to its process group, as a terminal does; check that it ends with its children and one line."""
        children, start = self.children(), time.monotonic()
        os.killpg(self.process.pid, number)
        self.process.join(SECONDS)
        assert not self.process.is_alive(), f"still there after {SECONDS} s: {self.said}"
        _, alive = psutil.wait_procs(children, timeout=max(0.1, start + SECONDS - time.monotonic()))
        alive = [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        assert not alive, f"children are left: {alive}"
        assert "Traceback" not in self.said
        assert "the same command goes on from there" in self.said.splitlines()[-1]
        return self.process.exitcode


def kinds(children):
    """What each child was started for."""
    found = []
    for child in children:
        try:
            found.append(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return found


SIGNALS = pytest.mark.parametrize(("number", "status"), ENDS)


@SIGNALS
def test_measure(model, tmp_path, number, status):
    settings = ["--what", "latency", "--rounds", 1_000_000, "--threads", 1]
    ask = Command(tmp_path, "measure", model, *settings, "--out", tmp_path / "q")
    ask.until(lambda: len(ask.children()) == 2)  # the kept process, and the one that is timed
    assert ask.end(number) == status
    assert not (tmp_path / "q" / "records.jsonl").exists()


@SIGNALS
def test_training(model, tmp_path, number, status):
    settings = ["train.epochs=100000", "train.batch_size=256", "start=weights", "rank=8"]
    of = [model, "--method", "uct", "--dataset", "digits", "--set", *settings]
    ask = Command(tmp_path, "compress", *of, "--out", tmp_path / "m")
    ask.until(lambda: "step" in ask.said)
    assert ask.end(number) == status
    assert not [path for path in tmp_path.iterdir() if path.name != "said.txt"]


@SIGNALS
def test_a_search_of_policies_keeps_its_scores(model, tmp_path, home, number, status):
    def notes():
        return set(home.rglob("searches/*.jsonl"))

    settings = ["search.evaluations=100000", "search.how=random", f"search.seed={number}", "criterion.name=magnitude"]
    of = [model, "--method", "multidimensional", "--dataset", "digits", "--set", *settings, "tolerance=0.2"]
    before, ask = notes(), Command(tmp_path, "compress", *of, "--out", tmp_path / "m")
    ask.until(lambda: notes() - before)
    assert ask.end(number) == status
    (scores,) = notes() - before
    found, damaged = store.read_lines(scores)
    assert found
    assert not damaged
    assert not [path for path in tmp_path.iterdir() if path.name != "said.txt"]


@SIGNALS
def test_a_search_of_combinations_keeps_its_trials(model, tmp_path, number, status):
    settings = ["structures=[none]", "codes=[weight_only]", "settings.weight_only.rounding=nearest"]
    of = [model, "--dataset", "digits", "--budget", "bytes=0.5", "--trials", 100_000, "--set", *settings]
    ask = Command(tmp_path, "combine", *of, "--out", tmp_path / "m", "--record", tmp_path / "r")
    ask.until(lambda: list(tmp_path.glob("r/searches/*.jsonl")))
    assert ask.end(number) == status
    (trials,) = tmp_path.glob("r/searches/*.jsonl")
    found, damaged = store.read_lines(trials)
    assert found
    assert not damaged
    assert not (tmp_path / "m").exists()


def exports_for_ever():
    """In place of an export, which needs the extra onnx: half a model, and no end."""

    def export(folder, *_):
        (folder / "half.onnx").write_bytes(b"half")
        print("exported half", flush=True)
        time.sleep(600)

    bundle._export = export
    backends.require_backend = lambda name: None


@SIGNALS
def test_bundle_leaves_no_half_of_one(model, tmp_path, number, status):
    ask = Command(tmp_path, "bundle", model, "--out", tmp_path / "b", instead=exports_for_ever)
    ask.until(lambda: "exported half" in ask.said)
    assert ask.end(number) == status
    assert not [path for path in tmp_path.iterdir() if path.name != "said.txt"]


@SIGNALS
def test_a_sweep_keeps_its_finished_cells(tmp_path, number, status):
    cut = {"train": 128, "val": 32, "test": 64, "calibration": 32}
    sweep = {"models": [MICRO], "datasets": [{"dataset": "digits", "splits": cut}]}
    sweep |= {
        "train": {"epochs": 1, "batch_size": 64, "warmup_epochs": 0},
        "measures": {"what": ["accuracy"], "threads": 1},
    }
    sweep |= {"methods": [{"weight_only": {"bits": list(range(2, 9)), "group": [None, 16, 32, 64]}}]}
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(sweep))
    ask = Command(tmp_path, "run", file, "--out", out)
    ask.until(lambda: drive.latest_cell_rows(out / "records.jsonl"))
    assert any("vitbench.run.sweep.worker" in kind for kind in kinds(ask.children()))
    assert ask.end(number) == status
    assert {row.status for row in drive.latest_cell_rows(out / "records.jsonl")} == {"ok"}


@SIGNALS
def test_the_suite_starts_no_notebook_that_waits(tmp_path, number, status):
    ask = Command(tmp_path, "run", "quick", "--only", "02", "03", "04", "--set", *SHORT, "--out", tmp_path)
    folder = tmp_path / "notebooks"
    ask.until(lambda: list(folder.glob("*.running.ipynb")))
    assert ask.end(number) == status
    time.sleep(0.3)
    assert not list(folder.iterdir()), "half a notebook is left, or another one was started"


def test_a_second_signal_ends_at_once():
    """Also one that comes while the first is dealt with; without a second one the end comes when time is up."""
    code = (
        "import time\nfrom vitbench.cli import interrupts\n"
        "with interrupts.interruptible():\n"
        "    try:\n        print('at work', flush=True); time.sleep(60)\n"
        "    finally:\n        print('ending', flush=True); time.sleep(60)\n"
    )
    asked = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [ask.stdout.readline() for ask in asked] == ["at work\n"] * 2
    start = time.monotonic()
    for ask in asked:
        ask.send_signal(signal.SIGINT)
    time.sleep(interrupts.SAME_SECONDS + 0.3)
    asked[1].send_signal(signal.SIGTERM)
    for ask, most in ((asked[1], 2.0), (asked[0], 4.5)):
        said = ask.communicate(timeout=20)[1]
        assert ask.returncode == 130, said
        assert time.monotonic() - start < most
        assert said.strip().startswith("vitbench: stopped")
