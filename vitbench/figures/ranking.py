"""Methods at equal budgets over several seeds: accuracy within shares of the baseline's cost, with intervals."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.base.errors import InputError, one_of
from vitbench.figures.accuracy_cost import COSTS
from vitbench.figures.drawing import figure_title, footnote, legend_below, method_style, style, wrap_label
from vitbench.figures.layout import current, figure_size, figure_width, method_text
from vitbench.rows.budgets import TOLERANCE, at_budget
from vitbench.rows.experiment import across_seeds, over_seeds
from vitbench.rows.statistics import mean_interval
from vitbench.rows.words import display_labels

SHARES = {
    "bytes": (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16, 1 / 20),
    "macs": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),  # no method saves as large a share of the work as of the bytes
}
WIDTH = 0.7  # of all methods at one budget, in units of the distance between budgets


def at_budgets(rows: pd.DataFrame, cost: str = "bytes", shares: Sequence[float] = ()) -> pd.DataFrame:
    """The methods at equal shares of the baseline's cost (`budgets.at_budget`), and their accuracies over seeds.

    A combination counts as a method.

    Args:
        rows: of one model on the same images, with any settings and seeds.
        cost: "bytes" or "macs".
        shares: by default `SHARES`.

    Returns:
        A table with a line for each method and share that it fills, methods in the order of the rows. Columns: share,
        method, label, text (the display label), cost (mean over seeds), seeds, top1 (mean), low, high (95 % Student t
        interval over seeds; NaN for one seed). The first line is the baseline's, with share 1.

    Raises:
        InputError: no model or no baseline with both an accuracy and that cost.
    """
    shares = shares or SHARES[one_of("cost", cost, SHARES)]
    top1, spent = (across_seeds(rows, metric).set_index(["label", "seed"])["value"] for metric in ("top1", cost))
    both = pd.concat([top1, spent], axis=1, join="inner", keys=["top1", "cost"])
    order = list(dict.fromkeys(both.index.get_level_values("label")))
    if "baseline" not in order:
        raise InputError(f"the rows hold no accuracy beside {cost} of the baseline; measure both first")
    means = both.groupby(level="label", sort=False)["cost"].mean().to_dict()
    methods = {label: label.partition(" (")[0] for label in order if label != "baseline"}
    found = {share: at_budget(means, methods, share * means["baseline"]) for share in sorted(shares, reverse=True)}
    lines = [_line(both, means, "baseline", 1.0)]
    for method in dict.fromkeys(methods.values()):
        lines += [_line(both, means, labels[method], share) for share, labels in found.items() if method in labels]
    table = pd.DataFrame(lines)
    display = display_labels(over_seeds(rows[rows["metric"] == "top1"]), table["label"])
    return table.assign(text=table["label"].map(display))


def _line(both: pd.DataFrame, means: dict[str, float], label: str, share: float) -> dict[str, object]:
    values = both.loc[label]["top1"]
    mean, low, high = mean_interval(values)
    line = {"share": share, "method": label.partition(" (")[0], "label": label, "cost": means[label]}
    return line | {"seeds": len(values), "top1": mean, "low": low, "high": high}


def equal_budgets(rows: pd.DataFrame, cost: str = "bytes") -> tuple[Figure, pd.DataFrame]:
    """The accuracy of the methods at equal shares of the baseline's cost: means over seeds and their 95 % intervals.

    Returns the figure and the rows that it shows.
    """
    cost_name, table = _budget_table(rows, cost)
    dense, lines = table.iloc[0], table.iloc[1:]
    families = list(dict.fromkeys(lines["method"]))
    shares = sorted(set(lines["share"]), reverse=True)
    bottom = 100 * max(lines["top1"].min(), dense["top1"] - 0.35) - 1
    narrow = current().is_narrow
    with style():
        figure, axes = plt.subplots(figsize=figure_size(8.6, 4.6, 2.9 + 0.06 * len(families)))
        axes.axhline(100 * dense["top1"], color="#777777", lw=1, zorder=1)
        if dense["high"] > dense["low"]:
            axes.axhspan(100 * dense["low"], 100 * dense["high"], color="#EEEEEE", zorder=0)
        at_share = lines.groupby("share", sort=False)["method"]
        shift = WIDTH * ((at_share.cumcount() + 0.5) / at_share.transform("count") - 0.5)
        for family in families:
            family_lines = lines[lines["method"] == family]
            x = np.array([shares.index(share) for share in family_lines["share"]]) + shift[family_lines.index]
            y = 100 * family_lines["top1"].to_numpy()
            mark_style, is_below = method_style(family, families), y < bottom
            top1, low, high = (family_lines[key] for key in ("top1", "low", "high"))
            intervals = [np.nan_to_num(100 * (top1 - low)), np.nan_to_num(100 * (high - top1))]
            error_bars = np.where(is_below, 0, intervals)
            y_shown = np.maximum(y, bottom)
            label = wrap_label(method_text(family), 26)
            mark_style |= {"ecolor": mark_style["color"], "ms": 3.5 if narrow else 6, "label": label}
            axes.errorbar(x, y_shown, error_bars, ls="", lw=1, **mark_style)
            for mark_x, top1_percent in zip(x[is_below], y[is_below], strict=True):
                axes.annotate(
                    f"{top1_percent:.0f}",
                    (mark_x, bottom),
                    xytext=(0, -4),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=5.5 if narrow else 7,
                )
        axes.set_xticks(range(len(shares)), _names(shares, cost))
        axes.set(xlabel=f"budget: share of the baseline's {cost_name}", ylabel="top-1 on test images (%)")
        axes.set_xlim(-0.5, len(shares) - 0.5)
        tops = table[["top1", "high"]].max(axis=1).max()
        axes.set_ylim(bottom - 2, min(100.0, 100 * tops) + 0.6)
        axes.grid(visible=False, axis="x")
        for edge in np.arange(0.5, len(shares) - 1):
            axes.axvline(edge, color="#EEEEEE", lw=1, zorder=0)
        if narrow:
            legend_below(axes, axes.get_legend_handles_labels()[0], 2)
        else:
            figure.legend(loc="outside right upper", fontsize=8)
        axes.set_title(figure_title(rows, f"accuracy at equal {cost_name}"))
        seeds = sorted(set(table["seeds"]))
        over = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        footnote(
            figure,
            f"means over {over} of baseline and method, bars: their 95 % t intervals; line and band: the baseline's\n"
            f"each method at its largest setting within the budget, if that takes at least {100 * (1 - TOLERANCE):.0f} % of it; "
            "numbers at the edge: further down",
        )
    return figure, _source_rows(rows, table, cost)


def ranks(rows: pd.DataFrame, cost: str = "bytes") -> tuple[Figure, pd.DataFrame]:
    """The methods' ranks by mean accuracy within each share of the baseline's cost, beside the accuracies.

    A method without a setting that fills a share (`budgets.at_budget`) has no rank there. Returns the figure and the rows
    that it shows.
    """
    cost_name, table = _budget_table(rows, cost)
    accuracy = table.iloc[1:].pivot(index="method", columns="share", values="top1").sort_index(axis=1, ascending=False)
    rank = accuracy.rank(ascending=False, method="min")
    order = rank.mean(axis=1).sort_values(kind="stable").index
    accuracy, rank, narrow = accuracy.loc[order], rank.loc[order], current().is_narrow
    with style():
        height = 1.3 + 0.3 * len(order) if narrow else 1.5 + 0.34 * len(order)
        figure, axes = plt.subplots(figsize=(figure_width(2.6 + 0.9 * accuracy.shape[1]), height))
        darkest, lightest = -0.5, 1.6 * np.nanmax(rank)
        axes.imshow(rank, cmap="Greys_r", vmin=darkest, vmax=lightest, aspect="auto")
        for (i, j), mean in np.ndenumerate(accuracy.to_numpy()):
            if not np.isnan(mean):
                method_rank = int(rank.iloc[i, j])
                light = method_rank < (darkest + lightest) / 2
                text = f"{method_rank}{chr(10) if narrow else '   '}{100 * mean:.1f}"
                colour, size = "white" if light else "black", current().small_font_size
                axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
        axes.set_xticks(range(accuracy.shape[1]), _names(accuracy.columns, cost))
        names = [wrap_label(method_text(method), 16 if narrow else 40) for method in order]
        axes.set_yticks(range(len(order)), names, fontsize=current().small_font_size if narrow else None)
        axes.set_xlabel(f"budget: share of the baseline's {cost_name}")
        axes.grid(visible=False)
        axes.set_title(figure_title(rows, f"rank and top-1 (%) at equal {cost_name}"))
        footnote(
            figure,
            "means over seeds; neighbours may not differ significantly: see the intervals\n"
            f"empty: no setting takes {100 * (1 - TOLERANCE):.0f} to 100 % of the budget",
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
            f"no method is within a share of the baseline's {cost_name} and fills it; measure smaller models"
        )
    return cost_name, table


def _names(shares: Sequence[float], cost: str) -> list[str]:
    return [f"1/{1 / share:.0f}" if cost == "bytes" else f"{share:g}" for share in shares]


def _source_rows(rows: pd.DataFrame, table: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows of accuracy and cost from which a table of `at_budgets` was made."""
    both = pd.concat([across_seeds(rows, metric) for metric in ("top1", cost)])
    return rows[rows["key"].isin(both["key"][both["label"].isin(table["label"])])]
