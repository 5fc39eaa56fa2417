"""What ties the project's own files together."""

import re
import tomllib

import pytest
import yaml

from tests.conftest import ROOT
from vitbench.comparison import across_seeds, comparison, subject, value
from vitbench.records import load_records, read_rows
from vitbench.statistics import mean_interval


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


def test_the_readmes_commands_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", readme, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    from vitbench.cli import _parser

    for line in re.findall(r"^vitbench (.+)$", readme, re.M):
        _parser().parse_args(re.findall(r'"[^"]*"|\S+', line.split("#")[0]))


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


REFERENCES = sorted((ROOT / "results" / "reference").glob("*/records.jsonl"))


def table_lines(file):
    """The README's lines for one reference run, made from its rows."""
    rows = load_records(file)
    for method, line in comparison(rows).iterrows():
        accuracy = f"{line['top1 %']:.2f} [{line['low %']:.2f}, {line['high %']:.2f}]".replace("nan [nan, nan]", "-")
        ratios = "1 | 1" if method == "baseline" else f"{line['ratio b1']:.2f} | {line['ratio b8']:.2f}"
        about = subject(rows).iloc[-1]
        yield f"| {file.parent.name} | {about['model']} | {method} | {accuracy} | {line['MB']:.2f} | {ratios} |"


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.parent.name)
def test_the_readmes_numbers_are_the_reference_rows(file):
    readme = (ROOT / "README.md").read_text()
    for line in table_lines(file):
        assert line in readme
    for row in read_rows(file):
        assert (file.parent / "environments" / f"{row.env_id}.json").is_file()
        assert not row.commit.endswith("+changes"), "a reference row names a commit that holds its source"


def test_the_readmes_seeds_are_the_reference_rows():
    rows = load_records(ROOT / "results" / "reference" / "digits-quick")
    table = 100 * across_seeds(rows, "top1").pivot_table(index="seed", columns="label", values="value")
    assert len(table) >= 3
    readme = (ROOT / "README.md").read_text()
    for other in ("uct (train.epochs=0)", "baseline"):
        mean, low, high = mean_interval(table["uct"] - table[other])
        assert f"{mean:+.2f} points [{low:+.2f}, {high:+.2f}]" in readme, other


def test_the_readmes_rivals_are_the_reference_rows():
    rows = subject(load_records(ROOT / "results" / "reference" / "cifar10-deit"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    rival, ours = "weight_only (train.epochs=3)", "uct"
    assert (
        f"reach {100 * value(rows, rival, 'top1')['value']:.2f} % in {value(rows, rival, 'bytes')['value'] / 1e6:.2f} MB"
        in readme
    )
    lost = 100 * (value(rows, "baseline", "top1")["value"] - value(rows, ours, "top1")["value"])
    smaller = value(rows, "baseline", "bytes")["value"] / value(rows, ours, "bytes")["value"]
    assert (
        f"{smaller:.1f} times smaller ({value(rows, ours, 'bytes')['value'] / 1e6:.2f} MB) and loses {lost:.1f} points"
        in readme
    )
    rounded = [100 * value(rows, label, "top1")["value"] for label in ("uct (train.epochs=0)", "weight_only")]
    assert "UCT has {:.2f} % and plain 2-bit weights {:.2f} %".format(*rounded) in readme


def test_files_stay_small():
    for file in (ROOT / "vitbench").rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 300, file


def test_imports_run_one_way():
    """Methods do not measure, and what draws does not touch a model."""
    for file in (ROOT / "vitbench" / "methods").glob("*.py"):
        assert "vitbench.measure" not in file.read_text(), file
    for name in ("figures", "comparison", "report", "records", "statistics"):
        text = (ROOT / "vitbench" / f"{name}.py").read_text()
        assert not re.search(r"^(from|import) (torch|timm|vitbench\.(methods|measure|vit|training))", text, re.M), name
    for file in (ROOT / "vitbench").rglob("*.py"):
        if file.name != "vit.py":
            assert "timm.models" not in file.read_text(), f"{file}: only vit.py knows timm's models inside"
