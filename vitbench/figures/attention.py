"""Figures of efficient attention: its cost over full attention's, and the number of tokens from which it is cheaper."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitbench.figures.drawing import COLOURS, MARKERS, figure_title, footnote, style
from vitbench.rows.experiment import Experiment

TITLES = {"attention": "one attention layer", "model": "the whole model, {depth} block{s}"}


def attention_name(config: dict[str, Any]) -> str:
    """A model's attention in a few words, from the `config` of its row."""
    if not config["methods"]:
        return "full attention"
    step = config["methods"][-1]
    settings = step["config"]
    if step["method"] == "linear_attention":
        return "linear"
    if step["method"] != "nystroem":
        return step["method"]
    count = "default" if settings["landmarks"] is None else settings["landmarks"]
    inverse_text = f"{settings['iterations']} iterations" if settings["iterations"] else "exact"
    return f"Nystroem, m = {count}, {inverse_text}" + (
        ", class token averaged" if settings["class_token"] == "averaged" else ""
    )


def rows_by_variant(rows: pd.DataFrame, metric: str, part: str) -> dict[str, pd.DataFrame]:
    """Attention variant -> its rows of a metric and a part, sorted by tokens; columns `tokens` and `variant` are added."""
    rows = rows[(rows["status"] == "ok") & (rows["metric"] == metric)]
    is_part = rows["context"].map(lambda context: context["part"] == part)
    rows = rows[is_part.astype(bool)]
    rows = rows.assign(
        tokens=rows["context"].map(lambda context: context["tokens"]), variant=rows["config"].map(attention_name)
    )
    return {name: variant_rows.sort_values("tokens") for name, variant_rows in rows.groupby("variant", sort=False)}


def break_even_tokens(tokens: np.ndarray, ratios: np.ndarray) -> float:
    """The number of tokens above which a variant's cost ratio to full attention stays below 1.

    Between measured sizes, the logarithm of the ratio is interpolated linearly in the logarithm of the tokens. The result is
    the smallest measured size if all ratios are below 1, and infinity if the last is not.
    """
    above = np.flatnonzero(np.asarray(ratios) >= 1)
    if not len(above):
        return float(tokens[0])
    last = above[-1]
    if last == len(tokens) - 1:
        return float("inf")
    (x0, x1), (y0, y1) = np.log(tokens[last : last + 2]), np.log(ratios[last : last + 2])
    return float(np.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))


def break_even_by_variant(rows: pd.DataFrame, part: str) -> dict[str, tuple[float, float]]:
    """Attention variant -> the `break_even_tokens` of its multiply-accumulates, and of its median latency."""
    macs, times = rows_by_variant(rows, "macs", part), rows_by_variant(rows, "latency_ratio", part)
    full = macs["full attention"].set_index("tokens")["value"]
    return {
        name: (
            break_even_tokens(
                macs_rows["tokens"].to_numpy(), (macs_rows["value"] / macs_rows["tokens"].map(full)).to_numpy()
            ),
            break_even_tokens(times[name]["tokens"].to_numpy(), times[name]["value"].to_numpy()),
        )
        for name, macs_rows in macs.items()
        if name != "full attention"
    }


def against_tokens(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Latency and multiply-accumulates over full attention's against the number of tokens; the points where latency crosses 1."""
    with style():
        figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
        for axes, (part, title) in zip(panels, TITLES.items(), strict=True):
            _panel(axes, rows, part)
            depth = int(rows["context"].iloc[-1]["depth"])
            axes.set_title(title.format(depth=depth, s="" if depth == 1 else "s"))
        panels[0].set_ylabel("over full attention's")
        panels[0].legend(fontsize=8, loc="lower left")
        last = rows.iloc[-1]
        figure.suptitle(
            f"{last['model']}'s shape, batch {last['batch']}, {last['threads']} threads, eager", fontsize=10
        )
        footnote(
            figure,
            "solid: median time, with 95 % intervals; dotted: multiply-accumulates; rings: where the time falls below full attention's",
        )
    return figure, rows


def _panel(axes: Axes, rows: pd.DataFrame, part: str) -> None:
    macs, times, break_evens = (
        rows_by_variant(rows, "macs", part),
        rows_by_variant(rows, "latency_ratio", part),
        break_even_by_variant(rows, part),
    )
    full = macs["full attention"].set_index("tokens")["value"]
    axes.axhline(1, color="black", lw=1)
    for index, name in enumerate(break_evens, 1):
        variant_rows = times[name]
        line_style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)]}
        error_bars = [variant_rows["value"] - variant_rows["low"], variant_rows["high"] - variant_rows["value"]]
        axes.errorbar(
            variant_rows["tokens"],
            variant_rows["value"],
            yerr=error_bars,
            capsize=2,
            ms=4,
            marker=MARKERS[index],
            label=name,
            **line_style,
        )
        axes.plot(macs[name]["tokens"], macs[name]["value"] / macs[name]["tokens"].map(full), ls=":", **line_style)
        if np.isfinite(break_evens[name][1]) and break_evens[name][1] > variant_rows["tokens"].iloc[0]:
            axes.plot(break_evens[name][1], 1, marker="o", ms=11, mfc="none", **line_style)
    ticks = list(full.index)
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(
        [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    )
    axes.yaxis.set_major_formatter("{x:g}")


def speed_for_accuracy(
    rows: pd.DataFrame, names: dict[str, dict[int, str]], what: str, batches: tuple[int, ...] = (1, 8)
) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against the time over the baseline's, a panel a batch size; `names`: family -> r -> the model's label."""
    experiment, figure_rows = Experiment.of(rows), []
    with style():
        figure, panels = plt.subplots(1, len(batches), figsize=(5 * len(batches), 4), sharey=True, squeeze=False)
        for axes, batch in zip(panels[0], batches, strict=True):
            for index, (family, labels) in enumerate(names.items(), 1):
                top1 = [experiment.require(label, "top1") for label in labels.values()]
                times = [experiment.require(label, "latency_ratio", batch) for label in labels.values()]
                x, y = [row["value"] for row in times], [100 * row["value"] for row in top1]
                spread: dict[str, Any] = {
                    "xerr": _error_bars(times),
                    "yerr": 100 * _error_bars(top1),
                    "capsize": 2,
                    "elinewidth": 0.7,
                }
                colour = COLOURS[2 * index - 1]
                axes.errorbar(x, y, **spread, color=colour, marker=MARKERS[index], label=family)
                text_position: dict[str, Any] = (
                    {"xytext": (-6, 5), "ha": "right"} if index == 1 else {"xytext": (6, -13)}
                )
                for r, *point in zip(labels, x, y, strict=True):
                    if r or index == 1:  # r = 0 is the same model in every family
                        axes.annotate(
                            f"r = {r}", point, textcoords="offset points", fontsize=8, color=colour, **text_position
                        )
                figure_rows += top1 + times
            axes.axvline(1, color="black", lw=0.8, ls=":")
            axes.set_xlabel(f"median time over the baseline's, batch {batch}")
        panels[0, 0].set_ylabel("top-1 (%)")
        panels[0, 0].set_title(figure_title(experiment.rows, what))
        panels[0, -1].legend(fontsize=8, loc="lower right")
        footnote(figure, "bars: 95 % intervals; left and up is better")
    return figure, pd.DataFrame(figure_rows).drop_duplicates("key")


def _error_bars(rows: list[pd.Series]) -> np.ndarray:
    """Lengths of the rows' intervals below and above the value, (2, rows)."""
    return np.array([[abs(row[end] - row["value"]) for row in rows] for end in ("low", "high")])
