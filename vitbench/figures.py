"""Figures from rows alone, in one style: legible in grey, safe for colour-blind readers, labelled in place."""

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitbench.comparison import MEGA, in_backend, methods, ratios, subject, value
from vitbench.errors import InputError, one_of
from vitbench.paths import writable_folder
from vitbench.statistics import pareto_front

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ("#000000", "#D55E00", "#56B4E9", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "vitbench",  # the same rows give the same file
    "svg.fonttype": "none",
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
}
COSTS = {  # cost -> what the title calls it, the axis label, and the scale of the axis
    "bytes": ("size", "size on disk (MB)", 1 / MEGA),
    "latency_ratio": ("time", "median latency / baseline's, batch {batch}, timed in turn", 1.0),
    "macs": ("work", "multiply-accumulates for one image (M)", 1 / MEGA),
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The project's look, for the figures here and for a notebook's own."""
    with mpl.rc_context(STYLE):
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # a notebook's backend may have set it inside; taking it back would hide later figures


def look(method: str, among: Sequence[str]) -> dict[str, str]:
    """The colour and marker of a method, by its place among those shown."""
    place = list(among).index(method)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def save_figure(figure: Figure, folder: str | Path, name: str, rows: pd.DataFrame | None = None) -> None:
    """Write `name`.png and `name`.svg, and with `rows` a `name`.csv of the rows that the figure shows, with their keys."""
    folder = writable_folder(folder, "figures folder")
    with style():
        figure.savefig(folder / f"{name}.png")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    if rows is not None:
        columns = [
            *("key", "model", "dataset", "method", "config", "metric", "batch"),
            *("value", "low", "high", "unit", "source", "commit"),
        ]
        rows[columns].to_csv(folder / f"{name}.csv", index=False)


def tradeoff(rows: pd.DataFrame, cost: str = "bytes", batch: int = 1) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against a cost ("bytes", "latency_ratio" or "macs"), with 95 % intervals and the Pareto front.

    Returns the figure and the rows that it shows.
    """
    word, label, scale = COSTS[one_of("cost", cost, COSTS)]
    rows = subject(rows)
    names, points, shown = methods(rows), [], []
    at = batch if cost == "latency_ratio" else None
    for method in names:
        gain, price = value(rows, method, "top1"), value(rows, method, cost, at)
        if gain is None or (price is None and not (cost == "latency_ratio" and method == "baseline")):
            continue
        x = (1.0, None, None) if price is None else (price["value"] * scale, price["low"], price["high"])
        points.append((method, x, gain))
        shown += [row for row in (gain, price) if row is not None]
    if not points:
        raise InputError(f"no model has both an accuracy and a {word} among these rows; measure both first")
    with style():
        figure, axes = plt.subplots(figsize=(6.4, 4.2))
        for method, (x, low, high), gain in points:
            spread = None if low is None or np.isnan(low) else [[x - low], [high - x]]
            errors = 100 * np.array([[gain["value"] - gain["low"]], [gain["high"] - gain["value"]]])
            kind = look(method, names)
            axes.errorbar(
                x,
                100 * gain["value"],
                yerr=errors,
                xerr=spread,
                fmt=kind["marker"],
                color=kind["color"],
                ms=8,
                capsize=3,
            )
        front = pareto_front([x for _, (x, *_), _ in points], [gain["value"] for *_, gain in points])
        widest = max(x for _, (x, *_), _ in points)
        line = [(points[i][1][0], 100 * points[i][2]["value"]) for i in front]
        line.append((1.6 * widest, line[-1][1]))  # to the right, nothing better was found
        axes.plot(*zip(*line, strict=True), color="#777777", lw=1, ls="--", zorder=0, drawstyle="steps-post")
        axes.set_xlim(0, 1.6 * widest)  # room for the labels
        _label_points(axes, [(method, x, 100 * gain["value"]) for method, (x, *_), gain in points], names)
        axes.set(
            xlabel=label.format(batch=batch),
            ylabel="top-1 on test images (%)",
            title=heading(rows, f"accuracy against {word}"),
        )
        note(figure, "bars: 95 % intervals; dashed: Pareto front; left and up is better")
    return figure, pd.DataFrame(shown)


def latencies(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Every timed call, as the share of calls that took at most so long, one panel a batch size.

    Where methods were timed in turn with the baseline, a call's time is given in medians of the baseline's calls of the
    same process; a baseline alone is given in ms.
    """
    rows = subject(rows)
    # the baseline's calls are in the ratios, whether it has rows of its own or not
    names = list(dict.fromkeys(["baseline", *methods(rows)]))
    rows = rows[in_backend(rows)]
    paired = rows[rows["metric"] == "latency_ratio"]
    shown = rows[rows["metric"].isin(["latency_p50", "latency_ratio"] if len(paired) else ["latency_p50"])]
    shown = shown[shown["samples"].notna() & (shown["label"].isin(paired["label"]) | (not len(paired)))]
    batches = sorted(shown["batch"].unique())
    with style():
        figure, panels = plt.subplots(1, len(batches), figsize=(4.4 * len(batches), 3.6), squeeze=False, sharey=True)
        for axes, batch in zip(panels[0], batches, strict=True):
            calls = _calls(shown[shown["batch"] == batch], bool(len(paired)))
            for place, (method, times) in enumerate(calls.items()):
                kind, dashes = look(method, names), ("-", "--", ":", "-.")[place % 4]
                sns.ecdfplot(x=times, ax=axes, color=kind["color"], ls=dashes, label=textwrap.fill(method, 34))
                axes.axvline(np.median(times), color=kind["color"], lw=0.8, alpha=0.5)
            widest = max(min(np.percentile(times, 98), 2 * np.median(times)) for times in calls.values())
            axes.set_xlim(0, 1.1 * widest)
            axes.set(ylim=(0, 1.25), yticks=np.linspace(0, 1, 6), ylabel="share of calls")
            unit = "time of one call / baseline's median" if len(paired) else "ms for one call"
            axes.set_xlabel(f"{unit}, batch {int(batch)}")
            axes.legend(loc="upper left", fontsize=9)
        panels[0][0].set_title(heading(rows, "every timed call"))
        note(figure, "thin vertical lines: medians; the slowest calls may lie outside")
    return figure, shown


def _calls(shown: pd.DataFrame, paired: bool) -> dict[str, np.ndarray]:
    """Each method's calls; paired, in units of the baseline's median, with the baseline's own calls first."""
    own = {row.label: np.array(row.samples) for row in shown[shown["metric"] == "latency_p50"].itertuples()}
    if not paired:
        return own
    base = {row.label: np.array(row.samples) for row in shown[shown["metric"] == "latency_ratio"].itertuples()}
    calls = {"baseline": np.concatenate([times / np.median(times) for times in base.values()])}
    return calls | {label: own[label] / np.median(base[label]) for label in base}


def predicted_beside_measured(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """For each compressed method, what bits and MACs promise and what disk and clock say, as ratios to the baseline."""
    rows = subject(rows)
    names = [method for method in methods(rows) if method != "baseline"]
    columns = min(3, max(1, len(names)))
    lines = math.ceil(max(1, len(names)) / columns)
    shown = []
    with style():
        figure, panels = plt.subplots(lines, columns, figsize=(max(6.4, 4.6 * columns), 3.4 * lines), squeeze=False)
        for axes, method in zip(panels.flat, names, strict=False):
            bars, used = _promises(rows, method)
            _draw_bars(axes, bars)
            axes.set_title(method)
            shown += used
        for axes in panels.flat[len(names) :]:
            axes.axis("off")
        if not names:
            panels[0][0].text(0.5, 0.5, "no compressed method has been measured yet", ha="center")
        note(figure, "hatched: predicted; filled: measured; black bar: 95 % interval")
    return figure, pd.DataFrame(shown, columns=rows.columns)


Bar = tuple[str, float, tuple[float, float] | None, bool]  # label, ratio to the baseline, interval, measured


def _promises(rows: pd.DataFrame, method: str) -> tuple[list[Bar], list[pd.Series]]:
    """The bars of one method and the rows behind them."""
    bars: list[Bar] = []
    used = []
    for label, metric, measured in (
        ("bytes: weights x bits", "bytes_predicted", False),
        ("bytes: on disk", "bytes", True),
        ("MACs", "macs", False),
    ):
        base, own = value(rows, "baseline", metric), value(rows, method, metric)
        if base is not None and own is not None:
            bars.append((label, own["value"] / base["value"], None, measured))
            used += [base, own]
    for row in ratios(rows, method):
        bars.append((f"latency, batch {int(row['batch'])}", row["value"], (row["low"], row["high"]), True))
        used.append(row)
    return bars, used


def _draw_bars(axes: Axes, bars: list[Bar]) -> None:
    for place, (_, ratio, interval, measured) in enumerate(bars):
        colour = COLOURS[3] if measured else "white"
        axes.barh(place, ratio, color=colour, edgecolor=COLOURS[3], hatch="" if measured else "///")
        if interval:
            axes.plot(interval, [place, place], color="black", lw=2)
        right = interval[1] if interval else ratio
        axes.annotate(f"{ratio:.2f}", (right, place), xytext=(5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.set_xlim(0, 1.15 * max([1.0, *(interval[1] if interval else ratio for _, ratio, interval, _ in bars)]))
    axes.set_xlabel("ratio to the baseline (1 = no gain)")
    axes.invert_yaxis()


def _label_points(axes: Axes, points: list[tuple[str, float, float]], names: Sequence[str]) -> None:
    """Write each point's name beside it; names of points that lie together are stacked."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for place, (name, x, y) in enumerate(points):
        near = sum(
            abs(x - other) < 0.3 * (right - left) and abs(y - height) < 0.06 * (top - bottom)
            for _, other, height in points[:place]
        )
        colour = look(name, names)["color"]
        axes.annotate(
            name,
            (x, y),
            xytext=(9, 5 + 13 * near),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85},
        )


def heading(rows: pd.DataFrame, what: str) -> str:
    """A figure's title: what it shows, and of which model on which images."""
    last = rows.iloc[-1]
    return f"{what}\n{last['model']} on {last['dataset']}"


def note(figure: Figure, text: str) -> None:
    """A line of small print below a figure."""
    figure.supxlabel(text, fontsize=8, color="#555555", x=0.99, ha="right")
