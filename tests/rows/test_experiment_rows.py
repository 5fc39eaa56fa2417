"""What one baseline and the models made from it are, among rows of several."""

import pandas as pd
import pytest

from vitbench.base.errors import InputError
from vitbench.rows.comparison_table import experiment_rows, find_row
from vitbench.rows.experiment import Experiment

TRAINED = {"head": "random", "start": "weights:1", "train": {"epochs": 6, "seed": 0}}
METHOD = [{"method": "uct", "config": {"rank": 8}}]


def row(method, origin, artifact, steps=()):
    config = {"origin": origin, "methods": list(steps)}
    context = {"artifact": artifact}
    fields = {"model": "vit", "dataset": "set", "data_fingerprint": "0", "status": "ok", "metric": "top1"}
    return fields | {"method": method, "config": config, "context": context}


def labels(*rows):
    return Experiment.of(pd.DataFrame(list(rows))).rows["label"].tolist()


def test_what_starts_from_a_baselines_file_belongs_to_it():
    copy = {"head": "same", "start": "base.safetensors:abc"}
    rows = row("baseline", TRAINED, "abc"), row("uct", copy, "def", METHOD)
    assert labels(*rows) == labels(*rows[::-1])[::-1] == ["baseline", "uct"]


def test_what_starts_from_another_file_does_not():
    copy = {"head": "same", "start": "base.safetensors:xyz"}
    assert labels(row("baseline", TRAINED, "abc"), row("uct", copy, "def", METHOD)) == ["uct"]


def test_what_was_trained_from_that_file_is_another_baseline():
    again = {"head": "same", "start": "base.safetensors:abc", "train": {"epochs": 2}}
    assert len(labels(row("baseline", TRAINED, "abc"), row("baseline", again, "def"))) == 1


def test_an_experiment_and_its_rows_are_an_experiment():
    table = pd.DataFrame([row("baseline", TRAINED, "abc") | {"backend": "eager", "versus_backend": None}])
    experiment = Experiment.of(table)
    assert Experiment.of(experiment) is experiment
    assert Experiment.of(experiment.rows).rows is experiment.rows is experiment_rows(experiment.rows)
    assert experiment.require("baseline", "top1").equals(find_row(experiment.rows, "baseline", "top1"))
    with pytest.raises(InputError, match="hold no bytes of 'baseline'"):
        experiment.require("baseline", "bytes")
