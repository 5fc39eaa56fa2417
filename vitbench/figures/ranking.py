"""Methods at equal budgets over several seeds: accuracy within shares of the baseline's cost, with intervals."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.base.errors import InputError, one_of
from vitbench.figures.accuracy_cost import COSTS
from vitbench.figures.drawing import figure_title, footnote, method_style, style, wrap_label
from vitbench.rows.experiment import across_seeds
from vitbench.rows.statistics import mean_interval

SHARES = {
    "bytes": (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16, 1 / 20),
    "macs": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),  # no method saves as large a share of the work as of the bytes
}
WIDTH = 0.7  # of all methods at one budget, in units of the distance between budgets


def at_budgets(rows: pd.DataFrame, cost: str = "bytes", shares: Sequence[float] = ()) -> pd.DataFrame:
    """For each method and share of the baseline's cost, the most expensive setting within it, and its accuracy over seeds.

    The setting is chosen by cost alone, so that no test accuracy chooses anything. A combination counts as a method.

    Args:
        rows: of one model on the same images, with any settings and seeds.
        cost: "bytes" or "macs".
        shares: by default `SHARES`.

    Returns:
        A table with a line for each method and share that it reaches, methods in the order of the rows. Columns: share,
        method, label, cost (mean over seeds), seeds, top1 (mean), low, high (95 % Student t interval over seeds; NaN for
        one seed). The first line is the baseline's, with share 1.

    Raises:
        InputError: no model or no baseline with both an accuracy and that cost.
    """
    shares = shares or SHARES[one_of("cost", cost, SHARES)]
    top1, spent = (across_seeds(rows, metric).set_index(["label", "seed"])["value"] for metric in ("top1", cost))
    both = pd.concat([top1, spent], axis=1, join="inner", keys=["top1", "cost"])
    order = list(dict.fromkeys(both.index.get_level_values("label")))
    if "baseline" not in order:
        raise InputError(f"the rows hold no accuracy beside {cost} of the baseline; measure both first")
    means = both.groupby(level="label", sort=False)["cost"].mean()
    families: dict[str, list[str]] = {}
    for label in order:
        families.setdefault(label.partition(" (")[0], []).append(label)
    lines = [_line(both, means, "baseline", 1.0)]
    for family, labels in families.items():
        for share in sorted(shares, reverse=True) if family != "baseline" else ():
            within = [label for label in labels if means[label] <= share * means["baseline"]]
            if within:
                lines.append(_line(both, means, max(within, key=means.get), share))
    return pd.DataFrame(lines)


def _line(both: pd.DataFrame, means: pd.Series, label: str, share: float) -> dict[str, object]:
    values = both.loc[label]["top1"]
    mean, low, high = mean_interval(values)
    line = {"share": share, "method": label.partition(" (")[0], "label": label, "cost": means[label]}
    return line | {"seeds": len(values), "top1": mean, "low": low, "high": high}


def equal_budgets(rows: pd.DataFrame, cost: str = "bytes") -> tuple[Figure, pd.DataFrame]:
    """The accuracy of every method within each share of the baseline's cost: means over seeds and their 95 % intervals.

    Returns the figure and the rows that it shows.
    """
    cost_name, table = _budget_table(rows, cost)
    dense, lines = table.iloc[0], table.iloc[1:]
    families = list(dict.fromkeys(lines["method"]))
    shares = sorted(set(lines["share"]), reverse=True)
    bottom = 100 * max(lines["top1"].min(), dense["top1"] - 0.35) - 1
    with style():
        figure, axes = plt.subplots(figsize=(8.6, 4.6))
        axes.axhline(100 * dense["top1"], color="#777777", lw=1, zorder=1)
        if dense["high"] > dense["low"]:
            axes.axhspan(100 * dense["low"], 100 * dense["high"], color="#EEEEEE", zorder=0)
        for index, family in enumerate(families):
            family_lines = lines[lines["method"] == family]
            shift = WIDTH * ((index + 0.5) / len(families) - 0.5)
            x = np.array([shares.index(share) for share in family_lines["share"]]) + shift
            y = 100 * family_lines["top1"].to_numpy()
            mark_style, is_below = method_style(family, families), y < bottom
            top1, low, high = (family_lines[key] for key in ("top1", "low", "high"))
            intervals = [np.nan_to_num(100 * (top1 - low)), np.nan_to_num(100 * (high - top1))]
            error_bars = np.where(is_below, 0, intervals)
            y_shown = np.maximum(y, bottom)
            label = wrap_label(family, 26)
            axes.errorbar(
                x, y_shown, error_bars, ls="", lw=1, ecolor=mark_style["color"], **mark_style, ms=6, label=label
            )
            for mark_x, top1_percent in zip(x[is_below], y[is_below], strict=True):
                axes.annotate(
                    f"{top1_percent:.0f}",
                    (mark_x, bottom),
                    xytext=(0, -4),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=7,
                )
        axes.set_xticks(range(len(shares)), _names(shares, cost))
        axes.set(xlabel=f"budget: share of the baseline's {cost_name}", ylabel="top-1 on test images (%)")
        axes.set_xlim(-0.5, len(shares) - 0.5)
        tops = table[["top1", "high"]].max(axis=1).max()
        axes.set_ylim(bottom - 2, min(100.0, 100 * tops) + 0.6)
        axes.grid(visible=False, axis="x")
        for edge in np.arange(0.5, len(shares) - 1):
            axes.axvline(edge, color="#EEEEEE", lw=1, zorder=0)
        figure.legend(loc="outside right upper", fontsize=8)
        axes.set_title(figure_title(rows, f"accuracy at equal {cost_name}"))
        seeds = sorted(set(table["seeds"]))
        over = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        footnote(
            figure,
            f"means over {over} of baseline and method, bars: their 95 % t intervals; line and band: the baseline's\n"
            "each method at its setting that fills the budget most; numbers at the edge: further down",
        )
    return figure, _source_rows(rows, table, cost)


def ranks(rows: pd.DataFrame, cost: str = "bytes") -> tuple[Figure, pd.DataFrame]:
    """The methods' ranks by mean accuracy within each share of the baseline's cost, beside the accuracies.

    A method that does not reach a share has no rank there. Returns the figure and the rows that it shows.
    """
    cost_name, table = _budget_table(rows, cost)
    accuracy = table.iloc[1:].pivot(index="method", columns="share", values="top1").sort_index(axis=1, ascending=False)
    rank = accuracy.rank(ascending=False, method="min")
    order = rank.mean(axis=1).sort_values(kind="stable").index
    accuracy, rank = accuracy.loc[order], rank.loc[order]
    with style():
        figure, axes = plt.subplots(figsize=(2.6 + 0.9 * accuracy.shape[1], 1.5 + 0.34 * len(order)))
        axes.imshow(rank, cmap="Greys_r", vmin=-0.5, vmax=1.6 * len(order), aspect="auto")
        for (i, j), mean in np.ndenumerate(accuracy.to_numpy()):
            if not np.isnan(mean):
                method_rank = int(rank.iloc[i, j])
                light = method_rank < 0.35 * len(order)
                text = f"{method_rank}   {100 * mean:.1f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if light else "black")
        axes.set_xticks(range(accuracy.shape[1]), _names(accuracy.columns, cost))
        axes.set_yticks(range(len(order)), order)
        axes.set_xlabel(f"budget: share of the baseline's {cost_name}")
        axes.grid(visible=False)
        axes.set_title(figure_title(rows, f"rank and top-1 (%) at equal {cost_name}"))
        footnote(
            figure, "means over seeds; neighbours may not differ significantly: see the intervals; empty: out of reach"
        )
    return figure, _source_rows(rows, table, cost)


def _budget_table(rows: pd.DataFrame, cost: str) -> tuple[str, pd.DataFrame]:
    """The cost's name in figures, and `at_budgets`.

    Raises:
        InputError: no method within the largest share.
    """
    table, cost_name = at_budgets(rows, cost), COSTS[cost][0]
    if len(table) < 2:
        raise InputError(
            f"no method is within {SHARES[cost][0]:g} of the baseline's {cost_name}; measure smaller models"
        )
    return cost_name, table


def _names(shares: Sequence[float], cost: str) -> list[str]:
    return [f"1/{1 / share:.0f}" if cost == "bytes" else f"{share:g}" for share in shares]


def _source_rows(rows: pd.DataFrame, table: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows of accuracy and cost from which a table of `at_budgets` was made."""
    both = pd.concat([across_seeds(rows, metric) for metric in ("top1", cost)])
    return rows[rows["key"].isin(both["key"][both["label"].isin(table["label"])])]
