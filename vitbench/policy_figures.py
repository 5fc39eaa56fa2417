"""Figures of searches for a policy and of the policies found; from rows alone."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.comparison import subject
from vitbench.figures import COLOURS, heading, note, style

POLICY = {"policy_neurons": "neurons", "policy_heads": "heads", "policy_tokens": "tokens"}


def search_progress(rows: pd.DataFrame, named: dict[str, list[str]]) -> tuple[Figure, pd.DataFrame]:
    """The best score so far against the policies scored; name -> labels of the searches (one a seed): mean and range."""
    rows = subject(rows)
    shown = rows[
        (rows["metric"] == "search_score") & rows["label"].isin([label for each in named.values() for label in each])
    ]
    with style():
        figure, axes = plt.subplots(figsize=(7.2, 3.8))
        for place, (name, labels) in enumerate(named.items()):
            best = np.array([np.maximum.accumulate(row) for row in shown["samples"][shown["label"].isin(labels)]])
            x, colour = 1 + np.arange(best.shape[1]), COLOURS[(3, 1, 5, 4)[place % 4]]
            axes.plot(x, best.mean(0), color=colour, ls=("-", "--", ":", "-.")[place % 4], label=name)
            axes.fill_between(x, best.min(0), best.max(0), color=colour, alpha=0.2, lw=0)
        late = np.stack([np.maximum.accumulate(row) for row in shown["samples"]])[
            :, shown["samples"].map(len).min() // 4 :
        ]
        axes.set_ylim(late.min() - 0.1 * np.ptp(late), late.max() + 0.1 * np.ptp(late))  # the first steps are far below
        nats = (shown["unit"] == "nats").all()
        axes.set(
            xlabel="policies scored", ylabel="best so far: " + ("-cross-entropy on val" if nats else "top-1 on val")
        )
        axes.set_title(heading(rows, "search for a policy"))
        axes.legend(fontsize=8, loc="lower right")
        seeds = min(len(labels) for labels in named.values())
        note(figure, f"line: mean of {seeds} seeds; band: the worst and the best of them")
    return figure, shown


def policies(rows: pd.DataFrame, named: dict[str, str]) -> tuple[Figure, pd.DataFrame]:
    """What the best policy of each search leaves of every block, over depth; label -> name."""
    rows = subject(rows)
    shown = rows[rows["metric"].isin(POLICY) & rows["label"].isin(named)]
    with style():
        figure, panels = plt.subplots(1, len(POLICY), figsize=(10.4, 3.1))
        for axes, (metric, what) in zip(panels, POLICY.items(), strict=True):
            for place, (label, name) in enumerate(named.items()):
                left = shown["samples"][(shown["metric"] == metric) & (shown["label"] == label)].iloc[-1]
                kind = {"color": COLOURS[(3, 1, 5, 4)[place % 4]], "ls": ("-", "--", ":", "-.")[place % 4]}
                axes.step(range(len(left)), left, where="mid", **kind, label=name)
            axes.set(xlabel="block", ylabel=f"{what} left")
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[-1].legend(fontsize=8, loc="lower left")
        figure.suptitle(heading(rows, "what the policy leaves"), fontsize=10)
    return figure, shown
