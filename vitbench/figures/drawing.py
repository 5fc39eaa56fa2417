"""Figures from rows alone, in one style: legible in grey, safe for colour-blind readers, labelled in place."""

import contextlib
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

from vitbench.base.errors import InputError
from vitbench.base.files import figure_bytes, write_bytes, write_text
from vitbench.base.paths import writable_folder
from vitbench.rows.comparison_table import experiment_rows, find_row, in_backend, ratios, timed_labels

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ("#000000", "#D55E00", "#56B4E9", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
STYLE = {
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
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
}
SMALL = 8  # points, of the names and numbers of which there are many
PREDICTED = ("weights x bits", "MACs")
RING = {"ls": "", "marker": "o", "ms": 8, "color": "black", "mfc": "white"}
MEDIAN = {"ls": "", "marker": "o", "ms": 4.5, "color": COLOURS[3], "zorder": 4}
INTERVAL = {"lw": 5, "color": COLOURS[3], "alpha": 0.45, "solid_capstyle": "butt", "zorder": 3}
P90 = {"ls": "", "marker": "|", "ms": 7, "color": "#555555"}
P99 = {"ls": "", "marker": "d", "ms": 3.5, "color": "#777777"}
_own: dict[str, Any] = {}  # what `restyled` has set


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The project's look, for the figures here and for a notebook's own; a matplotlibrc has no part in it."""
    with mpl.rc_context():
        mpl.rcdefaults()  # text.usetex, for example, would need LaTeX
        mpl.rcParams.update(STYLE | _own)
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # a notebook's backend may have set it inside; taking it back would hide later figures


@contextlib.contextmanager
def restyled(file: str | Path) -> Iterator[None]:
    """Draw with a matplotlib style file, which goes before the project's look where it sets something; "" is none.

    Raises:
        InputError: no such file, or one that matplotlib does not understand.
    """
    global _own
    before = _own
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(f"no style file {str(path)!r}; give a file of lines such as `font.size: 12`")
        try:
            _own = dict(mpl.rc_params_from_file(path, fail_on_error=True, use_default_template=False))
        except (KeyError, ValueError, OSError) as error:
            raise InputError(
                f"{str(path)!r} is no matplotlib style file ({' '.join(str(error).split())[:200]})"
            ) from None
    try:
        yield
    finally:
        _own = before


def look(method: str, among: Sequence[str]) -> dict[str, str]:
    """The colour and marker of a method, by its place among those shown."""
    place = list(among).index(method)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def save_figure(
    figure: Figure,
    folder: str | Path,
    name: str,
    rows: pd.DataFrame | None = None,
    kinds: Sequence[str] = ("png", "svg"),
) -> None:
    """Write `name`.png and `name`.svg, and with `rows` a `name`.csv of the rows that the figure shows, with their keys."""
    folder = writable_folder(folder, "figures folder")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same rows give the same file
    with style():
        for kind in kinds:
            write_bytes(folder / f"{name}.{kind}", figure_bytes(figure, kind, metadata=undated.get(kind)))
            figure.set_layout_engine("none")  # it is laid out, for the other kinds and the notebook too
    if rows is not None:
        about = ["key", "model", "dataset", "method", "config", "metric", "batch"]
        columns = [*about, "value", "low", "high", "unit", "source", "commit"]
        write_text(folder / f"{name}.csv", rows[columns].to_csv(index=False))


def latencies(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """How long a call takes: median, p90 and p99, a line for each method, the fastest first, one panel a batch size.

    Where methods were timed in turn with the baseline, a call's time is given in medians of the baseline's calls of the
    same process, so that a method's median is its ratio to the baseline, drawn with its 95 % interval; a baseline alone
    is given in ms.
    """
    rows = experiment_rows(rows)
    rows = rows[in_backend(rows) & rows["samples"].notna()]
    paired = rows[rows["metric"] == "latency_ratio"]
    in_turn = len(paired) > 0
    shown = rows[rows["metric"].isin(["latency_p50", "latency_ratio"])]
    shown = shown[shown["label"].isin(paired["label"]) | (not in_turn)]
    if not len(shown):
        raise InputError("no call was timed among these rows; measure the latency first")
    calls = {int(batch): _calls(own, in_turn) for batch, own in shown.groupby("batch")}
    names = dict.fromkeys(name for own in calls.values() for name in own)
    names = sorted(names, key=lambda name: [np.median(own.get(name, np.inf)) for own in calls.values()])
    with style():
        figure, panels, places = _method_lines(names, len(calls))
        for axes, (batch, own) in zip(panels, calls.items(), strict=True):
            for name, times in own.items():
                _draw_times(axes, places[name], times, find_row(shown, name, "latency_ratio", batch))
            # one slow call must not press all the others together
            slow, slowest = (max(np.percentile(times, p) for times in own.values()) for p in (90, 99))
            axes.set_xlim(0, 1.05 * min(slowest, 2 * slow))
            unit = "time of a call / baseline's median" if in_turn else "time of a call (ms)"
            axes.set_xlabel(f"{unit}, batch {batch}")
            if in_turn:
                axes.axvline(1, color="black", lw=0.8, zorder=1)
            _key(
                axes,
                {"median": MEDIAN} | ({"its 95 % interval": INTERVAL} if in_turn else {}) | {"p90": P90, "p99": P99},
            )
        figure.suptitle(heading(rows, "how long a call takes"), x=0.01, ha="left")
        numbers = "the median and its 95 % interval" if in_turn else "the median"
        note(figure, f"numbers: {numbers}; the slowest calls may lie outside")
    return figure, shown


def _calls(shown: pd.DataFrame, in_turn: bool) -> dict[str, np.ndarray]:
    """Each method's calls; in turn, in units of the baseline's median, with the baseline's own calls first."""
    own = {row.label: np.array(row.samples) for row in shown[shown["metric"] == "latency_p50"].itertuples()}
    if not in_turn:
        return own
    base = {row.label: np.array(row.samples) for row in shown[shown["metric"] == "latency_ratio"].itertuples()}
    calls = {"baseline": np.concatenate([times / np.median(times) for times in base.values()])}
    return calls | {label: own[label] / np.median(base[label]) for label in base}


def _draw_times(axes: Axes, place: float, times: np.ndarray, ratio: pd.Series | None) -> None:
    """One method's line; the baseline has no ratio and so no interval."""
    median, p90, p99 = np.percentile(times, (50, 90, 99))
    median = median if ratio is None else ratio["value"]
    axes.plot([median, p99], [place, place], color="#999999", lw=1)
    axes.plot(p90, place, **P90)
    axes.plot(p99, place, **P99)
    text = f"{median:.2f}"
    if ratio is not None:
        axes.plot([ratio["low"], ratio["high"]], [place, place], **INTERVAL)
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    axes.plot(median, place, **MEDIAN | ({} if ratio is not None else {"color": "black"}))
    _beside(axes, place, text)


def predicted_beside_measured(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What bits and MACs promise beside what disk and clock say, as ratios to the baseline.

    A line for each compressed method, the smallest file first; its size in one panel, its time in the other.
    """
    rows = experiment_rows(rows)
    names = [method for method in timed_labels(rows) if method != "baseline"]
    promises = {name: _promises(rows, name) for name in names}
    names.sort(key=lambda name: promises[name][0].get("on disk", (np.inf,)))
    with style():
        figure, panels, places = _method_lines(names, 2)
        for side, (axes, what) in enumerate(zip(panels, ("size", "work or time"), strict=True)):
            kinds = _kinds(label for name in names for label in promises[name][side])
            for name in names:
                _draw_marks(axes, places[name], promises[name][side], kinds)
            axes.axvline(1, color="black", lw=0.8, zorder=1)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{what} / baseline's (1 = no gain)")
            _key(axes, kinds)
        if not names:
            panels[0].text(0, 0.2, "no compressed method has been measured yet")
        figure.suptitle(heading(rows, "predicted beside measured"), x=0.01, ha="left")
        note(
            figure,
            "hollow: predicted; filled: measured; bars: 95 % intervals; numbers: predicted \N{RIGHTWARDS ARROW} measured",
        )
    used = [row for name in names for row in promises[name][2]]
    return figure, pd.DataFrame(used, columns=rows.columns).drop_duplicates("key")


Marks = dict[str, tuple[float, float, float]]  # what it tells -> ratio to the baseline, and the ends of its interval


def _promises(rows: pd.DataFrame, method: str) -> tuple[Marks, Marks, list[pd.Series]]:
    """The marks of one method for size and for time, and the rows behind them."""
    size, time, used = {}, {}, []
    for marks, label, metric in (
        (size, "weights x bits", "bytes_predicted"),
        (size, "on disk", "bytes"),
        (time, "MACs", "macs"),
    ):
        base, own = find_row(rows, "baseline", metric), find_row(rows, method, metric)
        if base is not None and own is not None:
            marks[label] = (own["value"] / base["value"],) * 3
            used += [base, own]
    for row in ratios(rows, method):
        time[f"time, batch {int(row['batch'])}"] = (row["value"], row["low"], row["high"])
        used.append(row)
    return size, time, used


def _kinds(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each label's marks look: predicted ones are rings, into which a measured one of the same value fits."""
    labels = list(dict.fromkeys(labels))
    kinds: dict[str, dict[str, Any]] = {label: RING for label in labels if label in PREDICTED}
    for place, label in enumerate(label for label in labels if label not in PREDICTED):
        colour, marker = COLOURS[(3, 1, 5, 4)[place % 4]], MARKERS[place % len(MARKERS)]
        kinds[label] = {"ls": "", "ms": 5, "marker": marker, "color": colour}
    return kinds


def _draw_marks(axes: Axes, place: float, marks: Marks, kinds: dict[str, dict[str, Any]]) -> None:
    """One method's line in one panel; what was measured at several batch sizes stands a little apart, in inches."""
    predicted, measured = ([label for label in kinds if (label in PREDICTED) == side] for side in (True, False))
    found = [ratio for ratio, *_ in marks.values()]
    axes.plot(found, [place] * len(found), color="#BBBBBB", lw=1)
    for label, (ratio, low, high) in marks.items():
        at = place + (0.08 * (measured.index(label) - (len(measured) - 1) / 2) if label in measured else 0)
        axes.plot([low, high], [at, at], **INTERVAL | {"color": kinds[label]["color"], "lw": 3})
        axes.plot(ratio, at, **kinds[label])
    sides = [", ".join(f"{marks[label][0]:.2f}" for label in side if label in marks) for side in (predicted, measured)]
    _beside(axes, place, " \N{RIGHTWARDS ARROW} ".join(side or "-" for side in sides))


def _method_lines(names: Sequence[str], panels: int) -> tuple[Figure, list[Axes], dict[str, float]]:
    """An empty figure with a line for each name, and panels side by side; with it, the place of each name's line."""
    texts = [wrapped(name, 44) for name in names]
    heights = np.array([0.085 + 0.135 * (1 + text.count("\n")) for text in texts])  # inches
    total, places = max(0.5, heights.sum()), np.cumsum(heights) - heights / 2
    figure, drawn = plt.subplots(1, panels, figsize=(3 + 3.8 * panels, 1.7 + total), sharey=True, squeeze=False)
    drawn[0, 0].set_yticks(places, texts, fontsize=SMALL)
    drawn[0, 0].set_ylim(total, 0)
    for axes in drawn[0]:
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure, list(drawn[0]), dict(zip(names, places, strict=True))


def _beside(axes: Axes, place: float, text: str) -> None:
    """Write to the right of a panel, on a method's line."""
    axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), fontsize=SMALL, va="center")


def _key(axes: Axes, kinds: dict[str, dict[str, Any]]) -> None:
    """What the marks mean, above the panel: the reading of a long list starts there."""
    marks = [Line2D([], [], label=label, **kind) for label, kind in kinds.items()]
    close = {"borderpad": 0, "columnspacing": 1.2, "handlelength": 1.4, "handletextpad": 0.5}
    axes.legend(handles=marks, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=SMALL, **close)


def wrapped(name: str, width: int) -> str:
    """A name on as many lines as it needs; nothing is left out, since two settings may differ in the last of them only."""
    return textwrap.fill(name, width, break_on_hyphens=False)


def heading(rows: pd.DataFrame, what: str) -> str:
    """A figure's title: what it shows, and of which model on which images."""
    last = rows.iloc[-1]
    return f"{what}\n{plain(last['model'])} on {plain(last['dataset'])}"


def plain(text: str) -> str:
    """Text from outside, in which a dollar is a dollar and begins no formula."""
    return text.replace("$", r"\$")


def note(figure: Figure, text: str) -> None:
    """A line of small print below a figure."""
    figure.supxlabel(text, fontsize=8, color="#555555", x=0.99, ha="right")
