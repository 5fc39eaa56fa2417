"""A results folder: records.jsonl, environments/, models/, figures/, notebooks/ and report.html."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from vitbench import environment, paths
from vitbench.errors import InputError
from vitbench.records import Row, append_rows
from vitbench.row_table import load_records

MARKS = ("records.jsonl", "environments", "searches", "suite.lock", "sweep.lock")  # what a results folder is known by
# what results would write over, or be taken for, where somebody else's lies in a folder
TAKEN = (
    "notebooks",
    "figures",
    "errors",
    "report.html",
    "sweep.json",
    "recipe.json",
    "model.safetensors",
    "bundle.json",
)


class Run:
    """A results folder to add rows, models and figures to.

    Args:
        folder: an existing or new folder; "" means `results/runs/quick` in the project.

    Raises:
        InputError: the folder cannot be written, or is none of results and holds what results would write over.
    """

    def __init__(self, folder: str | Path = ""):
        folder = Path(folder or paths.home() / "results" / "runs" / "quick").expanduser()
        _refuse_others(folder)
        self.folder = paths.writable_folder(folder, "results folder")
        (self.folder / "environments").mkdir(exist_ok=True)  # from now on it is known as a results folder
        self.records = self.folder / "records.jsonl"
        self.models = self.folder / "models"
        self.figures = self.folder / "figures"
        self.notebooks = self.folder / "notebooks"

    def append(self, rows: Iterable[Row], facts: dict | None = None) -> None:
        """Add rows with the environment, this process's or another device's `facts`, and the commit they were made with.

        Rows that have a key already, of another process, stay as they are; `keep_environment` keeps what they name.
        """
        env_id = self.keep_environment(facts)
        append_rows(self.records, [row if row.key else row.stamped(env_id, environment.commit()) for row in rows])

    def keep_environment(self, facts: dict | None = None) -> str:
        """Keep an environment, by default this process's; returns its name."""
        return environment.write_environment(self.folder / "environments", facts)

    def done(self) -> set[str]:
        """Keys of the rows that are there as ok or skipped."""
        if not self.records.exists():
            return set()
        rows = load_records(self.records, latest=False)
        return set(rows["key"][rows["status"] != "failed"])

    def rows(self) -> pd.DataFrame:
        """All rows, the latest about each thing."""
        return load_records(self.records)


def _refuse_others(folder: Path) -> None:
    taken = [name for name in TAKEN if (folder / name).exists()]
    if taken and not any((folder / name).exists() for name in MARKS):
        raise InputError(
            f"{str(folder)!r} holds {taken[0]!r} and no results, so it is left alone; give a new folder or one of results"
        )
