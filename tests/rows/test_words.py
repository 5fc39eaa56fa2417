"""Display labels: short, with what decides the size and what differs, and never two alike."""

import pandas as pd
import pytest

from tests.conftest import ROOT
from vitbench.rows.row_table import load_records
from vitbench.rows.words import display_labels, family_of, method_name

REFERENCE = ROOT / "results" / "reference"
UNTRAINED, TRAINED = {"epochs": 0, "lr": 0.1}, {"epochs": 3, "lr": 0.2}


def rows_of(*models):
    """Rows of models, each given as its methods with their settings."""
    rows = [
        {
            "status": "ok",
            "model": "m",
            "dataset": "d",
            "data_fingerprint": "f",
            "method": "+".join(model) or "baseline",
            "config": {"methods": [{"method": name, "config": config} for name, config in model.items()]},
            "context": {},
        }
        for model in models
    ]
    return pd.DataFrame(rows)


def texts(*models):
    return list(display_labels(rows_of(*models)).values())


def test_the_setting_that_decides_the_size_is_always_named():
    assert texts({}, {"weight_only": {"bits": 4, "group": None}}) == ["baseline", "4-bit weights"]
    assert texts({"mixed_rank": {"keep": 0.4}}) == ["mixed rank, 40 % kept"]
    assert texts({"uct": {"bits": 4, "rank": 138, "rank_ratio": 0.72}}) == ["UCT, 4 bits, rank 138"]
    assert texts({"uct": {"bits": 4, "rank": None, "rank_ratio": 0.72}}) == ["UCT, 4 bits, rank 72 % of the width"]
    assert texts({"static_int8": {"equalise": 0.5}}) == ["static int8"]
    assert texts({"pruning": {"neurons": 0.5, "heads": 0.25, "tokens": 0.0}}) == [
        "pruning, 50 % of neurons, 25 % of heads"
    ]
    assert texts({"token_merging": {"r": 4}}) == ["token merging, 4 pairs a block"]
    assert texts({"lsq": {"weight_bits": 4, "activation_bits": 8}}) == ["LSQ, W4A8"]


def test_settings_that_differ_are_named_and_others_are_not():
    trained, grouped = ({"bits": 2, "group": None, "train": TRAINED}, {"bits": 4, "group": 32, "train": UNTRAINED})
    assert texts({"weight_only": trained}, {"weight_only": grouped}) == [
        "2-bit weights, trained 3 epochs",
        "4-bit weights, groups of 32",
    ]
    assert texts({"weight_only": trained}) == ["2-bit weights"]


def test_models_that_used_other_images_are_told_apart():
    rows = rows_of(*({"weight_only": {"bits": 2, "group": None}} for _ in range(3)))
    for row, images in zip(
        rows["config"][1:], ({"fingerprint": "f", "train": 320, "val": 64}, {"fingerprint": "abc"}), strict=True
    ):
        row["methods"][0]["images"] = images
    assert list(display_labels(rows).values()) == [
        "2-bit weights",
        "2-bit weights, 320 training images",
        "2-bit weights, images.fingerprint abc",
    ]


def test_a_figure_names_what_differs_between_its_own_models():
    rows = rows_of(*({"weight_only": {"bits": bits, "group": group}} for bits, group in ((4, None), (4, 32), (2, 32))))
    labels = display_labels(rows)
    assert list(labels.values()) == ["4-bit weights", "4-bit weights, groups of 32", "2-bit weights, groups of 32"]
    assert list(display_labels(rows, list(labels)[1:]).values()) == ["4-bit weights", "2-bit weights"]


def test_combinations_and_unknown_methods_and_settings():
    both = {"mixed_rank": {"keep": 0.6}, "weight_only": {"bits": 4}}
    assert texts(both) == ["mixed rank, 60 % kept + 4-bit weights"]
    assert texts({"own_method": {"alpha": 1}}, {"own_method": {"alpha": 2.5}}) == [
        "own method",
        "own method, alpha 2.5",
    ]
    assert texts({"own_method": {"fast": True}}, {"own_method": {"fast": False}}) == [
        "own method",
        "own method, no fast",
    ]


def test_models_that_differ_never_have_the_same_text():
    close = [{"mixed_rank": {"keep": keep}} for keep in (0.4, 0.40001)]
    same_name = [{"weight_only": {"bits": 4}}, {"own": {}}]
    assert len(set(texts(*close))) == 2
    assert len(set(texts(*same_name))) == 2


@pytest.mark.parametrize("name", ["digits-pruning", "mixed-rank-cifar10", "equal-cifar10", "nystroem-cifar10-224"])
def test_models_of_committed_rows_have_texts_of_their_own(name):
    display = display_labels(load_records(REFERENCE / name))
    assert len(set(display.values())) == len(display)
    assert not any("=" in text or "_" in text for text in display.values() if "student" not in text)


def test_methods_without_settings():
    assert method_name("mixed_rank+weight_only") == "mixed rank + weight-only quantization"
    assert method_name("own_method") == "own method"
    assert [family_of(name) for name in ("lsq", "uct", "uct+lsq", "own_method")] == [
        "quantization",
        "UCT",
        "combinations",
        "",
    ]
