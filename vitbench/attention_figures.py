"""What replaced attention costs against the number of tokens, and where it starts to pay; like all figures, from rows alone."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.figures import COLOURS, MARKERS, note, style

TITLES = {"attention": "one attention layer", "model": "the whole model, {depth} block{s}"}


def variant(config: dict[str, Any]) -> str:
    """A model's attention in a few words, from the `config` of its row."""
    if not config["methods"]:
        return "full attention"
    step = config["methods"][-1]
    own = step["config"]
    if step["method"] == "linear_attention":
        return "linear"
    if step["method"] != "nystroem":
        return step["method"]
    count = "default" if own["landmarks"] is None else own["landmarks"]
    how = f"{own['iterations']} iterations" if own["iterations"] else "exact"
    return f"Nystroem, m = {count}, {how}" + (", class token averaged" if own["class_token"] == "averaged" else "")


def curves(rows: pd.DataFrame, metric: str, part: str) -> dict[str, pd.DataFrame]:
    """Variant -> its rows of a metric and a part in the order of tokens; columns tokens, value, low, high."""
    rows = rows[(rows["status"] == "ok") & (rows["metric"] == metric)]
    about = rows["context"].map(lambda context: context["part"] == part)
    rows = rows[about.astype(bool)]
    rows = rows.assign(
        tokens=rows["context"].map(lambda context: context["tokens"]), variant=rows["config"].map(variant)
    )
    return {name: own.sort_values("tokens") for name, own in rows.groupby("variant", sort=False)}


def crossing(tokens: np.ndarray, ratios: np.ndarray) -> float:
    """From how many tokens on a variant's ratio to full attention stays below 1, between sizes in straight lines of logarithms.

    The smallest size measured where it is below from the start, infinity where it is not at the largest.
    """
    above = np.flatnonzero(np.asarray(ratios) >= 1)
    if not len(above):
        return float(tokens[0])
    last = above[-1]
    if last == len(tokens) - 1:
        return float("inf")
    (x0, x1), (y0, y1) = np.log(tokens[last : last + 2]), np.log(ratios[last : last + 2])
    return float(np.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))


def crossings(rows: pd.DataFrame, part: str) -> dict[str, tuple[float, float]]:
    """Variant -> the `crossing` of its multiply-accumulates and that of its median time."""
    macs, times = curves(rows, "macs", part), curves(rows, "latency_ratio", part)
    full = macs["full attention"].set_index("tokens")["value"]
    return {
        name: (
            crossing(own["tokens"].to_numpy(), (own["value"] / own["tokens"].map(full)).to_numpy()),
            crossing(times[name]["tokens"].to_numpy(), times[name]["value"].to_numpy()),
        )
        for name, own in macs.items()
        if name != "full attention"
    }


def against_tokens(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Time and multiply-accumulates over full attention's against the number of tokens, with the points where they cross 1."""
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
        note(
            figure,
            "solid: median time, with 95 % intervals; dotted: multiply-accumulates; rings: where the time falls below full attention's",
        )
    return figure, rows


def _panel(axes: plt.Axes, rows: pd.DataFrame, part: str) -> None:
    macs, times, found = curves(rows, "macs", part), curves(rows, "latency_ratio", part), crossings(rows, part)
    full = macs["full attention"].set_index("tokens")["value"]
    axes.axhline(1, color="black", lw=1)
    for place, name in enumerate(found, 1):
        own, kind = times[name], {"color": COLOURS[place % len(COLOURS)]}
        reach = [own["value"] - own["low"], own["high"] - own["value"]]
        axes.errorbar(
            own["tokens"], own["value"], yerr=reach, capsize=2, ms=4, marker=MARKERS[place], label=name, **kind
        )
        axes.plot(macs[name]["tokens"], macs[name]["value"] / macs[name]["tokens"].map(full), ls=":", **kind)
        if np.isfinite(found[name][1]) and found[name][1] > own["tokens"].iloc[0]:
            axes.plot(found[name][1], 1, marker="o", ms=11, mfc="none", **kind)
    ticks = list(full.index)
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(
        [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    )
    axes.yaxis.set_major_formatter("{x:g}")
