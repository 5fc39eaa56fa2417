"""One style for all figures, legible in grey and safe for colour-blind readers; figures of latencies and predictions."""

import contextlib
import re
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
from matplotlib.transforms import ScaledTranslation

from vitbench.base.errors import InputError
from vitbench.base.files import figure_bytes, write_bytes, write_text
from vitbench.base.paths import writable_folder
from vitbench.figures.layout import current, figure_width, fold, texts_of
from vitbench.rows.experiment import Experiment, in_backend
from vitbench.rows.words import COMBINATIONS, METHODS, family_of

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ("#000000", "#D55E00", "#56B4E9", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "p", "h", "d")
FAMILY_COLOURS = {  # one colour for each family of methods, the same in all figures
    "baseline": COLOURS[0],
    "quantization": COLOURS[3],
    "UCT": COLOURS[1],
    "low rank": COLOURS[4],
    "pruning": COLOURS[5],
    "tokens and attention": COLOURS[2],
    "distillation": COLOURS[6],
    COMBINATIONS: "#882255",  # Tol's wine, since Okabe and Ito have no further dark colour
}
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
NARROW_STYLE: dict[Any, Any] = {  # of one column of a paper
    "font.size": 7,
    "axes.titlesize": 7.5,
    "figure.titlesize": 7.5,
    "savefig.dpi": 300,
    "lines.markersize": 4,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "axes.labelpad": 2,
    "figure.constrained_layout.h_pad": 0.045,
    "figure.constrained_layout.w_pad": 0.02,
}
PREDICTED = ("weights x bits", "MACs")
NEUTRAL = "#555555"  # in legends, of marks that have their methods' colours
RING: dict[str, Any] = {"ls": "", "marker": "o", "ms": 8, "color": "black", "mfc": "white"}
MEDIAN: dict[str, Any] = {"ls": "", "marker": "o", "ms": 4.5, "color": NEUTRAL, "zorder": 4}
INTERVAL: dict[str, Any] = {"lw": 5, "color": NEUTRAL, "alpha": 0.45, "solid_capstyle": "butt", "zorder": 3}
P90: dict[str, Any] = {"ls": "", "marker": "|", "ms": 7, "color": "#555555"}
P99: dict[str, Any] = {"ls": "", "marker": "d", "ms": 3.5, "color": "#777777"}
_user_style: dict[Any, Any] = {}  # what `user_style` has set


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The project's style, for figures of the package and of notebooks; a user's matplotlibrc is ignored."""
    with mpl.rc_context():
        mpl.rcdefaults()  # text.usetex, for example, would need LaTeX
        mpl.rcParams.update(STYLE | (NARROW_STYLE if current().is_narrow else {}) | _user_style)
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
    """The colour of a method's family and the method's marker, the same in all figures.

    A combination has the colour of combinations, and its marker by its index among those of the figure. A name that is no
    method has a colour and a marker by its index among the names of the figure, which are `methods`.
    """
    methods = list(methods)
    family = family_of(method)
    if family and family != COMBINATIONS:
        return {"color": FAMILY_COLOURS[family], "marker": MARKERS[list(METHODS).index(method) % len(MARKERS)]}
    alike = [name for name in methods if family_of(name) == family]
    index = alike.index(method)
    taken = {FAMILY_COLOURS[family_of(name)] for name in methods if family_of(name)}
    free = [colour for colour in COLOURS if colour not in taken] or COLOURS
    return {
        "color": FAMILY_COLOURS.get(family, free[index % len(free)]),
        "marker": MARKERS[index % len(MARKERS)],
    }


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
    colours = _colours(rows)
    with style():
        figure, panels, y = _method_lines(rows, names, len(calls))
        for axes, (batch, calls_by_label) in zip(panels, calls.items(), strict=True):
            for name, times in calls_by_label.items():
                ratio = Experiment(latency_rows).find(name, "latency_ratio", batch)
                _draw_times(axes, y[name], times, ratio, colours.get(name, "black"))
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
        suptitle(figure, rows, "how long a call takes")
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


def _draw_times(axes: Axes, y: float, times: np.ndarray, ratio: pd.Series | None, colour: str) -> None:
    """Draw one method's line in its colour; the baseline has no ratio and no interval."""
    median, p90, p99 = np.percentile(times, (50, 90, 99))
    median = median if ratio is None else ratio["value"]
    axes.plot([median, p99], [y, y], color="#999999", lw=1)
    axes.plot(p90, y, **P90)
    axes.plot(p99, y, **P99)
    text = f"{median:.2f}"
    if ratio is not None:
        axes.plot([ratio["low"], ratio["high"]], [y, y], **INTERVAL | {"color": colour})
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    axes.plot(median, y, **MEDIAN | {"color": colour})
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
    colours = _colours(experiment.rows)
    with style():
        figure, panels, y = _method_lines(experiment, names, 2)
        for axes, what, marks in zip(panels, ("size", "work or time"), (sizes, times), strict=True):
            kinds = _kinds(label for name in names for label in marks[name])
            for name in names:
                _draw_marks(axes, y[name], marks[name], kinds, colours[name])
            axes.axvline(1, color="black", lw=0.8, zorder=1)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{what} / baseline's (1 = no gain)")
            _legend(axes, kinds)
        if not names:
            panels[0].text(0, 0.2, "no compressed method has been measured yet")
        suptitle(figure, experiment.rows, "predicted beside measured")
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
        kinds[label] = {"ls": "", "ms": 5, "marker": MARKERS[index % len(MARKERS)], "color": NEUTRAL}
    return kinds


