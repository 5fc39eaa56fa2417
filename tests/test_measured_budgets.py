"""The README's table of equal budgets and its figures are those of the rows."""

import re

import pytest
from matplotlib.testing.compare import compare_images

from tests.conftest import ROOT
from tests.measured_words import MEASURED, WORDS, apart
from vitbench.budgets import scored, winners
from vitbench.cli import main
from vitbench.comparison import accuracy_text, across_seeds, subject, value
from vitbench.equal_budgets import at_budgets
from vitbench.gallery import rows_of
from vitbench.row_table import load_records

MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()
CIFAR10 = re.search(r"^CIFAR10 := \$\(addprefix \$\(ROWS\)/,(.+)\)$", MAKEFILE, re.M).group(1).split()
FIGURES = re.findall(r"vitbench (figure .+)$", MAKEFILE, re.M)


def folders():
    return [ROOT / "results" / "reference" / name for name in CIFAR10]


def lines():
    for won in winners(rows_of(folders())):
        if won.top1 is not None:
            accuracy = accuracy_text(won.top1)
            size = f"{won.cost['value'] / 1e6:.2f}"
            yield f"| 1/{1 / won.share:.0f} | {won.count} | {won.top1['label']} | {accuracy} | {size} | {len(won.equals)} |"


EQUAL = at_budgets(load_records(ROOT / "results" / "reference" / "equal-cifar10"))


def equal_lines():
    dense = EQUAL.iloc[0]
    for line in EQUAL.iloc[1:].itertuples():
        accuracy = f"{100 * line.top1:.2f} [{100 * line.low:.2f}, {100 * line.high:.2f}]"
        yield f"| 1/{1 / line.share:.0f} | {line.label} | {line.cost / 1e6:.2f} | {accuracy} | {100 * (line.top1 - dense.top1):+.2f} |"


@pytest.mark.parametrize("line", list(equal_lines()))
def test_the_table_of_equal_sizes(line):
    assert line in MEASURED


def test_equal_sizes_are_of_three_seeds_at_eight_budgets():
    assert set(EQUAL["seeds"]) == {3}
    assert EQUAL["share"].nunique() == 1 + 8
    dense = EQUAL.iloc[0]
    accuracy = f"{100 * dense.top1:.2f} % [{100 * dense.low:.2f}, {100 * dense.high:.2f}] in {dense.cost / 1e6:.2f} MB"
    assert accuracy in WORDS


def test_the_words_on_a_twentieth_of_the_bytes():
    dense, last = EQUAL.iloc[0], EQUAL[EQUAL["share"] == 1 / 20].iloc[0]
    top1 = across_seeds(load_records(ROOT / "results" / "reference" / "equal-cifar10"), "top1")
    blocks = top1.loc[top1["label"] == "distillation", "value"].mean()
    lost = [100 * loss for loss in (dense.top1 - last.top1, dense.top1 - blocks, blocks - last.top1)]
    assert f"({dense.cost / last.cost:.1f} times smaller), {lost[0]:.1f} points below the baseline" in WORDS
    assert f"6 blocks in fp32 lose {lost[1]:.1f} points, the 2 bits another {lost[2]:.1f}" in WORDS


@pytest.mark.parametrize("line", list(lines()))
def test_the_table_of_budgets(line):
    assert line in README


def test_the_readmes_words_on_budgets():
    rows = rows_of(folders())
    base = rows[(rows["method"] == "baseline") & rows["backend"].isna()].drop_duplicates("metric", keep="last")
    base = base.set_index("metric")["value"]
    words = " ".join(README.split())
    models = scored(subject(rows), "bytes")
    assert f"of {(models['family'] != 'baseline').sum()} compressed models" in words
    packed = "weight_only (train.augment=shift-flip, train.epochs=1, train.lr=0.001, train.precision=auto)"
    times = sorted(value(subject(rows), packed, "latency_ratio", batch)["value"] for batch in (1, 8))
    assert "take {:.1f} to {:.1f} times fp32's time in eager mode".format(*times) in words
    assert f"({100 * base['top1']:.2f} % in {base['bytes'] / 1e6:.2f} MB)" in words
    assert all("weight_only" in won.top1["label"] for won in winners(rows) if won.count), (
        "small weights win at every size"
    )


@pytest.mark.parametrize("command", FIGURES)
def test_the_readmes_figures_are_drawn_again_from_committed_rows(command, tmp_path):
    command = command.replace("$(CIFAR10)", " ".join(map(str, folders()))).replace(
        "$(ROWS)", str(ROOT / "results/reference")
    )
    *given, committed = command.split()
    fresh = tmp_path / "fresh.png"
    assert main([*given, str(fresh)]) == 0
    assert committed.removeprefix(f"{ROOT}/") in README
    assert compare_images(committed, str(fresh), tol=1) is None


def fast_lines():
    """A line for each model of the fast sweep, scored and timed in OpenVINO with bf16: top-1, times over two baselines, points lost."""
    rows, backend = load_records(ROOT / "results" / "reference" / "fast-cifar10-224"), "openvino_bf16"
    rows = subject(rows[rows["metric"] != "cell_seconds"])
    dense = value(rows, "baseline", "top1", backend=backend)
    for label in dict.fromkeys(rows["label"]):
        top1, size = value(rows, label, "top1", backend=backend), value(rows, label, "bytes")["value"] / 1e6
        cells = [accuracy_text(top1), f"{size:.2f}"]
        for versus in ("eager", ""):
            found = [value(rows, label, "latency_ratio", batch, backend, versus) for batch in (1, 8)]
            cells.append("1 / 1" if found[0] is None else " / ".join(f"{row['value']:.2f}" for row in found))
        if label != "baseline":
            yield f"| {label} | {' | '.join(cells)} | {apart(top1, dense)} |"


@pytest.mark.parametrize("line", list(fast_lines()))
def test_the_fastest_combinations(line):
    assert line in MEASURED


def test_what_one_image_takes_in_the_fastest():
    rows = load_records(ROOT / "results" / "reference" / "fast-cifar10-224")
    rows = rows[(rows["method"] == "pruning+static_int8") & (rows["metric"] == "latency_p50")]
    one, eight = (rows[rows["batch"] == batch]["value"].iloc[0] for batch in (1, 8))
    assert f"one image takes {one:.2f} ms and eight take {eight:.2f}" in WORDS
