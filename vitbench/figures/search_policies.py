"""Figures of policy searches and of the policies that they chose, from rows alone."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.figures.drawing import COLOURS, figure_title, footnote, method_style, style
from vitbench.rows.experiment import Experiment

POLICY = {
    "policy_neurons": "neurons",
    "policy_heads": "heads",
    "policy_head_dims": "dimensions of a head",
    "policy_tokens": "tokens",
}


def _line(index: int) -> dict[str, Any]:
    """Colour and dashes of the line with this index."""
    return {
        "color": COLOURS[(3, 1, 5, 4, 6, 0)[index % 6]],
        "ls": ("-", "--", ":", "-.", (0, (6, 3)), (0, (1, 3)))[index % 6],
    }


def search_progress(rows: pd.DataFrame, names: dict[str, list[str]]) -> tuple[Figure, pd.DataFrame]:
    """The best score so far against the number of scored policies, mean and range over seeds.

    `names`: name in the legend -> labels of its searches, one for each seed.
    """
    figure_rows = Experiment.of(rows).of_metrics("search_score")
    figure_rows = figure_rows[figure_rows["label"].isin([label for labels in names.values() for label in labels])]
    with style():
        figure, axes = plt.subplots(figsize=(7.2, 3.8))
        for index, (name, labels) in enumerate(names.items()):
            best = np.array(
                [np.maximum.accumulate(row) for row in figure_rows["samples"][figure_rows["label"].isin(labels)]]
            )
            x, line = 1 + np.arange(best.shape[1]), _line(index)
            axes.plot(x, best.mean(0), **line, label=name)
            axes.fill_between(x, best.min(0), best.max(0), color=line["color"], alpha=0.2, lw=0)
        later_scores = np.stack([np.maximum.accumulate(row) for row in figure_rows["samples"]])[
            :, figure_rows["samples"].map(len).min() // 4 :
        ]
        axes.set_ylim(
            later_scores.min() - 0.1 * np.ptp(later_scores), later_scores.max() + 0.1 * np.ptp(later_scores)
        )  # the first steps are far below
        nats = (figure_rows["unit"] == "nats").all()
        axes.set(
            xlabel="policies scored", ylabel="best so far: " + ("-cross-entropy on val" if nats else "top-1 on val")
        )
        axes.set_title(figure_title(figure_rows, "search for a policy"))
        axes.legend(fontsize=8, loc="lower right")
        seeds = min(len(labels) for labels in names.values())
        footnote(figure, f"line: mean of {seeds} seeds; band: the worst and the best of them")
    return figure, figure_rows


def policies(rows: pd.DataFrame, names: dict[str, str]) -> tuple[Figure, pd.DataFrame]:
    """The units that each search's best policy keeps in each block; `names`: label -> name in the legend."""
    experiment = Experiment.of(rows)
    figure_rows = experiment.of_metrics(*POLICY)
    figure_rows = figure_rows[figure_rows["label"].isin(names)]
    with style():
        changed_metrics = {
            metric: unit for metric, unit in POLICY.items() if _differs(figure_rows[figure_rows["metric"] == metric])
        }
        figure, panels = plt.subplots(1, len(changed_metrics), figsize=(10.4, 3.1), squeeze=False)
        for axes, (metric, unit) in zip(panels[0], changed_metrics.items(), strict=True):
            for index, (label, name) in enumerate(names.items()):
                remaining = experiment.require(label, metric)["samples"]
                axes.step(range(len(remaining)), remaining, where="mid", **_line(index), label=name)
            axes.set(xlabel="block", ylabel=f"{unit} left")
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0, -1].legend(fontsize=8, loc="lower left")
        figure.suptitle(figure_title(experiment.rows, "what the policy leaves"), fontsize=10)
    return figure, figure_rows


def by_budget(rows: pd.DataFrame, panels: dict[str, dict[tuple[float, str], str]]) -> tuple[Figure, pd.DataFrame]:
    """Top-1 against the remaining multiply-accumulates, a line for each kind of policy, a panel for each name.

    `panels`: name -> {(budget, kind): label}.
    """
    experiment, figure_rows = Experiment.of(rows), []
    baseline_macs, baseline_top1 = (experiment.require("baseline", metric) for metric in ("macs", "top1"))
    with style():
        figure, drawn = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), sharey=True, squeeze=False)
        for axes, (name, labels) in zip(drawn[0], panels.items(), strict=True):
            kinds = list(dict.fromkeys(kind for _, kind in labels))
            axes.axhline(100 * baseline_top1["value"], color="black", lw=1, ls=":", label="baseline")
            for kind in kinds:
                labels_of_kind = [label for (_, label_kind), label in labels.items() if label_kind == kind]
                macs, top1 = (
                    [experiment.require(label, metric) for label in labels_of_kind] for metric in ("macs", "top1")
                )
                figure_rows += [*macs, *top1]
                x, y = [row["value"] / baseline_macs["value"] for row in macs], [100 * row["value"] for row in top1]
                error_bars = [[100 * abs(row[end] - row["value"]) for row in top1] for end in ("low", "high")]
                axes.errorbar(x, y, yerr=error_bars, capsize=2, label=kind, **method_style(kind, kinds))
            axes.set(xlabel="multiply-accumulates left, of the baseline's", title=name)
        drawn[0, 0].set_ylabel("top-1 (%)")
        drawn[0, -1].legend(fontsize=8)
        figure.suptitle(figure_title(experiment.rows, "one kind of unit, or all of them"), fontsize=10)
        footnote(figure, "bars: 95 % intervals; a kind that is missing could not reach the budget")
    return figure, pd.DataFrame([baseline_macs, baseline_top1, *figure_rows])


def _differs(rows: pd.DataFrame) -> bool:
    """Whether the rows' counts differ between blocks or policies; if not, no policy changes them and they need no panel."""
    return len(rows) > 0 and np.unique(np.concatenate(rows["samples"].tolist())).size > 1