def _draw_marks(axes: Axes, y: float, marks: Marks, kinds: dict[str, dict[str, Any]], colour: str) -> None:
    """Draw one method's line in one panel, what was measured in the method's colour.

    Times of several batch sizes are shifted vertically (inches).
    """
    predicted, measured = ([label for label in kinds if (label in PREDICTED) == side] for side in (True, False))
    all_ratios = [ratio for ratio, *_ in marks.values()]
    axes.plot(all_ratios, [y] * len(all_ratios), color="#BBBBBB", lw=1)
    for label, (ratio, low, high) in marks.items():
        shifted = y + (0.08 * (measured.index(label) - (len(measured) - 1) / 2) if label in measured else 0)
        own = {} if label in PREDICTED else {"color": colour}
        axes.plot([low, high], [shifted, shifted], **INTERVAL | {"lw": 3} | own)
        axes.plot(ratio, shifted, **kinds[label] | own)
    sides = [", ".join(f"{marks[label][0]:.2f}" for label in side if label in marks) for side in (predicted, measured)]
    _write_at_right(axes, y, " \N{RIGHTWARDS ARROW} ".join(side or "-" for side in sides))


def _colours(rows: pd.DataFrame) -> dict[str, str]:
    """Label -> the colour of its method's family."""
    methods = dict(zip(rows["label"], rows["method"], strict=True))
    in_figure = list(dict.fromkeys(methods.values()))
    return {label: method_style(method, in_figure)["color"] for label, method in methods.items()}


def _method_lines(
    rows: pd.DataFrame | Experiment, names: Sequence[str], panels: int
) -> tuple[Figure, list[Axes], dict[str, float]]:
    """An empty figure with a line for each label, and label -> y of its line (inches).

    Panels are side by side; on a narrow page they are below each other.
    """
    narrow, display = current().is_narrow, texts_of(rows, names)
    texts = [wrap_label(display[name], 24 if narrow else 44) for name in names]
    line_height = 0.1 if narrow else 0.135
    heights = np.array([0.085 + line_height * (1 + text.count("\n")) for text in texts])  # inches
    total, y = max(0.5, heights.sum()), np.cumsum(heights) - heights / 2
    across, down = (1, panels) if narrow else (panels, 1)
    size = (figure_width(3 + 3.8 * panels), (0.8 if narrow else 1.7) + down * (total + (0.5 if narrow else 0)))
    figure, drawn = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False)
    for axes in drawn.flat:
        axes.set_ylim(total, 0)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    for axes in drawn[:, 0]:
        axes.set_yticks(y, texts, fontsize=current().small_font_size)
    return figure, list(drawn.flat), dict(zip(names, y, strict=True))


def _write_at_right(axes: Axes, y: float, text: str) -> None:
    """Write a text to the right of a panel, at a method's line."""
    font_size = current().small_font_size
    axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), fontsize=font_size, va="center")


def _legend(axes: Axes, kinds: dict[str, dict[str, Any]]) -> None:
    """Draw a legend above the panel, where a reader of a long list starts."""
    marks = [Line2D([], [], label=label, **kind) for label, kind in kinds.items()]
    close: dict[str, Any] = {"borderpad": 0, "columnspacing": 1.2, "handlelength": 1.4, "handletextpad": 0.5}
    if current().is_narrow:
        close |= {"columnspacing": 0.8, "handlelength": 0.9, "handletextpad": 0.4, "markerscale": 0.7}
    font_size = current().small_font_size
    axes.legend(handles=marks, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=font_size, **close)


def legend_below(axes: Axes, handles: Sequence[Any], columns: int) -> None:
    """Draw a legend below a panel's axis label, above the small print; for narrow pages."""
    figure = axes.figure
    below = axes.transAxes + ScaledTranslation(0, -0.32, figure.dpi_scale_trans)
    axes.legend(
        handles=handles,
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.45, 0),
        bbox_transform=below,
        fontsize=current().small_font_size,
        columnspacing=1.2,
        handletextpad=0.4,
        borderpad=0,
    )


def wrap_label(name: str, width: int) -> str:
    """Break a name into lines, where it can after a comma or a plus.

    It is never shortened, since two settings may differ only at the end.
    """
    lines: list[str] = []
    for phrase in re.split(r"(?<=,) |(?<= \+) ", name):
        if lines and len(lines[-1]) + 1 + len(phrase) <= width:
            lines[-1] += f" {phrase}"
        else:
            lines += textwrap.wrap(phrase, width, break_on_hyphens=False)
    return "\n".join(lines)


def figure_title(rows: pd.DataFrame, what: str) -> str:
    """A figure's title: what it shows, the model and the images; "" on a page without titles."""
    if not current().title:
        return ""
    last = rows.iloc[-1]
    title = f"{what}\n{escape_dollars(last['model'])} on {escape_dollars(last['dataset'])}"
    return fold(title, current().width, 7.5 if current().is_narrow else 11)


def suptitle(figure: Figure, rows: pd.DataFrame, what: str) -> None:
    """Write `figure_title` above all panels."""
    if title := figure_title(rows, what):
        figure.suptitle(title, x=0.01, ha="left")


def escape_dollars(text: str) -> str:
    """Escape dollar signs, so that matplotlib does not read a formula."""
    return text.replace("$", r"\$")


def footnote(figure: Figure, text: str) -> None:
    """Write small print below a figure."""
    font_size = current().small_font_size
    text = fold(text, current().width, font_size)
    figure.supxlabel(text, fontsize=font_size, color="#555555", x=0.99, ha="right")
