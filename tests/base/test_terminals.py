"""Terminals, locales and machines that are not ours: bars and tables print, reports need no group of metrics, a silent hub is named."""

import ast
import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time

import nbformat
import pytest
import timm

from tests.conftest import ROOT
from vitbench.base import hub, progress
from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.figures.report import write_report
from vitbench.methods.registry import METHODS
from vitbench.rows.records import append_rows, read_rows
from vitbench.rows.runs import Run
from vitbench.run import suite
from vitbench.run.lessons import Lesson

PACKAGE = sorted((ROOT / "vitbench").rglob("*.py"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8"])
def test_bars_and_names_print_in_any_encoding(encoding, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    progress.escape_unencodable(terminal, None)
    for _ in progress.progress_bar(range(3), "training ä 漢"):
        pass
    print("top-1 ± µ \ud800")
    terminal.flush()
    written = terminal.buffer.getvalue().decode(encoding)
    assert "100%" in written
    assert ("\u2588" in written) == (encoding in ("utf-8", "cp437")) or encoding == "cp437"


@pytest.mark.slow
def test_a_poor_environment_still_makes_and_measures_a_model(tmp_path):
    """No HOME, a locale and streams without UTF-8, and names that are not ASCII."""
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG")} | poor
    script = """
import sys
from vitbench.cli.program import main
folder = sys.argv[1]
for words in (["compress", "vit_micro_patch2_8", "--random", "--out", folder + "/m"],
              ["measure", folder + "/m", "--dataset-name", "chiffres \\u00e9", "--what", "accuracy", "--out", folder + "/r"]):
    status = main(words)
    if status:
        sys.exit(status)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    assert b"Traceback" not in done.stderr
    assert b"chiffres \\xe9" in done.stdout or (tmp_path / "r" / "report.html").is_file()
    assert {row.dataset for row in read_rows(tmp_path / "r")} == {"chiffres é"}


def test_nothing_depends_on_what_optimisation_takes_away(monkeypatch, capsys):
    """`python -OO` drops docstrings and asserts; an assert may state a type, `is not None` or `isinstance`, and no more."""
    for method in METHODS.values():
        monkeypatch.setattr(method.handler, "__doc__", None)
    assert main(["list", "methods"]) == 0
    assert "weight_only" in capsys.readouterr().out
    for file in PACKAGE:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tests = [ast.unparse(node.test) for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        wrong = [test for test in tests if not re.fullmatch(r"[\w.]+ is not None|isinstance\([\w.]+, [\w.| ]+\)", test)]
        assert not wrong, f"{file}: python -O drops asserts"


def groups_of(rows):
    """Rows by the group of metrics that `measure --what` names."""
    of = {
        "accuracy": ("top1", "top5", "cross_entropy"),
        "size": ("bytes", "params", "macs"),
        "latency": ("latency_p50", "latency_p90", "latency_p99", "latency_ratio"),
        "memory": ("peak_rss", "peak_tensors"),
    }
    return {group: [row for row in rows if row.metric in names] for group, names in of.items()}


CHOICES = [
    "accuracy",
    "size",
    "latency",
    "memory",
    "accuracy+latency",
    "accuracy+size",
    "accuracy+memory",
    "size+latency",
]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", CHOICES)
def test_a_report_is_made_of_whatever_was_measured(chosen, tmp_path):
    groups = groups_of(read_rows(ROOT / "results" / "reference" / "digits-quick"))
    assert all(groups.values())
    append_rows(tmp_path / "records.jsonl", [row for group in chosen.split("+") for row in groups[group]])
    assert "Traceback" not in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("shown", "failed"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_lesson_without_its_figures_is_a_failure(shown, failed, tmp_path):
    run, begun = Run(tmp_path), time.time() - 1
    run.figures.mkdir()
    for name in ("01_images", "01_shares", "05_other_lesson"):
        (run.figures / f"{name}.png").write_bytes(b"png")
    (run.figures / "01_of_a_run_before.png").write_bytes(b"png")
    os.utime(run.figures / "01_of_a_run_before.png", (begun - 100, begun - 100))
    lesson = Lesson(tmp_path / "01_baseline.ipynb", "title", "baseline", 1, {}, 3)
    outputs = [nbformat.v4.new_output("display_data", {"image/png": "x"}) for _ in range(shown)]
    cells = [nbformat.v4.new_code_cell("draw()", outputs=outputs)]
    found = suite._missing_figures_reason(nbformat.v4.new_notebook(cells=cells), lesson, run, begun)
    assert bool(found) == failed, found
    assert not failed or f"it saved 2 figures and shows {shown}" in found


@pytest.fixture
def server():
    """The port of a server that takes connections and never answers."""
    with socket.socket() as listening, contextlib.ExitStack() as kept:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def take():
            with contextlib.suppress(OSError):
                while True:
                    kept.enter_context(listening.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield listening.getsockname()[1]


@pytest.fixture
def online(monkeypatch, tmp_path):
    """As if nothing told the hub's library to stay offline; nothing was fetched before."""
    import huggingface_hub

    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    huggingface_hub.close_session()
    yield huggingface_hub
    huggingface_hub.close_session()


def test_a_proxy_that_is_silent_ends_in_one_line(server, online, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server}")
    start = time.monotonic()
    with pytest.raises(InputError) as refused, hub.fetching("the weights", "give a checkpoint file"):
        timm.create_model("deit_tiny_patch16_224", pretrained=True)
    assert time.monotonic() - start < 10
    said = str(refused.value)
    assert said.startswith("the weights could not be fetched (the Hugging Face hub did not answer within 0.5 s)")
    assert "and the proxy that HTTPS_PROXY names, or give a checkpoint file" in said
    assert "\n" not in said
    assert "OFFLINE" not in said, "it names a setting that nobody made"
    assert not online.constants.HF_HUB_OFFLINE


def test_a_network_that_is_not_there_is_named(online, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert "cannot be reached" in hub.unreachable_reason()


def test_who_chose_to_stay_offline_is_told_so(online, monkeypatch):
    monkeypatch.setattr(online.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"), hub.fetching("the weights", "give a file"):
        timm.create_model("deit_tiny_patch16_224", pretrained=True)
