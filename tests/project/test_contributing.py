"""CONTRIBUTING.md followed to the letter: one file and one notebook, and everything else picks the method up."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.golden.make import FILES
from vitbench.rows.comparison_table import comparison
from vitbench.rows.row_table import load_records

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is needed of the project, with the method's file and the notebook that the page has."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("vitbench", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("photographs", "deit_tiny_patch16_96"):
        shutil.copytree(ROOT / "data" / name, folder / "data" / name)
    (folder / "notebooks").mkdir()
    shutil.copytree(ROOT / "notebooks" / "profiles", folder / "notebooks" / "profiles")
    shutil.copy(ROOT / "notebooks" / "01_baseline.ipynb", folder / "notebooks")
    method, notebook = re.findall(r"```python\n(.+?)```", TEXT, re.S)
    (name,) = re.findall(r"`(vitbench/methods/\w+\.py)`", TEXT)
    (folder / name).write_text(method)
    subprocess.run([sys.executable, "-c", notebook], cwd=folder, check=True)
    return folder


def run(checkout, *command):
    paths = {"PYTHONPATH": str(checkout), "VITBENCH_HOME": str(checkout)}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=checkout,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_commands_of_the_page_are_the_ones_tried_here():
    (commands,) = re.findall(r"\*\*3\. Check the result\.\*\*\n\n```\n(.+?)```", TEXT, re.S)
    assert commands.splitlines() == [
        "vitbench list methods",
        "pytest tests/methods/test_methods.py -k half",
        "vitbench run quick --only 01 50",
    ]


def test_the_golden_lists_of_the_page_exist():
    (commands,) = re.findall(r"\*\*4\. Prepare the pull request\.\*\*\n\n```\n(.+?)```", TEXT, re.S)
    (names,) = re.findall(r"^python -m tests\.golden\.make (.+)$", commands, re.M)
    assert set(names.split()) == {"recipes", "notebooks", "old/logits"} <= set(FILES)


@pytest.mark.slow
def test_the_golden_lists_take_it(checkout):
    made = run(checkout, "tests.golden.make", "recipes", "old/logits")
    assert made.returncode == 0, made.stderr
    done = run(
        checkout, "pytest", "tests/project/test_golden.py", "-k", "half or recipes", "-q", "-p", "no:cacheprovider"
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.slow
def test_the_command_line_lists_it(checkout):
    assert (
        "Round all floating-point numbers to half precision." in run(checkout, "vitbench.cli", "list", "methods").stdout
    )


@pytest.mark.slow
def test_the_registrys_tests_cover_it(checkout):
    done = run(checkout, "pytest", "tests/methods/test_methods.py", "-k", "half", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 7


@pytest.mark.slow
def test_the_suite_the_comparison_and_the_report_have_it(checkout):
    out = checkout / "results" / "runs" / "quick"
    done = run(checkout, "vitbench.cli", "run", "quick", "--only", "01", "50", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    table = comparison(load_records(out))
    assert 1.8 < table.loc["half", "x smaller"] < 2.1
    assert "half" in (out / "report.html").read_text()
