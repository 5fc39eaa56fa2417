"""Mining: from a model, images and a budget to the best file within it."""

import pytest

from vitbench import cli
from vitbench.base.errors import InputError
from vitbench.data.splits import load_data
from vitbench.methods.registry import METHODS
from vitbench.model import artifact
from vitbench.rows.runs import Run
from vitbench.run import mined as texts, mining
from vitbench.run.candidates import Candidate, candidates
from vitbench.run.mined import Budget, parse_budget

FEW = [Candidate("weight_only", {"bits": bits}, fitted=False) for bits in (8, 2)] + [Candidate("mixed_rank", {})]


@pytest.fixture
def few(monkeypatch):
    """Three models to try, none of them timed."""
    monkeypatch.setattr(mining, "candidates", lambda model, cost, epochs: FEW)
    monkeypatch.setattr(mining._Miner, "measure", lambda miner, *configs: miner.bench.measure(*configs))


@pytest.mark.parametrize(
    ("text", "cost", "value", "share"),
    [
        ("2MB", "bytes", 2e6, False),
        ("500 kB", "bytes", 5e5, False),
        ("1.5MiB", "bytes", 1.5 * 2**20, False),
        ("0.25bytes", "bytes", 0.25, True),
        (".5macs", "macs", 0.5, True),
        ("300Mmacs", "macs", 3e8, False),
        ("10ms", "latency", 10, False),
        ("0.8latency", "latency", 0.8, True),
    ],
)
def test_budgets_are_read(text, cost, value, share):
    assert parse_budget(text) == Budget(cost, value, share)


@pytest.mark.parametrize("text", ["", "2", "2 parsecs", "-1MB", "0MB", "2latency", "1e400MB", "bytes=0.25"])
def test_a_budget_that_cannot_be_read(text):
    with pytest.raises(InputError, match="give for example 2MB"):
        parse_budget(text)


def test_a_budget_is_below_what_the_model_has():
    assert Budget("bytes", 0.25, True).limit(1000) == 250
    with pytest.raises(InputError, match="nothing is to be done"):
        Budget("bytes", 2e6, False).limit(1.5e6)


def test_costs_have_units():
    assert [texts.cost_text("bytes", size) for size in (2e6, 5.3e4, 12)] == ["2 MB", "53 kB", "12 B"]
    assert texts.cost_text("macs", 3e8) == "300 MMACs"
    assert texts.cost_text("latency", 10.04) == "10 ms"


def test_a_small_folder_has_enough_images_to_choose_on(image_folder):
    data, splits = mining.load_images(str(image_folder(count=60)))
    assert (len(data.val), len(data.test), splits) == (48, 36, {"val": 48})
    again = load_data(image_folder(count=60, name="again"), name="set", **splits)
    assert again.fingerprint == data.fingerprint
    with pytest.raises(InputError, match="needs at least 30; give more images"):
        mining.load_images(str(image_folder(count=20, name="few")))


def test_images_of_some_classes_of_a_model(image_folder):
    folder = image_folder()
    data = load_data(folder, classes=["ant", "owl", "cat", "dog"])
    assert data.classes == ("ant", "owl", "cat", "dog")
    own = load_data(folder)
    assert [data.classes[label] for label in data.test.labels] == [own.classes[label] for label in own.test.labels]
    with pytest.raises(InputError, match="unknown class of set 'owl'"):
        load_data(folder, classes=["cat", "dog"])
    with pytest.raises(InputError, match="a name is there twice"):
        load_data(folder, classes=["cat", "dog", "owl", "cat"])


def test_what_is_tried_depends_on_the_budget(micro):
    names = {cost: [one.name for one in candidates(micro, cost, 3)] for cost in ("bytes", "macs", "latency")}
    assert names["bytes"][:3] == ["weight_only bits=8", "weight_only bits=4", "weight_only bits=3"]
    assert "token_merging" in names["macs"]
    assert "token_merging" not in names["bytes"]
    assert "dynamic_int8" in names["latency"]
    assert "dynamic_int8" not in names["macs"]
    first_trained = [name.endswith("epochs") for name in names["bytes"]].index(True)
    assert all(name.endswith("epochs") for name in names["bytes"][first_trained:]), "what trains comes last"
    assert {one.method for one in candidates(micro, "bytes", 0)} <= METHODS.keys()
    assert not any(one.epochs for one in candidates(micro, "bytes", 0))


