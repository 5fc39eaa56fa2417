"""Small multiples: accuracy against a cost, a panel a method, each against all the others in grey."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.budgets import SHARES, scored
from vitbench.comparison import MEGA, subject, value
from vitbench.errors import InputError, one_of
from vitbench.figures import COLOURS, SMALL, heading, note, style, wrapped
from vitbench.statistics import pareto_front

COLUMNS = 4
COSTS = {"bytes": ("size on disk (MB)", MEGA), "macs": ("multiply-accumulates for one image (M)", MEGA)}


def multiples(rows: pd.DataFrame, cost: str = "bytes") -> tuple[Figure, pd.DataFrame]:
    """Every model's accuracy against its bytes or MACs with 95 % intervals, a panel a method, and the methods' own fronts.

    Vertical lines stand at the budgets of `budgets.SHARES`. What is far below the others stands at the lower edge.

    Returns the figure and the rows that it shows.
    """
    label, scale = COSTS[one_of("cost", cost, COSTS)]
    rows = subject(rows)
    models, base = scored(rows, cost), value(rows, "baseline", cost)
    families = [family for family in dict.fromkeys(models["family"]) if family != "baseline"]
    if not families or base is None:
        raise InputError(
            f"the rows hold no method with an accuracy and its {cost} beside a baseline; measure both first"
        )
    x = np.array([row["value"] / scale for row in models["cost"]])
    y, low, high = (np.array([100 * row[key] for row in models["top1"]]) for key in ("value", "low", "high"))
    front = pareto_front(x, y)
    bottom = min(low[front].min(), np.quantile(y, 0.25)) - 1
    reference = value(rows, "baseline", "top1")
    count = math.ceil(len(families) / COLUMNS)
    with style():
        size = (max(7.0, 1 + 2.5 * min(COLUMNS, len(families))), 1.1 + 2.1 * count)
        grid = (count, min(COLUMNS, len(families)))
        figure, panels = plt.subplots(*grid, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axes, family in zip(panels.flat, families, strict=False):
            own = np.flatnonzero(models["family"] == family)
            for share in SHARES:
                axes.axvline(share * base["value"] / scale, color="#EEEEEE", lw=1, zorder=0)
            if reference is not None:
                axes.axhline(100 * reference["value"], color="#999999", lw=0.8, zorder=0)
            axes.plot(x, np.maximum(y, bottom), ls="", marker=".", ms=3, color="#BBBBBB", zorder=1)
            axes.step(x[front], y[front], where="post", color="#999999", lw=1, ls="--", zorder=1)
            spread = [np.maximum(0, y[own] - low[own]), high[own] - y[own]]
            seen = y[own] > bottom
            look = {"ls": "", "marker": "o", "ms": 3.5, "color": COLOURS[3], "elinewidth": 1, "zorder": 3}
            axes.errorbar(x[own][seen], y[own][seen], [side[seen] for side in spread], **look)
            axes.plot(
                x[own][~seen], np.full((~seen).sum(), bottom), ls="", marker="v", ms=4, color=COLOURS[1], zorder=3
            )
            best = own[pareto_front(x[own], y[own])]
            axes.step(x[best], np.maximum(y[best], bottom), where="post", color=COLOURS[3], lw=1.2, zorder=2)
            axes.set_title(wrapped(family, 24), fontsize=9)
            axes.set(xscale="log", ylim=(bottom - 0.6, high.max() + 0.6))
            axes.grid(visible=False, axis="x")
        for axes in panels.flat[len(families) :]:
            axes.set_visible(False)
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if x.min() <= tick <= x.max()]
        panels[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0, 0].xaxis.set_minor_locator(plt.NullLocator())
        for axes in panels[:, 0]:
            axes.set_ylabel("top-1 (%)", fontsize=SMALL)
        figure.suptitle(
            heading(rows, f"accuracy against {'size' if cost == 'bytes' else 'work'}, method by method"),
            x=0.01,
            ha="left",
        )
        shares = ", ".join(f"1/{1 / share:.0f}" for share in SHARES)
        note(
            figure,
            f"{label}; grey: all models, their front, and the baseline's accuracy; bars: 95 % intervals; triangles: further down\nlines at {shares} of the baseline's",
        )
    used = [row for column in ("top1", "cost") for row in models[column]]
    return figure, pd.DataFrame(used)
