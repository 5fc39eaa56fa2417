"""Accuracy against cost: a labelled point for each method, and small multiples with a panel for each method."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from vitbench.base.errors import InputError, one_of
from vitbench.figures.drawing import (
    COLOURS,
    figure_title,
    footnote,
    legend_below,
    method_style,
    style,
    suptitle,
    wrap_label,
)
from vitbench.figures.layout import current, figure_size, method_text, texts_of
from vitbench.rows.budgets import SHARES, models_with_cost
from vitbench.rows.experiment import MEGA, Experiment
from vitbench.rows.statistics import pareto_front

COSTS = {  # cost -> its name in titles, the axis label, and the factor from a row's unit to the axis's
    "bytes": ("size", "size on disk (MB)", 1 / MEGA),
    "latency_ratio": ("time", "median latency / baseline's, batch {batch}, timed in turn", 1.0),
    "latency_p50": ("time", "median latency (ms), batch {batch}", 1.0),
    "macs": ("work", "multiply-accumulates for one image (M)", 1 / MEGA),
    "energy": ("energy", "energy for one image (J)", 1.0),
}
Position = tuple[float, float]
Segment = tuple[float, float, float, float]  # x0, y0, x1, y1
MAX_NAMED_POINTS = 8  # of more points, only the baseline and the Pareto front are named


class Point(NamedTuple):
    """A model's cost and its accuracy (%), each with the bounds of its interval."""

    label: str
    method: str
    x: float
    left: float
    right: float
    y: float
    low: float
    high: float


