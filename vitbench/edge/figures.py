"""Figures of other devices: where models fit, the parts of time and energy, the memory cliff, and the effect of links."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from vitbench.base.errors import InputError
from vitbench.edge.model import PARTS, Device, Link, Profiles, transfer_energy
from vitbench.edge.rows import weights_location_of
from vitbench.figures.drawing import COLOURS, figure_title, footnote, style, wrap_label
from vitbench.figures.layout import current, figure_width
from vitbench.rows.experiment import MEGA, Experiment

# colours of where the weights come from; darker costs more
LOCATION_COLOURS = {"memory": "#FFFFFF", "storage": "#BFD7EA", "server": "#E8A27C"}
PART_STYLES = {"transfer": (COLOURS[1], ""), "load": (COLOURS[2], "//"), "infer": (COLOURS[3], "")}
WIDTH = 6.5  # inches, of a printed page
UNITS = {"edge_time": "latency of one inference (s)", "edge_energy": "energy of one inference (J)"}
PAPER_RATIOS = {"edge_time": 68, "edge_energy": 1470}  # ratios in DeepCompress-ViT's abstract (CVPR 2025)


def modelled_rows(rows: pd.DataFrame, metric: str, **context: Any) -> pd.DataFrame:
    """The modelled rows of a metric with this context, the last of each model, device and link, with a column `label`.

    Raises:
        InputError: no such row.
    """
    rows = Experiment.of(rows).of_metrics(metric)
    for key, expected in context.items():
        rows = rows.loc[[row_context.get(key) == expected for row_context in rows["context"]]]
    if not len(rows):
        selection_text = ", ".join(f"{key} = {expected}" for key, expected in context.items())
        raise InputError(f"the rows hold no {metric} with {selection_text}; model it first (`vitbench edge`)")
    rows = rows.assign(**{key: [row_context[key] for row_context in rows["context"]] for key in ("profile", "link")})
    return rows.drop_duplicates(["label", "profile", "link"], keep="last")


def _only(figure_rows: pd.DataFrame, names: Mapping[str, str] | None) -> tuple[pd.DataFrame, Mapping[str, str]]:
    """The rows of the models that `names` names, in that order, and label -> name; without `names` all, by their labels."""
    labels = list(dict.fromkeys(figure_rows["label"]))
    names = {label: label for label in labels} if names is None else names
    order = {label: position for position, label in enumerate(names)}
    figure_rows = figure_rows[figure_rows["label"].isin(list(names))]
    return figure_rows.sort_values("label", key=lambda column: column.map(order), kind="stable"), names


def fit_heatmap(
    rows: pd.DataFrame, profiles: Profiles, link: str, names: Mapping[str, str] | None = None
) -> tuple[Figure, pd.DataFrame]:
    """Where the weights come from on each device (memory, storage or server), and the time of one inference.

    Args:
        names: label -> what to call the model; other models are left out. By default all models, by their labels.
    """
    experiment = Experiment.of(rows)
    figure_rows = modelled_rows(rows, "edge_time", link=link, first=False, memory=None, storage=None, energy="board")
    figure_rows, names = _only(figure_rows, names)
    labels = list(dict.fromkeys(figure_rows["label"]))
    locations = list(LOCATION_COLOURS)
    codes = figure_rows.assign(code=[locations.index(weights_location_of(source)) for source in figure_rows["source"]])
    codes = codes.pivot(index="label", columns="profile", values="code").loc[labels]
    seconds = figure_rows.pivot(index="label", columns="profile", values="value").loc[labels, codes.columns]
    titles = [
        textwrap.fill(profiles.devices[name].title, 13, break_long_words=False) if name in profiles.devices else name
        for name in codes.columns
    ]
    with style():
        figure, axes = plt.subplots(figsize=(figure_width(WIDTH), 1.9 + 0.36 * len(labels)))
        colours = ListedColormap(list(LOCATION_COLOURS.values()))
        text = seconds.map(_seconds)
        sns.heatmap(codes, annot=text, fmt="", cmap=colours, vmin=0, vmax=2, cbar=False, linewidths=1, ax=axes)
        for cell in axes.texts:
            cell.set(color="black", fontsize=current().small_font_size)
        sizes = [experiment.require(label, "peak_tensors")["value"] / MEGA for label in labels]
        texts = [f"{wrap_label(names[label], 22)} ({size:.3g} MB)" for label, size in zip(labels, sizes, strict=True)]
        axes.set_yticklabels(texts, rotation=0)
        axes.set_xticklabels(titles, rotation=0)
        axes.tick_params(labelsize=current().small_font_size, length=0)
        axes.tick_params(axis="x", labelsize=6.5)
        axes.set(xlabel="", ylabel="")
        handles = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec="#888888") for colour in LOCATION_COLOURS.values()]
        axes.legend(
            handles,
            [f"weights from {name}" for name in LOCATION_COLOURS],
            ncols=3,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            fontsize=current().small_font_size,
        )
        figure.suptitle(
            figure_title(figure_rows, f"where each model fits, and the latency of one inference (link: {link})"),
            x=0.01,
            ha="left",
        )
        footnote(figure, "modelled; in parentheses: peak memory of one inference, measured")
    return figure, figure_rows


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def cost_breakdown(
    rows: pd.DataFrame, device: str, link: str, names: Mapping[str, str] | None = None, **deployment: Any
) -> tuple[Figure, pd.DataFrame]:
    """Time and energy of one inference by part, with the transfer (left) and without it (right).

    Args:
        names: as in `fit_heatmap`.
        deployment: fields of `Deployment`, of the rows to draw.
    """
    found = [_only(modelled_rows(rows, metric, profile=device, link=link, **deployment), names) for metric in UNITS]
    figure_rows = [metric_rows for metric_rows, _ in found]
    with style():
        size = (figure_width(WIDTH), 1.8 + 0.5 * len(figure_rows[0]))
        figure, panels = plt.subplots(2, 2, figsize=size, sharey="row", squeeze=False)
        for panel_row, (metric, metric_rows) in enumerate(zip(UNITS, figure_rows, strict=True)):
            for axes, parts in zip(panels[panel_row], (PARTS, PARTS[1:]), strict=True):
                _draw_parts(axes, metric_rows, parts, found[0][1])
                axes.set_xlabel(UNITS[metric] + ("" if parts == PARTS else ",\nwithout the transfer"))
        panels[0][0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=current().small_font_size)
        title = f"the parts of one inference on {device} over {link}"
        figure.suptitle(figure_title(figure_rows[0], title), x=0.01, ha="left")
        footnote(figure, "modelled; energy on a board is measured power times modelled time, and the radio's")
    return figure, pd.concat(figure_rows)


def _draw_parts(axes: Axes, figure_rows: pd.DataFrame, parts: Sequence[str], names: Mapping[str, str]) -> None:
    """One bar for each model, stacked from the parts, with the total as text."""
    values = {part: [row[PARTS.index(part)] for row in figure_rows["samples"]] for part in parts}
    ends = np.zeros(len(figure_rows))
    for part in parts:
        colour, hatch = PART_STYLES[part]
        axes.barh(
            range(len(figure_rows)), values[part], left=ends, color=colour, hatch=hatch, edgecolor="white", label=part
        )
        ends = ends + np.array(values[part])
    for position, end in enumerate(ends):
        axes.annotate(f"{end:.3g}", (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    labels = [wrap_label(names[label], 22) for label in figure_rows["label"]]
    axes.set_yticks(range(len(figure_rows)), labels, fontsize=current().small_font_size)
    axes.set_xlim(0, 1.25 * max(ends.max(), 1e-12))
    axes.set_ylim(len(figure_rows) - 0.4, -0.6)


def memory_cliff(
    rows: pd.DataFrame, profiles: Profiles, device: str, link: str, names: Mapping[str, str] | None = None
) -> tuple[Figure, pd.DataFrame]:
    """Time of one inference against the memory that a model may take, on a device without storage: a step where it fits.

    Args:
        names: as in `fit_heatmap`.
    """
    common = {"profile": device, "link": link, "first": False, "energy": "board"}
    experiment = Experiment.of(rows)
    resident_rows, names = _only(modelled_rows(rows, "edge_time", **common, memory=None, storage=None), names)
    fetched_rows = modelled_rows(rows, "edge_time", **common, memory=0.0, storage=0.0)
    lines = {
        row["label"]: (
            row["samples"][PARTS.index("infer")],
            sum(fetched_rows[fetched_rows["label"] == row["label"]]["samples"].iloc[0]),
        )
        for _, row in resident_rows.iterrows()
    }
    sizes = {label: experiment.require(label, "peak_tensors")["value"] for label in lines}
    span = min(sizes.values()) / 2, max(sizes.values()) * 2
    with style():
        figure, axes = plt.subplots(figsize=(figure_width(WIDTH), 3.8))
        for number, (label, (resident_seconds, fetched_seconds)) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(
                [span[0], sizes[label], sizes[label], span[1]],
                [fetched_seconds, fetched_seconds, resident_seconds, resident_seconds],
                color=colour,
                lw=1.6,
                ls=("-", "--", ":")[number // len(COLOURS) % 3],
                label=names[label],
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
            ylabel="latency of one inference (s)",
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=current().small_font_size, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        figure.suptitle(
            figure_title(
                resident_rows, f"the memory cliff: {device}, weights fetched over {link} where they do not fit"
            ),
            x=0.01,
            ha="left",
        )
        footnote(figure, "modelled; in the paper's setting nothing is stored on the device")
    return figure, pd.concat([resident_rows, fetched_rows])


def paper_ratios(
    rows: pd.DataFrame, profiles: Profiles, dense: str, small: str, link: str, names: tuple[str, str] | None = None
) -> tuple[Figure, pd.DataFrame]:
    """How many times cheaper the small model is, if only the dense one has to be fetched, against the link's bandwidth.

    There is a line for each device whose memory holds the small model, for time and for both ways to count energy. The
    bandwidth changes the time of the transfer; the energy of a byte is that of `link`. The ratios in the abstract of
    DeepCompress-ViT (CVPR 2025) are drawn as horizontal lines.

    Args:
        names: what to call the dense and the small model; by default their labels.

    Raises:
        InputError: the small model fits into no device's memory.
    """
    size, bandwidth = Experiment.of(rows).require(dense, "bytes")["value"], np.logspace(4.5, 9, 200)
    figure_rows = []
    with style():
        figure, grid = plt.subplots(2, 2, figsize=(figure_width(WIDTH), 6.2))
        panels = list(grid.flat)
        kinds = (("edge_time", "board"), ("edge_energy", "board"), ("edge_energy", "operations"))
        for axes, (metric, energy) in zip(panels[:3], kinds, strict=True):
            metric_rows = modelled_rows(rows, metric, link=link, first=False, memory=None, storage=None, energy=energy)
            is_resident = metric_rows["source"].map(weights_location_of) == "memory"
            devices = metric_rows[(metric_rows["label"] == small) & is_resident]["profile"]
            if not len(devices):
                raise InputError(f"{small} fits into no device's memory, so no model is resident")
            is_drawn = metric_rows["profile"].isin(devices) & metric_rows["label"].isin((dense, small))
            figure_rows.append(metric_rows[is_drawn])
            for number, name in enumerate(devices):
                samples = metric_rows[is_drawn & (metric_rows["profile"] == name)].set_index("label")["samples"]
                infer = samples.str[PARTS.index("infer")]
                transfer_cost = _transfer_cost(
                    profiles.device(name), profiles.link(link), metric, energy, size, bandwidth
                )
                line = {"color": COLOURS[number % len(COLOURS)], "ls": ("-", "--")[number % 2], "label": name}
                axes.plot(bandwidth, (transfer_cost + infer[dense]) / infer[small], **line)
            quantity = "latency" if metric == "edge_time" else f"energy ({energy})"
            axes.set(
                xscale="log",
                yscale="log",
                xlabel="bandwidth of the link (bytes/s)",
                ylabel=f"{quantity}: times cheaper",
            )
            _draw_paper_ratio(axes, metric, bandwidth[-1], profiles)
        panels[3].axis("off")
        handles, labels = panels[0].get_legend_handles_labels()
        titles = [profiles.device(label).title for label in labels]
        panels[3].legend(
            handles, titles, title="the small model is held by", fontsize=current().small_font_size, loc="center left"
        )
        dense_name, small_name = names or (dense, small)
        title = f"{dense_name} fetched for every inference, {small_name} held in memory"
        figure.suptitle(figure_title(figure_rows[0], title), x=0.01, ha="left")
        footnote(figure, f"modelled; energy of a byte over {link}; upright names: the links' bandwidths")
    return figure, pd.concat(figure_rows)


def _transfer_cost(
    device: Device, link: Link, metric: str, energy: str, size: float, bandwidth: np.ndarray
) -> np.ndarray:
    """Seconds or joules to fetch `size` bytes at each bandwidth; a board also draws its idle power during the transfer."""
    if metric == "edge_time":
        return size / bandwidth
    waiting = device.idle_power.value if energy == "board" else 0.0
    return transfer_energy(size, link) + waiting * size / bandwidth


def _draw_paper_ratio(axes: Axes, metric: str, right: float, profiles: Profiles) -> None:
    """The abstract's ratio across a panel, and the links' names at their bandwidths."""
    axes.axhline(PAPER_RATIOS[metric], color="black", lw=1, ls=":")
    axes.annotate(
        f"abstract: > {PAPER_RATIOS[metric]}", (right, PAPER_RATIOS[metric]), ha="right", va="bottom", fontsize=8
    )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, PAPER_RATIOS[metric] / 4), 2 * high)
    text_style: dict[str, Any] = {"rotation": 90, "fontsize": 7, "color": "#555555", "va": "bottom"}
    for turn, (name, profile) in enumerate(profiles.links.items()):
        side = ("center", "right", "left")[turn % 3]  # links of about the same bandwidth stand side by side
        axes.axvline(profile.bandwidth.value, color="#BBBBBB", lw=0.6, zorder=0)
        at = (profile.bandwidth.value, 1.01)
        axes.annotate(name, at, xycoords=("data", "axes fraction"), ha=side, **text_style)


def transfer_check(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The ratio of measured to modelled time of streams through a rate limiter, against their bytes."""
    rows = rows[(rows["status"] == "ok") & rows["metric"].isin(["transfer_time", "transfer_time_modelled"])]
    if not len(rows):
        raise InputError("the rows hold no transfer_time; stream something first (edge.rows.streamed)")
    with_link = rows.assign(**{key: [row_context[key] for row_context in rows["context"]] for key in ("link", "count")})
    wide = with_link.pivot_table(
        index=["link", "count"], columns="metric", values="value", aggfunc="last"
    ).reset_index()
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
