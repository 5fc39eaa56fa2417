"""Ctrl-C and SIGTERM: every long command ends within seconds, with its children, and goes on from what was finished."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from vitbench import artifact, vit
from vitbench.sweep import drive

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of this kind are not there")

SECONDS = 5.0
MICRO = "vit_micro_patch2_8"
ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
SHORT = ["model=vit_micro_patch2_8", "train.epochs=1", "threads=1", "rounds=10"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return artifact.save(vit.create_model(MICRO), tmp_path_factory.mktemp("model") / "m")


class Command:
    """A command of vitbench in a process of its own; `said` is what it printed."""

    def __init__(self, folder, *arguments):
        self.file = folder / "said.txt"
        command = [sys.executable, "-m", "vitbench.cli", *map(str, arguments)]
        with open(self.file, "w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said, process_group=0)

    @property
    def said(self):
        return self.file.read_text()

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def until(self, at_work, seconds=240):
        deadline = time.monotonic() + seconds
        while not at_work():
            assert self.process.poll() is None, f"it ended too early: {self.said}"
            assert time.monotonic() < deadline, f"it is not at work: {self.said}"
            time.sleep(0.05)

    def end(self, *numbers):
        """Send signals to its process group, as a terminal does; check that it ends with its children and one line."""
        children, start = self.children(), time.monotonic()
        for number in numbers:
            os.killpg(self.process.pid, number)
            time.sleep(0.7 if len(numbers) > 1 else 0)
        try:
            status = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {SECONDS} s: {self.said}")
        _, alive = psutil.wait_procs(children, timeout=max(0.1, start + SECONDS - time.monotonic()))
        alive = [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        assert not alive, f"children are left: {alive}"
        assert "Traceback" not in self.said
        assert "the same command goes on from there" in self.said.splitlines()[-1]
        return status


def kinds(children):
    """What each child was started for."""
    found = []
    for child in children:
        try:
            found.append(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_measure(model, tmp_path, number, status):
    ask = Command(
        tmp_path,
        "measure",
        model,
        "--what",
        "latency",
        "--rounds",
        "1000000",
        "--threads",
        "1",
        "--out",
        tmp_path / "q",
    )
    ask.until(lambda: len(ask.children()) == 2)  # the kept process, and the one that is timed
    assert ask.end(number) == status
    assert not (tmp_path / "q" / "records.jsonl").exists()


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_training(model, tmp_path, number, status):
    settings = ["train.epochs=100000", "train.batch_size=256", "start=weights", "rank=8"]
    ask = Command(
        tmp_path,
        "compress",
        model,
        "--method",
        "uct",
        "--dataset",
        "digits",
        "--set",
        *settings,
        "--out",
        tmp_path / "m",
    )
    ask.until(lambda: "step" in ask.said)
    assert ask.end(number) == status
    assert not [path for path in tmp_path.iterdir() if path.name != "said.txt"]


@pytest.mark.parametrize(("number", "status"), ENDS)
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
    ask.until(lambda: drive.latest(out / "records.jsonl"))
    assert any("vitbench.sweep.worker" in kind for kind in kinds(ask.children()))
    assert ask.end(number) == status
    assert {row.status for row in drive.latest(out / "records.jsonl")} == {"ok"}


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_the_suite_starts_no_notebook_that_waits(tmp_path, number, status):
    ask = Command(tmp_path, "run", "quick", "--only", "02", "03", "04", "--set", *SHORT, "--out", tmp_path)
    folder = tmp_path / "notebooks"
    ask.until(lambda: list(folder.glob("*.running.ipynb")))
    assert ask.end(number) == status
    time.sleep(1)
    assert not list(folder.iterdir()), "half a notebook is left, or another one was started"


def test_a_second_signal_ends_at_once(model, tmp_path):
    """Also one that comes while the first is dealt with."""
    code = (
        "import time\nfrom vitbench.cli import interrupts\n"
        "with interrupts.interruptible():\n"
        "    try:\n        print('at work', flush=True); time.sleep(60)\n"
        "    finally:\n        print('ending', flush=True); time.sleep(60)\n"
    )
    for numbers, most in (([signal.SIGINT], 4.5), ([signal.SIGINT, signal.SIGTERM], 2.0)):
        ask = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert ask.stdout.readline() == "at work\n"
        start = time.monotonic()
        for number in numbers:
            ask.send_signal(number)
            time.sleep(0.8)
        said = ask.communicate(timeout=20)[1]
        assert ask.returncode == 130, said
        assert time.monotonic() - start < most
        assert said.strip().startswith("vitbench: stopped")
