"""The page's numbers are those of the reference rows."""

import json
import re

import pandas as pd
import pytest
from scipy.stats import ttest_rel

from tests.conftest import ROOT
from tests.measured_words import MEASURED, WORDS, apart
from vitbench.comparison import across_seeds, comparison, percent, subject, value
from vitbench.methods import make_config
from vitbench.records import read_rows
from vitbench.row_table import load_records
from vitbench.statistics import mean_interval, paired, unpack_hits

REFERENCES = sorted((ROOT / "results" / "reference").glob("*/records.jsonl"))


def table_lines(file):
    """The page's lines for one reference run, made from its rows."""
    rows = load_records(file)
    if not (rows["metric"] == "bytes").any() or file.parent.name.startswith("edge-deit-"):
        return  # shapes without accuracies have a table of their own, in test_measured_edge.py
    for method, line in comparison(rows).iterrows():
        if pd.isna(line.get("ratio b1")):
            continue  # timed in other backends alone; they have a table of their own
        accuracy = f"{line['top1 %']:.2f} [{line['low %']:.2f}, {line['high %']:.2f}]".replace("nan [nan, nan]", "-")
        ratios = "1 | 1" if method == "baseline" else f"{line['ratio b1']:.2f} | {line['ratio b8']:.2f}"
        about = subject(rows).iloc[-1]
        yield f"| {file.parent.name} | {about['model']} | {method} | {accuracy} | {line['MB']:.2f} | {ratios} |"


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.parent.name)
def test_the_numbers_are_the_reference_rows(file):
    for line in table_lines(file):
        assert line in MEASURED
    for row in read_rows(file):
        assert (file.parent / "environments" / f"{row.env_id}.json").is_file()
        assert not row.commit.endswith(("+changes", "-dirty")), "a reference row names a commit that holds its source"


def test_what_a_reviewer_should_see_are_the_reference_rows():
    rows = load_records(ROOT / "results" / "reference" / "digits-quick")
    lines = [line for line in (ROOT / "REVIEWING.md").read_text().splitlines() if re.match(r"\| \w+ \| \d", line)]
    assert len(lines) >= 3
    for line in lines:
        label = line.split(" | ")[0].removeprefix("| ")
        size = value(subject(rows), label, "bytes")["value"] / 1e6
        assert line == f"| {label} | {percent(rows, label)} | {size:.2f} |"


def test_the_seeds_are_the_reference_rows():
    rows = load_records(ROOT / "results" / "reference" / "digits-quick")
    table = 100 * across_seeds(rows, "top1").pivot_table(index="seed", columns="label", values="value")
    assert len(table) >= 3
    for other in ("uct (train.epochs=0)", "baseline"):
        mean, low, high = mean_interval(table["uct"] - table[other])
        assert f"{mean:+.2f} points [{low:+.2f}, {high:+.2f}]" in MEASURED, other


def test_the_rivals_are_the_reference_rows():
    rows = subject(load_records(ROOT / "results" / "reference" / "cifar10-deit"))
    rival, ours = "weight_only (train.epochs=3)", "uct"
    assert (
        f"reach {100 * value(rows, rival, 'top1')['value']:.2f} % in {value(rows, rival, 'bytes')['value'] / 1e6:.2f} MB"
        in WORDS
    )
    lost = 100 * (value(rows, "baseline", "top1")["value"] - value(rows, ours, "top1")["value"])
    smaller = value(rows, "baseline", "bytes")["value"] / value(rows, ours, "bytes")["value"]
    assert (
        f"{smaller:.1f} times smaller ({value(rows, ours, 'bytes')['value'] / 1e6:.2f} MB) and loses {lost:.1f} points"
        in WORDS
    )
    rounded = [100 * value(rows, label, "top1")["value"] for label in ("uct (train.epochs=0)", "weight_only")]
    assert "UCT has {:.2f} % and plain 2-bit weights {:.2f} %".format(*rounded) in WORDS


