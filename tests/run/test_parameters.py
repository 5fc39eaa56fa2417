"""Notebooks by papermill alone: parameters of the declared types, figures whatever the environment says, and whose notebooks run."""

import json
import os
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
from matplotlib.text import Text

import vitbench as vb
from tests.conftest import ROOT
from vitbench.base import paths
from vitbench.cli import main
from vitbench.figures import gallery
from vitbench.run import lessons
from vitbench.run.lessons import KINDS, convert_parameter, setup_notebook

GOOD = [
    ("false", "bool", False),
    ("True", "bool", True),
    (False, "bool", False),
    (3, "int", 3),
    (3, "float", 3),
    (0.5, "float", 0.5),
    ("7", "str", "7"),
    ({"epochs": 1}, "dict", {"epochs": 1}),
    ([1], "list", [1]),
]
WRONG = [
    ("maybe", "bool", "'maybe' is a str; the notebooks declare it as bool"),
    (0, "bool", "0 is a int; the notebooks declare it as bool"),
    (True, "int", "True is a bool; the notebooks declare it as int"),
    (2.5, "int", "2.5 is a float"),
    ("many", "int", "'many' is a str"),
    (None, "float", "None is a NoneType"),
    ("{epochs: 1}", "dict", 'write -y "train: {epochs: 1}"'),
    ("[1, 2]", "list", 'write -y "train: [1, 2]"'),
    (10, "str", "write -r train 10"),
]


@pytest.mark.parametrize(("value", "kind", "wanted"), GOOD)
def test_a_parameter_has_its_declared_type(value, kind, wanted):
    names = {"__annotations__": {"train": KINDS[kind] if isinstance(KINDS[kind], type) else float}, "train": value}
    setup_notebook(names)
    assert names["train"] == wanted == convert_parameter("train", value, kind)
    assert type(names["train"]) is type(wanted)


@pytest.mark.parametrize(("value", "kind", "message"), WRONG)
def test_a_parameter_of_another_type_is_refused_by_name(value, kind, message):
    with pytest.raises(vb.InputError) as refused:
        convert_parameter("train", value, kind)
    assert str(refused.value).startswith("parameter train = ")
    assert message in str(refused.value)


def test_the_text_false_never_counts_as_true(digits):
    with pytest.raises(vb.InputError, match="pretrained = 'false' is a str; give True or False"):
        vb.baseline("vit_micro_patch2_8", digits, vb.TrainConfig(epochs=1), pretrained="false")


@pytest.fixture(scope="module")
def by_papermill(tmp_path_factory):
    """A short notebook of the lessons' form, run by papermill with MPLBACKEND=Agg and a matplotlibrc that wants LaTeX."""
    folder = tmp_path_factory.mktemp("papermill")
    parameters = nbformat.v4.new_code_cell(
        "pretrained: bool = True\nkeep: float = 1.0", metadata={"tags": ["parameters"]}
    )
    start = "import matplotlib.pyplot as plt\nimport vitbench as vb\nvb.setup_notebook(globals())\nprint([pretrained, keep])"
    draw = 'picture, axes = plt.subplots()\naxes.set_title("a title")'
    cells = [parameters, nbformat.v4.new_code_cell(start), nbformat.v4.new_code_cell(draw)]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=about), folder / "short.ipynb")
    (folder / "matplotlibrc").write_text("text.usetex: True\n")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "short.ipynb",
        "out.ipynb",
        "-p",
        "pretrained",
        "false",
        "-p",
        "keep",
        "0.5",
    ]
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([*command, "--no-progress-bar"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return nbformat.read(folder / "out.ipynb", as_version=4).cells


@pytest.mark.slow
def test_papermills_false_is_false(by_papermill):
    assert by_papermill[-2].outputs[-1].text.strip() == "[False, 0.5]"


@pytest.mark.slow
def test_figures_are_there_whatever_matplotlib_was_told(by_papermill):
    kinds = [kind for output in by_papermill[-1].outputs for kind in output.get("data", {})]
    assert "image/png" in kinds


@pytest.mark.slow
def test_no_figure_of_the_gallery_asks_for_latex():
    rows = gallery.load_folders(
        [ROOT / "results" / "reference" / "edge-deit-tiny", ROOT / "results" / "reference" / "digits-quick"]
    )
    drawn = 0
    with mpl.rc_context({"text.usetex": True, "font.size": 31.0}):
        for name, (_, draw) in gallery.GALLERY.items():
            try:
                figure, _ = draw(rows, 1)
            except vb.InputError:  # these rows have nothing for it
                continue
            drawn += 1
            texts = [text for text in figure.findobj(Text) if text.get_text()]
            assert not [text for text in texts if text.get_usetex() or text.get_fontsize() == 31], name
            plt.close(figure)
    assert drawn >= 5


def stranger(folder):
    """A results folder from elsewhere that has notebooks and profiles of the project's names."""
    (folder / "notebooks" / "profiles").mkdir(parents=True)
    (folder / "notebooks" / "profiles" / "quick.yaml").write_text("dataset: digits\n")
    code = nbformat.v4.new_code_cell('dataset: str = "digits"', metadata={"tags": ["parameters"]})
    harm = nbformat.v4.new_code_cell("open('harmed', 'w').close()")
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# x"), code, harm], metadata=about)
    nbformat.write(notebook, folder / "notebooks" / "01_baseline.ipynb")
    return folder


@pytest.mark.parametrize("inside", [".", "results", "notebooks"])
@pytest.mark.parametrize("told", [False, True])
def test_no_folder_but_a_named_one_decides_which_notebooks_run(inside, told, tmp_path, monkeypatch):
    folder = stranger(tmp_path)
    (folder / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(folder / inside)
    if told:
        monkeypatch.setenv("VITBENCH_HOME", str(folder))
    else:
        monkeypatch.delenv("VITBENCH_HOME")
    assert lessons.lessons_folder() == ROOT / "notebooks"
    assert {lesson.path.parent for lesson in lessons.find_lessons()} == {ROOT / "notebooks"}
    assert {path.parent for path in lessons.profiles().values()} == {ROOT / "notebooks" / "profiles"}
    assert paths.home() == (folder if told else ROOT)
    (named,) = lessons.find_lessons(folder / "notebooks")
    assert named.path == folder / "notebooks" / "01_baseline.ipynb"


def test_an_installation_without_notebooks_says_so(tmp_path, monkeypatch, capsys):
    folder = stranger(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("VITBENCH_HOME")
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "site" / "vitbench" / "base" / "paths.py"))
    assert paths.home() == folder
    assert main(["run", "quick", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has no notebooks" in line
    assert "--notebooks DIR" in line
    assert not (folder / "harmed").exists()
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"cells": 7}',
        json.dumps({"cells": [], "metadata": {"vitbench": {"stage": "x"}}, "nbformat": 4, "nbformat_minor": 5}),
    ],
)
def test_a_file_that_is_no_notebook_gives_one_line(content, tmp_path):
    (tmp_path / "01_odd.ipynb").write_text(content)
    with pytest.raises(vb.InputError, match="01_odd.ipynb") as refused:
        lessons.find_lessons(tmp_path)
    assert "\n" not in str(refused.value)
