"""The config of a measurement: its errors, its texts, and what the key of a sweep's cell hashes of it."""

import pytest

from vitbench.base.errors import InputError
from vitbench.measurement.measures import Measures
from vitbench.run.sweep.grid import SweepMeasures

BAD = [
    ({"rounds": 3}, "rounds = 3"),
    ({"threads": 0}, "threads = 0"),
    ({"batches": []}, "batches"),
    ({"batches": [0]}, "batches.0 = 0"),
    ({"rounds": 10, "starts": 11}, "starts = 11: more than rounds = 10"),
    ({"what": ["speed"]}, "unknown group of metrics 'speed'"),
    ({"power": -1.0}, "power = -1"),
    ({"within": -1}, "within = -1"),
    ({"round": 20}, "unknown key 'round'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Measures(**fields)


def test_the_baseline_runs_in_the_models_backend_unless_others_are_named():
    assert Measures(backend="onnxruntime").versus_backends == ["onnxruntime"]
    assert Measures(backend="onnxruntime", versus_backend="eager").versus_backends == ["eager"]
    assert Measures(backend="onnxruntime", versus_backend=["", "eager", "eager"]).versus_backends == [
        "onnxruntime",
        "eager",
    ]


def test_a_cell_hashes_the_fields_of_the_first_sweeps_and_others_only_where_they_are_set():
    hashed = {"what", "backend", "versus_backend", "batches", "rounds", "starts", "threads"}
    assert set(SweepMeasures().to_dict()) == hashed
    assert set(SweepMeasures(power=5).to_dict()) == hashed | {"power"}
    assert SweepMeasures(**SweepMeasures(within=100).to_dict()) == SweepMeasures(within=100)
