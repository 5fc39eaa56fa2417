"""What templates ask of results: one folder's rows as numbers and as the text of a page."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from vitbench.rows.comparison_table import accuracy_text, experiment_rows, paired_loss, paired_rows
from vitbench.rows.row_table import load_records

BATCHES = (1, 8)


class MissingRow(LookupError):
    """A page asks for a row that no folder has."""


class Difference:
    """A paired test of two models on the same images; as text it is what tables show.

    Attributes:
        difference, low, high: the difference and its 95 % interval, in points or nats.
        p: of the test.
        apart: whether the test tells the two apart, at 5 %.
        better: whether they are apart and the first is above.
    """

    def __init__(self, test: Any, scale: float, digits: int):
        self.difference, self.low, self.high = (scale * number for number in (test.difference, test.low, test.high))
        self.p, self.digits = test.p, digits

    @property
    def apart(self) -> bool:
        return self.p < 0.05

    @property
    def better(self) -> bool:
        return self.apart and self.difference > 0

    def __str__(self) -> str:
        number = f"+.{self.digits}f"
        return f"{self.difference:{number}} [{self.low:{number}}, {self.high:{number}}] (p = {self.p:.2g})"


class Results:
    """The rows of one results folder, or of several together: those of the last row's baseline and of what was made from it.

    Attributes:
        name: of the folder, or of all.
        rows: as `vitbench.rows.comparison_table.experiment_rows` gives them, with a label for each model.
        every: the rows of all models, seeds and statuses, the last about each thing.
        measured: all rows, those that were measured again later too.
    """

    def __init__(self, *folders: Path):
        self.name = ", ".join(folder.name for folder in folders)
        self.every, self.measured = (
            pd.concat([load_records(folder, latest=latest) for folder in folders], ignore_index=True)
            for latest in (True, False)
        )
        self.rows = experiment_rows(self.every)
        self._kept: dict[int, pd.Series] = {}

    def row(
        self, label: str, metric: str, batch: int | None = None, backend: str = "eager", versus: str = ""
    ) -> pd.Series:
        """The last row of a metric of the model with that label; `versus` is the backend of a ratio's baseline.

        Raises:
            MissingRow: there is none; one of another backend does not stand in for it.
        """
        found = self.find(label, metric, batch, backend, versus)
        if found is None:
            raise MissingRow(
                f"{self.name} has no {metric} of {label!r} (batch {batch}, {backend}); it has {', '.join(self.labels())}"
            )
        return found

    def find(
        self, label: str, metric: str, batch: int | None = None, backend: str = "eager", versus: str = ""
    ) -> pd.Series | None:
        """As `row`, or None; of rows of eager mode one that names it goes before one that names no backend."""
        exact, without = [], []
        for place, its_backend, its_versus, its_batch in self._places.get((label, metric), ()):
            if its_versus == versus and batch in (None, its_batch):
                if its_backend == backend:
                    exact.append(place)
                elif not its_backend:
                    without.append(place)
        found = exact or (without if backend == "eager" else [])
        return self._at(found[-1]) if found else None

    @cached_property
    def _places(self) -> dict[tuple[str, str], list[tuple[int, str, str, float]]]:
        """For each label and metric the places of its rows with backend, versus and batch: pandas is slow at many small questions."""
        found: dict[tuple[str, str], list[tuple[int, str, str, float]]] = {}
        names = ("label", "metric", "backend", "versus_backend", "batch")
        for place, (label, metric, *backends, batch) in enumerate(zip(*(self.rows[name] for name in names))):
            backend, versus = (name if isinstance(name, str) else "" for name in backends)
            found.setdefault((label, metric), []).append((place, backend, versus, batch))
        return found

    def _at(self, place: int) -> pd.Series:
        if place not in self._kept:
            self._kept[place] = self.rows.iloc[place]
        return self._kept[place]

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
        """The label of the one model of a method that has these settings and no other that its label names.

        A setting of a nested config is given with two underscores: `train__epochs=2`.
        """
        wanted = {name.replace("__", "."): str(setting) for name, setting in settings.items()}
        found = [label for label in self.labels(method) if _named(label).items() == wanted.items()]
        if len(found) != 1:
            raise MissingRow(f"{self.name} has {len(found)} models of {method} with {wanted}: {self.labels(method)}")
        return found[0]

    def trained(self, method: str, **settings: Any) -> str:
        """The label of the one model of a method that has these settings and was trained, however its label says so."""
        wanted = {name.replace("__", "."): str(setting) for name, setting in settings.items()}
        found = []
        for label in self.labels(method):
            own = _named(label)
            rest = {name: setting for name, setting in own.items() if "train." not in name}
            if rest == wanted and any(name.endswith("train.epochs") and own[name] != "0" for name in own):
                found.append(label)
        if len(found) != 1:
            raise MissingRow(f"{self.name} has {len(found)} trained models of {method} with {wanted}: {found}")
        return found[0]

    def top1(self, label: str, backend: str = "eager") -> float:
        """Top-1 in per cent."""
        return 100 * self.value(label, "top1", backend=backend)

    def accuracy(self, label: str, backend: str = "eager") -> str:
        """Top-1 in per cent with its 95 % interval; `-` where it was not measured."""
        found = self.find(label, "top1", backend=backend)
        return "-" if found is None else accuracy_text(found)

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
        """How many images its top-1 was measured on."""
        return self.row(label, "top1", backend=backend)["context"]["images"]

    def count(self, metric: str) -> int:
        """How many rows there are of a metric."""
        return int((self.every["metric"] == metric).sum())


def points(first: Any, second: Any) -> Difference:
    """Two rows of accuracy on the same images, in points.

    Raises:
        MissingRow: one does not have its answers image by image.
    """
    if not (first["hits"] and second["hits"]):
        raise MissingRow("a row of top-1 without its answers image by image cannot be compared with another")
    return Difference(paired_rows(first, second), 100, 2)


def found_in(folder: Path) -> dict[str, Any]:
    """What a benchmark that leaves no rows wrote into a folder."""
    return json.loads((folder / "found.json").read_text())


def _named(label: str) -> dict[str, str]:
    """The settings that a label names."""
    _, _, settings = label.partition(" (")
    pairs = (part.partition("=") for part in settings.removesuffix(")").split(", ")) if settings else ()
    return {name: setting for name, _, setting in pairs}
