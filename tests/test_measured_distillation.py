"""The page's numbers on distillation are those of the reference rows."""

import pytest

from tests.conftest import ROOT
from tests.measured_words import MEASURED, WORDS, apart, times_of
from vitbench.comparison import accuracy_text, subject, value
from vitbench.row_table import load_records
from vitbench.statistics import mean_interval

REFERENCE = ROOT / "results" / "reference"
DIGITS, CIFAR = REFERENCE / "distillation-digits", REFERENCE / "distillation-cifar10"


def name_of(method, steps):
    """Student and kind of teaching in the page's words, or None for what is not in its tables."""
    if method == "baseline":
        return "teacher"
    if method.startswith("pruning"):
        train = steps[0]["config"]["train"]["epochs"]
        how = "trained on, labels" if steps[0]["config"]["teacher"] == "none" else "distilled from the original"
        return f"pruned, {how if train else 'not trained'}"
    if not method.startswith("distillation"):
        return None
    config = steps[0]["config"]
    train, student = config["train"], config["student"] or f"{config['depth']} of the teacher's blocks"
    kind = "hard" if train["kd_labels"] == "hard" else "soft"
    for name, given in (
        ("features", train["feature_weight"]),
        ("attention", train["attention_weight"]),
        ("token", config["token"]),
    ):
        kind = name if given else kind
    kind = "alone" if config["teacher"] == "none" else kind
    return f"{student}, {kind}" + (", then int8" if "int8" in method else "")


def models(folder):
    """Name -> label of each model of seed 0 whose accuracy was measured."""
    rows = subject(load_records(folder))
    found = {}
    for row in rows[rows["metric"] == "top1"].itertuples():
        steps = row.config["methods"]
        name = name_of(row.method, steps)
        if name and all(step["config"].get("train", {}).get("seed", 0) == 0 for step in steps):
            found.setdefault(name, row.label)
    return rows, found


def lines(folder):
    """A line for each model: MB, share of the teacher's bytes, top-1, against the same student alone, and its time."""
    rows, found = models(folder)
    whole = value(rows, "baseline", "bytes")["value"]
    for name, label in found.items():
        top1, size = value(rows, label, "top1"), value(rows, label, "bytes")["value"]
        alone = found.get(f"{name.split(', ')[0]}, alone")
        gained = "" if alone in (None, label) else apart(top1, value(rows, alone, "top1"))
        time = "1 / 1" if label == "baseline" else times_of(rows, label)
        yield f"| {name} | {size / 1e6:.2f} | {size / whole:.2f} | {accuracy_text(top1)} | {gained} | {time} |"


@pytest.mark.parametrize(("folder", "least"), [(DIGITS, 11), (CIFAR, 6)], ids=["digits", "cifar10"])
def test_the_tables_are_the_reference_rows(folder, least):
    found, text = list(lines(folder)), MEASURED
    assert len(found) >= least
    for line in found:
        assert line in text


def over_seeds():
    """The distilled student's top-1 over its own alone, in points, with the 95 % interval over seeds, as results/measured.md says it."""
    rows = load_records(DIGITS)
    rows = rows[rows["method"] == "distillation"]
    own = rows["config"].map(lambda config: name_of("distillation", config["methods"]))
    seeds = rows["config"].map(lambda config: config["methods"][0]["config"]["train"]["seed"])
    top1 = rows[rows["metric"] == "top1"].assign(name=own, own_seed=seeds)
    table = 100 * top1.pivot_table(index="own_seed", columns="name", values="value")
    student = "vit_micro_patch2_8"
    pair = table[[f"{student}, alone", f"{student}, soft"]].dropna()
    mean, low, high = mean_interval(pair.iloc[:, 1] - pair.iloc[:, 0])
    return pair, (mean, low, high)


def test_a_distilled_student_beats_itself_alone_over_seeds():
    pair, (mean, low, high) = over_seeds()
    assert len(pair) >= 5
    assert low > 0
    text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] points over {len(pair)} seeds"
    assert text in WORDS
    means = pair.mean()
    assert f"from {means.iloc[0]:.2f} to {means.iloc[1]:.2f} %" in WORDS


def test_the_students_have_a_third_of_the_bytes_at_most():
    for folder in (DIGITS, CIFAR):
        rows, found = models(folder)
        sizes = {name: value(rows, label, "bytes")["value"] for name, label in found.items()}
        assert all(
            size <= sizes["teacher"] / 3 for name, size in sizes.items() if "pruned" not in name and name != "teacher"
        )
