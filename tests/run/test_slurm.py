"""A sweep on a real Slurm, of one node on this machine."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.run.test_sweep import SMALL
from vitbench.base.errors import InputError
from vitbench.rows.runs import Run
from vitbench.run.sweep import drive
from vitbench.run.sweep.executors import open_workers
from vitbench.run.sweep.grid import parse_sweep


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="the dask extra is not installed")
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Slurm (Debian: slurm-wlm munge); missing: {', '.join(missing) or 'root'}")
    folder = tmp_path / "slurm"
    script = [str(ROOT / "tests" / "run" / "slurm_node.sh")]
    started = subprocess.run([*script, "start", str(folder)], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield folder
    subprocess.run([*script, "stop", str(folder)], check=True)


@pytest.mark.slow
def test_a_sweep_on_slurm(slurm, tmp_path):
    import dask

    wanted = {"cores": 1, "memory": "2GB", "walltime": "00:10:00", "log-directory": str(slurm), "interface": "lo"}
    wanted |= {"job-extra-directives": ["--mem=0"], "job-cpu": 1}
    with dask.config.set({f"jobqueue.slurm.{key}": value for key, value in wanted.items()}):
        run = Run(tmp_path / "rows")
        outcome = drive.run_sweep(drive.plan(parse_sweep(SMALL), run), run, workers=2, scheduler="slurm")
    assert outcome["done"] == 4
    jobs = list(slurm.glob("dask-worker-*.out"))
    assert 1 <= len(jobs) <= 2, "the first may have done all before the second began"


def test_slurm_without_a_configuration(monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="the dask extra is not installed")
    with pytest.raises(InputError, match="jobqueue.yaml"):
        open_workers("slurm", 1, {}).__enter__()
