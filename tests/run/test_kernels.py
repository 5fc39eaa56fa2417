"""Kernels that are forked from a process which has imported: they are like others, and end."""

import asyncio
import sys

import nbformat
import papermill
import psutil
import pytest

from vitbench.base.processes import ProcessError
from vitbench.run.kernels import Kernels

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked here")]

FIRST = "import os, sys\nprint('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
FIGURE = "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])"
CHILD = "from vitbench.measurement import child\nprint(child._server.alive(), child.in_child('time_models', 1, models=[], batch=1, rounds=1, exported=''))"
AGAIN = "import subprocess\nprint(subprocess.run(['false']).returncode, os.getpid())"


@pytest.fixture(scope="module")
def kernels():
    with Kernels() as kernels:
        yield kernels


def run(kernels, folder, *cells):
    """What each cell printed, or the kinds of what it showed."""
    notebook, path = (
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]),
        folder / "a.ipynb",
    )
    nbformat.write(notebook, path)
    with kernels.kernel() as kernel:
        done = papermill.execute_notebook(str(path), None, progress_bar=False, kernel_name="python3", km=kernel)
    return ["".join(out.get("text") or "".join(out.get("data", {})) for out in cell.outputs) for cell in done.cells]


def test_a_kernel_has_imported_shows_figures_times_models_and_ends(kernels, tmp_path):
    first, figure, timed, again = run(kernels, tmp_path, FIRST, FIGURE, CHILD, AGAIN)
    assert first == "True False\n"
    assert "image/png" in figure
    assert timed == "True {'timed': []}\n"
    status, process = again.split()
    assert status == "1", "a child's exit status reaches the kernel"
    assert not psutil.pid_exists(int(process))
    other = run(kernels, tmp_path, FIRST + "\nprint(os.getpid())")[0].split()
    assert other[:2] == ["True", "False"]
    assert other[2] != process, "no two notebooks share a kernel"


def test_kernels_end_with_the_process_that_forks_them(tmp_path):
    with Kernels() as kernels, kernels.kernel() as kernel:
        client = kernel.client()
        client.start_channels()
        asyncio.run(client.wait_for_ready(timeout=120))
        client.stop_channels()
        kernels._server._process.process.kill()
        assert kernel.process.ended(20), "the kernel goes on although nobody waits for it"
        with pytest.raises(ProcessError, match="the process that is forked ended: .* signal 9"), kernels.kernel():
            pass
