"""What ties the project's own files together."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types

import pytest
import yaml

import vitbench
from tests.conftest import ROOT

LINT = shutil.which("lint-imports") or "lint-imports"  # conftest puts the environment's commands first
PATH = os.pathsep.join([str(ROOT), *filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def ranges(lines):
    """Package name -> the rest of a requirement, both without blanks."""
    found = {}
    for line in lines:
        name, rest = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", line).groups()
        found[name.lower().replace("_", "-")] = rest.replace(" ", "")
    return found


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def installed(project):
    """The requirements of what `make run` installs: the package, its tests, and ONNX Runtime for the edge."""
    extras = project["optional-dependencies"]
    return project["dependencies"] + extras["dev"] + extras["onnx"]


def test_the_conda_environment_has_pyprojects_ranges(project):
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = ranges(conda["dependencies"])
    wanted = ranges(installed(project))
    wanted["pytorch"] = wanted.pop("torch")
    assert conda.pop("python") == project["requires-python"]
    assert conda.pop("pip") == ""
    assert conda == wanted


def test_the_lock_has_every_dependency_and_no_address(project):
    text = (ROOT / "requirements.lock").read_text()
    locked = ranges(line for line in text.splitlines() if not line.startswith("#"))
    assert all(re.fullmatch(r"==[\w.]+", version) for version in locked.values())
    wanted = ranges(installed(project))
    assert wanted.keys() <= locked.keys()
    assert "://" not in text


def test_the_lock_is_within_the_ranges(project):
    from packaging.requirements import Requirement

    text = (ROOT / "requirements.lock").read_text()
    locked = ranges(line for line in text.splitlines() if not line.startswith("#"))
    for line in installed(project):
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[requirement.name.lower()].removeprefix("==")), line


def test_every_linter_of_make_is_a_hook():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (lines,) = re.findall(r"^lint: setup\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.M)
    for line in re.findall(r"\$\(BIN\)/(.+)", lines):
        command = " ".join(word for word in line.split() if word[0] not in "-.")
        assert [hook for hook in hooks if hook["entry"].startswith(command)], command


def test_the_citation_is_of_this_version(project):
    from vitbench import __version__

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert cited["license"] == project["license"]
    assert (ROOT / "LICENSE").read_text().startswith(cited["license"])


GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[a-z]*.md"))]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_exist(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", text, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    from vitbench.cli.program import _parser

    for line in re.findall(r"^vitbench (.+)$", text, re.M):
        _parser().parse_args(re.findall(r'"[^"]*"|\S+', line.split("#")[0]))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_links_lead_somewhere():
    folders = (ROOT, ROOT / "docs", ROOT / "data", ROOT / "results", ROOT / "results" / "reference")
    for page in (page for folder in folders for page in folder.glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


ROOMS = sorted(file.parent.name for file in (ROOT / "vitbench").glob("*/__init__.pyi"))


def test_every_folder_is_a_room_and_the_top_holds_little():
    folders = [file.parent.name for file in (ROOT / "vitbench").glob("*/__init__.py")]
    assert sorted(folders) == ROOMS == sorted({*vitbench.__all__} & {*folders})
    assert len(list((ROOT / "vitbench").glob("*.py"))) <= 8


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_name_is_there_and_hides_no_module(room):
    front = importlib.import_module(f"vitbench.{room}".rstrip("."))
    folder = ROOT / "vitbench" / room
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    for name in front.__all__:
        is_module = isinstance(getattr(front, name), types.ModuleType)
        assert is_module == (name in modules), f"{name} is a module and another thing too"
    assert set(front.__all__) <= set(dir(front)) | {"__version__"}
    with pytest.raises(AttributeError, match="squeeze"):
        assert front.squeeze


def test_the_functions_are_what_their_names_say():
    """Whatever was imported before: a room or a module of a like name hides none of them."""
    for room in ROOMS:
        importlib.import_module(f"vitbench.{room}")
    for name in ("measure", "train", "compress", "evaluate", "load", "save"):
        assert isinstance(getattr(vitbench, name), types.FunctionType), name


def test_a_front_says_in_three_sentences_what_lives_there():
    for room in ROOMS:
        text = importlib.import_module(f"vitbench.{room}").__doc__
        assert len(re.findall(r"[.](?=\s|$)", text)) == 3, room


def test_notebooks_and_benchmarks_import_the_front_alone():
    for file in (*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "benchmarks").glob("*.py")):
        assert not re.search(r"(from|import) vitbench(?! as vb)\b", file.read_text()), file


def test_an_import_is_quick():
    code = "import sys, vitbench; print(sorted({'torch', 'numpy', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_small():
    for file in (ROOT / "vitbench").rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 600, file


def test_only_the_room_of_the_model_knows_timms_models_inside():
    for file in (ROOT / "vitbench").rglob("*.py"):
        if file.parent.name != "model":
            assert "timm.models" not in file.read_text(), f"{file}: only model/ knows timm's models inside"


@pytest.mark.slow
def test_imports_keep_to_the_contract():
    """`lint-imports` says which import breaks it."""
    done = subprocess.run([LINT], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PATH})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_figure_that_imports_a_model_breaks_the_contract(tmp_path):
    shutil.copytree(ROOT / "vitbench", tmp_path / "vitbench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "vitbench" / "figures" / "drawing.py"
    file.write_text(file.read_text() + "\nfrom vitbench.model import vit  # noqa\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), PATH])}
    done = subprocess.run([LINT, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "vitbench.figures is not allowed to import vitbench.model" in done.stdout
