"""Figures of measured costs: peak memory, start-up time, time in every backend, and time over the latency floor."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from vitbench.base.errors import InputError
from vitbench.figures.drawing import COLOURS, MARKERS, footnote, legend_below, method_style, style, suptitle, wrap_label
from vitbench.figures.layout import MIN_WIDTH, current, figure_width, fold, texts_of
from vitbench.rows.experiment import EAGER, MEGA, Experiment

Ratio = Callable[[str, int, str], float]


def memory(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Peak memory of a fresh process that classifies one image, by backend and model; the imports' share is hatched.

    A thick line marks the smallest memory limit under which the process still works, if it was measured.
    """
    figure, axes, figure_rows, peaks = _bars(
        rows, "peak_rss", "import_rss", "memory", 1 / MEGA, extra=("memory_limit",)
    )
    for position, row in enumerate(peaks.itertuples()):
        limit = Experiment(figure_rows).number(row.label, "memory_limit", backend=row.backend) / MEGA
        axes.plot([limit, limit], [position - 0.4, position + 0.4], color=COLOURS[1], lw=3)
    with style():
        axes.set_xlabel(_folded("peak memory of a fresh process that runs one image (MB)"))
        footnote(
            figure,
            "hatched: after the imports, before the model; thick line: smallest memory limit in which it runs",
        )
    return figure, figure_rows


