"""The page's numbers on efficient attention and token merging are those of the reference rows."""

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.measured_words import MEASURED, WORDS, apart, times_of
from vitbench import attention_figures
from vitbench.comparison import accuracy_text, subject, value
from vitbench.row_table import load_records

REFERENCE = ROOT / "results" / "reference"
MERGED, IMAGENET = REFERENCE / "token-merging-imagenet-sample", REFERENCE / "nystroem-imagenet-sample"
DIGITS, SIZES = REFERENCE / "digits-efficient-attention", REFERENCE / "attention-latency"
CIFAR = REFERENCE / "nystroem-cifar10-224"


def models(folder):
    """What each scored model is, as (method, its config) in the order of the rows, with its label."""
    rows, found = subject(load_records(folder)), {}
    for row in rows[rows["metric"] == "top1"].itertuples():
        steps = row.config["methods"]
        found.setdefault(row.label, (row.method, steps[0]["config"] if steps else {}))
    return rows, found


def cells(rows, label):
    """Top-1, how far from the baseline, and the time at batch 1 and 8 where it was taken."""
    top1 = value(rows, label, "top1")
    return f"{accuracy_text(top1)} | {apart(top1, value(rows, 'baseline', 'top1'))} | {times_of(rows, label)}"


def merging_lines():
    """A line for each r and schedule: share of the multiply-accumulates, then `cells`."""
    rows, found = models(MERGED)
    dense = value(rows, "baseline", "macs")["value"]
    for label, (method, config) in found.items():
        if method == "token_merging":
            share = value(rows, label, "macs")["value"] / dense
            yield f"| {config['r']} | {config['schedule']} | {share:.3f} | {cells(rows, label)} |"


def name_of(method, config):
    """What stands in the place of attention, in the page's words."""
    if method == "linear_attention":
        return "linear"
    inverse = f"{config['iterations']} iterations" if config["iterations"] else "exact inverse"
    also = ", convolution" if config["residual"] else ""
    return f"Nystroem, m = {config['landmarks']}, {inverse}, class token {config['class_token']}{also}"


def attention_lines(folder):
    """A line for each model whose attention was replaced, trained ones said to be so."""
    rows, found = models(folder)
    for label, (method, config) in found.items():
        if method not in ("nystroem", "linear_attention"):
            continue
        trained = config["train"]["epochs"]
        if config["blocks"] == []:
            yield f"| full attention, trained as much longer | {cells(rows, label)} |"
        else:
            yield f"| {name_of(method, config)}{', fine-tuned' if trained else ''} | {cells(rows, label)} |"


def size_lines():
    """A line for each variant and part: its time over full attention's by tokens, and where multiply-accumulates and time cross."""
    rows = load_records(SIZES)
    for part in ("attention", "model"):
        times, found = attention_figures.curves(rows, "latency_ratio", part), attention_figures.crossings(rows, part)
        for name, (macs, time) in found.items():
            own = times[name].set_index("tokens")["value"]
            ratios = " | ".join(f"{own[n]:.2f}" if n in own else "-" for n in sizes(rows))
            where = "one layer" if part == "attention" else "the whole model"
            yield f"| {where} | {name} | {ratios} | {macs:.0f} | {time:.0f} |"


def sizes(rows):
    return sorted({context["tokens"] for context in rows["context"]})


@pytest.mark.parametrize(
    ("lines", "least"),
    [
        (merging_lines, 9),
        (lambda: attention_lines(IMAGENET), 13),
        (lambda: attention_lines(DIGITS), 18),
        (lambda: attention_lines(CIFAR), 9),
        (size_lines, 8),
    ],
    ids=["merging", "imagenet-sample", "digits", "cifar10-224", "sizes"],
)
def test_the_tables_are_the_reference_rows(lines, least):
    found, text = list(lines()), MEASURED
    assert len(found) >= least
    for line in found:
        assert line in text


def test_without_training_accuracy_is_in_the_surveys_order():
    """65.9, 75.9 and 91.7 % with 24, 32 and 64 landmarks there."""
    for folder in (IMAGENET, DIGITS, CIFAR):
        rows, found = models(folder)
        ours = {
            config["landmarks"]: value(rows, label, "top1")["value"]
            for label, (method, config) in found.items()
            if method == "nystroem" and config["class_token"] == "averaged" and not config["train"]["epochs"]
        }
        in_order = [ours[m] for m in sorted(ours)]
        assert len(in_order) == 3
        assert in_order == sorted(in_order)
        assert len(set(in_order)) == 3
        assert in_order[-1] < value(rows, "baseline", "top1")["value"]


def won_back(folder):
    """Share of what was lost against the control that training won back, by name, where a point or more was lost."""
    rows, found = models(folder)
    top1 = {}
    for label, (method, config) in found.items():
        if method in ("nystroem", "linear_attention"):
            name = "control" if config["blocks"] == [] else name_of(method, config)
            top1[name, bool(config["train"]["epochs"])] = value(rows, label, "top1")["value"]
    control = top1["control", True]
    return {
        name: 1 - (control - top1[name, True]) / (control - top1[name, False])
        for name, trained in top1
        if trained and name != "control" and control - top1[name, False] > 0.01
    }


@pytest.mark.parametrize("folder", [DIGITS, CIFAR], ids=["digits", "cifar10-224"])
def test_what_training_wins_back_is_on_the_page(folder):
    for name, share in won_back(folder).items():
        assert f"{share:.2f} ({name})" in WORDS, name


def test_at_197_tokens_it_does_not_pay_and_at_4097_it_does():
    rows = load_records(SIZES)
    for part in ("attention", "model"):
        for name, own in attention_figures.curves(rows, "latency_ratio", part).items():
            if name != "full attention":
                ratio = own.set_index("tokens")["value"]
                assert ratio[197] > 1 > ratio[4097], (part, name)
    assert all(np.isfinite(time) for _, time in attention_figures.crossings(rows, "model").values())
