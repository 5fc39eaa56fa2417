"""Figures of single models: training curves, bytes by part, layers' errors and ranks, and error by family of settings."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.figures.drawing import COLOURS, MARKERS, figure_title, footnote, style
from vitbench.rows.experiment import MEGA, Experiment

PARTS = {  # part of a saved model -> colour
    "block weights": COLOURS[3],
    "shared factors": COLOURS[1],
    "patch embedding and head": COLOURS[4],
    "norms, biases, embeddings": COLOURS[2],
    "names and recipe": "#BBBBBB",
}
ERRORS = {  # metric of each layer -> axis and title
    "weight_error": ("||W' - W|| / ||W|| (%)", "error of the weights, layer by layer"),
    "output_error": ("error of outputs (% of variance)", "error of the layers' outputs"),
}
FigureAndRows = tuple[Figure, pd.DataFrame]


def training_curves(rows: pd.DataFrame, names: dict[str, str] | None = None) -> FigureAndRows:
    """Loss on the training images and accuracy on the val split, at each step; `names`: label -> name in the legend."""
    experiment, names = Experiment.of(rows), names or {"baseline": "baseline"}
    metrics = [metric for metric in ("train_loss", "val_top1") if len(experiment.of_metrics(metric))]
    figure_rows = []
    with style():
        figure, panels = plt.subplots(1, max(1, len(metrics)), figsize=(8.2, 3.3), squeeze=False)
        for axes, metric in zip(panels[0], metrics, strict=False):
            percent = metric == "val_top1"
            for index, (label, name) in enumerate(names.items()):
                row = experiment.find(label, metric)
                if row is None:
                    continue
                curve = np.array(row["samples"]) * (100 if percent else 1)
                steps = row["context"].get("steps_per_epoch", 1) * np.arange(1, len(curve) + 1)
                line_style: dict[str, Any] = {
                    "color": COLOURS[(3, 1, 5, 4)[index % 4]],
                    "ls": ("-", "--", ":", "-.")[index % 4],
                }
                axes.plot(steps, curve, **line_style, marker="." if len(curve) < 30 else "", label=name)
                if len(names) == 1:
                    end = (steps[-1], curve[-1])
                    axes.annotate(f"{end[1]:.3g}", end, xytext=(-6, 8), textcoords="offset points", ha="right")
                figure_rows.append(row)
            axes.set(xlabel="optimiser step", ylabel="top-1 on val images (%)" if percent else "training loss (nats)")
        if len(names) > 1:
            panels[0][-1].legend(fontsize=8)
        panels[0][0].set_title(figure_title(experiment.rows, "training"))
    return figure, pd.DataFrame(figure_rows)


def parts(rows: pd.DataFrame, names: dict[str, str]) -> FigureAndRows:
    """Bytes on disk by part, one bar for each model; `names`: label -> name."""
    experiment = Experiment.of(rows)
    figure_rows = experiment.of_metrics("part_bytes")
    figure_rows = figure_rows[figure_rows["label"].isin(names)]
    parts_held = figure_rows["context"].map(lambda context: context["part"])
    with style():
        figure, axes = plt.subplots(figsize=(7.6, 1.7 + 0.5 * len(names)))
        for index, label in enumerate(names):
            bar_start = 0.0
            for part, colour in PARTS.items():
                width = figure_rows["value"][(figure_rows["label"] == label) & (parts_held == part)].sum() / MEGA
                axes.barh(index, width, left=bar_start, color=colour, edgecolor="white", label=None if index else part)
                bar_start += width
            axes.annotate(
                f"{bar_start:.3g} MB", (bar_start, index), xytext=(4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(names)), names.values())
        axes.margins(x=0.15)
        axes.set(xlabel="size on disk (MB)", title=figure_title(experiment.rows, "what the bytes hold"))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.legend(fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.32))
    return figure, figure_rows


def layer_errors(
    rows: pd.DataFrame, names: dict[str, str], metric: str = "weight_error", scale: str = "linear"
) -> FigureAndRows:
    """An error of each layer, one line for each model; `names`: label -> name in the legend; `metric`: one of `ERRORS`."""
    experiment, figure_rows = Experiment.of(rows), []
    axis, title = ERRORS[metric]
    with style():
        figure, axes = plt.subplots(figsize=(8.2, 3.4))
        for index, (label, name) in enumerate(names.items()):
            row = experiment.find(label, metric)
            if row is None:
                continue
            layers, errors = _by_depth(row)
            turns, marker = divmod(index, len(MARKERS))
            line_style: dict[str, Any] = {
                "marker": MARKERS[marker],
                "color": COLOURS[(3, 1, 5, 4)[(index + turns) % 4]],
                "ls": ("-", "--", ":", "-.")[index % 4],
            }
            axes.plot([layer.removeprefix("blocks.") for layer in layers], 100 * errors, **line_style, ms=5, label=name)
            figure_rows.append(row)
        axes.tick_params(axis="x", rotation=90, labelsize=7 if len(figure_rows) and len(layers) > 24 else 8)
        axes.set(ylabel=axis, title=figure_title(experiment.rows, title), yscale=scale)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    return figure, pd.DataFrame(figure_rows)


def layer_map(rows: pd.DataFrame, names: dict[str, str]) -> FigureAndRows:
    """The share of weights that each layer keeps, and its rank: a heat map over depth and type for each model.

    `names`: label -> title. Dense layers have no rank.
    """
    experiment, figure_rows = Experiment.of(rows), []
    with style():
        figure, panels = plt.subplots(len(names), 1, figsize=(9.6, 0.6 + 1.75 * len(names)), squeeze=False)
        for axes, (label, name) in zip(panels[:, 0], names.items(), strict=True):
            keep, rank = (experiment.require(label, metric) for metric in ("layer_keep", "layer_rank"))
            layers, shares = _by_depth(keep)
            kinds = list(dict.fromkeys(layer.rpartition(".")[-1] for layer in keep["context"]["layers"]))
            depth = 1 + max(int(layer.split(".")[1]) for layer in layers)
            grid, texts = np.full((len(kinds), depth), np.nan), dict(zip(*_by_depth(rank), strict=True))
            for layer, share in zip(layers, shares, strict=True):
                row, column = kinds.index(layer.rpartition(".")[-1]), int(layer.split(".")[1])
                grid[row, column] = share
                text = "dense" if share >= 1 else f"{texts[layer]:.0f}"
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=7, color="white" if share < 0.5 else "black"
                )
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            axes.set_yticks(range(len(kinds)), kinds)
            axes.set_xticks(range(depth), range(depth))
            axes.grid(False)
            axes.set_title(name, fontsize=9)
            figure_rows += [keep, rank]
        panels[-1, 0].set_xlabel("block")
        figure.colorbar(image, ax=list(panels[:, 0]), label="share of weights kept", fraction=0.03, pad=0.01)
        figure.suptitle(figure_title(experiment.rows, "what each layer keeps; the numbers are ranks"), fontsize=10)
    return figure, pd.DataFrame(figure_rows)


def _by_depth(row: pd.Series) -> tuple[list[str], np.ndarray]:
    """The names of a row's layers and its samples, both sorted by depth."""
    pairs = zip(row["context"]["layers"], row["samples"], strict=True)
    sorted_pairs = sorted(pairs, key=lambda pair: [int(part) if part.isdigit() else 0 for part in pair[0].split(".")])
    return [name for name, _ in sorted_pairs], np.array([sample for _, sample in sorted_pairs])


