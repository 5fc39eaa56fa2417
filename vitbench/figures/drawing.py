"""One style for all figures, legible in grey and safe for colour-blind readers; figures of latencies and predictions."""

import contextlib
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler

from vitbench.base.errors import InputError
from vitbench.base.files import figure_bytes, write_bytes, write_text
from vitbench.base.paths import writable_folder
from vitbench.rows.experiment import Experiment, in_backend

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ("#000000", "#D55E00", "#56B4E9", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {  # matplotlib's keys are typed as literals, so `str` does not fit
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.titlesize": 11,
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
    "axes.prop_cycle": cycler(color=COLOURS),
}
SMALL_FONT_SIZE = 8  # points, for dense labels
PREDICTED = ("weights x bits", "MACs")
RING: dict[str, Any] = {"ls": "", "marker": "o", "ms": 8, "color": "black", "mfc": "white"}
MEDIAN: dict[str, Any] = {"ls": "", "marker": "o", "ms": 4.5, "color": COLOURS[3], "zorder": 4}
INTERVAL: dict[str, Any] = {"lw": 5, "color": COLOURS[3], "alpha": 0.45, "solid_capstyle": "butt", "zorder": 3}
P90: dict[str, Any] = {"ls": "", "marker": "|", "ms": 7, "color": "#555555"}
P99: dict[str, Any] = {"ls": "", "marker": "d", "ms": 3.5, "color": "#777777"}
_user_style: dict[Any, Any] = {}  # what `user_style` has set


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The project's style, for figures of the package and of notebooks; a user's matplotlibrc is ignored."""
    with mpl.rc_context():
        mpl.rcdefaults()  # text.usetex, for example, would need LaTeX
        mpl.rcParams.update(STYLE | _user_style)
        yield
        interactive = mpl.is_interactive()
    # a notebook's backend may have switched this on; switching it off would hide later figures
    mpl.interactive(interactive)


@contextlib.contextmanager
def user_style(file: str | Path) -> Iterator[None]:
    """Draw with a matplotlib style file, whose settings override the project's style; "" means no file.

    Raises:
        InputError: the file does not exist, or is no matplotlib style file.
    """
    global _user_style
    before = _user_style
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(f"no style file {str(path)!r}; give a file of lines such as `font.size: 12`")
        try:
            _user_style = dict(mpl.rc_params_from_file(path, fail_on_error=True, use_default_template=False))
        except (KeyError, ValueError, OSError) as error:
            raise InputError(
                f"{str(path)!r} is no matplotlib style file ({' '.join(str(error).split())[:200]})"
            ) from None
    try:
        yield
    finally:
        _user_style = before


def method_style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """The colour and marker of a method, by its index among the methods of the figure."""
    index = list(methods).index(method)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def save_figure(
    figure: Figure,
    folder: str | Path,
    name: str,
    rows: pd.DataFrame | None = None,
    kinds: Sequence[str] = ("png", "svg"),
    alt: str = "",
) -> None:
    """Write `name`.png and `name`.svg, and `name`.csv of `rows`, the rows that the figure shows.

    Args:
        alt: the figure's text for readers who cannot see it. It goes into the files, and a notebook shows the figure with it.
    """
    folder = writable_folder(folder, "figures folder")
    undated: dict[str, dict[str, Any]] = {
        "png": {"Description": alt} if alt else {},
        "svg": {"Date": None} | ({"Description": alt} if alt else {}),
        "pdf": {"CreationDate": None} | ({"Subject": alt} if alt else {}),
    }  # without a date the same rows give the same file
    with style():
        for kind in kinds:
            write_bytes(folder / f"{name}.{kind}", figure_bytes(figure, kind, metadata=undated.get(kind)))
            figure.set_layout_engine("none")  # keeps the first layout for the other kinds and the notebook
    if rows is not None:
        identity_columns = ["key", "model", "dataset", "method", "config", "metric", "batch"]
        columns = [*identity_columns, "value", "low", "high", "unit", "source", "commit"]
        write_text(folder / f"{name}.csv", rows[columns].to_csv(index=False))
    if alt:
        _show(figure, alt)


def _show(figure: Figure, alt: str) -> None:
    """In a notebook, show the figure with its alternative text, which the inline backend would not write."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        return
    from IPython.display import Image, display

    with style():
        display(Image(figure_bytes(figure, "png", dpi=figure.dpi), format="png", alt=alt))
    plt.close(figure)  # or the inline backend would show it again


def latencies(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Median, p90 and p99 of the time of a call, a line for each method, the fastest first, a panel for each batch size.

    If methods were timed in alternation with the baseline, times are divided by the median of the baseline's calls in the
    same process. A method's median is then its latency ratio, drawn with its 95 % interval. Otherwise times are in ms.

    Raises:
        InputError: no timed call.
    """
    rows = Experiment.of(rows).rows
    rows = rows[in_backend(rows) & rows["samples"].notna()]
    paired = rows[rows["metric"] == "latency_ratio"]
    alternating = len(paired) > 0
    latency_rows = rows[rows["metric"].isin(["latency_p50", "latency_ratio"])]
    latency_rows = latency_rows[latency_rows["label"].isin(paired["label"]) | (not alternating)]
    if not len(latency_rows):
        raise InputError("no call was timed among these rows; measure the latency first")
    calls = {int(batch): _calls(batch_rows, alternating) for batch, batch_rows in latency_rows.groupby("batch")}
    names = sorted(
        dict.fromkeys(name for calls_by_label in calls.values() for name in calls_by_label),
        key=lambda name: [np.median(calls_by_label.get(name, np.inf)) for calls_by_label in calls.values()],
    )
    with style():
        figure, panels, y = _method_lines(names, len(calls))
        for axes, (batch, calls_by_label) in zip(panels, calls.items(), strict=True):
            for name, times in calls_by_label.items():
                _draw_times(axes, y[name], times, Experiment(latency_rows).find(name, "latency_ratio", batch))
            # a single slow call must not set the scale of the axis
            slow, slowest = (max(np.percentile(times, p) for times in calls_by_label.values()) for p in (90, 99))
            axes.set_xlim(0, 1.05 * min(slowest, 2 * slow))
            unit = "time of a call / baseline's median" if alternating else "time of a call (ms)"
            axes.set_xlabel(f"{unit}, batch {batch}")
            if alternating:
                axes.axvline(1, color="black", lw=0.8, zorder=1)
            _legend(
                axes,
                {"median": MEDIAN}
                | ({"its 95 % interval": INTERVAL} if alternating else {})
                | {"p90": P90, "p99": P99},
            )
        figure.suptitle(figure_title(rows, "how long a call takes"), x=0.01, ha="left")
        numbers = "the median and its 95 % interval" if alternating else "the median"
        footnote(figure, f"numbers: {numbers}; the slowest calls may lie outside")
    return figure, latency_rows


def _calls(latency_rows: pd.DataFrame, alternating: bool) -> dict[str, np.ndarray]:
    """Label -> times of its calls (ms); if `alternating`, over the baseline's median, with the baseline first."""
    calls_by_label = _samples(latency_rows, "latency_p50")
    if not alternating:
        return calls_by_label
    base = _samples(latency_rows, "latency_ratio")
    calls = {"baseline": np.concatenate([times / np.median(times) for times in base.values()])}
    return calls | {label: calls_by_label[label] / np.median(base[label]) for label in base}


def _samples(rows: pd.DataFrame, metric: str) -> dict[str, np.ndarray]:
    """Label -> the samples of its last row of a metric."""
    rows = rows[rows["metric"] == metric]
    return {label: np.array(samples) for label, samples in zip(rows["label"], rows["samples"], strict=True)}


def _draw_times(axes: Axes, y: float, times: np.ndarray, ratio: pd.Series | None) -> None:
    """Draw one method's line; the baseline has no ratio and no interval."""
    median, p90, p99 = np.percentile(times, (50, 90, 99))
    median = median if ratio is None else ratio["value"]
    axes.plot([median, p99], [y, y], color="#999999", lw=1)
    axes.plot(p90, y, **P90)
    axes.plot(p99, y, **P99)
    text = f"{median:.2f}"
    if ratio is not None:
        axes.plot([ratio["low"], ratio["high"]], [y, y], **INTERVAL)
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    axes.plot(median, y, **MEDIAN | ({} if ratio is not None else {"color": "black"}))
    _write_at_right(axes, y, text)


def predicted_beside_measured(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Size and time predicted by bits and MACs, beside the measured ones, as ratios to the baseline.

    A line for each compressed method, the smallest file first; size in one panel, time in the other.
    """
    experiment = Experiment.of(rows)
    names = [method for method in experiment.timed_labels if method != "baseline"]
    sizes: dict[str, Marks] = {}
    times: dict[str, Marks] = {}
    rows_used: dict[str, list[pd.Series]] = {}
    for name in names:
        sizes[name], times[name], rows_used[name] = _ratios_to_baseline(experiment, name)
    names.sort(key=lambda name: sizes[name].get("on disk", (np.inf,)))
    with style():
        figure, panels, y = _method_lines(names, 2)
        for axes, what, marks in zip(panels, ("size", "work or time"), (sizes, times), strict=True):
            kinds = _kinds(label for name in names for label in marks[name])
            for name in names:
                _draw_marks(axes, y[name], marks[name], kinds)
            axes.axvline(1, color="black", lw=0.8, zorder=1)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{what} / baseline's (1 = no gain)")
            _legend(axes, kinds)
        if not names:
            panels[0].text(0, 0.2, "no compressed method has been measured yet")
        figure.suptitle(figure_title(experiment.rows, "predicted beside measured"), x=0.01, ha="left")
        footnote(
            figure,
            "hollow: predicted; filled: measured; bars: 95 % intervals; numbers: predicted \N{RIGHTWARDS ARROW} measured",
        )
    figure_rows = [row for name in names for row in rows_used[name]]
    return figure, pd.DataFrame(figure_rows, columns=experiment.rows.columns).drop_duplicates("key")


Marks = dict[str, tuple[float, float, float]]  # quantity -> ratio to the baseline, low and high of its interval


def _ratios_to_baseline(experiment: Experiment, method: str) -> tuple[Marks, Marks, list[pd.Series]]:
    """The marks of one method for size and for time, and the rows that they show."""
    size: Marks = {}
    time: Marks = {}
    rows_used = []
    for marks, label, metric in (
        (size, "weights x bits", "bytes_predicted"),
        (size, "on disk", "bytes"),
        (time, "MACs", "macs"),
    ):
        base, row = experiment.find("baseline", metric), experiment.find(method, metric)
        if base is not None and row is not None:
            marks[label] = (row["value"] / base["value"],) * 3
            rows_used += [base, row]
    for row in experiment.ratios(method):
        time[f"time, batch {int(row['batch'])}"] = (row["value"], row["low"], row["high"])
        rows_used.append(row)
    return size, time, rows_used


def _kinds(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Label -> style of its marks; a predicted one is a ring, so that a measured one of the same value fits into it."""
    labels = list(dict.fromkeys(labels))
    kinds: dict[str, dict[str, Any]] = {label: RING for label in labels if label in PREDICTED}
    for index, label in enumerate(label for label in labels if label not in PREDICTED):
        colour, marker = COLOURS[(3, 1, 5, 4)[index % 4]], MARKERS[index % len(MARKERS)]
        kinds[label] = {"ls": "", "ms": 5, "marker": marker, "color": colour}
    return kinds


def _draw_marks(axes: Axes, y: float, marks: Marks, kinds: dict[str, dict[str, Any]]) -> None:
    """Draw one method's line in one panel; times of several batch sizes are shifted vertically (inches)."""
    predicted, measured = ([label for label in kinds if (label in PREDICTED) == side] for side in (True, False))
    all_ratios = [ratio for ratio, *_ in marks.values()]
    axes.plot(all_ratios, [y] * len(all_ratios), color="#BBBBBB", lw=1)
    for label, (ratio, low, high) in marks.items():
        shifted = y + (0.08 * (measured.index(label) - (len(measured) - 1) / 2) if label in measured else 0)
        axes.plot([low, high], [shifted, shifted], **INTERVAL | {"color": kinds[label]["color"], "lw": 3})
        axes.plot(ratio, shifted, **kinds[label])
    sides = [", ".join(f"{marks[label][0]:.2f}" for label in side if label in marks) for side in (predicted, measured)]
    _write_at_right(axes, y, " \N{RIGHTWARDS ARROW} ".join(side or "-" for side in sides))


def _method_lines(names: Sequence[str], panels: int) -> tuple[Figure, list[Axes], dict[str, float]]:
    """An empty figure with a line for each name, its panels side by side, and name -> y of its line (inches)."""
    texts = [wrap_label(name, 44) for name in names]
    heights = np.array([0.085 + 0.135 * (1 + text.count("\n")) for text in texts])  # inches
    total, y = max(0.5, heights.sum()), np.cumsum(heights) - heights / 2
    figure, drawn = plt.subplots(1, panels, figsize=(3 + 3.8 * panels, 1.7 + total), sharey=True, squeeze=False)
    drawn[0, 0].set_yticks(y, texts, fontsize=SMALL_FONT_SIZE)
    drawn[0, 0].set_ylim(total, 0)
    for axes in drawn[0]:
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure, list(drawn[0]), dict(zip(names, y, strict=True))


def _write_at_right(axes: Axes, y: float, text: str) -> None:
    """Write a text to the right of a panel, at a method's line."""
    axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), fontsize=SMALL_FONT_SIZE, va="center")


def _legend(axes: Axes, kinds: dict[str, dict[str, Any]]) -> None:
    """Draw a legend above the panel, where a reader of a long list starts."""
    marks = [Line2D([], [], label=label, **kind) for label, kind in kinds.items()]
    close: dict[str, Any] = {"borderpad": 0, "columnspacing": 1.2, "handlelength": 1.4, "handletextpad": 0.5}
    axes.legend(handles=marks, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=SMALL_FONT_SIZE, **close)


def wrap_label(name: str, width: int) -> str:
    """Break a name into lines; it is never shortened, since two settings may differ only at the end."""
    return textwrap.fill(name, width, break_on_hyphens=False)


def figure_title(rows: pd.DataFrame, what: str) -> str:
    """A figure's title: what it shows, the model and the images."""
    last = rows.iloc[-1]
    return f"{what}\n{escape_dollars(last['model'])} on {escape_dollars(last['dataset'])}"


def escape_dollars(text: str) -> str:
    """Escape dollar signs, so that matplotlib does not read a formula."""
    return text.replace("$", r"\$")


def footnote(figure: Figure, text: str) -> None:
    """Write small print below a figure."""
    figure.supxlabel(text, fontsize=8, color="#555555", x=0.99, ha="right")