def tradeoff(
    rows: pd.DataFrame, cost: str = "bytes", batch: int = 1, *, limit: float | None = None, chosen: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against a cost, one of `COSTS`, with 95 % intervals and the Pareto front.

    Of more than `MAX_NAMED_POINTS` methods, only the baseline and the Pareto front are named, if there is room. The others
    are lighter, and a legend lists the methods without settings. Points far below the front are drawn on a grey strip.

    Args:
        batch: the batch size of a latency.
        limit: a budget in the unit of the rows; what is above it is shaded.
        chosen: the label of a model that gets a ring.

    Returns the figure and the rows that it shows.

    Raises:
        InputError: an unknown cost, or no model with an accuracy and this cost.
    """
    cost_name, label, scale = COSTS[one_of("cost", cost, COSTS)]
    experiment = Experiment.of(rows)
    points, figure_rows = _points(experiment, cost, batch)
    if not points:
        raise InputError(
            f"no model has both an accuracy and {'an' if cost_name[0] in 'aeiou' else 'a'} {cost_name} among these rows; measure both first"
        )
    front = [points[index] for index in pareto_front([point.x for point in points], [point.y for point in points])]
    best = list(dict.fromkeys([*(point for point in points if point.label == "baseline"), *front]))
    best += [point for point in points if point.label == chosen and point not in best]
    named = best if len(points) > MAX_NAMED_POINTS else list(dict.fromkeys([*best, *points]))
    methods, narrow = list(dict.fromkeys(point.method for point in points)), current().is_narrow
    columns = math.ceil(len(methods) / 20) if len(points) > MAX_NAMED_POINTS else 0
    with style():
        lines = math.ceil(len(methods) / 2) if columns else 0
        figure, axes = plt.subplots(figsize=figure_size(6.6 + 1.9 * columns, 4.6, 2.9 + 0.13 * lines))
        floor = _set_limits(axes, points, best)
        for point in points:
            _draw_point(axes, point, method_style(point.method, methods), point in named, floor)
        budget = [] if limit is None else [_draw_budget(axes, limit * scale)]
        edge = (axes.get_xlim()[1], front[-1].y)  # the last step of the front reaches the right edge
        ends = [*((point.x, point.y) for point in front), edge]
        axes.plot(*zip(*ends, strict=True), color="#777777", lw=1, ls="--", zorder=1, drawstyle="steps-post")
        axes.set(xlabel=label.format(batch=batch), ylabel="top-1 on test images (%)")
        axes.set_title(figure_title(experiment.rows, f"accuracy against {cost_name}"))
        if columns:
            marks = [
                Line2D([], [], ls="", label=wrap_label(method_text(method), 26), **method_style(method, methods))
                for method in methods
            ]
            if narrow:
                legend_below(axes, marks, 2)
            else:
                figure.legend(handles=marks, loc="outside right upper", ncols=columns, fontsize=8)
        energy_sources = dict.fromkeys(row["source"].split(":")[0] for row in figure_rows if row["metric"] == "energy")
        ring_note = "; ring: chosen on the val images" if chosen else ""
        energy_note = f"; energy {' and '.join(energy_sources)}" if energy_sources else ""
        footnote(
            figure,
            f"bars: 95 % intervals; dashed: Pareto front; left and up is better{ring_note}{energy_note}"
            + _below(points, floor),
        )
        bars = [bar for point in named for bar in _bars(point)]
        steps = [segment for (a, b), (c, d) in pairwise(ends) for segment in ((a, b, c, b), (c, b, c, d))]
        positions = {point.label: (point.x, max(point.y, floor)) for point in (*named, *points)}
        if chosen in positions:
            ring = 10 if narrow else 15
            axes.plot(*positions[chosen], ls="", marker="o", ms=ring, mfc="none", mec="black", zorder=4)
        display = texts_of(experiment, positions)
        names = {display[point.label]: positions[point.label] for point in named}
        _name_points(axes, names, positions.values(), [*bars, *steps, *budget])
    return figure, pd.DataFrame(figure_rows)


def _draw_budget(axes: Axes, limit: float) -> Segment:
    """Shade what is above a budget, and return the line at it."""
    (_, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.axvspan(limit, right, color="#F2F2F2", zorder=0)
    axes.axvline(limit, color=COLOURS[1], lw=1.2, zorder=1)
    place: dict[str, Any] = {"xytext": (3, 4), "textcoords": "offset points", "rotation": 90, "va": "bottom"}
    note: dict[str, Any] = {"fontsize": current().small_font_size, "color": COLOURS[1]}
    axes.annotate(f"budget: {limit:.3g}", (limit, 0), xycoords=axes.get_xaxis_transform(), **place, **note)
    return limit, bottom, limit, top


def _points(experiment: Experiment, cost: str, batch: int) -> tuple[list[Point], list[pd.Series]]:
    """The methods that have an accuracy and the cost, and the rows that they come from."""
    points, used, scale = [], [], COSTS[cost][2]
    for label in experiment.model_labels:
        top1_row = experiment.find(label, "top1")
        cost_row = experiment.find(label, cost, batch if cost.startswith("latency") else None)
        if top1_row is None or (cost_row is None and not (cost == "latency_ratio" and label == "baseline")):
            continue
        x = left = right = 1.0  # the baseline's ratio to itself, which has no row
        if cost_row is not None:
            x = cost_row["value"] * scale
            left, right = (x if pd.isna(cost_row[end]) else cost_row[end] for end in ("low", "high"))
        top1 = top1_row["value"]
        low, high = (top1 if pd.isna(top1_row[end]) else top1_row[end] for end in ("low", "high"))
        points.append(Point(label, top1_row["method"], x, left, right, 100 * top1, 100 * low, 100 * high))
        used += [row for row in (top1_row, cost_row) if row is not None]
    return points, used


def _set_limits(axes: Axes, points: list[Point], best: list[Point]) -> float:
    """Set the axes' limits, and return the y of points that are too far below the best: the middle of a strip below.

    The baseline and the front take at least a fourth of the axis, so that a method that failed does not compress them.
    """
    top, lowest_best = max(point.high for point in points), min(point.low for point in best)
    points_in_range = [point for point in points if point.y >= lowest_best - 3 * (top - lowest_best)]
    bottom = min(point.low for point in points_in_range)
    margin = 0.04 * (top - bottom)
    axes.set_xlim(0, 1.1 * max(point.right for point in points))
    axes.set_ylim(bottom - margin, top + margin)
    if len(points_in_range) < len(points):
        axes.set_yticks([tick for tick in axes.get_yticks() if bottom - margin <= tick <= top + margin])
        axes.set_ylim(bottom - 3 * margin, top + margin)
        axes.axhspan(bottom - 3 * margin, bottom - margin, color="#EEEEEE", zorder=0)
    return bottom - 2 * margin


def _below(points: list[Point], floor: float) -> str:
    """The footnote's sentence about the points on the strip."""
    off_axis = [point.y for point in points if point.y < floor]
    ends = dict.fromkeys(f"{end:.1f}" for end in (min(off_axis), max(off_axis))) if off_axis else ()
    return f"\ngrey strip: points further down, at {' to '.join(ends)} %" if off_axis else ""


def _draw_point(axes: Axes, point: Point, mark_style: dict[str, Any], named: bool, floor: float) -> None:
    for x0, y0, x1, y1 in _bars(point) if point.y > floor else ():
        colour, width = (mark_style["color"], 1.4) if named else ("#CCCCCC", 0.7)
        axes.plot([x0, x1], [y0, y1], color=colour, lw=width, zorder=2 + named)
    size = 5 if current().is_narrow else 8
    emphasis: dict[str, Any] = (
        {"ms": size, "alpha": 1, "zorder": 3.5} if named else {"ms": 0.75 * size, "alpha": 0.55, "zorder": 2.5}
    )
    axes.plot(point.x, max(point.y, floor), ls="", **mark_style, **emphasis)


def _bars(point: Point) -> list[Segment]:
    """The intervals of the accuracy and of the cost, as segments."""
    return [(point.x, point.low, point.x, point.high), (point.left, point.y, point.right, point.y)]


def _name_points(axes: Axes, names: Mapping[str, Position], marks: Iterable[Position], segments: list[Segment]) -> None:
    """Write each name near its point, where it covers no mark and no other name; a thin line leads to a name further off.

    It also avoids the segments, if that costs little distance. A name without room nearby is not written. Call it
    last, since the layout moves the axes.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    to_pixels, frame, dot = axes.transData.transform, axes.get_window_extent(), figure.dpi / 72
    reach = 6 * dot
    taken = [np.concatenate([centre - reach, centre + reach]) for centre in to_pixels(list(marks))]
    lines = np.sort(to_pixels(np.array(segments).reshape(-1, 2)).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    for name, position in names.items():
        text = axes.annotate(
            wrap_label(name, 18 if current().is_narrow else 26),
            position,
            xytext=(0, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=current().small_font_size,
            arrowprops={"arrowstyle": "-", "color": "#777777", "lw": 0.7, "shrinkA": 0, "shrinkB": 4},
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
            zorder=5,
        )
        centre, size = to_pixels(position), np.array(text.get_window_extent().size) + 8 * dot
        boxes = _boxes(frame, size, 3 * dot)
        gap = np.linalg.norm(np.maximum(0, np.maximum(boxes[:, :2] - centre, centre - boxes[:, 2:])), axis=1)
        free = (gap < 60 * dot) & (_overlaps(boxes, np.array(taken)) == 0)
        boxes, gap = boxes[free], gap[free]
        if not len(boxes):
            text.remove()
            continue
        off_centre = np.linalg.norm(boxes[:, :2] + size / 2 - centre, axis=1)
        best = np.argmin(gap + 0.1 * off_centre + 40 * dot * _overlaps(boxes, lines))
        taken.append(boxes[best])
        text.set_position((boxes[best, :2] + 4 * dot - centre) / dot)
        assert text.arrow_patch is not None  # since `arrowprops` was given
        text.arrow_patch.set_visible(bool(gap[best] > 2 * reach))


def _boxes(frame: Bbox, size: np.ndarray, step: float) -> np.ndarray:
    """Candidate boxes of a size inside the frame, (boxes, 4) as x0, y0, x1, y1 in pixels."""
    across, up = np.arange(frame.x0, frame.x1 - size[0], step), np.arange(frame.y0, frame.y1 - size[1], step)
    corners = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    return np.concatenate([corners, corners + size], axis=1)


def _overlaps(boxes: np.ndarray, other_boxes: np.ndarray) -> np.ndarray:
    """How many of the other boxes each box overlaps, (boxes,)."""
    is_disjoint = (boxes[:, None, :2] > other_boxes[None, :, 2:]) | (boxes[:, None, 2:] < other_boxes[None, :, :2])
    return (~is_disjoint.any(-1)).sum(1)


COLUMNS = 4
TICKS = [digit * 10**power for power in range(-2, 6) for digit in (1, 2, 5)]
POINT_STYLE: dict[str, Any] = {"ls": "", "marker": "o", "ms": 3.5, "elinewidth": 1, "zorder": 3}
OFF_AXIS_STYLE: dict[str, Any] = {"ls": "", "marker": "v", "ms": 4, "mfc": "white", "zorder": 3}


def small_multiples(rows: pd.DataFrame, cost: str = "bytes") -> tuple[Figure, pd.DataFrame]:
    """Every model's accuracy against its bytes or MACs with 95 % intervals, a panel with a Pareto front for each method.

    Vertical lines mark the budgets of `budgets.SHARES`. Points far below the others are drawn at the lower edge.

    Returns the figure and the rows that it shows.

    Raises:
        InputError: another cost, no method with an accuracy and this cost, or no baseline.
    """
    cost_name, label, scale = COSTS[one_of("cost", cost, ("bytes", "macs"))]
    experiment = Experiment.of(rows)
    models, base = models_with_cost(experiment.rows, cost), experiment.find("baseline", cost)
    families = [family for family in dict.fromkeys(models["family"]) if family != "baseline"]
    if not families or base is None:
        raise InputError(
            f"the rows hold no method with an accuracy and its {cost} beside a baseline; measure both first"
        )
    points = pd.DataFrame({key: [100 * row[key] for row in models["top1"]] for key in ("value", "low", "high")})
    points = points.assign(x=[row["value"] * scale for row in models["cost"]], family=models["family"])
    front = points.iloc[pareto_front(points["x"], points["value"])]
    bottom = min(front["low"].min(), points["value"].quantile(0.25)) - 1
    reference = experiment.find("baseline", "top1")
    narrow = current().is_narrow
    columns = min(2 if narrow else COLUMNS, len(families))
    lines = math.ceil(len(families) / columns)
    with style():
        size = figure_size(max(7.0, 1 + 2.5 * columns), 1.1 + 2.1 * lines, 1.1 + 1.15 * lines)
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
            _panel(axes, points[points["family"] == family], bottom, method_style(family, families)["color"])
            axes.set_title(wrap_label(method_text(family), 24), fontsize=7 if narrow else 9)
            axes.set(xscale="log", ylim=(bottom - 0.6, points["high"].max() + 0.6))
            axes.grid(visible=False, axis="x")
        for index, axes in enumerate(panels.flat[len(families) :], len(families)):
            axes.set_visible(False)
            if index >= columns:
                panels.flat[index - columns].tick_params(labelbottom=True)
        ticks = [tick for tick in TICKS if points["x"].min() <= tick <= points["x"].max()]
        ticks = ticks[:: 2 if narrow and len(ticks) > 5 else 1]
        panels[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0, 0].xaxis.set_minor_locator(NullLocator())
        for axes in panels[:, 0]:
            axes.set_ylabel("top-1 (%)", fontsize=current().small_font_size)
        suptitle(figure, experiment.rows, f"accuracy against {cost_name}, method by method")
        shares = ", ".join(f"1/{1 / share:.0f}" for share in SHARES)
        marks = (
            "grey: all models, their front, and the baseline's accuracy; bars: 95 % intervals; triangles: further down"
        )
        footnote(figure, f"{label}; {marks}\nlines at {shares} of the baseline's")
    return figure, pd.DataFrame([row for column in ("top1", "cost") for row in models[column]])


def _panel(axes: Axes, points: pd.DataFrame, bottom: float, colour: str) -> None:
    """Draw one method's points with their intervals, those below `bottom` at the edge, and its Pareto front."""
    visible, off_axis = points[points["value"] > bottom], points[points["value"] <= bottom]
    error_bars = [(visible["value"] - visible["low"]).clip(lower=0), (visible["high"] - visible["value"]).clip(lower=0)]
    axes.errorbar(visible["x"], visible["value"], error_bars, color=colour, **POINT_STYLE)
    axes.plot(off_axis["x"], np.full(len(off_axis), bottom), color=colour, **OFF_AXIS_STYLE)
    best = points.iloc[pareto_front(points["x"], points["value"])]
    axes.step(best["x"], best["value"].clip(lower=bottom), where="post", color=colour, lw=1.2, zorder=2)
