"""Who wins at equal budgets: the most accurate model within each share of the baseline's cost, and which others cannot be told apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from vitbench.base.errors import InputError, one_of
from vitbench.rows.comparison_table import MEGA, accuracy_text, experiment_rows, find_row, paired_rows

SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 10, 1 / 12, 1 / 15)
SIGNIFICANCE_LEVEL = 0.05  # largest p at which two models' answers are told apart
COSTS = ("bytes", "macs", "latency_ratio")


@dataclass(frozen=True)
class BudgetWinner:
    """The most accurate model within a budget.

    Attributes:
        share: of the baseline's cost.
        count: how many models were within the budget, the more of them the luckier the first.
        top1: the winner's row of accuracy; None if no model is within.
        cost: the winner's row of the cost.
        indistinguishable: labels of the others within the budget whose answers to the same images cannot be told apart from the
            winner's (exact McNemar test, p at least 0.05, without a correction for their number), best first; one without
            its answers image by image is among them if the intervals overlap.
    """

    share: float
    count: int
    top1: pd.Series | None
    cost: pd.Series | None
    indistinguishable: tuple[str, ...]


def models_with_cost(rows: pd.DataFrame, cost: str, batch: int = 1) -> pd.DataFrame:
    """Each model with an accuracy and a cost, timed or not: columns label, family, top1 and cost (rows), in the order they came.

    Args:
        rows: as `experiment_rows` gives them. A time is that of eager mode at the batch size, over the baseline's in turn.
    """
    models = []
    for label in dict.fromkeys(rows["label"][rows["metric"] == "top1"]):
        top1 = find_row(rows, label, "top1")
        cost_row = find_row(rows, label, cost, batch if cost == "latency_ratio" else None)
        if top1 is not None and cost_row is not None:
            models.append({"label": label, "family": top1["method"], "top1": top1, "cost": cost_row})
    return pd.DataFrame(models, columns=["label", "family", "top1", "cost"])


def winners(
    rows: pd.DataFrame, cost: str = "bytes", shares: Sequence[float] = SHARES, batch: int = 1
) -> list[BudgetWinner]:
    """The winner within each share of the baseline's cost, the largest share first.

    Raises:
        InputError: no accuracy, or no such cost of the baseline, among the rows.
    """
    one_of("cost", cost, COSTS)
    rows = experiment_rows(rows)
    models = models_with_cost(rows, cost, batch)
    baseline_row = find_row(rows, "baseline", cost)
    baseline_cost = 1.0 if cost == "latency_ratio" else None if baseline_row is None else baseline_row["value"]
    if not len(models) or baseline_cost is None:
        raise InputError(f"the rows hold no accuracy beside {cost}, or none of the baseline; measure both first")
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
        indistinguishable = [row.label for row in others.itertuples() if _is_indistinguishable(first["top1"], row.top1)]
        results.append(BudgetWinner(share, len(candidates), first["top1"], first["cost"], tuple(indistinguishable)))
    return results


def _is_indistinguishable(first: pd.Series, second: pd.Series) -> bool:
    """Whether two rows of accuracy on the same images cannot be told apart."""
    if first["hits"] and second["hits"] and first["context"]["images"] == second["context"]["images"]:
        return paired_rows(first, second).p >= SIGNIFICANCE_LEVEL
    return second["high"] >= first["low"]


def budget_table(rows: pd.DataFrame, cost: str = "bytes", batch: int = 1) -> pd.DataFrame:
    """`winners` as a table for reading: one line a budget."""
    lines = []
    for winner in winners(rows, cost, batch=batch):
        line = {"budget": f"1/{1 / winner.share:.3g}", "models": winner.count, "most accurate": "-", "top-1 %": "-"}
        if winner.top1 is not None:
            scale, unit = {"bytes": (MEGA, " MB"), "macs": (MEGA, " M")}.get(cost, (1.0, ""))
            line |= {"most accurate": winner.top1["label"], "top-1 %": accuracy_text(winner.top1)}
            line |= {
                cost: f"{winner.cost['value'] / scale:.3g}{unit}",
                "cannot be told apart": str(len(winner.indistinguishable)),
            }
            line["of them"] = "; ".join(winner.indistinguishable[:3]) + (
                "; ..." if len(winner.indistinguishable) > 3 else ""
            )
        lines.append(line)
    return pd.DataFrame(lines).fillna("-").set_index("budget")
