"""What lessons measure on: a baseline, its images and a results folder; what is made of it is looked up by its label."""

from typing import Any

import pandas as pd

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData
from vitbench.measurement.measures import Measures
from vitbench.measurement.measuring import measure
from vitbench.rows import comparison_table
from vitbench.rows.runs import Run
from vitbench.run.cache import CachedModel, compressed
from vitbench.run.history import search_rows


class Bench:
    """Makes models of one baseline, measures their files against its file, and looks rows up.

    Args:
        base: the baseline, as `baseline` gives it.
        data: accuracy is that of its test split; methods train on its train split and choose on the others.
        run: where the rows go.
        threads, rounds: of timings (see `measure`).
    """

    def __init__(self, base: CachedModel, data: ImageData, run: Run, *, threads: int = 2, rounds: int = 60):
        self.base, self.data, self.run = base, data, run
        self.measures = Measures(what=("accuracy", "size"), threads=threads, rounds=rounds)

    def measured(self, *configs: Config, **settings: Any) -> str:
        """The label of the model that the configs make of the baseline, one after the other, once its file was measured.

        None at all is the baseline itself. The policies that a search tried become rows too. What was made or measured
        before is not done again, nor what two combinations begin with.

        Args:
            settings: fields of `Measures`; by default accuracy and size are measured.

        Raises:
            InputError: a config that does not fit the model; a setting that is not allowed.
        """
        made = self.base
        for config in configs:
            made = compressed(made, config, self.data)
        if made.search:
            self.run.append(search_rows(self.base.path, self.data, configs[-1], made.search))
        versus = self.base.path if configs else ""
        rows = measure(made.path, self.data, self.run, self.measures, versus=versus, **settings)
        return comparison_table.label_of(self.run.rows(), rows)

    @property
    def rows(self) -> pd.DataFrame:
        """The baseline's rows and those of what was made of it, with their labels (see `comparison_table.experiment_rows`)."""
        return comparison_table.experiment_rows(self.run.rows())

    def find_row(
        self, label: str, metric: str, batch: int | None = None, backend: str = comparison_table.EAGER
    ) -> pd.Series | None:
        """The row of a metric (see `comparison.value`), or None."""
        return comparison_table.find_row(self.rows, label, metric, batch, backend)

    def top1_text(self, label: str, backend: str = comparison_table.EAGER) -> str:
        """Top-1 in per cent with its 95 % interval."""
        return comparison_table.top1_text(self.rows, label, backend)

    def top1_difference_text(self, first: str, second: str) -> str:
        """By how many points of top-1 the first is better than the second, on the same images, with 95 % interval and p."""
        return comparison_table.top1_difference_text(self.rows, first, second)

    def loss_difference_text(self, first: str, second: str) -> str:
        """By how many nats the first's cross-entropy is above the second's, on the same images, likewise."""
        return comparison_table.loss_difference_text(self.rows, first, second)
