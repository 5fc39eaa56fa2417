"""Small multiples: accuracy against a cost, a panel a method, each against all the others in grey."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vitbench.budgets import SHARES, scored
from vitbench.comparison import subject, value
from vitbench.errors import InputError, one_of
from vitbench.figures import COLOURS, SMALL, heading, note, style, wrapped
from vitbench.statistics import pareto_front
from vitbench.tradeoff import COSTS

COLUMNS = 4
TICKS = [digit * 10**power for power in range(-2, 6) for digit in (1, 2, 5)]
SEEN = {"ls": "", "marker": "o", "ms": 3.5, "color": COLOURS[3], "elinewidth": 1, "zorder": 3}
SUNK = {"ls": "", "marker": "v", "ms": 4, "color": COLOURS[1], "zorder": 3}


def multiples(rows: pd.DataFrame, cost: str = "bytes") -> tuple[Figure, pd.DataFrame]:
    """Every model's accuracy against its bytes or MACs with 95 % intervals, a panel a method, and the methods' own fronts.

    Vertical lines stand at the budgets of `budgets.SHARES`. What is far below the others stands at the lower edge.

    Returns the figure and the rows that it shows.
    """
    word, label, scale = COSTS[one_of("cost", cost, ("bytes", "macs"))]
    rows = subject(rows)
    models, base = scored(rows, cost), value(rows, "baseline", cost)
    families = [family for family in dict.fromkeys(models["family"]) if family != "baseline"]
    if not families or base is None:
        raise InputError(
            f"the rows hold no method with an accuracy and its {cost} beside a baseline; measure both first"
        )
    points = pd.DataFrame({key: [100 * row[key] for row in models["top1"]] for key in ("value", "low", "high")})
    points = points.assign(x=[row["value"] * scale for row in models["cost"]], family=models["family"])
    front = points.iloc[pareto_front(points["x"], points["value"])]
    bottom = min(front["low"].min(), points["value"].quantile(0.25)) - 1
    reference = value(rows, "baseline", "top1")
    columns = min(COLUMNS, len(families))
    lines = math.ceil(len(families) / columns)
    with style():
        size = (max(7.0, 1 + 2.5 * columns), 1.1 + 2.1 * lines)
        figure, panels = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axes, family in zip(panels.flat, families, strict=False):
            for share in SHARES:
                axes.axvline(share * base["value"] * scale, color="#EEEEEE", lw=1, zorder=0)
            if reference is not None:
                axes.axhline(100 * reference["value"], color="#999999", lw=0.8, zorder=0)
            axes.plot(
                points["x"], points["value"].clip(lower=bottom), ls="", marker=".", ms=3, color="#BBBBBB", zorder=1
            )
            axes.step(front["x"], front["value"], where="post", color="#999999", lw=1, ls="--", zorder=1)
            _panel(axes, points[points["family"] == family], bottom)
            axes.set_title(wrapped(family, 24), fontsize=9)
            axes.set(xscale="log", ylim=(bottom - 0.6, points["high"].max() + 0.6))
            axes.grid(visible=False, axis="x")
        for axes in panels.flat[len(families) :]:
            axes.set_visible(False)
        ticks = [tick for tick in TICKS if points["x"].min() <= tick <= points["x"].max()]
        panels[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0, 0].xaxis.set_minor_locator(NullLocator())
        for axes in panels[:, 0]:
            axes.set_ylabel("top-1 (%)", fontsize=SMALL)
        figure.suptitle(heading(rows, f"accuracy against {word}, method by method"), x=0.01, ha="left")
        shares = ", ".join(f"1/{1 / share:.0f}" for share in SHARES)
        marks = (
            "grey: all models, their front, and the baseline's accuracy; bars: 95 % intervals; triangles: further down"
        )
        note(figure, f"{label}; {marks}\nlines at {shares} of the baseline's")
    return figure, pd.DataFrame([row for column in ("top1", "cost") for row in models[column]])


def _panel(axes: Axes, own: pd.DataFrame, bottom: float) -> None:
    """One method's points with their intervals, those that are too low at the edge, and its front."""
    seen, sunk = own[own["value"] > bottom], own[own["value"] <= bottom]
    spread = [(seen["value"] - seen["low"]).clip(lower=0), (seen["high"] - seen["value"]).clip(lower=0)]
    axes.errorbar(seen["x"], seen["value"], spread, **SEEN)
    axes.plot(sunk["x"], np.full(len(sunk), bottom), **SUNK)
    best = own.iloc[pareto_front(own["x"], own["value"])]
    axes.step(best["x"], best["value"].clip(lower=bottom), where="post", color=COLOURS[3], lw=1.2, zorder=2)
