"""What ties the project's own files together."""

import importlib
import re
import tomllib

import pytest
import yaml

import vitbench
from tests.conftest import ROOT


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


def test_the_conda_environment_has_pyprojects_ranges(project):
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = ranges(conda["dependencies"])
    wanted = ranges(project["dependencies"] + project["optional-dependencies"]["dev"])
    wanted["pytorch"] = wanted.pop("torch")
    assert conda.pop("python") == project["requires-python"]
    assert conda.pop("pip") == ""
    assert conda == wanted


def test_the_lock_has_every_dependency_and_no_address(project):
    text = (ROOT / "requirements.lock").read_text()
    locked = ranges(line for line in text.splitlines() if not line.startswith("#"))
    assert all(re.fullmatch(r"==[\w.]+", version) for version in locked.values())
    wanted = ranges(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert wanted.keys() <= locked.keys()
    assert "://" not in text


def test_the_lock_is_within_the_ranges(project):
    from packaging.requirements import Requirement

    text = (ROOT / "requirements.lock").read_text()
    locked = ranges(line for line in text.splitlines() if not line.startswith("#"))
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[requirement.name.lower()].removeprefix("==")), line


def test_the_citation_is_of_this_version(project):
    from vitbench import __version__

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert cited["license"] == project["license"]
    assert (ROOT / "LICENSE").read_text().startswith(cited["license"])


def test_the_readmes_commands_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", readme, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    from vitbench.cli import _parser

    for line in re.findall(r"^vitbench (.+)$", readme, re.M):
        _parser().parse_args(re.findall(r'"[^"]*"|\S+', line.split("#")[0]))


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "results").glob("*.md"), *(ROOT / "results" / "reference").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_every_public_name_comes_from_its_place():
    placed = {name: place for place, names in vitbench._PLACES.items() for name in names}
    assert {*placed, "__version__"} == set(vitbench.__all__) <= set(dir(vitbench))
    for name, place in placed.items():
        assert getattr(vitbench, name) is getattr(importlib.import_module(f"vitbench.{place}"), name)
    told = re.findall(r"^    from vitbench\.(\w+) import (.+)$", (ROOT / "vitbench" / "__init__.py").read_text(), re.M)
    assert {place: tuple(names.split(", ")) for place, names in told} == vitbench._PLACES
    with pytest.raises(AttributeError, match="no attribute 'squeeze'"):
        assert vitbench.squeeze


def test_files_stay_small():
    for file in (ROOT / "vitbench").rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 300, file


def test_imports_run_one_way():
    """Methods do not measure, and what draws does not touch a model."""
    for file in (ROOT / "vitbench" / "methods").glob("*.py"):
        assert "vitbench.measurement" not in file.read_text(), file
    for name in (
        "figures",
        "tradeoff",
        "attention_figures",
        "policy_figures",
        "closeups",
        "comparison",
        "report",
        "records",
        "statistics",
    ):
        text = (ROOT / "vitbench" / f"{name}.py").read_text()
        assert not re.search(r"^(from|import) (torch|timm|vitbench\.(methods|measure|vit|training))", text, re.M), name
    for file in (ROOT / "vitbench").rglob("*.py"):
        if file.name != "vit.py" and file.parent.name != "model":
            assert "timm.models" not in file.read_text(), f"{file}: only vit.py and model/ know timm's models inside"