RIVAL = {"gradient_weight": 0.0, "compensation": "none", "allocation": "uniform"}
STAGES = {  # name on the page -> settings of mixed_rank that differ from its defaults
    "plain SVD, the same share of each layer": {"decomposition": "svd", "mean_correction": False, **RIVAL},
    "ASVD, likewise": {"decomposition": "asvd", "mean_correction": False, **RIVAL},
    "SVD-LLM, likewise": {"decomposition": "svd_llm", "mean_correction": False, **RIVAL},
    "stage 1: activation-aware, likewise": RIVAL,
    "+ stage 2: greedy ranks": {"gradient_weight": 0.0, "compensation": "none"},
    "+ weighted by the gradient's moments": {"compensation": "none"},
    "+ stage 3: compensation": {},
    "+ ranks by head (`split_qkv`)": {"split_qkv": True},
    "energy": {"scale": "energy", "gradient_weight": 0.0, "compensation": "none"},
    "error": {"scale": "error", "gradient_weight": 0.0, "compensation": "none"},
    "+ short distillation instead": {"train": True},
}


def stage_rows(folder):
    """(stage, share kept) -> the row of its top-1, for what was run."""
    rows = subject(load_records(folder))
    rows = rows[(rows["metric"] == "top1") & (rows["method"] == "mixed_rank")]
    usual, names = (
        make_config("mixed_rank").to_dict(),
        {json.dumps(own, sort_keys=True): name for name, own in STAGES.items()},
    )
    found = {}
    for row in rows.itertuples():
        config = row.config["methods"][0]["config"]
        own = {key: value for key, value in config.items() if key not in ("keep", "train") and value != usual[key]}
        own |= {"train": True} if config["train"]["epochs"] else {}
        found[names.get(json.dumps(own, sort_keys=True)), config["keep"]] = row
    return found


def stage_lines(folder, keeps):
    """Lines of top-1 in per cent, a stage each and a column for each share kept, for the stages that were run."""
    found = stage_rows(folder)
    for name in STAGES:
        each = [found.get((name, keep)) for keep in keeps]
        if all(row is not None for row in each):
            cells = [f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]" for row in each]
            yield f"| {name} | {' | '.join(cells)} |"


def gain(folder, stage, before, keep):
    """What a stage adds to another, as results/measured.md says it."""
    rows = [stage_rows(folder)[name, keep] for name in (stage, before)]
    found = paired(*(unpack_hits(row.hits, row.context["images"]) for row in rows))
    return (
        f"{100 * found.difference:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}] at {keep} (p = {found.p:.2g})"
    )


IMAGENET = ROOT / "results" / "reference" / "mixed-rank-imagenet-sample"
CIFAR = ROOT / "results" / "reference" / "mixed-rank-cifar10"


@pytest.mark.parametrize(("folder", "keeps"), [(IMAGENET, (0.95, 0.9, 0.8, 0.7)), (CIFAR, (0.6, 0.5, 0.4))])
def test_the_stages_are_the_reference_rows(folder, keeps):
    lines = list(stage_lines(folder, keeps))
    assert len(lines) >= 8
    for line in lines:
        assert line in MEASURED


def test_the_gains_are_the_reference_rows():
    _, _, _, uniform, two, weighted, three, heads, energy, error, _ = STAGES
    found = stage_rows(IMAGENET)
    scales = [f"{100 * found[name, 0.8].value:.1f}" for name in (uniform, energy, error, two)]
    assert (
        "{} % with the same share for all, {} % by energy, {} % by plain error, {} % by sensitivity".format(*scales)
        in WORDS
    )
    for keep in (0.9, 0.8, 0.7):
        assert gain(IMAGENET, three, weighted, keep) in WORDS
        assert gain(IMAGENET, heads, three, keep) in WORDS


