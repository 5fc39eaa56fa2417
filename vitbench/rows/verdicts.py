"""Sentences that interpret rows: each is computed from a paired test or an interval, so that other rows give another sentence."""

from collections.abc import Mapping

import pandas as pd

from vitbench.base.errors import InputError
from vitbench.rows.budgets import SIGNIFICANCE_LEVEL
from vitbench.rows.comparison_table import paired_rows
from vitbench.rows.experiment import EAGER, MEGA, Experiment
from vitbench.rows.words import display_labels

COST_NAMES = {"bytes": ("file", "smaller", "larger"), "macs": ("multiply-accumulates", "fewer", "more")}


def accuracy_verdict(rows: pd.DataFrame, first: str, second: str, names: tuple[str, str] | None = None) -> str:
    """Which of two models is more accurate on the same test images, and by how much; or that they do not differ significantly.

    The test is the exact McNemar test (`paired_rows`); the interval is the difference's.

    Args:
        first, second: labels of the models.
        names: what the sentence calls them; by default their display labels.

    Raises:
        InputError: a model without an accuracy image by image.
    """
    experiment = Experiment.of(rows)
    pair = [experiment.by_image(label) for label in (first, second)]
    test, count = paired_rows(*pair), pair[0]["context"]["images"]
    first_name, second_name = names or _display_names(experiment, first, second)
    points, interval = 100 * test.difference, f"[{100 * test.low:+.1f}, {100 * test.high:+.1f}]"
    if test.p >= SIGNIFICANCE_LEVEL:
        return (
            f"**{first_name}** and **{second_name}** are not significantly different on these {count:,} test "
            f"images: {points:+.1f} points {interval} (p = {test.p:.2g})."
        )
    direction = "more" if points > 0 else "less"
    return (
        f"**{first_name}** is {abs(points):.1f} points {direction} accurate than **{second_name}** on the same {count:,} test "
        f"images ({points:+.1f} {interval}, p = {test.p:.2g})."
    )


def cost_verdict(
    rows: pd.DataFrame, first: str, second: str, cost: str = "bytes", names: tuple[str, str] | None = None
) -> str:
    """How the cost of two models compares: bytes of the file on disk, or multiply-accumulates.

    Raises:
        InputError: a cost that is not one of these, or a model without it.
    """
    if cost not in COST_NAMES:
        raise InputError(f"cost = {cost!r} is not known here; allowed: {', '.join(COST_NAMES)}")
    experiment, (what, less, more) = Experiment.of(rows), COST_NAMES[cost]
    values = [float(experiment.require(label, cost)["value"]) for label in (first, second)]
    first_name, second_name = names or _display_names(experiment, first, second)
    unit = "MB" if cost == "bytes" else "M"
    numbers = f"{values[0] / MEGA:.3g} {unit} against {values[1] / MEGA:.3g} {unit}"
    ratio = values[1] / values[0]
    if abs(ratio - 1) < 0.005:
        return f"**{first_name}** and **{second_name}** take as much ({what}): {numbers}."
    if cost == "macs":
        share = 100 * abs(1 - values[0] / values[1])
        return f"**{first_name}** does {share:.0f} % {less if ratio > 1 else more} {what} than **{second_name}**: {numbers}."
    factor = max(ratio, 1 / ratio)
    by = f"{factor:.2g} times" if factor >= 1.5 else f"{100 * abs(1 - values[0] / values[1]):.2g} %"
    return f"The {what} of **{first_name}** is {by} {less if ratio > 1 else more} than that of **{second_name}**: {numbers}."


def time_verdict(rows: pd.DataFrame, label: str, batch: int = 1, backend: str = EAGER, name: str = "") -> str:
    """Whether a model is faster than the baseline that was timed in turn with it, from the interval of the ratio.

    Raises:
        InputError: a model without a latency ratio at that batch size in that backend.
    """
    experiment = Experiment.of(rows)
    row = experiment.find(label, "latency_ratio", batch, backend)
    if row is None:
        raise InputError(
            f"the rows hold no latency ratio of {label!r} at batch {batch} in {backend}; measure its latency"
        )
    name = name or _display_names(experiment, label)[0]
    where = f"at batch {batch}" + ("" if backend == EAGER else f" in {backend}")
    numbers = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}] of the baseline's time {where}"
    if row["high"] < 1:
        return f"**{name}** is faster: {numbers}."
    if row["low"] > 1:
        return f"**{name}** is slower: {numbers}."
    return f"**{name}** is neither faster nor slower than this run can tell: {numbers}."


def best_verdict(rows: pd.DataFrame, labels: Mapping[str, str]) -> str:
    """The most accurate of several models, and the others that do not differ significantly from it.

    Args:
        labels: name in the sentence -> label.

    Raises:
        InputError: fewer than two models, or one without an accuracy image by image.
    """
    if len(labels) < 2:
        raise InputError(f"{len(labels)} model was given to choose the best from; give two or more")
    experiment = Experiment.of(rows)
    by_name = {name: experiment.by_image(label) for name, label in labels.items()}
    ranked = sorted(by_name, key=lambda name: -by_name[name]["value"])
    best, others = ranked[0], ranked[1:]
    tied = [name for name in others if paired_rows(by_name[best], by_name[name]).p >= SIGNIFICANCE_LEVEL]
    beaten = [name for name in others if name not in tied]
    count, top1 = by_name[best]["context"]["images"], 100 * by_name[best]["value"]
    sentence = f"**{best}** has the highest top-1, {top1:.1f} % of {count:,} test images"
    if not beaten:
        return f"{sentence}, but no difference to {_listed(tied)} is significant."
    sentence += f"; it is significantly better than {_listed(beaten)}"
    return sentence + (f", and not significantly better than {_listed(tied)}." if tied else ".")


def _display_names(experiment: Experiment, *labels: str) -> tuple[str, ...]:
    """The display labels of models that are named together."""
    display = display_labels(experiment, labels)
    return tuple(display[label] for label in labels)


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
