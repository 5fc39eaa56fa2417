"""What the lessons measure on: models by their labels, each made and measured once."""

import pytest

from vitbench import Bench, Run
from vitbench.base.errors import InputError
from vitbench.methods.registry import make_config

pytestmark = pytest.mark.slow


def test_models_go_by_their_labels(base, digits, tmp_path):
    bench = Bench(base, digits, Run(tmp_path))
    assert bench.measure() == "baseline"
    assert bench.find_row("baseline", "weight_error") is None, "the baseline is not compared with itself"
    few = make_config("dynamic_int8", {"layers": ["fc1"]})
    assert bench.measure(make_config("dynamic_int8")) == "dynamic_int8"
    assert bench.measure(few) == "dynamic_int8 (layers=['fc1'])"
    both = bench.measure(make_config("pruning", {"neurons": 0.5, "heads": 0.0}), few)
    assert both == "pruning+dynamic_int8"
    sizes = [
        bench.find_row(label, "bytes").value for label in ("dynamic_int8", "dynamic_int8 (layers=['fc1'])", "baseline")
    ]
    assert sizes == sorted(sizes)
    known = len(bench.rows)
    assert bench.measure(few) == "dynamic_int8 (layers=['fc1'])"
    assert len(bench.rows) == known
    assert bench.find_row("dynamic_int8", "latency_p50") is None
    assert bench.top1_text("baseline").startswith(f"{100 * bench.find_row('baseline', 'top1').value:.2f} [")
    assert bench.top1_difference_text("baseline", "baseline").startswith("+0.00")
    assert bench.loss_difference_text("dynamic_int8", "baseline").count("p =") == 1


def test_what_a_search_tried_is_in_the_rows(base, digits, tmp_path):
    bench = Bench(base, digits, Run(tmp_path))
    policy = make_config(
        "multidimensional", {"keep": 0.7, "search": {"evaluations": 6, "first": 4}, "train": {"epochs": 0}}
    )
    label = bench.measure(policy)
    assert label.startswith("multidimensional")
    found = bench.rows[bench.rows["metric"] == "search_score"]
    assert [len(samples) for samples in found["samples"]] == [6]


def test_a_model_that_was_not_measured(base, digits, tmp_path):
    bench = Bench(base, digits, Run(tmp_path))
    bench.measure()
    assert bench.find_row("uct", "bytes") is None
    assert bench.top1_text("uct") == "-"
    with pytest.raises(InputError, match="the rows hold no top1 of 'uct'"):
        bench.top1_difference_text("uct", "baseline")
