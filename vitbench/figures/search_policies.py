"""Figures of policy searches and of the policies that they chose, from rows alone."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitbench.figures.drawing import COLOURS, footnote, style
from vitbench.rows.experiment import Experiment

POLICY = {
    "policy_neurons": "neurons left",
    "policy_heads": "heads left",
    "policy_head_dims": "dimensions of a head left",
    "policy_tokens": "tokens left",
}
WIDTH, TITLE_CHARACTERS = 6.5, 84  # inches; of a title's line


def _colour(index: int) -> str:
    return COLOURS[(3, 1, 5, 4, 6, 0)[index % 6]]


def search_progress(rows: pd.DataFrame, names: dict[str, list[str]]) -> tuple[Figure, pd.DataFrame]:
    """The scores of the policies in the order of their trial, and the best so far; over seeds its mean and range.

    `names`: name in the legend -> labels of its searches, one for each seed.
    """
    experiment = Experiment.of(rows)
    figure_rows = [experiment.require(label, "search_score") for labels in names.values() for label in labels]
    best_of = {name: max(experiment.require(label, "search_score")["value"] for label in names[name]) for name in names}
    with style():
        figure, axes = plt.subplots(figsize=(WIDTH, 3.1))
        for index, (name, labels) in enumerate(names.items()):
            scores = [np.array(experiment.require(label, "search_score")["samples"]) for label in labels]
            best = np.array([np.maximum.accumulate(samples) for samples in scores])
            trials = 1 + np.arange(best.shape[1])
            axes.step(trials, best.mean(0), where="post", color=_colour(index), label=name)
            if len(labels) > 1:
                axes.fill_between(trials, best.min(0), best.max(0), step="post", color=_colour(index), alpha=0.2, lw=0)
            else:
                axes.plot(trials, scores[0], "o", ms=4, mfc="none", color=_colour(index))
        nats = all(row["unit"] == "nats" for row in figure_rows)
        axes.set(xlabel="policies scored", ylabel="minus cross-entropy on val" if nats else "top-1 on val")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(
            f"the highest score on val is that of {max(best_of, key=lambda name: best_of[name])}", fontsize=10
        )
        axes.legend(fontsize=8, loc="lower right")
        seeds = max(len(labels) for labels in names.values())
        footnote(
            figure,
            "rings: scores; lines: the best so far" + (f", mean and range of {seeds} seeds" if seeds > 1 else ""),
        )
    return figure, pd.DataFrame(figure_rows)


def policies(rows: pd.DataFrame, names: dict[str, str]) -> tuple[Figure, pd.DataFrame]:
    """The units that each search's best policy keeps in each block; `names`: label -> name in the legend."""
    experiment = Experiment.of(rows)
    figure_rows = experiment.of_metrics(*POLICY)
    figure_rows = figure_rows[figure_rows["label"].isin(names)]
    with style():
        changed_metrics = {
            metric: unit for metric, unit in POLICY.items() if _differs(figure_rows[figure_rows["metric"] == metric])
        }
        figure, panels = plt.subplots(1, len(changed_metrics), figsize=(WIDTH, 2.7), squeeze=False)
        for axes, (metric, unit) in zip(panels[0], changed_metrics.items(), strict=True):
            for index, (label, name) in enumerate(names.items()):
                remaining = experiment.require(label, metric)["samples"]
                dashes: dict[str, Any] = {"lw": 2.2} if index == 0 else {"lw": 1.3, "ls": (0, (4, index))}
                axes.step(range(len(remaining)), remaining, where="mid", color=_colour(index), label=name, **dashes)
            axes.set(xlabel="block")
            axes.set_title(unit, fontsize=10)
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(changed_metrics):
            handles, texts = panels[0, 0].get_legend_handles_labels()
            figure.legend(handles, texts, loc="outside lower center", ncols=4, fontsize=8)
    return figure, figure_rows


def by_budget(rows: pd.DataFrame, labels: dict[tuple[float, str], str], title: str) -> tuple[Figure, pd.DataFrame]:
    """Top-1 of each kind of policy as bars, a panel for each budget; `labels`: (budget, kind) -> the model's label."""
    experiment = Experiment.of(rows)
    budgets = list(dict.fromkeys(budget for budget, _ in labels))
    kinds = list(dict.fromkeys(kind for _, kind in labels))
    baseline = experiment.require("baseline", "top1")
    figure_rows = [baseline]
    with style():
        height = 1.3 + 0.33 * len(kinds)
        figure, panels = plt.subplots(1, len(budgets), figsize=(WIDTH, height), sharey=True, squeeze=False)
        for axes, budget in zip(panels[0], budgets, strict=True):
            for index, kind in enumerate(kinds):
                if (budget, kind) not in labels:
                    axes.text(2, index, "cannot reach it", va="center", fontsize=8, color="#777777")
                    continue
                top1 = experiment.require(labels[budget, kind], "top1")
                figure_rows.append(top1)
                error_bar = [[100 * abs(top1[end] - top1["value"])] for end in ("low", "high")]
                axes.barh(index, 100 * top1["value"], xerr=error_bar, color=_colour(index), capsize=3, height=0.65)
                axes.text(2, index, f"{100 * top1['value']:.1f} %", va="center", color="white", fontsize=9)
            axes.axvline(100 * baseline["value"], color="black", lw=1, ls=":")
            axes.set(xlim=(0, 100), xlabel="top-1 (%)")
            axes.set_title(f"{budget:g} of the multiply-accumulates", fontsize=9)
            axes.grid(axis="y", visible=False)
        panels[0, 0].set_yticks(range(len(kinds)), kinds)
        panels[0, 0].set_ylim(len(kinds) - 0.5, -0.5)
        figure.suptitle(textwrap.fill(title, TITLE_CHARACTERS), x=0.01, ha="left", fontsize=10)
        footnote(figure, "dotted: the baseline; bars: 95 % intervals")
    return figure, pd.DataFrame(figure_rows)


def _differs(rows: pd.DataFrame) -> bool:
    """Whether the rows' counts differ between blocks or policies; if not, no policy changes them and they need no panel."""
    return len(rows) > 0 and np.unique(np.concatenate(rows["samples"].tolist())).size > 1
