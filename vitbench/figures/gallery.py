"""The figures that `vitbench figure` draws from the rows of results folders, by name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.base.errors import InputError, one_of
from vitbench.base.paths import writable_folder
from vitbench.figures import drawing, measured_edge
from vitbench.figures.accuracy_cost import small_multiples, tradeoff
from vitbench.figures.layout import page
from vitbench.figures.ranking import equal_budgets, ranks
from vitbench.rows.experiment import Experiment, over_seeds
from vitbench.rows.row_table import load_records
from vitbench.rows.words import display_labels

Draw = Callable[
    [pd.DataFrame, int], tuple[Figure, pd.DataFrame]
]  # of rows and a batch size: the figure, and the rows it shows
GALLERY: dict[str, tuple[str, Draw]] = {
    "size": ("accuracy against bytes on disk", lambda rows, batch: tradeoff(rows, "bytes")),
    "work": ("accuracy against multiply-accumulates", lambda rows, batch: tradeoff(rows, "macs")),
    "time": ("accuracy against time over the baseline's", lambda rows, batch: tradeoff(rows, "latency_ratio", batch)),
    "energy": ("accuracy against energy, measured or estimated", lambda rows, batch: tradeoff(rows, "energy")),
    "methods": ("accuracy against bytes, a panel a method", lambda rows, batch: small_multiples(rows, "bytes")),
    "methods-work": ("the same against multiply-accumulates", lambda rows, batch: small_multiples(rows, "macs")),
    "equal-size": ("accuracy at equal bytes, over seeds", lambda rows, batch: equal_budgets(rows, "bytes")),
    "equal-work": (
        "accuracy at equal multiply-accumulates, over seeds",
        lambda rows, batch: equal_budgets(rows, "macs"),
    ),
    "ranks": ("ranks by accuracy at equal bytes, over seeds", lambda rows, batch: ranks(rows, "bytes")),
    "predicted": (
        "size and time, predicted by bits and MACs and measured",
        lambda rows, batch: drawing.predicted_beside_measured(rows),
    ),
    "latencies": ("how long a call takes", lambda rows, batch: drawing.latencies(rows)),
    "backends": ("time in every backend over eager fp32's", lambda rows, batch: measured_edge.in_backends(rows)),
    "floors": ("time over the least that this machine allows", lambda rows, batch: measured_edge.floors(rows)),
    "memory": ("peak memory of a process", lambda rows, batch: measured_edge.memory(rows)),
    "startup": ("time to the first inference", lambda rows, batch: measured_edge.startup(rows)),
}
OVER_SEEDS = ("equal-size", "equal-work", "ranks")
KINDS = (".png", ".svg", ".pdf")


def load_folders(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The rows of several results folders in one table. A figure shows the model and the images of the last row."""
    return pd.concat([load_records(folder) for folder in folders], ignore_index=True)


def draw(
    name: str,
    rows: pd.DataFrame,
    out: str | Path,
    *,
    batch: int = 1,
    style_file: str | Path = "",
    width: float | None = None,
    title: bool = True,
    only: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
) -> int:
    """Draw a figure of the gallery into `out` (.png, .svg or .pdf), and write its rows into a CSV file beside it.

    Args:
        batch: batch size of the times.
        style_file: a matplotlib style file; its settings override the project's.
        width: in inches; below 5 the figure is laid out for one column of a paper. None means the figure's own.
        title: whether the figure has its title.
        only: methods, labels or display labels of the models to show beside the baseline; empty means all.
        names: method, label or display label -> what to write in its place.

    Returns:
        How many ok rows are of another model or other images, and so not in the figure.

    Raises:
        InputError: no such figure, rows that lack its metrics, a name that no model has, or a file that cannot be written.
    """
    one_of("figure", name, GALLERY)
    out = Path(out).expanduser()
    if out.suffix not in KINDS:
        raise InputError(f"--out {str(out)!r} ends in {out.suffix!r}; give a name that ends in {', '.join(KINDS)}")
    csv_path = out.with_suffix(".csv")
    if csv_path.exists() and not csv_path.read_bytes().startswith(b"key,model,dataset,"):
        raise InputError(
            f"the rows of the figure go into {str(csv_path)!r}, where another table lies; give --out another name"
        )
    experiment = over_seeds(rows) if name in OVER_SEEDS else Experiment.of(rows)
    chosen = rows
    if only:
        chosen = rows.loc[_chosen(experiment, only).index] if name in OVER_SEEDS else _chosen(experiment, only)
    renamed = _renamed(experiment, names or {})
    with drawing.user_style(style_file), page(width, title, **renamed):
        figure, figure_rows = GALLERY[name][1](chosen, batch)
        drawing.save_figure(
            figure, writable_folder(out.parent, "figures folder"), out.stem, figure_rows, kinds=[out.suffix[1:]]
        )
    plt.close(figure)
    ok_rows = rows[rows["status"] == "ok"]
    return len(ok_rows) - (len(experiment.rows) if name not in OVER_SEEDS else _same_images_count(ok_rows))


def _find(experiment: Experiment, name: str) -> tuple[str, list[str]]:
    """The method that has this name, or "", and the labels of the models that have it.

    Raises:
        InputError: neither a method nor a model has it.
    """
    methods = dict.fromkeys(experiment.rows["method"])
    shown = [display_labels(experiment), display_labels(experiment, experiment.timed_labels)]
    labels = {text: label for display in shown for label, text in display.items()}
    labels |= {label: label for label in shown[0]}
    one_of("method or label", name, [*methods, *(text for text in labels if text not in methods)])
    return (name if name in methods else ""), [labels[name]] if name in labels else []


def _chosen(experiment: Experiment, only: Sequence[str]) -> pd.DataFrame:
    """The experiment's rows of the baseline and of the models that are named by method, label or display label."""
    found = [_find(experiment, name) for name in ("baseline", *only)]
    labels = [label for method, labels in found if not method for label in labels]
    rows = experiment.rows
    return rows[rows["label"].isin(labels) | rows["method"].isin([method for method, _ in found])]


def _renamed(experiment: Experiment, names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """`names` by label and by method, as `layout.page` takes them."""
    by_label: dict[str, str] = {}
    by_method: dict[str, str] = {}
    for old, new in names.items():
        method, labels = _find(experiment, old)
        by_method |= {method: new} if method else {}
        by_label |= dict.fromkeys(labels, new)
    for texts in (
        display_labels(experiment) | by_label,
        {name: name for name in experiment.rows["method"]} | by_method,
    ):
        if twice := next((text for text in texts.values() if list(texts.values()).count(text) > 1), None):
            raise InputError(f"two models or methods would be called {twice!r}; give each a name of its own")
    return {"labels": by_label, "methods": by_method}


def _same_images_count(rows: pd.DataFrame) -> int:
    """How many rows are of the last one's model and images, of any seed."""
    same = [rows[name] == rows[name].iloc[-1] for name in ("model", "dataset", "data_fingerprint")]
    return int(np.logical_and.reduce(same).sum())
