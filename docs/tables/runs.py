"""Tables of whole runs: every model of every run, the most accurate within budgets, the fastest combinations."""

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from docs.results import Results, points
from docs.tables.common import Cells, Mean, known, table
from vitbench.figures.ranking import at_budgets
from vitbench.rows.budgets import TOLERANCE, models_with_cost, winners
from vitbench.rows.comparison_table import accuracy_text
from vitbench.rows.experiment import across_seeds
from vitbench.rows.words import display_labels, family_of


@table
def every_run(runs: Iterable[Results]) -> Iterator[Cells]:
    """A line for each model that was timed in eager mode: run, model, method, top-1, MB, times over the baseline's.

    Runs of several backends have tables of their own.
    """
    for results in runs:
        if not (results.every["metric"] == "bytes").any() or results.name.startswith("edge-deit-"):
            continue
        model = results.rows["model"].iloc[-1]
        labels = results.experiment.timed_labels
        if all(results.find(label, "latency_p50", 1) is None for label in labels):
            continue
        for label in labels:
            if label == "baseline" or results.find(label, "latency_ratio", 1) is not None:
                ratios = "1 | 1" if label == "baseline" else results.times(label, " | ")
                yield results.name, model, label, results.accuracy(label), f"{results.mb(label):.2f}", ratios


@known
def over_seeds(results: Results, label: str, to: str) -> Any:
    """By how many points of top-1 a model is above another one, each seed a pair: mean, 95 % interval, number of seeds."""
    top1 = across_seeds(results.every, "top1").pivot_table(index="seed", columns="label", values="value")
    return Mean((100 * (top1[label] - top1[to])).dropna())


@known
def budgets(results: Results) -> Any:
    """The most accurate method within each share of the baseline's bytes, each at its largest setting there."""
    return winners(results.rows)


@known
def how_many_scored(results: Results) -> int:
    """How many compressed models have an accuracy and a size."""
    return int((models_with_cost(results.rows, "bytes")["family"] != "baseline").sum())


@known
def all_are_of(budget_winners: Iterable[Any], family: str) -> bool:
    """Whether a method of a family is the most accurate within every share that has any."""
    return all(family_of(winner.top1["method"]) == family for winner in budget_winners if winner.count)


@table
def most_accurate(results: Results, budget_winners: Iterable[Any]) -> Iterator[Cells]:
    """A line for each share: how many methods are within, the most accurate, its top-1 and MB, how many do not differ significantly."""
    found = [winner for winner in budget_winners if winner.top1 is not None]
    display = display_labels(results.experiment, [winner.top1["label"] for winner in found])
    for winner in found:
        yield (
            f"1/{1 / winner.share:.0f}",
            winner.count,
            display[winner.top1["label"]],
            accuracy_text(winner.top1),
            f"{winner.cost['value'] / 1e6:.2f}",
            len(winner.indistinguishable),
        )


@known
def equal_sizes(results: Results) -> pd.DataFrame:
    """The methods at equal shares of the baseline's bytes (`vitbench.rows.budgets.at_budget`), the baseline first."""
    return at_budgets(results.every)


@known
def least_of_budget() -> float:
    """How much of a budget, in per cent, a model takes at least that is compared at it."""
    return 100 * (1 - TOLERANCE)


@table
def at_equal_sizes(sizes: pd.DataFrame) -> Iterator[Cells]:
    """A line for each method and share: display label, MB, mean top-1 over seeds, points from the baseline."""
    dense = sizes.iloc[0]
    for line in sizes.iloc[1:].itertuples():
        accuracy = f"{100 * line.top1:.2f} [{100 * line.low:.2f}, {100 * line.high:.2f}]"
        gained = f"{100 * (line.top1 - dense.top1):+.2f}"
        yield f"1/{1 / line.share:.0f}", line.text, f"{line.cost / 1e6:.2f}", accuracy, gained


@known
def mean_top1(results: Results, method: str) -> float:
    """The mean top-1 over seeds, in per cent, of a method at its first setting."""
    top1 = across_seeds(results.every, "top1")
    return 100 * float(top1.loc[top1["label"] == method, "value"].mean())


@table
def fastest_combinations(results: Results, backend: str) -> Iterator[Cells]:
    """A line for each model, scored and timed in a backend: top-1, MB, times over two baselines, points from the baseline."""
    dense = results.row("baseline", "top1", backend=backend)
    for label in results.labels():
        if label != "baseline":
            times = [results.times(label, backend=backend, versus=versus) for versus in ("eager", "")]
            top1 = results.row(label, "top1", backend=backend)
            yield label, accuracy_text(top1), f"{results.mb(label):.2f}", *times, points(top1, dense)


@known
def within(results: Results, backend: str, batch: int, share: float, lost: float) -> list[str]:
    """The labels of the models that take at most a share of eager fp32's time and lose at most so many points."""
    dense, labels = results.top1("baseline", backend), []
    for label in results.labels():
        if label != "baseline" and results.time(label, batch, backend, "eager") <= share:
            labels += [label] if dense - results.top1(label, backend) <= lost else []
    return labels


@known
def trials(results: Results, harm: str) -> int:
    """How many times work was killed, or bits were flipped."""
    rows = results.every[results.every["metric"] == "trials"]
    return int(sum(row.value for row in rows.itertuples() if row.context["harm"] == harm))


@known
def surely_faster(results: Results) -> list[str]:
    """The labels of the models whose time over the baseline's has an interval below 1."""
    rows = results.rows[results.rows["metric"] == "latency_ratio"]
    return list(dict.fromkeys(rows["label"][rows["high"] < 1]))