def startup(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Seconds from the start of a process to its first output, by backend and model; dots: single starts, hatched: loading."""
    figure, axes, figure_rows, starts = _bars(rows, "cold_start", "load_time", "startup", 1.0)
    for position, row in enumerate(starts.itertuples()):
        axes.plot(row.samples, [position] * len(row.samples), ls="", marker="o", ms=3.5, color="black")
    with style():
        axes.set_xlabel(_folded("time from the start of a process to the end of its first inference (s)"))
        footnote(figure, "dots: single starts; bar: their median; hatched: of it, to load the model")
    return figure, figure_rows


def _folded(text: str) -> str:
    """An axis label as wide as a narrow page allows beside the names of models."""
    return fold(text, 0.6 * MIN_WIDTH if current().is_narrow else None, current().font_size)


def _bars(
    rows: pd.DataFrame, metric: str, part: str, group: str, scale: float, extra: tuple[str, ...] = ()
) -> tuple[Figure, Axes, pd.DataFrame, pd.DataFrame]:
    """A bar for each model and backend: `metric`, with `part` of it hatched and its value at the end.

    Returns the figure, its axes, all rows that it shows, and the rows of the bars.
    """
    experiment = Experiment.of(rows)
    figure_rows = experiment.of_metrics(metric, part, *extra)
    bars = figure_rows[figure_rows["metric"] == metric].drop_duplicates(["label", "backend"], keep="last")
    if not len(bars):
        raise InputError(f"the rows hold no {metric}; measure the group {group} first")
    narrow, display = current().is_narrow, texts_of(experiment, bars["label"])
    names = [wrap_label(f"{display[row.label]}, {row.backend}", 24 if narrow else 40) for row in bars.itertuples()]
    with style():
        height = sum(0.17 + 0.15 * (1 + name.count("\n")) for name in names)
        figure, axes = plt.subplots(figsize=(figure_width(9), 1.4 + height))
        for position, row in enumerate(bars.itertuples()):
            colour = method_style(row.method, [row.method])["color"]
            axes.barh(position, row.value * scale, color=colour, alpha=0.5)
            width = experiment.number(row.label, part, backend=row.backend) * scale
            axes.barh(position, width, color="white", hatch="///", edgecolor=colour)
            end = max(row.samples or [row.value]) * scale
            axes.annotate(
                f"{row.value * scale:.3g}", (end, position), xytext=(6, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(bars)), names, fontsize=current().small_font_size if narrow else None)
        axes.margins(x=0.12)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        suptitle(figure, figure_rows, "memory" if metric == "peak_rss" else "the first inference")
    return figure, axes, figure_rows, bars


@style()
def floors(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Median latency over the latency floor, by model and backend, one panel for each batch size.

    The floor is the least time that the machine's measured peaks allow for the products and the bytes of the weights.
    """
    experiment = Experiment.of(rows)
    floor, timed = experiment.of_metrics("latency_floor"), experiment.of_metrics("latency_p50")
    timed = timed[timed["versus_backend"].isna()]
    if not len(floor) or not len(timed):
        raise InputError(
            "the rows hold no latency_floor beside a latency; measure the groups roofline and latency first"
        )

    def over_floor(label: str, batch: int, backend: str) -> float:
        latency = experiment.number(label, "latency_p50", batch=batch, backend=backend)
        return latency / experiment.number(label, "latency_floor", batch=batch)

    batches = sorted(set(floor["batch"]) & set(timed["batch"]))
    figure = _marks(timed, batches, over_floor, "median time / floor", "how far from the machine's own limit")
    footnote(figure, "1 is the floor: products and bytes at this machine's measured peaks")
    return figure, pd.concat([floor, timed])


@style()
def in_backends(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Median latency over eager fp32's in alternating calls, by model and backend, one panel for each batch size."""
    experiment = Experiment.of(rows)
    timed = experiment.of_metrics("latency_ratio")
    timed = timed[timed["versus_backend"].eq(EAGER) | (timed["versus_backend"].isna() & timed["backend"].eq(EAGER))]
    if not len(timed):
        raise InputError("the rows hold no time over eager fp32's; measure the latency with --versus-backend eager")

    def over_eager(label: str, batch: int, backend: str) -> float:
        versus = "" if backend == EAGER else EAGER
        return experiment.number(label, "latency_ratio", batch=batch, backend=backend, versus=versus)

    batches = sorted(set(timed["batch"]))
    figure = _marks(timed, batches, over_eager, "time / eager fp32's", "time in every backend")
    footnote(figure, "medians, in turn with eager fp32 in one process; left is faster")
    return figure, timed


def _marks(figure_rows: pd.DataFrame, batches: Sequence[float], ratio: Ratio, unit: str, title: str) -> Figure:
    """A line for each model, a mark for each backend, a panel for each batch size.

    `ratio(label, batch, backend)` is the x of a mark, or NaN where there is no mark.
    """
    names, backends = list(dict.fromkeys(figure_rows["label"])), list(dict.fromkeys(figure_rows["backend"]))
    narrow, display = current().is_narrow, texts_of(figure_rows, names)
    with style():
        across, down = (1, len(batches)) if narrow else (len(batches), 1)
        height = 1.2 + down * (0.5 + 0.21 * len(names)) if narrow else 1.8 + 0.3 * len(names)
        size = (figure_width(3.4 + 3.6 * len(batches)), height)
        figure, panels = plt.subplots(down, across, figsize=size, sharey=True, sharex=narrow, squeeze=False)
        for axes, batch in zip(panels.flat, batches, strict=True):
            for index, backend in enumerate(backends):
                ratios = [ratio(name, int(batch), backend) for name in names]
                mark_style: dict[str, Any] = {"marker": MARKERS[index], "color": COLOURS[(index + 1) % len(COLOURS)]}
                axes.plot(ratios, range(len(names)), ls="", label=backend, **mark_style)
            axes.axvline(1, color="black", lw=1)
            axes.set(xscale="log", xlabel=f"{unit}, batch {int(batch)}")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
        texts = [wrap_label(display[name], 26 if narrow else 30) for name in names]
        for axes in panels[:, 0]:
            axes.set_yticks(range(len(names)), texts, fontsize=current().small_font_size)
        panels[0][0].invert_yaxis()
        if narrow:
            legend_below(panels[-1][0], panels[0][0].get_legend_handles_labels()[0], 3)
        else:
            panels[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        suptitle(figure, figure_rows, title)
    return figure
