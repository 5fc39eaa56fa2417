"""Equal budgets: each method's largest setting within a share of the baseline's cost, and the most accurate of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from vitbench.base.errors import InputError, one_of
from vitbench.rows.comparison_table import accuracy_text, are_paired, paired_rows
from vitbench.rows.experiment import MEGA, Experiment
from vitbench.rows.words import display_labels

SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 10, 1 / 12, 1 / 15)
SIGNIFICANCE_LEVEL = 0.05  # two models differ significantly if p is below it
COSTS = ("bytes", "macs", "latency_ratio")
TOLERANCE = 0.25  # models are at an equal budget if they are within it and take at least 1 - TOLERANCE of it


@dataclass(frozen=True)
class BudgetWinner:
    """The most accurate method within a budget, each method at its largest setting in it.

    Attributes:
        share: the budget, as a share of the baseline's cost.
        count: how many methods are within the budget. With more methods, chance favours the winner more.
        top1: the winner's row of top1; None if no model is within the budget.
        cost: the winner's row of the cost; None if no model is within the budget.
        indistinguishable: labels of the other methods' settings that do not differ significantly from the winner on the
            same images (exact McNemar test, p >= 0.05, not corrected for multiple tests), best first. A model without hits
            is one of them if the intervals overlap.
    """

    share: float
    count: int
    top1: pd.Series | None
    cost: pd.Series | None
    indistinguishable: tuple[str, ...]


def at_budget(
    costs: Mapping[str, float], methods: Mapping[str, str], budget: float, tolerance: float = TOLERANCE
) -> dict[str, str]:
    """The models at an equal budget: method -> the label of its largest setting within it, in the order of the methods.

    The setting is chosen by its cost alone, so that no accuracy chooses anything. A method whose largest setting takes less
    than 1 - `tolerance` of the budget is left out, since it would stand there with the accuracy of a smaller model.

    Args:
        costs: label -> cost.
        methods: label -> method.
        budget: the largest cost, in the unit of the costs.
        tolerance: 1 means that every model within the budget counts.
    """
    largest: dict[str, str] = {}
    for label, method in methods.items():
        if costs[label] <= budget and (method not in largest or costs[label] > costs[largest[method]]):
            largest[method] = label
    return {method: label for method, label in largest.items() if costs[label] >= (1 - tolerance) * budget}


def models_with_cost(rows: pd.DataFrame, cost: str, batch: int = 1) -> pd.DataFrame:
    """All models with an accuracy and a cost, in the order of their rows; top1 and cost are rows.

    Args:
        cost: the metric; "latency_ratio" is that of eager mode at the batch size.
        batch: the batch size of "latency_ratio".

    Returns:
        A table with the columns label, family, top1 and cost.
    """
    experiment, models = Experiment.of(rows), []
    for label in dict.fromkeys(experiment.of_metrics("top1")["label"]):
        top1 = experiment.find(label, "top1")
        cost_row = experiment.find(label, cost, batch if cost == "latency_ratio" else None)
        if top1 is not None and cost_row is not None:
            models.append({"label": label, "family": top1["method"], "top1": top1, "cost": cost_row})
    return pd.DataFrame(models, columns=["label", "family", "top1", "cost"])


def winners(
    rows: pd.DataFrame, cost: str = "bytes", shares: Sequence[float] = SHARES, batch: int = 1
) -> list[BudgetWinner]:
    """The winner within each share of the baseline's cost, the largest share first.

    Each method stands at its largest setting within the share, however little of the share that takes, because a model that
    costs less is within the budget too.

    Raises:
        InputError: the rows have no model with accuracy and cost, or no cost of the baseline.
    """
    one_of("cost", cost, COSTS)
    experiment = Experiment.of(rows)
    models = models_with_cost(experiment.rows, cost, batch)
    baseline_cost = 1.0 if cost == "latency_ratio" else experiment.number("baseline", cost)
    if not len(models) or math.isnan(baseline_cost):
        raise InputError(f"the rows hold no model with accuracy and {cost}, or no {cost} of the baseline; measure both")
    accuracy = models["top1"].map(lambda row: row["value"])
    cost_values = models["cost"].map(lambda row: row["value"])
    models = models.assign(accuracy=accuracy, spent=cost_values).sort_values("accuracy", ascending=False, kind="stable")
    costs, methods = (dict(zip(models["label"], models[name], strict=True)) for name in ("spent", "family"))
    results = []
    for share in sorted(shares, reverse=True):
        candidates = models[models["label"].isin(at_budget(costs, methods, share * baseline_cost, 1).values())]
        if not len(candidates):
            results.append(BudgetWinner(share, 0, None, None, ()))
            continue
        first, others = candidates.iloc[0], candidates.iloc[1:]
        indistinguishable = [row.label for row in others.itertuples() if is_indistinguishable(first["top1"], row.top1)]
        results.append(BudgetWinner(share, len(candidates), first["top1"], first["cost"], tuple(indistinguishable)))
    return results


def is_indistinguishable(first: pd.Series, second: pd.Series) -> bool:
    """Whether two rows of top1 on the same images do not differ significantly."""
    if are_paired(first, second):
        return paired_rows(first, second).p >= SIGNIFICANCE_LEVEL
    return second["high"] >= first["low"]


def budget_table(rows: pd.DataFrame, cost: str = "bytes", batch: int = 1) -> pd.DataFrame:
    """`winners` as a table to read, with one line for each budget."""
    experiment, lines = Experiment.of(rows), []
    won = winners(experiment.rows, cost, batch=batch)
    labels = [
        label
        for winner in won
        if winner.top1 is not None
        for label in (winner.top1["label"], *winner.indistinguishable)
    ]
    display = display_labels(experiment, labels)
    for winner in won:
        line = {"budget": f"1/{1 / winner.share:.3g}", "methods": winner.count, "most accurate": "-", "top-1 %": "-"}
        if winner.top1 is not None and winner.cost is not None:
            scale, unit = {"bytes": (MEGA, " MB"), "macs": (MEGA, " M")}.get(cost, (1.0, ""))
            line |= {"most accurate": display[winner.top1["label"]], "top-1 %": accuracy_text(winner.top1)}
            line |= {
                cost: f"{winner.cost['value'] / scale:.3g}{unit}",
                "not significantly different": str(len(winner.indistinguishable)),
            }
            line["of them"] = "; ".join(display[label] for label in winner.indistinguishable[:3]) + (
                "; ..." if len(winner.indistinguishable) > 3 else ""
            )
        lines.append(line)
    return pd.DataFrame(lines).fillna("-").set_index("budget")
