"""One experiment, a baseline and the models made from it: their rows, the labels of the models, and finding a row.

A label is the method's name with the settings that differ from those of the method's first row.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitbench.base.errors import InputError

MEGA = 1e6
EAGER = "eager"


@dataclass(frozen=True, eq=False)
class Experiment:
    """The ok rows of a baseline and of the models made from it.

    Attributes:
        rows: with a column `label`, the label of the row's model.
    """

    rows: pd.DataFrame

    @classmethod
    def of(cls, rows: "pd.DataFrame | Experiment") -> "Experiment":
        """The experiment of the last row, which is ok, among rows of several.

        Rows of another model or data set, or of a baseline that was trained with other settings or another seed, belong to
        another experiment. An experiment is returned unchanged, and so are its rows.

        Raises:
            InputError: there is no ok row.
        """
        if isinstance(rows, Experiment):
            return rows
        if "label" in rows:
            return cls(rows)
        ok_rows = rows[rows["status"] == "ok"]
        if not len(ok_rows):
            raise InputError("the records hold no ok row; run the baseline and a method first")
        ok_rows = ok_rows[_same_experiment(ok_rows)].copy()
        ok_rows["label"] = _row_labels(ok_rows)
        return cls(ok_rows)

    @property
    def timed_labels(self) -> list[str]:
        """The labels with a latency (all labels, if none has one), the baseline first, the others in the order of their rows.

        Figures of time show these; tables and figures of size show `model_labels`.
        """
        timed = self.of_metrics("latency_p50")
        labels = dict.fromkeys((timed if len(timed) else self.rows)["label"])
        return sorted(labels, key=lambda label: label != "baseline")

    @property
    def model_labels(self) -> list[str]:
        """`timed_labels`, then the labels of all other models with a file; a search has rows and no file."""
        return list(dict.fromkeys((*self.timed_labels, *self.of_metrics("bytes")["label"])))

    def of_metrics(self, *metrics: str) -> pd.DataFrame:
        """The rows of these metrics."""
        return self.rows[self.rows["metric"].isin(metrics)]

    def find(
        self, label: str, metric: str, batch: int | None = None, backend: str = EAGER, versus: str = ""
    ) -> pd.Series | None:
        """The last row of a model's metric at a batch size and `in_backend`; None if there is none.

        A row of this backend is preferred to one without a backend.
        """
        rows = self.rows[(self.rows["label"] == label) & (self.rows["metric"] == metric)]
        rows = rows[in_backend(rows, backend, versus)]
        if batch is not None:
            rows = rows[rows["batch"] == batch]
        exact_rows = rows[rows["backend"] == backend]
        rows = exact_rows if len(exact_rows) else rows
        return rows.iloc[-1] if len(rows) else None

    def require(self, label: str, metric: str, batch: int | None = None) -> pd.Series:
        """`find`, where nothing can be shown without the row.

        Raises:
            InputError: no such row.
        """
        row = self.find(label, metric, batch)
        if row is None:
            raise InputError(f"the rows hold no {metric} of {label!r}; measure it first")
        return row

    def by_image(self, label: str, metric: str = "top1", field: str = "hits") -> pd.Series:
        """The row of a metric with its values for each image, which are in `field`.

        Raises:
            InputError: no such row, or it has no values for each image.
        """
        row = self.find(label, metric)
        if row is None or not row[field]:
            raise InputError(f"the rows hold no {metric} of {label!r} image by image; measure its accuracy again")
        return row

    def number(self, label: str, metric: str, *, field: str = "value", **selection: Any) -> float:
        """A field of the row that `find` gives; NaN if it was not measured."""
        row = self.find(label, metric, **selection)
        return float("nan") if row is None or row[field] is None else row[field]

    def ratios(self, label: str) -> list[pd.Series]:
        """The model's rows of latency ratios in eager mode, one for each batch size, smallest batch first."""
        rows = self.of_metrics("latency_ratio")
        batches = rows["batch"][(rows["label"] == label) & in_backend(rows)]
        return [self.require(label, "latency_ratio", batch) for batch in sorted(batches.unique())]


def in_backend(rows: pd.DataFrame, backend: str = EAGER, versus: str = "") -> pd.Series:
    """Whether each row was measured in `backend` or has no backend (bytes, eager accuracy).

    `versus` is the backend of the baseline of a latency ratio; "" means the same backend.
    """
    is_in_backend = (rows["backend"] == backend) | rows["backend"].isna()
    return is_in_backend & (rows["versus_backend"].eq(versus) if versus else rows["versus_backend"].isna())


