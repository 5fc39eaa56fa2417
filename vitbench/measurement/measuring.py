"""Measure a saved model: accuracy, size, MACs, latency, memory. Each number becomes a row, once."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.calibration.moments import CALIBRATION_BATCH
from vitbench.data.splits import ImageData
from vitbench.measurement import (
    accuracy,
    backends,
    cost,
    energy,
    fresh,
    limits,
    roofline,
    timing,
    token_scaling,  # noqa: F401  (the import registers its job)
)
from vitbench.measurement.child import ChildError, start_fork_server
from vitbench.measurement.cost import Measurement, batch_context, model_row_fields
from vitbench.measurement.measures import Measures
from vitbench.model import artifact, vit
from vitbench.rows import runs
from vitbench.rows.records import Row
from vitbench.rows.runs import Run
from vitbench.training.loop import SCORING_BATCH

CHILD_GROUPS = ("latency", "energy", "roofline")  # groups that call `in_child`


@dataclass(frozen=True)
class _Group:
    """Metrics that are measured together: (metric, unit, context) of each, and a function that measures them in that order."""

    name: str
    metrics: list[tuple[str, str, dict[str, Any]]]
    measure: Callable[[], Iterable[Measurement]]
    unsupported_reason: Callable[[], str] = str  # why they are not available, "" if they are


def measure(
    path: str | Path,
    data: ImageData,
    run: Run,
    measures: Measures | None = None,
    *,
    versus: str | Path = "",
    **settings: Any,
) -> pd.DataFrame:
    """Measure the model saved at `path` and write one row a metric to `run`. Rows that are there already are not measured again.

    Args:
        path: a folder written by `save`. It is loaded, and the loaded model is measured.
        data: accuracy is measured on its test split.
        versus: a saved baseline. Timings alternate with it, so that their ratio holds on a noisy machine.
        measures: what to measure and how; by default `Measures()`.
        settings: fields of `Measures` by name, which stand over those of `measures`: `what=("size",), rounds=20`.

    Returns:
        This model's rows, new and old.

    Raises:
        InputError: a setting that is not allowed, or images with another number of classes than the model has outputs.
    """
    path = Path(path)
    measures = (measures or Measures()).replace(**settings)
    for name in (measures.backend, *measures.versus_backends):
        backends.require_backend(name)
    manifest = artifact.read_manifest(path)
    outputs = manifest.recipe.architecture.num_classes
    if outputs != len(data.classes):
        raise InputError(
            f"the model has {outputs} outputs and {data.name} has {len(data.classes)} classes; "
            "give images of the model's classes, or train it on these first"
        )
    row_fields = model_row_fields(manifest.recipe, data)
    finished_keys = run.finished_keys()
    missing: list[tuple[_Group, list[Row]]] = []
    row_keys: set[str] = set()
    for group in (*_model_groups(path, data, versus, measures), *_device_groups(path, versus, measures)):
        if group.name not in measures.what:
            continue
        rows = [
            Row(
                **row_fields,
                metric=metric,
                unit=unit,
                context={**context, "artifact": manifest.sha256[:12]},
                source="measured",
                value=0,
            )
            for metric, unit, context in group.metrics
        ]
        group_keys = {row.compute_key() for row in rows}
        row_keys |= group_keys
        if not group_keys <= finished_keys:
            missing.append((group, rows))
    if any(group.name in CHILD_GROUPS for group, _ in missing):
        start_fork_server(measures.threads)
    if missing:
        bar = progress.progress_bar(missing, f"measuring {row_fields['method']}", unit="group")
        for group, rows in bar:
            bar.set_postfix_str(group.name)
            run.append(_measured(group, rows))
    frame = run.rows()
    return frame[frame["key"].isin(row_keys)].reset_index(drop=True)


def _measured(group: _Group, rows: list[Row]) -> list[Row]:
    """The rows with values; skipped or failed rows, with the reason, where there are none."""
    if reason := group.unsupported_reason():
        return [row.replace(status="skipped", error=reason, value=None, source="") for row in rows]
    try:
        measurements = list(group.measure())
    except (ChildError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        print(f"{group.name} could not be measured: {reason}")
        return [row.replace(status="failed", error=reason, value=None, source="") for row in rows]
    pairs = zip(rows, measurements, strict=True)
    return [row.replace(metric=measurement.metric, **measurement.fields()) for row, measurement in pairs]


def _model_groups(path: Path, data: ImageData, versus: str | Path, measures: Measures) -> Iterable[_Group]:
    """The groups whose values do not depend on the device."""
    backend, recipe = measures.backend, artifact.read_manifest(path).recipe
    test = data.require_split("test")
    context = {"split": "test", "images": len(test), "cut": data.origin["test"]}
    context |= {} if backend == "eager" else {"backend": backend}
    context |= batch_context(recipe, SCORING_BATCH)
    names = ["top1", *(["top5"] if len(data.classes) > 5 else []), "cross_entropy"]
    yield _Group(
        "accuracy",
        [(name, "nats" if name == "cross_entropy" else "fraction", context) for name in names],
        functools.partial(accuracy.accuracy, path, data, names, measures.device, backend),
        functools.partial(backends.unsupported_reason, backend, recipe),
    )

    units = {"params": "weights", "macs": "MACs", "int8_macs": "MACs", "bytes": "bytes", "bytes_predicted": "bytes"}
    metrics: list[tuple[str, str, dict[str, Any]]] = [(metric, unit, {}) for metric, unit in units.items()]
    metrics += [("part_bytes", "bytes", {"part": part}) for part in artifact.bytes_by_part(path)]
    yield _Group("size", metrics, functools.partial(cost.cost, path))

    baseline_recipe = artifact.read_manifest(versus).recipe if versus else None
    if baseline_recipe and (coded_names := cost.coded_layers(recipe)):
        context = {**_baseline_context(versus), "layers": coded_names}
        measure_errors = functools.partial(cost.weight_error, path, Path(versus), coded_names)
        yield _Group("weights", [("weight_error", "fraction", context)], measure_errors)

    if not ("outputs" in measures.what and baseline_recipe and len(data.calibration)):
        return
    if accuracy.have_same_blocks(recipe, baseline_recipe):
        layer_names = accuracy.layers_of(vit.meta_model(baseline_recipe.architecture))
        context = {**_baseline_context(versus), "layers": layer_names, "split": "calibration"}
        context |= batch_context(recipe, CALIBRATION_BATCH) | batch_context(baseline_recipe, CALIBRATION_BATCH)
        units = {"output_error": "fraction", "layer_rank": "rank", "layer_keep": "fraction"}
        yield _Group(
            "outputs",
            [(metric, unit, context) for metric, unit in units.items()],
            functools.partial(accuracy.measure_outputs, path, Path(versus), data, layer_names),
        )


def _device_groups(path: Path, versus: str | Path, measures: Measures) -> Iterable[_Group]:
    """The groups whose values are those of this device."""
    backend, threads, batches = measures.backend, measures.threads, measures.batches
    power, within = measures.power, measures.within
    unsupported_reason = functools.partial(backends.unsupported_reason, backend, artifact.read_manifest(path).recipe)
    machine = {"threads": threads, "device": runs.device_name(backend), "backend": backend}
    metrics = [(metric, unit, machine) for metric, unit in fresh.memory_metrics(backend).items()]
    yield _Group("memory", metrics, functools.partial(fresh.memory, path, backend, threads), unsupported_reason)
    timed = {**machine, **timing.shared_rounds(measures.rounds, measures.starts), **_baseline_context(versus)}
    metrics = [
        metric
        for batch in batches
        for metric in timing.latency_metrics({**timed, "batch": batch}, measures.versus_backends)
    ]
    yield _Group("latency", metrics, functools.partial(timing.latency, path, versus, measures), unsupported_reason)
    metrics = [(metric, unit, machine) for metric, unit in fresh.STARTUP.items()]
    yield _Group("startup", metrics, functools.partial(fresh.startup, path, backend, threads), unsupported_reason)
    measure_limit = functools.partial(fresh.memory_limit, path, backend, threads)
    metrics = [("memory_limit", "bytes", machine)]
    if within:
        measure_limit = functools.partial(fresh.answers_within, path, backend, threads, within)
        metrics = [("answers_within", "1 or 0", {**machine, "limit": within})]
    yield _Group("limit", metrics, measure_limit, lambda: unsupported_reason() or limits.unsupported_reason())
    yield _Group(
        "energy",
        [("energy", "J", machine | ({"power": power} if power else {}))],
        functools.partial(energy.energy, path, backend, threads, power),
        lambda: unsupported_reason() or energy.unsupported_reason(backend, power),
    )
    machine_without_backend = {key: value for key, value in machine.items() if key != "backend"}
    metrics = [
        (metric, "ms", {**machine_without_backend, "batch": batch})
        for metric in ("latency_floor", "products_time")
        for batch in batches
    ]
    yield _Group("roofline", metrics, functools.partial(roofline.roofline, path, batches, threads))


def _baseline_context(versus: str | Path) -> dict[str, str]:
    """The context of rows that compare a model with the baseline `versus`."""
    if not versus:
        return {}
    manifest = artifact.read_manifest(versus)
    return {"versus": f"{manifest.recipe.method}:{manifest.sha256[:12]}"}