def test_the_costs_of_mixed_rank_are_the_reference_rows():
    rows, free = subject(load_records(CIFAR)), "mixed_rank"
    found, base = stage_rows(CIFAR), value(rows, "baseline", "top1")["value"]
    lost = {keep: 100 * (base - found["+ short distillation instead", keep].value) for keep in (0.4, 0.6)}
    assert f"60 % of the blocks' weights cost {lost[0.4]:.1f} points after the distillation" in WORDS
    assert f"40 % cost {lost[0.6]:.1f}." in WORDS
    ratio = {
        (label, backend, batch): f"{value(rows, label, 'latency_ratio', batch, backend)['value']:.2f}"
        for label in (free, "mixed_rank (split_qkv=True)")
        for backend in ("eager", "openvino")
        for batch in (1, 8)
    }
    whole, apart = (list(ratio.values())[i : i + 4] for i in (0, 4))
    macs = value(rows, free, "macs")["value"] / value(rows, "baseline", "macs")["value"]
    text = "takes {} of the baseline's time at batch 1 and {} at batch 8 in eager mode, {} and {} of OpenVINO's, for {:.2f} of"
    assert text.format(*whole, macs) in WORDS
    assert "with ranks by head {} and {}, and {} and {}".format(*apart) in WORDS
    seconds = load_records(ROOT / "results" / "reference" / "shape-deit-base")["value"].iloc[-1]
    assert f"take {seconds:.0f} s on two cores" in WORDS
    depths = load_records(ROOT / "results" / "reference" / "shape-deit-tiny-depths")
    assert [context["depth"] for context in depths["context"]] == [3, 6, 12]
    assert "{:.1f}, {:.1f} and {:.1f} s for DeiT-Tiny's shape".format(*depths["value"]) in WORDS


SEARCHED = ROOT / "results" / "reference" / "multidimensional-cifar10"
ALL = ("neurons", "head_dims", "tokens")
POLICIES = {  # name on the page -> how the policy was found, and what may go
    "all three, searched": ("gp", ALL),
    "neurons alone, searched": ("gp", ("neurons",)),
    "dimensions of heads alone, searched": ("gp", ("head_dims",)),
    "tokens alone, searched": ("gp", ("tokens",)),
    "all three and whole heads, searched": ("gp", ("neurons", "heads", "head_dims", "tokens")),
    "all three, the same ratio": ("one_ratio", ALL),
}
BUDGETS = (0.8, 0.6, 0.45)
PLAIN, FREE, DISTILLED = "labels", "not trained", "distilled"


def policy_rows(metric="top1"):
    """(how, dimensions, share of MACs, how it was fine-tuned) -> the row of a metric."""
    rows = subject(load_records(SEARCHED))
    found = {}
    for row in rows[(rows["metric"] == metric) & (rows["method"] == "multidimensional")].itertuples():
        config = row.config["methods"][0]["config"]
        tuned = (DISTILLED if config["train"]["kd_weight"] else PLAIN) if config["train"]["epochs"] else FREE
        if config["budget"] == "macs" and config["search"]["seed"] == 0:
            found[config["search"]["how"], tuple(config["dimensions"]), config["keep"], tuned] = row
    return found


def policy_lines():
    """A line for each policy and budget that was run: MACs left, top-1 not trained and fine-tuned."""
    top1, macs, dense = policy_rows(), policy_rows("macs"), value(subject(load_records(SEARCHED)), "baseline", "macs")
    for keep in BUDGETS:
        for name, kind in POLICIES.items():
            each = [top1.get((*kind, keep, tuned)) for tuned in (FREE, DISTILLED)]
            if all(row is not None for row in each):
                cells = [f"{100 * row.value:.2f} [{100 * row.low:.2f}, {100 * row.high:.2f}]" for row in each]
                yield f"| {name} | {macs[(*kind, keep, FREE)].value / dense['value']:.3f} | {' | '.join(cells)} |"


