"""Verification: rebuild models from the configs in their rows, and compare the numbers."""

import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vitbench.base import paths
from vitbench.base.errors import InputError, one_of
from vitbench.data.splits import ImageData
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import make_config
from vitbench.rows.runs import Run
from vitbench.run import cache
from vitbench.training.config import TrainConfig

METRICS = {  # metric -> the tolerance, in words
    "top1": "inside the row's 95 % interval",
    "macs": "the same",
    "params": "the same",
    "bytes": "within 0.1 % and 512 bytes",
}


@dataclass(frozen=True)
class Check:
    """A row and the value that was measured here."""

    row: pd.Series
    measured: float

    @property
    def within(self) -> bool:
        """Whether `measured` is within the metric's tolerance (`METRICS`)."""
        expected = self.row["value"]
        if self.row["metric"] == "top1":
            return self.row["low"] - 1e-12 <= self.measured <= self.row["high"] + 1e-12
        slack = 512 + 0.001 * expected if self.row["metric"] == "bytes" else 0
        return abs(self.measured - expected) <= slack


def verify(
    rows: pd.DataFrame,
    data: ImageData,
    *,
    only: Sequence[str] = (),
    models: int = 4,
    metrics: Sequence[str] = tuple(METRICS),
    checkpoint: str | Path = "",
    img_size: int | None = None,
) -> list[Check]:
    """Rebuild some of the models of the rows from their configs, and measure them.

    Args:
        rows: as `load_records` returns them; those on other images than `data` are left out.
        only: methods; none for all.
        models: how many, spread evenly over those in the rows; 0 for all.
        metrics: of `METRICS`.
        checkpoint, img_size: of the baselines, where they do not start at random with the model's own size.

    Returns:
        A check for each row of those models with one of the metrics.

    Raises:
        InputError: no such rows on these images, or a baseline that starts from other weights than the rows'.
    """
    for metric in metrics:
        one_of("metric", metric, METRICS)
    ok_rows = rows[
        (rows["status"] == "ok") & rows["metric"].isin(metrics) & (rows["data_fingerprint"] == data.fingerprint)
    ]
    ok_rows = ok_rows[ok_rows["backend"].isna() | (ok_rows["backend"] == "eager")]
    for method in only:
        one_of("method among the rows", method, dict.fromkeys(ok_rows["method"]))
    ok_rows = ok_rows[ok_rows["method"].isin(only)] if only else ok_rows
    if not len(ok_rows):
        raise InputError(
            f"no row of {', '.join(metrics)} is on these images ({data.name}, fingerprint {data.fingerprint}); give the "
            "dataset and splits that the rows were made with"
        )
    texts = [json.dumps([row.model, row.config], sort_keys=True) for row in ok_rows.itertuples()]
    groups = [group for _, group in ok_rows.groupby(texts, sort=False)]
    if models and len(groups) > models:
        groups = [groups[round(i * (len(groups) - 1) / max(1, models - 1))] for i in range(models)]
    return [check for group in groups for check in _remake_and_check(group, data, checkpoint, img_size)]


def _remake_and_check(
    group: pd.DataFrame, data: ImageData, checkpoint: str | Path, img_size: int | None
) -> list[Check]:
    first = group.iloc[0]
    cached = remake(first["model"], first["config"], data, checkpoint, img_size)
    what = [
        name
        for name, metrics in {"accuracy": {"top1"}, "size": set(METRICS) - {"top1"}}.items()
        if metrics & set(group["metric"])
    ]
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(cached.path, data, Run(folder), what=what).set_index("metric")["value"]
    return [
        Check(row, float(measured[row["metric"]]))
        for _, row in group.iterrows()
        if not math.isnan(measured[row["metric"]])
    ]


def remake(
    model: str, config: dict[str, Any], data: ImageData, checkpoint: str | Path = "", img_size: int | None = None
) -> cache.CachedModel:
    """Rebuild the model of a row from the row's `model` and `config`.

    A baseline that starts from a model of the project is found by that model's name.

    Raises:
        InputError: the baseline starts from other weights than the row's.
    """
    origin = config.get("origin", {})
    train = TrainConfig(**origin.get("train", {"epochs": 0}))
    expected_start = origin.get("start", "random")
    shipped_name = expected_start.partition(":")[0]
    if not checkpoint and paths.shipped(shipped_name):
        model = shipped_name
    initial_model = cache.create_initial_model(model, data, train, checkpoint=checkpoint, img_size=img_size)
    if (start := initial_model.recipe.origin["start"]) != expected_start:
        raise InputError(
            f"the rows' {model} starts from {expected_start}, and this one from {start}; give that checkpoint"
        )
    base = cache.baseline(model, data, train, checkpoint=checkpoint, img_size=img_size)
    cached = base
    for images, steps in itertools.groupby(config.get("methods", []), lambda step: step.get("images", {})):
        configs = [make_config(step["method"], step["config"]) for step in steps]
        cached = cache.compress_cached(cached, configs, _images_of_step(images, data))
    return cached


def _images_of_step(images: dict[str, Any], data: ImageData) -> ImageData:
    """The images that a method used, which a row holds as what differs from those that it was measured with."""
    if not images:
        return data
    same_set = images.get("name", data.name) == data.name
    amounts = {key: value for key, value in images.items() if key not in ("fingerprint", "name")}
    used = data.reload(**amounts) if same_set else data
    if used.fingerprint != images["fingerprint"]:
        raise InputError(
            f"a method of the row used other images ({images}) than can be cut from {data.name} ({data.amounts})"
        )
    return used
