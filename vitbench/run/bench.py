"""A bench for lessons: a baseline, its images and a results folder; models made from it are found by their labels."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData
from vitbench.measurement.measures import Measures
from vitbench.measurement.measuring import measure
from vitbench.methods.multidimensional import MultiDimensional
from vitbench.rows import comparison_table, verdicts
from vitbench.rows.experiment import EAGER, Experiment
from vitbench.rows.runs import Run
from vitbench.run.cache import CachedModel, compress_cached
from vitbench.run.history import search_rows


class Bench:
    """Compresses one baseline, measures the saved models against its file, and looks up their rows.

    Args:
        base: the baseline, as `baseline` returns it.
        data: accuracy is measured on its test split; methods train on its train split and choose on the others.
        run: the results folder for the rows.
        threads, rounds: of timings (see `measure`).
    """

    def __init__(self, base: CachedModel, data: ImageData, run: Run, *, threads: int = 2, rounds: int = 60):
        self.base, self.data, self.run = base, data, run
        self.measures = Measures(what=("accuracy", "size"), threads=threads, rounds=rounds)

    def measure(self, *configs: Config, **settings: Any) -> str:
        """Compress the baseline with the configs in order, measure the saved model, and return its label.

        Without configs the baseline itself is measured. The policies that a search tried become rows too. Models and
        metrics that exist are not measured again, nor are the first steps that two combinations share.

        Args:
            settings: fields of `Measures`; by default accuracy and size are measured.

        Raises:
            InputError: a config that does not fit the model; a setting that is not allowed.
        """
        cached = self.base
        for config in configs:
            cached = compress_cached(cached, config, self.data)
        if configs and isinstance(configs[-1], MultiDimensional) and cached.search:
            self.run.append(search_rows(self.base.path, self.data, configs[-1], cached.search))
        versus = self.base.path if configs else ""
        rows = measure(cached.path, self.data, self.run, self.measures, versus=versus, **settings)
        return comparison_table.label_of(self.run.rows(), rows)

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of the baseline and of the models made from it, with their labels (see `Experiment`)."""
        return Experiment.of(self.run.rows()).rows

    def find_row(self, label: str, metric: str, batch: int | None = None, backend: str = EAGER) -> pd.Series | None:
        """The row of a metric (see `Experiment.find`), or None."""
        return Experiment.of(self.run.rows()).find(label, metric, batch, backend)

    def top1_text(self, label: str, backend: str = EAGER) -> str:
        """Top-1 in per cent with its 95 % interval."""
        return comparison_table.top1_text(self.rows, label, backend)

    def top1_difference_text(self, first: str, second: str) -> str:
        """By how many points of top-1 the first is better than the second, on the same images, with 95 % interval and p."""
        return comparison_table.top1_difference_text(self.rows, first, second)

    def loss_difference_text(self, first: str, second: str) -> str:
        """By how many nats the first's cross-entropy is above the second's, on the same images, with 95 % interval and p."""
        return comparison_table.loss_difference_text(self.rows, first, second)

    def accuracy_verdict(self, first: str, second: str = "baseline", names: tuple[str, str] | None = None) -> str:
        """Which of two models is more accurate on the same test images (see `rows.accuracy_verdict`)."""
        return verdicts.accuracy_verdict(self.rows, first, second, names)

    def cost_verdict(
        self, first: str, second: str = "baseline", cost: str = "bytes", names: tuple[str, str] | None = None
    ) -> str:
        """How the bytes or multiply-accumulates of two models compare (see `rows.cost_verdict`)."""
        return verdicts.cost_verdict(self.rows, first, second, cost, names)

    def time_verdict(self, label: str, batch: int = 1, backend: str = EAGER, name: str = "") -> str:
        """Whether a model is faster than the baseline (see `rows.time_verdict`)."""
        return verdicts.time_verdict(self.rows, label, batch, backend, name)

    def best_verdict(self, labels: Mapping[str, str]) -> str:
        """The most accurate of several models, name -> label (see `rows.best_verdict`)."""
        return verdicts.best_verdict(self.rows, labels)
