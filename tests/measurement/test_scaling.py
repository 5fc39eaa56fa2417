"""Time and multiply-accumulates against the number of tokens, the points where they cross, and the figure."""

import numpy as np
import pytest

from tests.conftest import ROOT
from vitbench.base.errors import InputError
from vitbench.figures import attention
from vitbench.measurement.token_scaling import measure_token_scaling
from vitbench.methods.registry import make_config
from vitbench.rows.row_table import load_records
from vitbench.rows.runs import Run

LINEAR = make_config("linear_attention", {"train": {"epochs": 0}})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("scaling"))
    configs = [make_config("nystroem", {"landmarks": 8}), LINEAR]
    how = {"depth": 1, "rounds": 10}
    found = measure_token_scaling(run, "vit_mini_patch2_8", configs, [4, 16], **how)
    before = run.records.read_bytes()
    again = measure_token_scaling(run, "vit_mini_patch2_8", configs, [4, 16], **how)
    assert run.records.read_bytes() == before, "what is there is not measured again"
    assert set(again["key"]) == set(found["key"])
    return found


@pytest.mark.slow
def test_every_variant_part_and_size_has_its_rows(rows):
    good = rows[rows["status"] == "ok"]
    assert set(good["metric"]) == {"macs", "latency_p50", "latency_ratio"}
    kinds = {(row.method, row.context["part"], row.context["tokens"]) for row in good.itertuples()}
    parts = ("attention", "model")
    wanted = {(method, part, n) for method in ("baseline", "linear_attention") for part in parts for n in (5, 65)}
    assert kinds == wanted | {("nystroem", part, 65) for part in parts}
    assert (good["value"] > 0).all()


@pytest.mark.slow
def test_what_does_not_suit_a_size_is_skipped_with_the_reason(rows):
    skipped = rows[rows["status"] != "ok"]
    assert set(skipped["status"]) == {"skipped"}
    assert {row.context["tokens"] for row in skipped.itertuples()} == {5}
    assert skipped["error"].str.contains("landmarks = 8: vit_mini_patch2_8 has 5 tokens").all()


@pytest.mark.slow
def test_multiply_accumulates_of_the_layer_are_the_formula(rows):
    full = attention.rows_by_variant(rows, "macs", "attention")["full attention"]
    assert full["value"].tolist() == [4 * n * 64 * 64 + 2 * n * n * 64 for n in (5, 65)]
    linear = attention.rows_by_variant(rows, "macs", "attention")["linear"]
    assert linear["value"].tolist() == [4 * n * 64 * 64 + 2 * n * 16 * 64 + n * 64 for n in (5, 65)]


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        ([2, 1.5, 1.1], np.inf),
        ([0.9, 0.8, 0.5], 10),
        ([2, 2, 0.5], 10**2.5),
        ([0.5, 2, 0.5], 10**2.5),
        ([2, 1, 0.5], 100),
    ],
)
def test_the_crossing_is_where_the_ratio_stays_below_one(ratios, wanted):
    assert attention.break_even_tokens(np.array([10, 100, 1000]), np.array(ratios)) == pytest.approx(wanted)


@pytest.mark.slow
def test_the_figure_and_its_crossings_come_from_the_rows(rows):
    figure, shown = attention.against_tokens(rows)
    assert len(figure.axes) == 2
    ok = rows[(rows["status"] == "ok") & rows["metric"].isin(["macs", "latency_p50"])]
    assert set(shown["key"]) == set(ok["key"][ok["context"].map(lambda context: context["part"]) == "attention"])
    assert "of width 64" in figure.axes[1].get_title(loc="left"), "the model's"
    assert set(attention.break_even_by_variant(rows, "model")) == {"Nystroem, m = 8, 6 iterations", "linear"}


def test_accuracy_for_macs_shows_the_rows_it_names():
    found = load_records(ROOT / "results" / "reference" / "token-merging-imagenet-sample")
    named = {"merging": {"r = 4": "token_merging", "r = 8": "token_merging (r=8)"}}
    figure, shown = attention.accuracy_for_macs(found, named, "a title")
    assert figure.axes[0].get_title(loc="left") == "a title"
    assert set(shown["label"]) == {"baseline", *named["merging"].values()}
    assert sorted(shown["metric"]) == ["macs"] * 3 + ["top1"] * 3


@pytest.mark.parametrize("how", [{"rounds": 5}, {"threads": 0}, {"batch": 0}])
def test_wrong_settings(how, tmp_path):
    with pytest.raises(InputError, match="at least 1 thread, 10 rounds"):
        measure_token_scaling(Run(tmp_path), "vit_mini_patch2_8", [LINEAR], [8], **how)
