"""The notebooks: their form, and the quick suite from start to end, killed once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import yaml

from vitbench.base.errors import InputError
from vitbench.rows.comparison_table import experiment_rows
from vitbench.rows.records import read_rows
from vitbench.rows.row_table import load_records
from vitbench.run import lessons
from vitbench.run.lessons import KINDS, choose, find_lessons, read_profile

NOTEBOOKS = sorted(lessons.lessons_folder().glob("*.ipynb"))
INSTALL = """import importlib.util

if importlib.util.find_spec("vitbench") is None:  # such as in a hosted runtime
    raise ModuleNotFoundError(
        "vitbench is not installed here; run %pip install with the address of its repository or of a wheel, then run all"
    )"""
FORM = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@FORM
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.vitbench.stage in lessons.STAGES
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert 12 <= len(notebook.cells) <= 36, f"{len(notebook.cells)} cells; a lesson has 12 to 36"
    first = notebook.cells[0].source
    assert first.startswith("# "), "the first cell has no title"
    assert "**You will learn**" in first, "the first cell does not say what the reader will learn"
    assert "minute" in first, "the first cell does not say how long the lesson takes"
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[:1], "one parameters cell, and it is the first code"
    assert code[1].source == INSTALL, (
        "the second code cell must say how to install vitbench; copy it from another lesson"
    )
    assert not any(line.lstrip().startswith(("%", "!")) for cell in code for line in cell.source.splitlines()), (
        "a command"
    )
    assert "\nvb.setup_notebook(globals())" in code[2].source, "no check of the parameters, and no inline figures"
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "What to remember" in text, "the lesson does not say what to remember"
    assert text.count("<details>") == text.count("</details>") >= 3, "fewer than three exercises with folded answers"


def test_a_notebook_without_the_package_says_how_to_install_it_and_installs_nothing(monkeypatch):
    """The package index is not asked: whoever takes a free name there would run code on the reader's machine."""
    exec(INSTALL, {})  # where it is installed, the cell is silent
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="vitbench is not installed here; run %pip install with the address"):
        exec(INSTALL, {})


@FORM
def test_parameters_are_typed_explained_and_the_quick_runs(path):
    import papermill

    declared = papermill.inspect_notebook(str(path))
    quick = yaml.safe_load((path.parent / "profiles" / "quick.yaml").read_text())
    assert declared
    for name, parameter in declared.items():
        assert parameter["inferred_type_name"] in KINDS, f"{name} has no type"
        assert parameter["help"], f"{name} is not explained"
        if name in quick:
            assert eval(parameter["default"]) == quick[name], f"{name}: the default is not the quick run's"


@FORM
def test_links_between_lessons_lead_somewhere(path):
    import re

    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for target in re.findall(r"\]\(([^)#]+\.ipynb)\)", text):
        if "{" not in target:
            assert (path.parent / target).exists(), target


@FORM
def test_links_to_the_glossary_lead_to_its_terms(path):
    glossary = (path.parents[1] / "docs" / "GLOSSARY.md").read_text(encoding="utf-8")
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for term in re.findall(r"\]\(\.\./docs/GLOSSARY\.md#([^)]+)\)", text):
        assert f'<a id="{term}"></a>' in glossary, term


def test_every_profile_sets_known_parameters_of_the_right_type():
    for name in lessons.profiles():
        read_profile(name, [], find_lessons())


def test_lessons_run_in_order():
    stages = [lessons.STAGES.index(lesson.stage) for lesson in find_lessons()]
    assert stages == sorted(stages)
    assert [lesson.name for lesson in choose(find_lessons(), ["02", "01_baseline"])] == [
        "01_baseline",
        "02_quantization",
    ]


