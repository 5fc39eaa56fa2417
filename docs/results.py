"""The rows of results folders as numbers and as text, for the templates of pages."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from vitbench.rows.comparison_table import accuracy_text, paired_loss, paired_rows
from vitbench.rows.experiment import Experiment
from vitbench.rows.row_table import load_records

BATCHES = (1, 8)


class MissingRow(LookupError):
    """A page needs a row that no folder has."""


class Difference:
    """A paired test of two models on the same images; its text stands in tables.

    Attributes:
        difference, low, high: the difference and its 95 % interval, in points or nats.
        p: of the test.
        significant: whether the difference is significant at 5 %.
        better: whether it is significant and the first model is above.
    """

    def __init__(self, test: Any, scale: float, digits: int):
        self.difference, self.low, self.high = (scale * number for number in (test.difference, test.low, test.high))
        self.p, self.digits = test.p, digits

    @property
    def significant(self) -> bool:
        return self.p < 0.05

    @property
    def better(self) -> bool:
        return self.significant and self.difference > 0

    def __str__(self) -> str:
        number = f"+.{self.digits}f"
        return f"{self.difference:{number}} [{self.low:{number}}, {self.high:{number}}] (p = {self.p:.2g})"


class Results:
    """The rows of one results folder, or of several together.

    Attributes:
        name: of the folder, or of all folders.
        experiment: the last row's baseline and the models made from it.
        rows: the experiment's, with a label for each model.
        every: the rows of all models, seeds and statuses, the last one for each key.
        measured: all rows, with those that were measured again later.
    """

    def __init__(self, *folders: Path):
        self.name = ", ".join(folder.name for folder in folders)
        self.every, self.measured = (
            pd.concat([load_records(folder, latest=latest) for folder in folders], ignore_index=True)
            for latest in (True, False)
        )
        self.experiment = Experiment.of(self.every)
        self.rows = self.experiment.rows
        self._row_cache: dict[int, pd.Series] = {}

    def row(
        self, label: str, metric: str, batch: int | None = None, backend: str = "eager", versus: str = ""
    ) -> pd.Series:
        """The last row of a metric of the model with that label; `versus` is the backend of a ratio's baseline.

        Raises:
            MissingRow: there is none; a row of another backend is not used instead.
        """
        row = self.find(label, metric, batch, backend, versus)
        if row is None:
            raise MissingRow(
                f"{self.name} has no {metric} of {label!r} (batch {batch}, {backend}); it has {', '.join(self.labels())}"
            )
        return row

    def find(
        self, label: str, metric: str, batch: int | None = None, backend: str = "eager", versus: str = ""
    ) -> pd.Series | None:
        """As `row`, or None; in eager mode a row that names the backend is preferred to one without a backend."""
        exact, without = [], []
        for index, its_backend, its_versus, its_batch in self._indices.get((label, metric), ()):
            if its_versus == versus and batch in (None, its_batch):
                if its_backend == backend:
                    exact.append(index)
                elif not its_backend:
                    without.append(index)
        indices = exact or (without if backend == "eager" else [])
        return self._at(indices[-1]) if indices else None

    @cached_property
    def _indices(self) -> dict[tuple[str, str], list[tuple[int, str, str, float]]]:
        """(label, metric) -> index, backend, versus and batch of its rows: pandas is slow at many small queries."""
        indices: dict[tuple[str, str], list[tuple[int, str, str, float]]] = {}
        names = ("label", "metric", "backend", "versus_backend", "batch")
        for index, (label, metric, *backends, batch) in enumerate(zip(*(self.rows[name] for name in names))):
            backend, versus = (name if isinstance(name, str) else "" for name in backends)
            indices.setdefault((label, metric), []).append((index, backend, versus, batch))
        return indices

    def _at(self, index: int) -> pd.Series:
        if index not in self._row_cache:
            self._row_cache[index] = self.rows.iloc[index]
        return self._row_cache[index]

    def value(
        self, label: str, metric: str, batch: int | None = None, backend: str = "eager", versus: str = ""
    ) -> float:
        """The value of `row`."""
        return float(self.row(label, metric, batch, backend, versus)["value"])

    def labels(self, method: str = "") -> list[str]:
        """The labels of all models, or of those of one method, in the order of the rows."""
        rows = self.rows if not method else self.rows[self.rows["method"] == method]
        return list(dict.fromkeys(rows["label"]))

    def label(self, method: str, **settings: Any) -> str:
        """The label of the one model of a method whose label names these settings and no other.

        A setting of a nested config is written with two underscores: `train__epochs=2`.
        """
        expected = {name.replace("__", "."): str(setting) for name, setting in settings.items()}
        labels = [label for label in self.labels(method) if _settings_in(label).items() == expected.items()]
        if len(labels) != 1:
            raise MissingRow(f"{self.name} has {len(labels)} models of {method} with {expected}: {self.labels(method)}")
        return labels[0]

    def trained(self, method: str, **settings: Any) -> str:
        """The label of the one model of a method that has these settings and was trained, with any training."""
        expected = {name.replace("__", "."): str(setting) for name, setting in settings.items()}
        labels = []
        for label in self.labels(method):
            settings_text = _settings_in(label)
            rest = {name: setting for name, setting in settings_text.items() if "train." not in name}
            if rest == expected and any(
                name.endswith("train.epochs") and settings_text[name] != "0" for name in settings_text
            ):
                labels.append(label)
        if len(labels) != 1:
            raise MissingRow(f"{self.name} has {len(labels)} trained models of {method} with {expected}: {labels}")
        return labels[0]

    def top1(self, label: str, backend: str = "eager") -> float:
        """Top-1 in per cent."""
        return 100 * self.value(label, "top1", backend=backend)

    def accuracy(self, label: str, backend: str = "eager") -> str:
        """Top-1 in per cent with its 95 % interval; `-` where it was not measured."""
        row = self.find(label, "top1", backend=backend)
        return "-" if row is None else accuracy_text(row)

    def lost_by(self, labels: list[str], backend: str = "eager") -> list[float]:
        """By how many points each of the models is below the baseline, both in a backend."""
        return [self.top1("baseline", backend) - self.top1(label, backend) for label in labels]

    def lost(self, label: str, to: str = "baseline") -> float:
        """By how many points of top-1 a model is below another one."""
        return self.top1(to) - self.top1(label)

    def points(self, label: str, to: str = "baseline") -> Difference:
        """By how many points of top-1 a model is above another one on the same images, by McNemar's exact test."""
        return points(self.row(label, "top1"), self.row(to, "top1"))

    def surely_above(self, label: str, other: str) -> bool:
        """Whether a model's 95 % interval of top-1 lies above another one's."""
        return self.row(label, "top1")["low"] > self.row(other, "top1")["high"]

    def nats(self, label: str, to: str) -> Difference:
        """By how many nats a model's cross-entropy is above another one's on the same images, by the paired t test."""
        return Difference(paired_loss(self.rows, label, to), 1, 3)

    def mb(self, label: str, metric: str = "bytes", backend: str = "eager") -> float:
        """A metric in millions of bytes."""
        return self.value(label, metric, backend=backend) / 1e6

    def share(self, label: str, metric: str = "bytes") -> float:
        """A metric over the baseline's."""
        return self.value(label, metric) / self.value("baseline", metric)

    def smaller(self, label: str) -> float:
        """How many times fewer bytes a model has than the baseline."""
        return 1 / self.share(label)

    def time(self, label: str, batch: int, backend: str = "eager", versus: str = "") -> float:
        """The median latency over that of the baseline, which ran in `versus` (by default in the same backend)."""
        return self.value(label, "latency_ratio", batch, backend, versus)

    def times(self, label: str, between: str = " / ", backend: str = "eager", versus: str = "") -> str:
        """`time` at batch 1 and 8 with two decimals, `-` where it was not measured."""
        rows = (self.find(label, "latency_ratio", batch, backend, versus) for batch in BATCHES)
        return between.join("-" if row is None else f"{row['value']:.2f}" for row in rows)

    def models(self, metric: str = "top1") -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Label, method and steps (each a method and its config) of every model with a metric in eager mode, once."""
        rows = self.rows[
            (self.rows["metric"] == metric) & (self.rows["backend"].isna() | (self.rows["backend"] == "eager"))
        ]
        for row in rows.drop_duplicates("label").itertuples():
            yield row.label, row.method, row.config["methods"]

    def config(self, label: str) -> dict[str, Any]:
        """The config of the model's first method."""
        return self.rows[self.rows["label"] == label].iloc[0]["config"]["methods"][0]["config"]

    def images(self, label: str = "baseline", backend: str = "eager") -> int:
        """The number of images on which its top-1 was measured."""
        return self.row(label, "top1", backend=backend)["context"]["images"]

    def count(self, metric: str) -> int:
        """How many rows there are of a metric."""
        return int((self.every["metric"] == metric).sum())


def points(first: Any, second: Any) -> Difference:
    """Two rows of accuracy on the same images, in points.

    Raises:
        MissingRow: one does not have a result for each image.
    """
    if not (first["hits"] and second["hits"]):
        raise MissingRow("a row of top-1 without a result for each image cannot be compared with another")
    return Difference(paired_rows(first, second), 100, 2)


def found_in(folder: Path) -> dict[str, Any]:
    """The result file of a benchmark that writes no rows."""
    return json.loads((folder / "found.json").read_text())


def _settings_in(label: str) -> dict[str, str]:
    """The settings that a label names."""
    _, _, settings = label.partition(" (")
    pairs = (part.partition("=") for part in settings.removesuffix(")").split(", ")) if settings else ()
    return {name: setting for name, _, setting in pairs}
