"""Figures of other devices: what fits where, of what an answer's time and energy consist, where memory ends, what links decide."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from vitbench.base.errors import InputError
from vitbench.edge.model import PARTS, Device, Link, Profiles, transfer_energy
from vitbench.edge.rows import place
from vitbench.figures.drawing import COLOURS, figure_title, footnote, style, wrap_label
from vitbench.rows.comparison_table import MEGA, experiment_rows, find_row

# where the weights come from, darker is dearer
PLACES = {"memory": "#FFFFFF", "storage": "#BFD7EA", "server": "#E8A27C"}
PART_LOOKS = {"transfer": (COLOURS[1], ""), "load": (COLOURS[2], "//"), "infer": (COLOURS[3], "")}
UNITS = {"edge_time": "time of an answer (s)", "edge_energy": "energy of an answer (J)"}
CLAIMS = {"edge_time": 68, "edge_energy": 1470}  # ratios in DeepCompress-ViT's abstract (CVPR 2025)


def chosen(rows: pd.DataFrame, metric: str, **context: Any) -> pd.DataFrame:
    """The modelled rows of a metric whose context is like this, the last of each model, device and link; column `label`.

    Raises:
        InputError: there is none.
    """
    rows = experiment_rows(rows)
    rows = rows[rows["metric"] == metric]
    for key, wanted in context.items():
        rows = rows[[found.get(key) == wanted for found in rows["context"]]]
    if not len(rows):
        said = ", ".join(f"{key} = {wanted}" for key, wanted in context.items())
        raise InputError(f"the rows hold no {metric} with {said}; model it first (`vitbench edge`)")
    rows = rows.assign(**{key: [found[key] for found in rows["context"]] for key in ("profile", "link")})
    return rows.drop_duplicates(["label", "profile", "link"], keep="last")


def fits(rows: pd.DataFrame, profiles: Profiles, link: str) -> tuple[Figure, pd.DataFrame]:
    """Where the weights come from on each device: its memory, its storage, or a server; with the seconds of an answer."""
    shown = chosen(rows, "edge_time", link=link, first=False, memory=None, storage=None, energy="board")
    order = list(dict.fromkeys(shown["label"]))
    names = list(PLACES)
    codes = shown.assign(code=[names.index(place(source)) for source in shown["source"]])
    codes = codes.pivot(index="label", columns="profile", values="code").loc[order]
    seconds = shown.pivot(index="label", columns="profile", values="value").loc[order, codes.columns]
    titles = [
        wrap_label(profiles.devices[name].title, 16) if name in profiles.devices else name for name in codes.columns
    ]
    with style():
        figure, axes = plt.subplots(figsize=(2.4 + 1.35 * len(codes.columns), 1.6 + 0.36 * len(order)))
        colours = ListedColormap(list(PLACES.values()))
        text = seconds.map(_seconds)
        sns.heatmap(codes, annot=text, fmt="", cmap=colours, vmin=0, vmax=2, cbar=False, linewidths=1, ax=axes)
        for cell in axes.texts:
            cell.set_color("black")
        axes.set_yticklabels([_with_size(rows, label) for label in order], rotation=0)
        axes.set_xticklabels(titles, rotation=0, fontsize=8)
        axes.set(xlabel="device", ylabel="model, and what it takes in memory while it answers")
        handles = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec="#888888") for colour in PLACES.values()]
        axes.legend(
            handles, [f"weights from {name}" for name in PLACES], ncols=3, loc="lower left", bbox_to_anchor=(0, 1)
        )
        figure.suptitle(
            figure_title(experiment_rows(rows), f"what fits where, and the time of an answer (link: {link})"),
            x=0.01,
            ha="left",
        )
        footnote(
            figure, "modelled from measured bytes, memory and multiply-accumulates, and from the profiles' constants"
        )
    return figure, shown


def _with_size(rows: pd.DataFrame, label: str) -> str:
    held = find_row(experiment_rows(rows), label, "peak_tensors")
    return f"{wrap_label(label, 34)} ({held['value'] / MEGA:.3g} MB)"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def stacks(rows: pd.DataFrame, device: str, link: str, **setting: Any) -> tuple[Figure, pd.DataFrame]:
    """Time and energy of an answer by part, with the transfer (left) and without it (right)."""
    used = []
    with style():
        panels = None
        for line, metric in enumerate(UNITS):
            shown = chosen(rows, metric, profile=device, link=link, **setting)
            used.append(shown)
            if panels is None:
                size = (10, 1.8 + 0.5 * len(shown))
                figure, panels = plt.subplots(2, 2, figsize=size, sharey="row", squeeze=False)
            for axes, parts in zip(panels[line], (PARTS, PARTS[1:]), strict=True):
                _stack(axes, shown, parts)
                axes.set_xlabel(UNITS[metric] + ("" if parts == PARTS else ", without the transfer"))
        panels[0][0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        figure.suptitle(figure_title(used[0], f"of what an answer consists on {device} over {link}"), x=0.01, ha="left")
        footnote(figure, "modelled; energy on a board is measured power times modelled time, and the radio's")
    return figure, pd.concat(used)


def _stack(axes: Axes, shown: pd.DataFrame, parts: Sequence[str]) -> None:
    """A bar a model, of the parts one after another, with its length as a number."""
    values = {part: [row[PARTS.index(part)] for row in shown["samples"]] for part in parts}
    ends = np.zeros(len(shown))
    for part in parts:
        colour, hatch = PART_LOOKS[part]
        axes.barh(range(len(shown)), values[part], left=ends, color=colour, hatch=hatch, edgecolor="white", label=part)
        ends = ends + np.array(values[part])
    for position, end in enumerate(ends):
        axes.annotate(f"{end:.3g}", (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [wrap_label(label, 30) for label in shown["label"]], fontsize=8)
    axes.set_xlim(0, 1.18 * max(ends.max(), 1e-12))
    axes.set_ylim(len(shown) - 0.4, -0.6)


def cliff(rows: pd.DataFrame, profiles: Profiles, device: str, link: str) -> tuple[Figure, pd.DataFrame]:
    """Time of an answer against the memory that a model may take, on a device that keeps nothing: a step where it fits."""
    held = chosen(rows, "edge_time", profile=device, link=link, first=False, memory=None, storage=None, energy="board")
    fetched = chosen(rows, "edge_time", profile=device, link=link, first=False, memory=0.0, storage=0.0, energy="board")
    lines = {
        row["label"]: (
            row["samples"][PARTS.index("infer")],
            sum(fetched[fetched["label"] == row["label"]]["samples"].iloc[0]),
        )
        for _, row in held.iterrows()
    }
    sizes = {label: find_row(experiment_rows(rows), label, "peak_tensors")["value"] for label in lines}
    span = min(sizes.values()) / 2, max(sizes.values()) * 2
    with style():
        figure, axes = plt.subplots(figsize=(9, 4.6))
        for number, (label, (resident, away)) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(
                [span[0], sizes[label], sizes[label], span[1]],
                [away, away, resident, resident],
                color=colour,
                lw=1.6,
                ls=("-", "--", ":")[number // len(COLOURS) % 3],
                label=label,
            )
        for name, profile in profiles.devices.items():
            if span[0] < profile.memory.value < span[1]:
                axes.axvline(profile.memory.value, color="#AAAAAA", lw=1)
                axes.annotate(
                    name,
                    (profile.memory.value, 0.02),
                    xycoords=("data", "axes fraction"),
                    rotation=90,
                    fontsize=8,
                    ha="right",
                    va="bottom",
                )
        axes.set(
            xscale="log",
            yscale="log",
            xlim=span,
            xlabel="memory that the model may take (bytes)",
            ylabel="time of an answer (s)",
        )
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.suptitle(
            figure_title(held, f"the memory cliff: {device}, weights fetched over {link} where they do not fit"),
            x=0.01,
            ha="left",
        )
        footnote(figure, "modelled; in the paper's setting nothing is stored on the device")
    return figure, pd.concat([held, fetched])


def claims(rows: pd.DataFrame, profiles: Profiles, dense: str, small: str, link: str) -> tuple[Figure, pd.DataFrame]:
    """How many times the small model's answer is cheaper, if only the dense one has to be fetched, against the link's bandwidth.

    A line for each device into whose memory the small model fits, for both metrics and both ways to count energy. What a
    link decides is the time of the transfer; energy a byte is that of `link`. The abstract's ratios are drawn across.

    Raises:
        InputError: the small model fits nowhere.
    """
    size, bandwidth, used = find_row(experiment_rows(rows), dense, "bytes")["value"], np.logspace(4.5, 9, 200), []
    with style():
        figure, panels = plt.subplots(1, 3, figsize=(13, 4.2))
        kinds = (("edge_time", "board"), ("edge_energy", "board"), ("edge_energy", "operations"))
        for axes, (metric, energy) in zip(panels, kinds, strict=True):
            shown = chosen(rows, metric, link=link, first=False, memory=None, storage=None, energy=energy)
            held = shown[(shown["label"] == small) & (shown["source"].map(place) == "memory")]["profile"]
            if not len(held):
                raise InputError(f"{small} fits into no device's memory, so that no answer of it is held")
            used.append(shown[shown["profile"].isin(held) & shown["label"].isin((dense, small))])
            for number, name in enumerate(held):
                infer = used[-1][used[-1]["profile"] == name].set_index("label")["samples"].str[PARTS.index("infer")]
                moved = _moved(profiles.device(name), profiles.link(link), metric, energy, size, bandwidth)
                line = {"color": COLOURS[number % len(COLOURS)], "ls": ("-", "--")[number % 2], "label": name}
                axes.plot(bandwidth, (moved + infer[dense]) / infer[small], **line)
            _claim(axes, metric, bandwidth[-1], profiles)
            what = "latency" if metric == "edge_time" else f"energy ({energy})"
            axes.set(
                xscale="log", yscale="log", xlabel="bandwidth of the link (bytes/s)", ylabel=f"{what}: times cheaper"
            )
        panels[2].legend(fontsize=7)
        title = f"{dense} fetched for every answer, {small} held in memory"
        figure.suptitle(figure_title(used[0], title), x=0.01, ha="left")
        footnote(figure, f"modelled; energy of a byte over {link}; names below: bandwidths of the links")
    return figure, pd.concat(used)


def _moved(device: Device, link: Link, metric: str, energy: str, size: float, bandwidth: np.ndarray) -> np.ndarray:
    """Seconds or joules to fetch `size` bytes at each bandwidth; a board also draws its idle power meanwhile."""
    if metric == "edge_time":
        return size / bandwidth
    waiting = device.idle_power.value if energy == "board" else 0.0
    return transfer_energy(size, link) + waiting * size / bandwidth


def _claim(axes: Axes, metric: str, right: float, profiles: Profiles) -> None:
    """The abstract's ratio across a panel, and the links' names at their bandwidths."""
    axes.axhline(CLAIMS[metric], color="black", lw=1, ls=":")
    axes.annotate(f"abstract: > {CLAIMS[metric]}", (right, CLAIMS[metric]), ha="right", va="bottom", fontsize=8)
    small = {"rotation": 90, "fontsize": 7, "color": "#555555", "va": "bottom", "ha": "center"}
    for turn, (name, profile) in enumerate(profiles.links.items()):
        at = (profile.bandwidth.value, 0.01 + 0.14 * (turn % 2))
        axes.annotate(name, at, xycoords=("data", "axes fraction"), **small)


def streams(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Measured over modelled time of bytes streamed through a limiter, against their number."""
    rows = rows[(rows["status"] == "ok") & rows["metric"].isin(["transfer_time", "transfer_time_modelled"])]
    if not len(rows):
        raise InputError("the rows hold no transfer_time; stream something first (edge.rows.streamed)")
    about = rows.assign(**{key: [found[key] for found in rows["context"]] for key in ("link", "count")})
    wide = about.pivot_table(index=["link", "count"], columns="metric", values="value", aggfunc="last").reset_index()
    with style():
        figure, axes = plt.subplots(figsize=(7, 3.6))
        sns.lineplot(
            x=wide["count"],
            y=wide["transfer_time"] / wide["transfer_time_modelled"],
            hue=wide["link"],
            style=wide["link"],
            markers=True,
            palette=list(COLOURS[1 : 1 + wide["link"].nunique()]),
            ax=axes,
        )
        for edge in (0.9, 1.0, 1.1):
            axes.axhline(edge, color="black", lw=1, ls="-" if edge == 1 else ":")
        axes.set(
            xscale="log",
            xlabel="bytes streamed over loopback through a limiter",
            ylabel="measured / modelled time",
            ylim=(0.8, 1.2),
        )
        footnote(figure, "dotted: 10 % off")
    return figure, rows
