"""Figures of efficient attention: its cost over full attention's, and the number of tokens from which it is cheaper."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from vitbench.figures.drawing import COLOURS, MARKERS, footnote, style
from vitbench.rows.experiment import Experiment

WIDTH = 6.5  # inches


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
    """Milliseconds of one attention layer against the tokens, and the share of the products of tokens with tokens in a block.

    A block has 12 N d^2 + 2 N^2 d multiply-accumulates for N tokens of width d, of which 2 N^2 d are those products.
    """
    times, macs = rows_by_variant(rows, "latency_p50", "attention"), rows_by_variant(rows, "macs", "attention")
    full, tokens = times["full attention"], times["full attention"]["tokens"].to_numpy()
    width = _width(int(tokens[-1]), float(macs["full attention"]["value"].iloc[-1]))
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
        for index, (name, variant_rows) in enumerate(times.items()):
            median = variant_rows["value"].to_numpy()
            quartiles = np.array([np.percentile(samples, (25, 75)) for samples in variant_rows["samples"]]).T
            line: dict[str, Any] = {"color": COLOURS[(0, 1, 5, 2, 6)[index % 5]], "marker": MARKERS[index], "ms": 5}
            left.errorbar(
                variant_rows["tokens"], median, yerr=np.abs(quartiles - median), capsize=2, label=name, **line
            )
        growth = full["value"].iloc[-1] / full["value"].iloc[0]
        left.plot(
            tokens, full["value"].iloc[0] * tokens / tokens[0], color="#999999", ls=":", label="in proportion to tokens"
        )
        left.set(xlabel="tokens", ylabel="ms of one layer", xscale="log", yscale="log")
        left.set_title(
            f"{tokens[-1] / tokens[0]:.0f} times the tokens take full\nattention {growth:.0f} times as long",
            fontsize=10,
        )
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        left.legend(fontsize=8)
        curve = np.geomspace(tokens[0] / 2, 4 * tokens[-1], 100)
        right.plot(curve, 100 * curve / (6 * width + curve), color="black")
        for count in tokens:
            share = 100 * count / (6 * width + count)
            right.plot(count, share, "o", color="black")
            offset: dict[str, Any] = {"xytext": (-7, 3), "textcoords": "offset points", "fontsize": 8}
            right.annotate(f"{count} tokens: {share:.0f} %", (count, share), ha="right", **offset)
        right.set(
            xlabel="tokens", ylabel="% of a block's MACs", xscale="log", ylim=(0, 100), xlim=(tokens[0] / 20, None)
        )
        right.set_title(f"the share of tokens times tokens\nin a block of width {width}", fontsize=10)
        for axes in (left, right):
            axes.set_xticks(tokens, [str(count) for count in tokens])
            axes.minorticks_off()
        last = rows.iloc[-1]
        footnote(
            figure,
            f"left: {last['model']}'s shape, batch {last['batch']}, {last['threads']} threads, eager; median and quartiles",
        )
    return figure, pd.concat([*times.values(), *macs.values()])


def _width(tokens: int, macs: float) -> int:
    """The width d of an attention layer with 4 N d^2 + 2 N^2 d multiply-accumulates for N tokens."""
    return round((-tokens + np.sqrt(tokens**2 + 4 * macs / tokens)) / 4)


def accuracy_for_macs(rows: pd.DataFrame, names: dict[str, dict[str, str]], title: str) -> tuple[Figure, pd.DataFrame]:
    """Top-1 against multiply-accumulates over the baseline's; `names`: family -> short name of a model -> its label."""
    experiment = Experiment.of(rows)
    baseline_macs, baseline_top1 = (experiment.require("baseline", metric) for metric in ("macs", "top1"))
    figure_rows = [baseline_macs, baseline_top1]
    with style():
        figure, axes = plt.subplots(figsize=(WIDTH, 3.5))
        axes.axhline(100 * baseline_top1["value"], color="black", lw=1, ls=":")
        axes.plot(1, 100 * baseline_top1["value"], "*", color="black", ms=9, label="baseline")
        for index, (family, labels) in enumerate(names.items()):
            macs, top1 = (
                [experiment.require(label, metric) for label in labels.values()] for metric in ("macs", "top1")
            )
            x, y = [row["value"] / baseline_macs["value"] for row in macs], [100 * row["value"] for row in top1]
            line: dict[str, Any] = {
                "color": COLOURS[(3, 1, 5)[index % 3]],
                "marker": MARKERS[index],
                "ls": "",
                "capsize": 2,
            }
            axes.errorbar(x, y, yerr=100 * _error_bars(top1), label=family, **line)
            for text, share, value in zip(labels, x, y, strict=True):
                axes.annotate(
                    text, (share, value), (7, -11), textcoords="offset points", fontsize=8, color=line["color"]
                )
            figure_rows += [*macs, *top1]
        axes.set(xlabel="multiply-accumulates over the baseline's", ylabel="top-1 (%)")
        axes.margins(x=0.2)
        axes.set_title(textwrap.fill(title, 80), fontsize=10)
        axes.legend(fontsize=8)
        footnote(figure, "bars: 95 % intervals; left and up is better")
    return figure, pd.DataFrame(figure_rows)


def _error_bars(rows: list[pd.Series]) -> np.ndarray:
    """Lengths of the rows' intervals below and above the value, (2, rows)."""
    return np.array([[abs(row[end] - row["value"]) for row in rows] for end in ("low", "high")])