def error_by_family(rows: pd.DataFrame, names: dict[str, list[str]], cost: str = "bytes") -> FigureAndRows:
    """Test error against bytes or weights, a line for each family; `names`: family -> the labels of its settings."""
    experiment, figure_rows = Experiment.of(rows), []
    base, unit = experiment.require("baseline", "top1"), {"bytes": "MB", "params": "M weights"}[cost]
    palette = (3, 3, 1, 1) if len(names) <= 4 else (2, 4, 6, 1, 5, 3, 0)  # up to four families are drawn as two pairs
    min_error = 0.5 / base["context"]["images"]  # a logarithmic axis cannot show 0
    baseline_error = 100 * max(1 - base["value"], min_error)
    with style():
        figure, axes = plt.subplots(figsize=(7.2, 4.4))
        for index, (name, labels) in enumerate(names.items()):
            sizes = [(label, experiment.find(label, cost)) for label in labels]
            size_and_top1 = sorted(
                ((size, experiment.require(label, "top1")) for label, size in sizes if size is not None),
                key=lambda pair: pair[0]["value"],
            )
            x = [size["value"] / MEGA for size, _ in size_and_top1]
            error, low, high = (
                100 * np.array([max(1 - top1[key], min_error) for _, top1 in size_and_top1])
                for key in ("value", "high", "low")
            )
            line_style: dict[str, Any] = {
                "color": COLOURS[palette[index % len(palette)]],
                "marker": MARKERS[index % len(MARKERS)],
            }
            spread: dict[str, Any] = {"yerr": [error - low, high - error], "capsize": 2, "elinewidth": 0.7}
            axes.errorbar(x, error, **spread, **line_style, ls=(":", "-")[index % 2], label=name)
            figure_rows += [row for pair in size_and_top1 for row in pair]
        axes.axhline(baseline_error, color="black", lw=1)
        corner: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "xytext": (0, 3),
            "textcoords": "offset points",
        }
        baseline_cost = experiment.require("baseline", cost)["value"] / MEGA
        axes.annotate(f"baseline, {baseline_cost:.3g} {unit}", (0.01, baseline_error), **corner)
        axes.set(xlabel={"bytes": "size on disk (MB)", "params": "weights (millions)"}[cost])
        axes.set(ylabel="wrong on test images (%)", yscale="log" if baseline_error < 10 else "linear")
        axes.set_title(figure_title(experiment.rows, f"errors against {'size' if cost == 'bytes' else 'weights'}"))
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if axes.get_ylim()[1] < 10 * axes.get_ylim()[0] else "")
        axes.legend(fontsize=8)
        footnote(figure, "bars: 95 % intervals of the test images; left and down is better")
    return figure, pd.DataFrame([*figure_rows, base])
