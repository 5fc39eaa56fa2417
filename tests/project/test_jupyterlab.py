"""Every lesson by Run All in a real JupyterLab in a real browser, as a student does it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from tests.figures.test_report_browser import CHROMIUM
from vitbench.run import lessons

playwright = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]
NOTEBOOKS = sorted(path.name for path in lessons.lessons_folder().glob("*.ipynb"))
LIMIT = 600_000  # ms, of a notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Copies of the notebooks: Run All saves its outputs into them."""
    copies = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(lessons.lessons_folder(), copies)
    return copies


@pytest.fixture(scope="module")
def address(folder):
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    settings = {
        "JUPYTER_CONFIG_DIR": str(folder.parent / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder.parent / "lab"),
    }
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | settings)
    try:
        for line in server.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+/lab", line):
                break
        else:
            pytest.fail("JupyterLab did not start")
        yield found[0]
    finally:
        server.terminate()
        server.stderr.close()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def page(address):
    with (
        playwright.sync_playwright() as api,
        contextlib.closing(api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])) as browser,
    ):
        page = browser.new_page(viewport={"width": 1400, "height": 1800})
        page.set_default_timeout(LIMIT)
        yield page


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_leaves_no_error(name, folder, address, page, home):
    page.goto(f"{address}/tree/{name}?reset")
    page.wait_for_selector(".jp-NotebookPanel-toolbar")
    page.wait_for_function(
        "jupyterapp.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'"
    )
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    code = [cell for cell in nbformat.read(folder / name, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "not every cell was run"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    if where := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{where}/{name.removesuffix('.ipynb')}.png")