def search_gain(folder):
    """What the Gaussian process's best scores have over random search's, over the seeds, as results/measured.md says it."""
    rows = subject(load_records(folder))
    rows = rows[rows["metric"] == "search_score"]
    best = {}
    for row in rows.itertuples():
        config = row.config["methods"][0]["config"]
        about = {key: given for key, given in config.items() if key not in ("search", "train", "teacher")}
        best.setdefault(json.dumps(about), {}).setdefault(config["search"]["how"], {})[row.seed] = row.value
    (found,) = [each for each in best.values() if "random" in each]
    differences = [found["gp"][seed] - score for seed, score in found["random"].items()]
    p = ttest_rel([found["gp"][seed] for seed in found["random"]], list(found["random"].values())).pvalue
    mean, low, high = mean_interval(differences)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}] (p = {p:.2g}, {len(differences)} seeds)"


def test_the_policies_are_the_reference_rows():
    lines = list(policy_lines())
    assert len(lines) >= 13
    for line in lines:
        assert line in MEASURED
    top1, dense = policy_rows(), baseline_row("top1")
    small = top1["gp", ALL, 0.6, DISTILLED]
    assert f"is {apart(small, dense)} points from the baseline" in WORDS
    for keep in BUDGETS:
        for name in ("neurons", "head_dims", "tokens"):
            for tuned in (FREE, DISTILLED):
                row = top1.get(("gp", (name,), keep, tuned))
                assert row is None or apart(top1["gp", ALL, keep, tuned], row) in WORDS, (keep, name, tuned)
    for folder in (SEARCHED, ROOT / "results" / "reference" / "digits-pruning"):
        assert search_gain(folder) in WORDS


def baseline_row(metric):
    rows = subject(load_records(SEARCHED))
    return next(rows[(rows["metric"] == metric) & (rows["method"] == "baseline")].itertuples())


ROUNDED = ROOT / "results" / "reference" / "quantization-imagenet-sample"


def rounded_rows():
    """(what was done, bits) -> label of each weight-only model without training, and of static int8."""
    rows, found = subject(load_records(ROUNDED)), {}
    for row in rows[(rows["metric"] == "top1") & rows["backend"].isna()].itertuples():
        if row.method == "weight_only":
            config = row.config["methods"][0]["config"]
            kind = config["rounding"].replace("_", " ") + (
                f", groups of {config['group']}" if config["group"] else ", a step a row"
            )
            if config["target_bytes"]:
                kind, config = kind + ", bits by layer", {**config, "bits": "2 to 8"}
            found.setdefault((kind, config["bits"]), []).append(row.label)
        elif row.method in ("static_int8", "dynamic_int8"):
            found.setdefault((row.method.replace("_", " "), 8), []).append(row.label)
    return rows, [(kind, bits, label) for (kind, bits), labels in found.items() for label in labels]


def rounded_lines():
    """A line for each rounded model: bits, MB, top-1 and how far it is from fp32."""
    rows, found = rounded_rows()
    dense = value(rows, "baseline", "top1")
    for kind, bits, label in found:
        top1, size = value(rows, label, "top1"), value(rows, label, "bytes")
        if kind.startswith("static") and label != "static_int8":
            continue
        cells = f"{100 * top1['value']:.1f} [{100 * top1['low']:.1f}, {100 * top1['high']:.1f}]"
        yield f"| {kind} | {bits} | {size['value'] / 1e6:.2f} | {cells} | {apart(top1, dense)} |"


def test_the_quantization_is_the_reference_rows():
    lines, text = list(rounded_lines()), MEASURED
    assert len(lines) >= 14
    for line in lines:
        assert line in text
    rows, found = rounded_rows()
    group = {(kind, bits): value(rows, label, "top1") for kind, bits, label in found}
    for bits in (4, 3, 2):
        gained = apart(group["second order, groups of 32", bits], group["nearest, groups of 32", bits])
        assert f"{gained} at {bits} bits" in WORDS
    for versus, method in (("eager", "static_int8"), ("eager", "baseline"), ("", "static_int8")):
        ratio = [value(rows, method, "latency_ratio", batch, "openvino", versus=versus) for batch in (1, 8)]
        assert "{:.2f} and {:.2f}".format(*(row["value"] for row in ratio)) in WORDS
