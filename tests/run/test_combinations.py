"""Combinations: a search within a budget that resumes, and what an order does."""

import argparse

import pytest

from vitbench.base.errors import InputError
from vitbench.cli import combine, main
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact
from vitbench.rows.row_table import load_records
from vitbench.run.combinations import CombinationSearch, orders, search_combinations, trial_rows
from vitbench.training.loop import evaluate

SMALL = CombinationSearch(target=0.2, trials=6, structures=("none", "distillation", "pruning"))


@pytest.fixture(scope="module")
def found(base, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches")
    return folder, search_combinations(base.model, digits, SMALL, folder)


@pytest.mark.slow
def test_the_best_is_within_the_budget_and_what_it_says(found, base, digits, tmp_path):
    _, searched = found
    assert len(searched.trials) == SMALL.trials
    assert searched.limit == pytest.approx(0.2 * artifact.size_on_disk(base.path), rel=1e-3)
    best = searched.best
    small = compress(base.model, list(best.configs), digits).model
    assert artifact.size_on_disk(artifact.save(small, tmp_path / "small")) <= best.cost <= searched.limit
    assert evaluate(small, digits.val).top1.mean() == pytest.approx(best.val_top1)
    assert best.val_top1 == max(trial.val_top1 for trial in searched.trials if trial.val_top1 is not None)
    for trial in searched.trials:
        within = trial.cost is not None and trial.cost <= searched.limit
        assert (trial.val_top1 is not None) == within
        assert bool(trial.error) == (trial.cost is None)


@pytest.mark.slow
def test_a_search_goes_on_where_it_was(found, base, digits):
    folder, searched = found
    again = search_combinations(base.model, digits, SMALL, folder)
    assert [(trial.name, trial.cost) for trial in again.trials] == [
        (trial.name, trial.cost) for trial in searched.trials
    ]
    longer = search_combinations(base.model, digits, SMALL.replace(trials=8), folder)
    assert longer.trials[:6] == searched.trials
    assert len(longer.trials) == 8


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["torn", "one bit"])
def test_a_search_whose_notes_are_damaged_says_so_and_finds_the_same(found, base, digits, tmp_path, capsys, harm):
    folder, searched = found
    (notes,) = folder.glob("*.jsonl")
    content = bytearray(notes.read_bytes())
    content[content.index(b'"val_top1": 0.') + 14] ^= 1
    (tmp_path / notes.name).write_bytes(notes.read_bytes()[:-20] if harm == "torn" else content)
    assert search_combinations(base.model, digits, SMALL, tmp_path).trials[:6] == searched.trials
    assert ("1 of the notes" in capsys.readouterr().out) == (harm == "one bit")


@pytest.mark.slow
def test_the_same_seed_finds_the_same(found, base, digits, tmp_path):
    assert search_combinations(base.model, digits, SMALL, tmp_path).trials == found[1].trials


@pytest.mark.slow
def test_trials_are_rows(found, base, digits):
    rows = list(trial_rows(base.path, digits, SMALL, found[1]))
    within = [trial for trial in found[1].trials if trial.val_top1 is not None]
    assert [row.value for row in rows] == [trial.val_top1 for trial in within]
    assert {row.context["split"] for row in rows} == {"val"}


@pytest.mark.slow
def test_every_order_is_tried_and_what_cannot_be_says_why(base, digits):
    made = {}
    for configs in orders(["pruning", "mixed_rank", "dynamic_int8"]):
        name = "+".join(type(config).__name__ for config in configs)
        try:
            made[name] = compress(base.model, configs, digits).model.recipe.method
        except InputError as error:
            made[name] = error
    assert len(made) == 6
    assert made["Pruning+MixedRank+DynamicInt8"] == "pruning+mixed_rank+dynamic_int8"
    assert isinstance(made["DynamicInt8+Pruning+MixedRank"], InputError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"structures": ("prunning",)}, "did you mean 'pruning'"),
        ({"structures": ("dynamic_int8",)}, "no operating points"),
        ({"settings": {"pruning": {"neuron": 0.5}}}, "unknown key 'neuron'"),
    ],
)
def test_a_wrong_search(values, message, base, digits, tmp_path):
    with pytest.raises(InputError, match=message):
        search_combinations(base.model, digits, CombinationSearch(**values), tmp_path)


def test_steps_that_do_not_fit_together_are_trials_that_say_so(base, digits, tmp_path):
    rows = {"weight_only": {"group": 7}}
    alone = SMALL.replace(structures=("none",), codes=("weight_only",), settings=rows, choices={}, trials=2)
    found = search_combinations(base.model, digits, alone, tmp_path)
    assert found.best is None
    assert all("group = 7 does not divide" in trial.error for trial in found.trials)
    assert not list(trial_rows(base.path, digits, alone, found))


@pytest.mark.slow
def test_no_trial_within_the_budget(base, digits, tmp_path):
    found = search_combinations(base.model, digits, SMALL.replace(target=0.001, trials=2), tmp_path)
    assert found.best is None
    assert len(found.trials) == 2


@pytest.mark.slow
def test_from_the_command_line(base, tmp_path, capsys):
    out, record = tmp_path / "best", tmp_path / "run"
    given = ["combine", str(base.path), "--dataset", "digits", "--out", str(out), "--record", str(record)]
    few = ["--trials", "3", "--set", "structures=[none, distillation]", "seed=1"]
    assert main([*given, "--budget", "bytes=0.2", *few]) == 0
    said = capsys.readouterr().out
    assert "% on val" in said
    assert artifact.size_on_disk(out) <= 0.2 * artifact.size_on_disk(base.path)
    assert set(load_records(record)["metric"]) == {"combination_top1"}
    for budget, message in (("bytes=0.0001", "none of 3 combinations"), ("bits=2", "bits"), ("bytes=-1", "target")):
        assert main([*given, "--budget", budget, *few]) == 2
        assert message in capsys.readouterr().err
    for setting, message in (
        ("seed.x=1", "seed was given a value of its own"),
        ("settings.pruning.neuron=0.5", "'neuron'"),
    ):
        assert main([*given, "--budget", "bytes=0.2", "--trials", "1", "--set", setting]) == 2
        assert message in capsys.readouterr().err


def test_settings_reach_into_what_is_usual():
    options = argparse.Namespace(
        budget="macs=0.5", trials=2, settings=["settings.weight_only.ridge=2", "train.epochs=1"]
    )
    config, usual = combine._config(options), CombinationSearch()
    assert config.settings["weight_only"] == usual.settings["weight_only"] | {"ridge": 2}
    assert config.train == usual.train.replace(epochs=1)


def test_only_whole_blocks_can_come_before_uct(base, digits):
    """The answer to an exercise of lesson 11."""
    uct = make_config("uct", {"train": {"epochs": 0}})
    taught = make_config("distillation", {"train": {"epochs": 0}})
    assert compress(base.model, [taught, uct], digits).model.recipe.method == "distillation+uct"
    with pytest.raises(InputError):
        compress(base.model, [make_config("mixed_rank"), uct], digits)
