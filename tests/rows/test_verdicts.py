"""Sentences that interpret: rows that say the contrary give the contrary sentence."""

import numpy as np
import pandas as pd
import pytest

from vitbench.base.errors import InputError
from vitbench.rows import accuracy_verdict, best_verdict, cost_verdict, pack_hits, time_verdict, wilson

COUNT = 1000


def rows(hits, **costs):
    """Rows of the models a, b, c with as many hits each; `costs` are metric -> values of a and b."""
    table = []
    for label, right in zip("abc", hits, strict=False):
        image_hits = np.arange(COUNT) < right
        low, high = wilson(right, COUNT)
        table.append(
            {"label": label, "metric": "top1", "value": right / COUNT, "low": low, "high": high}
            | {"hits": pack_hits(image_hits), "context": {"images": COUNT}}
        )
    for metric, values in costs.items():
        for label, value in zip("abc", values, strict=False):
            low, high = value if isinstance(value, tuple) else (None, None)
            mean = sum(value) / 2 if isinstance(value, tuple) else value
            table.append({"label": label, "metric": metric, "value": mean, "low": low, "high": high, "batch": 1})
    table = pd.DataFrame(table).reindex(columns=["label", "metric", "value", "low", "high", "hits", "context", "batch"])
    table["config"] = [{"methods": []}] * len(table)
    return table.assign(method=table["label"], backend="eager", versus_backend=None, hits=table["hits"].fillna(""))


def test_accuracy_is_more_or_less_by_the_rows():
    assert "**a** is 5.0 points more accurate than **b** on the same 1,000 test images" in accuracy_verdict(
        rows([900, 850]), "a", "b"
    )
    assert "**a** is 5.0 points less accurate than **b**" in accuracy_verdict(rows([850, 900]), "a", "b")
    assert "are not significantly different on these 1,000 test images" in accuracy_verdict(rows([900, 898]), "a", "b")
    assert "**UCT** is" in accuracy_verdict(rows([900, 850]), "a", "b", names=("UCT", "plain"))


def test_costs_are_smaller_or_larger_by_the_rows():
    by_bytes = [cost_verdict(rows([900, 900], bytes=pair), "a", "b") for pair in ((1e6, 4e6), (4e6, 1e6), (1e6, 1e6))]
    assert "4 times smaller than that of **b**" in by_bytes[0]
    assert "4 times larger than that of **b**" in by_bytes[1]
    assert "take as much" in by_bytes[2]
    assert "20 % smaller than that of **b**" in cost_verdict(rows([900, 900], bytes=(1.2e6, 1.5e6)), "a", "b")
    assert "25 % larger than that of **b**" in cost_verdict(rows([900, 900], bytes=(1.5e6, 1.2e6)), "a", "b")
    assert "does 25 % fewer multiply-accumulates" in cost_verdict(rows([1, 1], macs=(3e8, 4e8)), "a", "b", "macs")
    assert "does 33 % more multiply-accumulates" in cost_verdict(rows([1, 1], macs=(4e8, 3e8)), "a", "b", "macs")


@pytest.mark.parametrize(
    ("interval", "text"),
    [((0.7, 0.8), "is faster"), ((1.2, 1.3), "is slower"), ((0.9, 1.1), "is neither faster nor slower")],
)
def test_time_is_told_from_the_interval(interval, text):
    assert text in time_verdict(rows([1], latency_ratio=[interval]), "a")


def test_the_best_is_named_with_those_that_do_not_differ_significantly():
    names = {"first": "a", "second": "b", "third": "c"}
    assert best_verdict(rows([900, 850, 899]), names) == (
        "**first** has the highest top-1, 90.0 % of 1,000 test images; it is significantly better than second, and not "
        "significantly better than third."
    )
    assert best_verdict(rows([850, 900, 700]), names).startswith("**second** has the highest top-1")
    assert "no difference to second and third is significant" in best_verdict(rows([900, 899, 898]), names)


def test_wrong_input_says_what_to_measure():
    with pytest.raises(InputError, match="no top1 of 'd' image by image"):
        accuracy_verdict(rows([1, 2]), "a", "d")
    with pytest.raises(InputError, match="no bytes of 'a'"):
        cost_verdict(rows([1, 2]), "a", "b")
    with pytest.raises(InputError, match="cost = 'watts' is not known here; allowed: bytes, macs"):
        cost_verdict(rows([1, 2]), "a", "b", "watts")
    with pytest.raises(InputError, match="give two or more"):
        best_verdict(rows([1, 2]), {"a": "a"})
