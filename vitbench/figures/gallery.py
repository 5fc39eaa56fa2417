"""The figures that `vitbench figure` draws from the rows of results folders, by name."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitbench.base.errors import InputError, one_of
from vitbench.base.paths import writable_folder
from vitbench.figures import drawing, measured_edge
from vitbench.figures.accuracy_cost import small_multiples, tradeoff
from vitbench.figures.ranking import equal_budgets, ranks
from vitbench.rows.experiment import Experiment
from vitbench.rows.row_table import load_records

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


def draw(name: str, rows: pd.DataFrame, out: str | Path, *, batch: int = 1, style_file: str | Path = "") -> int:
    """Draw a figure of the gallery into `out` (.png, .svg or .pdf), and write its rows into a CSV file beside it.

    Args:
        batch: batch size of the times.
        style_file: a matplotlib style file; its settings override the project's.

    Returns:
        How many ok rows are of another model or other images, and so not in the figure.

    Raises:
        InputError: no such figure, rows that lack its metrics, or a file that cannot be written.
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
    with drawing.user_style(style_file):
        figure, figure_rows = GALLERY[name][1](rows, batch)
        drawing.save_figure(
            figure, writable_folder(out.parent, "figures folder"), out.stem, figure_rows, kinds=[out.suffix[1:]]
        )
    plt.close(figure)
    ok_rows = rows[rows["status"] == "ok"]
    return len(ok_rows) - (len(Experiment.of(rows).rows) if name not in OVER_SEEDS else _same_images_count(ok_rows))


def _same_images_count(rows: pd.DataFrame) -> int:
    """How many rows are of the last one's model and images, of any seed."""
    same = [rows[name] == rows[name].iloc[-1] for name in ("model", "dataset", "data_fingerprint")]
    return int(np.logical_and.reduce(same).sum())
