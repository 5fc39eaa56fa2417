"""Measure a saved model: accuracy, size, MACs, latency, memory. Each number becomes a row, once."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vitbench.base import progress
from vitbench.base.errors import InputError, one_of
from vitbench.calibration.moments import BATCH
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
from vitbench.measurement.child import ChildError, make_ready
from vitbench.measurement.cost import Value, about, scored_in
from vitbench.model import artifact, vit
from vitbench.rows import runs
from vitbench.rows.records import DEVICE_GROUPS, GROUPS, Row
from vitbench.rows.runs import Run
from vitbench.training.loop import SCORING_BATCH

DEFAULT_BATCHES = (1, 8)
FORKED = ("latency", "energy", "roofline")  # groups that call `in_child`


@dataclass(frozen=True)
class _Group:
    """What one piece of work yields: a (metric, unit, context) for each value, in order, and the work."""

    title: str
    slots: list[tuple[str, str, dict[str, Any]]]
    work: Callable[[], Iterable[Value]]
    unsupported_reason: Callable[[], str] = str  # why it cannot be had, "" if it can


def measure(
    path: str | Path,
    data: ImageData,
    run: Run,
    *,
    versus: str | Path = "",
    batches: Sequence[int] = DEFAULT_BATCHES,
    threads: int = 2,
    rounds: int = 60,
    starts: int = 1,
    device: str = "auto",
    backend: str = "eager",
    versus_backend: str | Sequence[str] = "",
    what: Sequence[str] = GROUPS,
    power: float = 0.0,
    within: int = 0,
) -> pd.DataFrame:
    """Measure the model saved at `path` and write one row a metric to `run`; what is there already is not done again.

    Args:
        path: a folder written by `save`; it is loaded, and what was loaded is what is measured.
        data: accuracy is that of its test split.
        versus: another saved model to take turns with in the timings, for a ratio that holds on a noisy machine.
        batches: batch sizes to time.
        threads: of the timed process.
        rounds: how often each model is timed.
        starts: fresh processes that share the rounds, so that no single one decides.
        device: where accuracy is computed. Latency and memory are those of the CPU.
        backend: what scores and runs the model: eager, torch_compile, onnxruntime, openvino, ... (see `vitbench.measurement.backends`).
        versus_backend: what times `versus`, by default the same; several for a ratio to each, in turn in one process.
        what: which of accuracy, size, weights and outputs (their errors; need `versus`), latency and memory to measure;
            and, only if asked for: startup (time to the first answer), limit (the smallest limit of memory), energy,
            and roofline (the least time that this machine's measured peaks allow).
        within: bytes; for the group limit, only whether the model answers in so much memory.
        power: watts that the device draws while it computes, for an estimate of energy where nothing counts it.

    Returns:
        This model's rows, new and old.
    """
    path = Path(path)
    if threads < 1 or rounds < 10 or not batches or min(batches) < 1 or not 1 <= starts <= rounds:
        raise InputError(
            f"threads = {threads}, rounds = {rounds}, starts = {starts}, batches = {tuple(batches)}: "
            "at least 1 thread, 10 rounds, batch 1, and from 1 start to one a round"
        )
    for group in what:
        one_of("group of metrics", group, (*GROUPS, *DEVICE_GROUPS))
    if not power >= 0 or within < 0:
        raise InputError(f"power = {power}, within = {within}: watts and bytes, 0 or more")
    others = [versus_backend] if isinstance(versus_backend, str) else versus_backend
    versus_backends = list(dict.fromkeys(other or backend for other in others))
    for each in (backend, *versus_backends):
        backends.available(each)
    manifest = artifact.read_manifest(path)
    outputs = manifest.recipe.architecture.num_classes
    if outputs != len(data.classes):
        raise InputError(
            f"the model has {outputs} outputs and {data.name} has {len(data.classes)} classes; "
            f"give the images that the model was made for, or train it on these first"
        )
    facts = about(manifest.recipe, data)
    done = run.done()
    todo, wanted = [], set()
    every = [
        *_model_groups(path, data, versus, device, backend, what),
        *_device_groups(path, versus, batches, threads, rounds, starts, backend, versus_backends, power, within),
    ]
    for group in [group for group in every if group.title in what]:
        rows = [
            Row(
                **facts,
                metric=metric,
                unit=unit,
                context={**context, "artifact": manifest.sha256[:12]},
                source="measured",
                value=0,
            )
            for metric, unit, context in group.slots
        ]
        keys = {row.identity() for row in rows}
        wanted |= keys
        if not keys <= done:
            todo.append((group, rows))
    if any(group.title in FORKED for group, _ in todo):
        make_ready(threads)
    bar = progress.bar(todo, f"measuring {facts['method']}", unit="group") if todo else []
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


def _model_groups(path, data, versus, device, backend, what) -> Iterable[_Group]:
    """What is true of a model wherever it runs."""
    test = data.require_split("test")
    context = {"split": "test", "images": len(test), "cut": data.origin["test"]}
    context |= {} if backend == "eager" else {"backend": backend}
    context |= scored_in(artifact.read_manifest(path).recipe, SCORING_BATCH)
    metrics = ["top1", *(["top5"] if len(data.classes) > 5 else []), "cross_entropy"]
    slots = [(metric, "nats" if metric == "cross_entropy" else "fraction", context) for metric in metrics]
    own = artifact.read_manifest(path).recipe
    unsupported_reason = functools.partial(backends.unsupported_reason, backend, own)
    yield _Group("accuracy", slots, lambda: accuracy.accuracy(path, data, metrics, device, backend), unsupported_reason)

    units = {"params": "weights", "macs": "MACs", "int8_macs": "MACs", "bytes": "bytes", "bytes_predicted": "bytes"}
    slots = [(metric, unit, {}) for metric, unit in units.items()]
    slots += [("part_bytes", "bytes", {"part": part}) for part in artifact.bytes_by_part(path)]
    yield _Group("size", slots, lambda: cost.cost(path))

    other = artifact.read_manifest(versus).recipe if versus else None
    names = cost.coded_layers(own)
    if other and names:
        context = {**_against(versus), "layers": names}
        yield _Group("weights", [("weight_error", "fraction", context)], lambda: cost.weight_error(path, versus, names))

    if "outputs" in what and other and len(data.calibration) and accuracy.comparable(own, other):
        every = accuracy.layers_of(vit.meta_model(other.architecture))
        context = {**_against(versus), "layers": every, "split": "calibration"}
        context |= scored_in(own, BATCH) | scored_in(other, BATCH)
        units = {"output_error": "fraction", "layer_rank": "rank", "layer_keep": "fraction"}
        slots = [(metric, unit, context) for metric, unit in units.items()]
        yield _Group("outputs", slots, lambda: accuracy.outputs(path, Path(versus), data, every))


def _device_groups(
    path, versus, batches, threads, rounds, starts, backend, versus_backends, power, within
) -> Iterable[_Group]:
    """What a model costs on this device."""
    unsupported_reason = functools.partial(backends.unsupported_reason, backend, artifact.read_manifest(path).recipe)
    machine = {"threads": threads, "device": runs.device_name(backend), "backend": backend}
    slots = [(metric, unit, machine) for metric, unit in fresh.memory_metrics(backend).items()]
    yield _Group("memory", slots, functools.partial(fresh.memory, path, backend, threads), unsupported_reason)
    timed = {**machine, **timing.shared_rounds(rounds, starts), **_against(versus)}
    slots = [slot for batch in batches for slot in timing.slots({**timed, "batch": batch}, versus_backends)]
    yield _Group(
        "latency",
        slots,
        lambda: timing.latency(path, versus, batches, threads, rounds, starts, backend, versus_backends),
        unsupported_reason,
    )
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


def _against(versus: str | Path) -> dict[str, str]:
    """The context of what is measured against another model."""
    if not versus:
        return {}
    other = artifact.read_manifest(versus)
    return {"versus": f"{other.recipe.method}:{other.sha256[:12]}"}