def over_seeds(rows: pd.DataFrame) -> Experiment:
    """The experiment of the last row with all its seeds: configs and labels name no seed.

    Raises:
        InputError: there is no ok row.
    """
    rows = rows.drop(columns="label", errors="ignore")
    return Experiment.of(rows.assign(config=rows["config"].map(_seedless)))


def across_seeds(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The values of a metric for all seeds, for the model and images of the last row: columns label, seed, value, key.

    The seed is that of both baseline and method. All other settings are those of the label.

    Raises:
        InputError: there is no ok row of the metric.
    """
    rows = over_seeds(rows[rows["metric"] == metric]).rows
    return rows.drop_duplicates(["label", "seed"], keep="last")[["label", "seed", "value", "key"]]


def _seedless(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config, dict):
        return {key: _seedless(value) for key, value in config.items() if key != "seed"}
    return [_seedless(item) for item in config] if isinstance(config, list) else config


def _same_experiment(rows: pd.DataFrame) -> pd.Series:
    """Whether each row has the images, the model and the origin of the baseline of the last row."""
    last = rows.iloc[-1]
    is_same = rows["model"].eq(last["model"]) & rows["data_fingerprint"].eq(last["data_fingerprint"])
    is_same &= rows["dataset"].eq(last["dataset"])
    trained = _origins_of_files(rows[is_same])
    origin = _origin(last["config"], trained)
    is_same[is_same] = [_origin(config, trained) == origin for config in rows["config"][is_same]]
    return is_same


def _origins_of_files(rows: pd.DataFrame) -> dict[str, Any]:
    """How each baseline's weights were made, by the start of the SHA-256 of its file."""
    baselines = rows[rows["method"] == "baseline"]
    files = (context.get("artifact") for context in baselines["context"])
    return {file: config.get("origin") for file, config in zip(files, baselines["config"], strict=True) if file}


def _origin(config: dict[str, Any], trained: dict[str, Any]) -> Any:
    """How the weights were made; of a model that starts from a baseline's very file, how that one's were made."""
    origin = config.get("origin") or {}
    if origin.get("head") == "same" and "train" not in origin:
        return trained.get(origin.get("start", "").rpartition(":")[2], origin)
    return origin


def _row_labels(rows: pd.DataFrame) -> list[str]:
    """The label of each row: the method, with `key=value` for settings that differ from those of the method's first row."""
    default_settings: dict[str, dict[str, Any]] = {}
    label_cache: dict[tuple[str, int], str] = {}  # many rows share one config object
    labels = []
    for method, config in zip(rows["method"], rows["config"], strict=True):
        label = label_cache.get((method, id(config)))
        if label is None:
            settings = _settings(config)
            label = label_cache[method, id(config)] = _label(
                method, settings, default_settings.setdefault(method, settings)
            )
        labels.append(label)
    return labels


def _label(method: str, settings: dict[str, Any], default_settings: dict[str, Any]) -> str:
    """The method with the settings that differ from the default ones, and the images that differ from the measured ones."""
    differing = sorted(
        key
        for key, value in settings.items()
        if "images" in key.split(".") or (value != default_settings.get(key, value) and has_effect(key, settings))
    )
    return method + (f" ({', '.join(f'{key}={_short(settings[key])}' for key in differing)})" if differing else "")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of all methods of a row, in one mapping."""
    steps = config.get("methods", [])
    settings: dict[str, Any] = {}
    for step in steps:
        settings |= flat_settings(step_settings(step), f"{step['method']}." if len(steps) > 1 else "")
    return settings


def step_settings(step: dict[str, Any]) -> dict[str, Any]:
    """The settings of a method in a row, with those of its images if they are not the images that it was measured with."""
    images = dict(step.get("images", {}))
    if len(images) > 1:
        images.pop("fingerprint")  # the amounts say it
    return {**step["config"], **({"images": images} if images else {})}


def _short(setting: Any) -> Any:
    """A setting in a label: 0.40625 instead of 0.4062499999674."""
    return f"{setting:.6g}" if isinstance(setting, float) else setting


def has_effect(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting has an effect; settings of a training of 0 epochs have none."""
    group, _, name = key.rpartition(".")
    return name == "epochs" or settings.get(f"{group}.epochs") != 0


def flat_settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's settings in one mapping; those of nested configs have keys such as `train.epochs`."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        settings |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return settings
