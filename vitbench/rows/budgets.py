"""Equal budgets: the most accurate model within each share of the baseline's cost, and the models that do not differ from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from vitbench.base.errors import InputError, one_of
from vitbench.rows.comparison_table import accuracy_text, paired_rows
from vitbench.rows.experiment import MEGA, Experiment

SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 10, 1 / 12, 1 / 15)
SIGNIFICANCE_LEVEL = 0.05  # two models differ significantly if p is below it
COSTS = ("bytes", "macs", "latency_ratio")


@dataclass(frozen=True)
class BudgetWinner:
    """The most accurate model within a budget.

    Attributes:
        share: the budget, as a share of the baseline's cost.
        count: how many models are within the budget. With more models, chance favours the winner more.
        top1: the winner's row of top1; None if no model is within the budget.
        cost: the winner's row of the cost; None if no model is within the budget.
        indistinguishable: labels of the other models within the budget that do not differ significantly from the winner on
            the same images (exact McNemar test, p >= 0.05, not corrected for multiple tests), best first. A model without
            hits is one of them if the intervals overlap.
    """

    share: float
    count: int
    top1: pd.Series | None
    cost: pd.Series | None
    indistinguishable: tuple[str, ...]


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
    results = []
    for share in sorted(shares, reverse=True):
        candidates = models[models["spent"] <= share * baseline_cost]
        if not len(candidates):
            results.append(BudgetWinner(share, 0, None, None, ()))
            continue
        first, others = candidates.iloc[0], candidates.iloc[1:]
        indistinguishable = [row.label for row in others.itertuples() if is_indistinguishable(first["top1"], row.top1)]
        results.append(BudgetWinner(share, len(candidates), first["top1"], first["cost"], tuple(indistinguishable)))
    return results


def is_indistinguishable(first: pd.Series, second: pd.Series) -> bool:
    """Whether two rows of top1 on the same images do not differ significantly."""
    if first["hits"] and second["hits"] and first["context"]["images"] == second["context"]["images"]:
        return paired_rows(first, second).p >= SIGNIFICANCE_LEVEL
    return second["high"] >= first["low"]


def budget_table(rows: pd.DataFrame, cost: str = "bytes", batch: int = 1) -> pd.DataFrame:
    """`winners` as a table to read, with one line for each budget."""
    lines = []
    for winner in winners(rows, cost, batch=batch):
        line = {"budget": f"1/{1 / winner.share:.3g}", "models": winner.count, "most accurate": "-", "top-1 %": "-"}
        if winner.top1 is not None and winner.cost is not None:
            scale, unit = {"bytes": (MEGA, " MB"), "macs": (MEGA, " M")}.get(cost, (1.0, ""))
            line |= {"most accurate": winner.top1["label"], "top-1 %": accuracy_text(winner.top1)}
            line |= {
                cost: f"{winner.cost['value'] / scale:.3g}{unit}",
                "not significantly different": str(len(winner.indistinguishable)),
            }
            line["of them"] = "; ".join(winner.indistinguishable[:3]) + (
                "; ..." if len(winner.indistinguishable) > 3 else ""
            )
        lines.append(line)
    return pd.DataFrame(lines).fillna("-").set_index("budget")
