"""The numbers of ours in results/papers.md are the rows'."""

import pytest

from tests.conftest import ROOT
from tests.test_measured_edge import paper_ratios
from vitbench.comparison import subject, value
from vitbench.row_table import load_records

PAGE = (ROOT / "results" / "papers.md").read_text()
MEASURED = " ".join((ROOT / "results" / "measured.md").read_text().split())
TRAINED = "train.augment=shift-flip, train.epochs=2, train.lr=0.0003, train.precision=auto"
APART = "class_token=apart, iterations=6"
EPOCH = "train.augment=shift-flip, train.batch_size=50, train.epochs=1, train.lr=0.0002, train.precision=auto"


class Of:
    """The rows of a reference folder, as the page says them."""

    def __init__(self, folder):
        self.rows = subject(load_records(ROOT / "results" / "reference" / folder))

    def of(self, label, metric, batch=None):
        return value(self.rows, label, metric, batch)["value"]

    def top1(self, label):
        return f"{100 * self.of(label, 'top1'):.2f}"

    def smaller(self, label):
        return self.of("baseline", "bytes") / self.of(label, "bytes")

    def mb(self, label):
        return f"{self.of(label, 'bytes') / 1e6:.2f}"

    def times(self, label):
        return " / ".join(f"{self.of(label, 'latency_ratio', batch):.2f}" for batch in (1, 8))


def sentences():
    small, cifar, survey = Of("shape-deit-small"), Of("cifar10-deit"), Of("quantization-cifar10")
    yield f"{small.smaller('uct'):.1f} times, DeiT-S at rank 277"
    yield f"{cifar.top1('baseline')} to {cifar.top1('uct')} %, DeiT-Tiny at 64 pixels, {cifar.smaller('uct'):.1f} times smaller"
    rival = "weight_only (train.epochs=3)"
    yield f"have {cifar.top1(rival)} % in {cifar.mb(rival)} MB against {cifar.mb('uct')}"
    share = small.of("uct", "macs") / small.of("baseline", "macs")
    yield f"{share:.3f} of them and {small.times('uct')} of eager fp32's time"
    held, fetched = (-1.0, -1.0, "ethernet"), (1e8, 0.0, "wifi")
    time, energy = ("edge_time", "board"), ("edge_energy", "board")
    ratios = paper_ratios()
    yield (
        f"{ratios[*held, *time]:.2f} in time where both are in memory, {ratios[*fetched, *time]:.0f} over Wi-Fi where the dense "
        f"one is fetched for every answer; energy of the board {ratios[*held, *energy]:.2f} and {ratios[*fetched, *energy]:.0f}"
    )
    dense = survey.top1("baseline")
    times = survey.times("dynamic_int8")
    yield f"{dense} to {survey.top1('dynamic_int8')} %, {survey.smaller('dynamic_int8'):.1f} times smaller, {times} of the time"
    yield f"{dense} to {survey.top1('static_int8')} % on CIFAR-10 (JPEG)"
    yield f"{dense} to {survey.top1('simulated_integer')} % (`quantization-cifar10`, `simulated_integer`)"
    yield f"{dense} to {survey.top1('lsq (train.epochs=1)')} %, {survey.mb('lsq (train.epochs=1)')} MB"
    scratch = Of("diffq-scratch-cifar10")
    yield f"{scratch.top1('diffq')} %, {scratch.mb('diffq')} MB (`diffq-scratch-cifar10`)"
    cut = Of("torch-pruning-cifar10")
    label = f"pruning (compensation=ridge, {TRAINED})"
    yield f"{cut.top1(label)} % after two epochs, {cut.of(label, 'latency_ratio', 1):.2f} of the time at batch 1"
    few = Of("nystroem-cifar10-224")
    marks = ("", "landmarks=32", "landmarks=64")
    plain = " / ".join(few.top1(f"nystroem ({mark})" if mark else "nystroem") for mark in marks)
    trained = [few.top1(f"nystroem ({', '.join(part for part in (APART, mark, EPOCH) if part)})") for mark in marks]
    yield f"{plain} of {few.top1('baseline')} %; {trained[0]}, {trained[1]} and {trained[2]} % after one epoch"
    names = ["nystroem", "nystroem (landmarks=32)", "nystroem (landmarks=64)"]
    first, eighth = ([few.of(name, "latency_ratio", batch) for name in names] for batch in (1, 8))
    yield (
        f"ours takes {min(first):.2f} to {max(first):.2f} of its time at batch 1 and {min(eighth):.2f} to {max(eighth):.2f} "
        "at batch 8"
    )
    student, both = "distillation (teacher=original)", "distillation+dynamic_int8"
    taught = Of("distillation-cifar10")
    yield f"three of twelve blocks: {taught.top1(student)} %"
    yield (
        f"{taught.top1(student)} to {taught.top1(both)} %, {taught.smaller(both):.0f} times smaller than the teacher, "
        f"{taught.times(both)} of its time"
    )


@pytest.mark.parametrize("sentence", list(sentences()))
def test_ours_are_the_rows(sentence):
    assert sentence in PAGE


def test_what_is_told_in_words_is_told_by_the_measured_page_too():
    for ours, there in {
        "40 % of the blocks' weights less cost 1.2 points, 60 % cost 2.7": "60 % of the blocks' weights cost 2.7 points after",
        "20 % less cost 6.7 points": "| + ranks by head (`split_qkv`) | 76.5 [73.3, 79.4] | 75.1 [71.9, 78.1] | 71.2",
        "1.34 points lost at 0.6": "the joint policy is -1.34 [-1.86, -0.82]",
    }.items():
        assert ours in PAGE
        assert there in MEASURED
