"""A results folder: records.jsonl, environments/, models/, figures/, notebooks/ and report.html."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from vitbench import environment, paths
from vitbench.records import Row, append_rows
from vitbench.row_table import load_records


class Run:
    """A results folder to add rows, models and figures to.

    Args:
        folder: an existing or new folder; "" means `results/runs/quick` in the project.
    """

    def __init__(self, folder: str | Path = ""):
        folder = folder or paths.home() / "results" / "runs" / "quick"
        self.folder = paths.writable_folder(folder, "results folder")
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