def test_settings_reach_into_mappings():
    values = read_profile("digits", ["train.epochs=3", "threads=1"], find_lessons())
    assert values["train"]["epochs"] == 3
    assert values["train"]["batch_size"] == 128
    assert values["threads"] == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("colour=red", "unknown parameter 'colour'; allowed"),
        ("threads=many", "threads = 'many' is a str; the notebooks declare it as int"),
        ("threads.x=1", "threads is not a mapping"),
        ("threads", "give key=value"),
        ("train=[1", "not valid YAML"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(InputError, match=message):
        read_profile("quick", [setting], find_lessons())


@pytest.mark.slow
def test_a_lesson_that_trains_is_left_out_where_there_is_nothing_to_train_on(tmp_path, base):
    weights = base.path / "model.safetensors"
    settings = ["splits.test=1.0", "train.epochs=0", f"checkpoint={weights}", "rounds=10"]
    done = suite("digits", "--only", "01", "07", "--set", *settings, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out 07_uct: it needs train images" in done.stdout
    assert "done     01_baseline" in done.stdout


RUN = [sys.executable, "-m", "vitbench.cli", "run"]
FASTER = (
    "quick",
    "--workers",
    "2",
    "--set",
    "rounds=10",
    "threads=1",
)  # the lessons are the same, their timings are rough


def suite(*arguments, **options):
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=2400, **options)


@pytest.fixture(scope="module")
def killed_then_finished(home):
    """The quick suite, killed while a notebook measures, then run to its end."""
    out = home / "results" / "runs" / "quick"
    shutil.rmtree(out, ignore_errors=True)
    child = subprocess.Popen([*RUN, *FASTER], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900  # two threads beside other work wait for each other
    while not ((out / "records.jsonl").exists() and b'"latency_p50"' in (out / "records.jsonl").read_bytes()):
        assert child.poll() is None, "the suite ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(2)  # the orphaned kernel notices within a second
    return out, suite(*FASTER)


@pytest.mark.slow
def test_the_suite_finishes_after_a_kill(killed_then_finished):
    out, done = killed_then_finished
    assert done.returncode == 0, done.stdout + done.stderr
    done_notebooks = {
        path.name for path in (out / "notebooks").iterdir() if not path.name.startswith(".")
    }  # a kill in a write leaves its part
    assert done_notebooks == {path.name for path in NOTEBOOKS}
    assert (out / "report.html").is_file()
    for name in ("13_accuracy_size", "13_accuracy_latency"):
        assert all((out / "figures" / f"{name}.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
    assert "dynamic int8" in done.stdout


@pytest.mark.slow
def test_no_row_twice_and_none_lost(killed_then_finished):
    out, _ = killed_then_finished
    rows = read_rows(out)
    assert len({row.key for row in rows}) == len(rows)
    for method, timed in (("baseline", 1), ("dynamic_int8", 1), ("uct", 0)):
        metrics = [
            row.metric for row in rows if row.method == method and row.context.get("backend", "eager") == "eager"
        ]
        assert metrics.count("latency_p50") == 2 * timed
        assert metrics.count("top1") >= timed


@pytest.mark.slow
def test_the_quick_numbers(killed_then_finished):
    out, _ = killed_then_finished
    rows = experiment_rows(load_records(out))
    value = {(row.label, row.metric): row.value for row in rows.itertuples()}
    assert value["baseline", "top1"] >= 0.9
    assert value["dynamic_int8", "bytes"] <= 0.35 * value["baseline", "bytes"]
    assert abs(value["dynamic_int8", "top1"] - value["baseline", "top1"]) <= 0.015
    uct = [each for (label, metric), each in value.items() if metric == "bytes" and label.startswith("uct (")]
    assert uct, "lesson 07 left no rows"
    assert 8 * max(uct) <= value["baseline", "bytes"]


@pytest.mark.slow
def test_a_second_run_skips_everything(killed_then_finished):
    out, _ = killed_then_finished
    before = {path: path.stat().st_mtime_ns for path in (out / "notebooks").iterdir()}
    start = time.monotonic()
    done = suite(*FASTER)
    assert done.returncode == 0
    assert len(re.findall(r"^skipped\s+\d\d", done.stdout, re.M)) == len(NOTEBOOKS)
    assert {path: path.stat().st_mtime_ns for path in (out / "notebooks").iterdir()} == before
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_executed_copies_say_what_made_them(killed_then_finished):
    out, _ = killed_then_finished
    copy = json.loads((out / "notebooks" / "01_baseline.ipynb").read_text())
    assert copy["metadata"]["papermill"]["parameters"]["dataset"] == "photographs"
    assert copy["metadata"]["vitbench"]["run_key"]
    text = json.dumps(copy)
    assert "Traceback" not in text
    assert not any(output.get("name") == "stderr" for cell in copy["cells"] for output in cell.get("outputs", []))


@pytest.mark.slow
@FORM
def test_every_figure_is_seen_in_the_executed_notebook(path, killed_then_finished):
    out, _ = killed_then_finished
    for cell in nbformat.read(out / "notebooks" / path.name, as_version=4).cells:
        conditional = re.search("^if ", cell.source, re.M)  # such a figure belongs to longer settings
        if (
            cell.cell_type == "code"
            and not conditional
            and ("plt.subplots" in cell.source or "save_figure(" in cell.source)
        ):
            kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
            slider = "application/vnd.jupyter.widget-view+json" in kinds and "figure_slider(" in cell.source
            assert "image/png" in kinds or slider, cell.source


@pytest.mark.slow
@FORM
def test_outputs_are_short_and_name_no_path(path, killed_then_finished):
    out, _ = killed_then_finished
    for cell in nbformat.read(out / "notebooks" / path.name, as_version=4).cells[3:]:
        if cell.cell_type == "code":
            outputs = [output for output in cell.outputs if "no VNNI instructions" not in output.get("text", "")]
            assert not [output for output in outputs if output.get("name") == "stderr"], "a warning, not of the CPU"
            assert len(outputs) <= 8, cell.source
            texts = [output.get("text", "") or str(output.get("data", {}).get("text/plain", "")) for output in outputs]
            assert str(out) not in "".join(texts), cell.source


@pytest.mark.slow
def test_a_notebook_that_fails_is_named_with_its_cell_and_stops_no_other(tmp_path):
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "quick.yaml").write_text("pause: 0.5\n")
    for name, last in (
        ("10_good", "print(pause)"),
        ("11_bad", "raise RuntimeError('on purpose')"),
        ("12_good", "1 + 1"),
    ):
        cells = [nbformat.v4.new_markdown_cell(f"# {name}"), nbformat.v4.new_code_cell("pause: float = 0.0  # seconds")]
        cells[1].metadata["tags"] = ["parameters"]
        notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(last)])
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    out = tmp_path / "out"
    done = suite("quick", "--out", str(out), "--notebooks", str(folder))
    assert done.returncode == 1
    assert "11_bad: cell 3 (In [3]): RuntimeError: on purpose" in done.stdout
    assert str(out / "notebooks" / "11_bad.ipynb") in done.stdout
    assert done.stdout.count("done ") == 2
    assert "Traceback" not in done.stderr
    assert {path.stem for path in (out / "notebooks").iterdir()} == {"10_good", "11_bad", "12_good"}
    again = suite("quick", "--out", str(out), "--notebooks", str(folder))
    assert again.stdout.count("skipped ") == 2
    assert again.returncode == 1
