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
    token_scaling,  # noqa: F401  (its job is registered)
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
    """What one piece of work yields: a (metric, unit, context) for each value, in order, and the work."""

    title: str
    metrics: list[tuple[str, str, dict[str, Any]]]
    work: Callable[[], Iterable[Measurement]]
    unsupported_reason: Callable[[], str] = str  # why it cannot be had, "" if it can


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
            f"give the images that the model was made for, or train it on these first"
        )
    facts = model_row_fields(manifest.recipe, data)
    done = run.finished_keys()
    todo, wanted = [], set()
    every = [
        *_model_groups(path, data, versus, measures),
        *_device_groups(path, versus, measures),
    ]
    for group in [group for group in every if group.title in measures.what]:
        rows = [
            Row(
                **facts,
                metric=metric,
                unit=unit,
                context={**context, "artifact": manifest.sha256[:12]},
                source="measured",
                value=0,
            )
            for metric, unit, context in group.metrics
        ]
        keys = {row.compute_key() for row in rows}
        wanted |= keys
        if not keys <= done:
            todo.append((group, rows))
    if any(group.title in CHILD_GROUPS for group, _ in todo):
        start_fork_server(measures.threads)
    bar = progress.progress_bar(todo, f"measuring {facts['method']}", unit="group") if todo else []
    for group, rows in bar:
        bar.set_postfix_str(group.title)
        run.append(_measured(group, rows))
    frame = run.rows()
    return frame[frame["key"].isin(wanted)].reset_index(drop=True)


def _measured(group: _Group, rows: list[Row]) -> list[Row]:
    if why := group.unsupported_reason():
        return [row.replace(status="skipped", error=why, value=None, source="") for row in rows]
    try:
        values = list(group.work())
    except (ChildError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        print(f"{group.title} could not be measured: {reason}")
        return [row.replace(status="failed", error=reason, value=None, source="") for row in rows]
    return [row.replace(metric=value.metric, **value.fields()) for row, value in zip(rows, values, strict=True)]


def _model_groups(path: Path, data: ImageData, versus: str | Path, measures: Measures) -> Iterable[_Group]:
    """What is true of a model wherever it runs."""
    backend = measures.backend
    test = data.require_split("test")
    context = {"split": "test", "images": len(test), "cut": data.origin["test"]}
    context |= {} if backend == "eager" else {"backend": backend}
    context |= batch_context(artifact.read_manifest(path).recipe, SCORING_BATCH)
    metrics = ["top1", *(["top5"] if len(data.classes) > 5 else []), "cross_entropy"]
    slots = [(metric, "nats" if metric == "cross_entropy" else "fraction", context) for metric in metrics]
    own = artifact.read_manifest(path).recipe
    unsupported_reason = functools.partial(backends.unsupported_reason, backend, own)
    yield _Group(
        "accuracy", slots, lambda: accuracy.accuracy(path, data, metrics, measures.device, backend), unsupported_reason
    )

    units = {"params": "weights", "macs": "MACs", "int8_macs": "MACs", "bytes": "bytes", "bytes_predicted": "bytes"}
    slots = [(metric, unit, {}) for metric, unit in units.items()]
    slots += [("part_bytes", "bytes", {"part": part}) for part in artifact.bytes_by_part(path)]
    yield _Group("size", slots, lambda: cost.cost(path))

    other = artifact.read_manifest(versus).recipe if versus else None
    names = cost.coded_layers(own)
    if other and names:
        context = {**_baseline_context(versus), "layers": names}
        yield _Group("weights", [("weight_error", "fraction", context)], lambda: cost.weight_error(path, versus, names))

    if "outputs" in measures.what and other and len(data.calibration) and accuracy.have_same_blocks(own, other):
        every = accuracy.layers_of(vit.meta_model(other.architecture))
        context = {**_baseline_context(versus), "layers": every, "split": "calibration"}
        context |= batch_context(own, CALIBRATION_BATCH) | batch_context(other, CALIBRATION_BATCH)
        units = {"output_error": "fraction", "layer_rank": "rank", "layer_keep": "fraction"}
        slots = [(metric, unit, context) for metric, unit in units.items()]
        yield _Group("outputs", slots, lambda: accuracy.measure_outputs(path, Path(versus), data, every))


def _device_groups(path: Path, versus: str | Path, measures: Measures) -> Iterable[_Group]:
    """What a model costs on this device."""
    backend, threads, batches = measures.backend, measures.threads, measures.batches
    power, within = measures.power, measures.within
    unsupported_reason = functools.partial(backends.unsupported_reason, backend, artifact.read_manifest(path).recipe)
    machine = {"threads": threads, "device": runs.device_name(backend), "backend": backend}
    slots = [(metric, unit, machine) for metric, unit in fresh.memory_metrics(backend).items()]
    yield _Group("memory", slots, functools.partial(fresh.memory, path, backend, threads), unsupported_reason)
    timed = {**machine, **timing.shared_rounds(measures.rounds, measures.starts), **_baseline_context(versus)}
    slots = [
        slot
        for batch in batches
        for slot in timing.latency_metrics({**timed, "batch": batch}, measures.versus_backends)
    ]
    yield _Group("latency", slots, functools.partial(timing.latency, path, versus, measures), unsupported_reason)
    slots = [(metric, unit, machine) for metric, unit in fresh.STARTUP.items()]
    yield _Group("startup", slots, functools.partial(fresh.startup, path, backend, threads), unsupported_reason)
    work = functools.partial(fresh.memory_limit, path, backend, threads)
    slots = [("memory_limit", "bytes", machine)]
    if within:
        work = functools.partial(fresh.answers_within, path, backend, threads, within)
        slots = [("answers_within", "1 or 0", {**machine, "limit": within})]
    yield _Group("limit", slots, work, lambda: unsupported_reason() or limits.unsupported_reason())
    slots = [("energy", "J", machine | ({"power": power} if power else {}))]
    work = functools.partial(energy.energy, path, backend, threads, power)
    yield _Group("energy", slots, work, lambda: unsupported_reason() or energy.unsupported_reason(backend, power))
    bare = {key: value for key, value in machine.items() if key != "backend"}
    slots = [
        (metric, "ms", {**bare, "batch": batch}) for metric in ("latency_floor", "products_time") for batch in batches
    ]
    yield _Group("roofline", slots, functools.partial(roofline.roofline, path, batches, threads))


def _baseline_context(versus: str | Path) -> dict[str, str]:
    """The context of what is measured against another model."""
    if not versus:
        return {}
    other = artifact.read_manifest(versus)
    return {"versus": f"{other.recipe.method}:{other.sha256[:12]}"}