@pytest.mark.slow
def test_the_best_within_a_budget_is_saved_and_kept(base, tmp_path, few):
    data, _ = mining.load_images("digits")
    run = Run(tmp_path)
    found = mining.mine(str(base.path), data, "0.3bytes", run)
    assert [one.label.partition(" (")[0] for one in found.models] == ["weight_only", "weight_only", "mixed_rank"]
    assert found.best in found.within
    assert found.best.val_top1 == max(one.val_top1 for one in found.within)
    assert artifact.size_on_disk(run.folder / "best") <= found.limit == 0.3 * found.own
    assert artifact.read_manifest(run.folder / "best").sha256 == artifact.read_manifest(found.best.path).sha256
    said = "\n".join(texts.findings(found, run, data))
    assert f"chosen on {len(data.val)} val images: 8-bit weights" in said
    assert "the chosen model" in said
    assert "yours" in said
    assert "**" not in said
    count = len(run.rows())
    again = mining.mine(str(base.path), data, "0.3bytes", run, minutes=1e-9)
    assert not again.left_out, "what was made before is there without any time"
    assert [one.label for one in again.models] == [one.label for one in found.models]
    assert len(run.rows()) == count
    others, _ = mining.load_images("digits", splits={"seed": 2})
    with pytest.raises(InputError, match="a results folder of its own"):
        mining.mine(str(base.path), others, "0.3bytes", run)


@pytest.mark.slow
def test_no_time_and_nothing_within(base, tmp_path, few):
    data, _ = mining.load_images("digits", splits={"seed": 1})
    late = mining.mine(str(base.path), data, "0.3bytes", Run(tmp_path), minutes=1e-9)
    assert (late.models, late.best) == ([], None)
    assert len(late.left_out) == len(FEW)
    assert "give more --minutes" in texts.nothing_within(late)
    tight = mining.mine(str(base.path), data, "5kB", Run(tmp_path))
    assert tight.best is None
    assert "cannot get to bytes" in tight.reasons["mixed_rank"]
    assert "the nearest, weight_only (bits=2), has" in texts.nothing_within(tight)


@pytest.mark.slow
def test_a_model_that_guesses_is_refused(micro, tmp_path):
    data, _ = mining.load_images("digits")
    path = artifact.save(micro, tmp_path / "micro")
    with pytest.raises(InputError, match=r"val images of digits, where always the same answer gives"):
        mining.mine(str(path), data, "0.5bytes", Run(tmp_path / "out"))


@pytest.mark.slow
def test_from_the_command_line(base, tmp_path, few, capsys):
    command = ["mine", str(base.path), "digits", "--out", str(tmp_path / "out")]
    for budget, reason in (("2 parsecs", "cannot be read"), ("1GB", "nothing is to be done")):
        assert cli.main([*command, "--budget", budget]) == 2
        assert reason in capsys.readouterr().err
    assert cli.main([*command, "--budget", "0.3bytes"]) == 0
    said = capsys.readouterr().out
    notes = (tmp_path / "out" / "mine.txt").read_text()
    assert notes.strip() in said
    for name in ("figures/yours.png", "report.html", "best/recipe.json", "base/recipe.json"):
        assert (tmp_path / "out" / name).is_file()
    alone = next(line.split() for line in notes.splitlines() if "vitbench compress" in line)
    assert cli.main(alone[1:]) == 0
    sums = [artifact.read_manifest(tmp_path / "out" / name).sha256 for name in ("best", "again")]
    assert sums[0] == sums[1]
    assert cli.main([*command, "--budget", "3kB"]) == 2
    assert "none of 2 models is within 3 kB; the nearest" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert cli.main([*command[:3], "--budget", "0.3bytes", "--out", str(tmp_path / "other")]) == 2
    assert "holds 'mine.txt' and no results" in capsys.readouterr().err
