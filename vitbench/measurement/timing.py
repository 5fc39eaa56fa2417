"""Latency: percentiles of single calls in a fresh process, alternating with a second model for a ratio."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitbench.base import locks
from vitbench.base.paths import model_cache, writable_folder
from vitbench.base.standalone import time_alternating
from vitbench.measurement.child import ChildError, in_child, job
from vitbench.measurement.cost import Measurement
from vitbench.measurement.measures import Measures
from vitbench.rows.statistics import quiet_latency_ratio

PERCENTILES = (50, 90, 95, 99)
MALLOC_NOTE = " (malloc told to keep freed memory)"  # see `standalone.keep_freed_memory`


@dataclass(frozen=True)
class BackendTiming:
    """A model's calls in a backend.

    Attributes:
        times: milliseconds of each call.
        logit_distance: from eager's logits, relative to the largest of them (`backends.logit_distance`).
        tolerance: the largest distance that is allowed.
    """

    times: list[float]
    logit_distance: float
    tolerance: float


def latency(path: Path, versus: str | Path, measures: Measures) -> Iterator[Measurement]:
    """Time the model at `path` at each batch size, in as many child processes as there are `starts`.

    If `versus` is given, its calls in each of `versus_backends` alternate with the model's, for a ratio to each.

    Raises:
        ChildError: a model cannot be prepared, or its process failed.
    """
    starts, backend = measures.starts, measures.backend
    models = [(os.path.abspath(path), backend)]
    if versus:
        models += [(os.path.abspath(versus), name) for name in measures.versus_backends]
    for results in compare_latency(models, measures.batches, measures.threads, measures.rounds, starts):
        timings = []
        for result in results:
            if isinstance(result, str):
                raise ChildError(result)
            timings.append(result)
        yield from latency_values(backend, timings[0], [timing.times for timing in timings[1:]], starts=starts)


def latency_values(
    backend: str, timing: BackendTiming, baseline_times: Sequence[list[float]], location: str = "", starts: int = 1
) -> Iterator[Measurement]:
    """The values of `latency_metrics`, in order: percentiles, a ratio to each of `baseline_times`, the logits' distance.

    Args:
        baseline_times: milliseconds of each baseline whose calls alternated with the model's.
        location: where the calls were made, for the rows' source; by default in fresh processes.
        starts: processes that share the rounds.
    """
    turn_text = ", in turn with the baseline" if baseline_times else ""
    location = location or ("in a fresh process" if starts == 1 else f"in {starts} fresh processes") + MALLOC_NOTE
    source = f"measured: {len(timing.times)} calls {location} after warm-up{turn_text}"
    for p in PERCENTILES:
        samples = timing.times if p == 50 else None
        yield Measurement(f"latency_p{p}", float(np.percentile(timing.times, p)), source, samples=samples)
    for times in baseline_times:
        ratio, low, high = quiet_latency_ratio(timing.times, times, starts)
        yield Measurement(
            "latency_ratio",
            ratio,
            source + "; median ratio of the quietest quarter of the rounds, bootstrap 95 %",
            low,
            high,
            samples=times,
        )
    if backend != "eager":
        limit = f"{timing.tolerance} is allowed"
        source = f"measured: largest difference from eager's logits over the largest of them; {limit}"
        yield Measurement("logit_distance", timing.logit_distance, source)


def shared_rounds(rounds: int, starts: int) -> dict[str, int]:
    """The context of a timing: its rounds, and the processes that share them if there are several."""
    return {"rounds": rounds} | ({"starts": starts} if starts > 1 else {})


def latency_metrics(context: dict[str, Any], versus_backends: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """The metric, unit and context of each of `latency_values`.

    Args:
        context: what all of them share; `versus` in it if there is a baseline.
        versus_backends: the backends of the baseline, with a ratio to each.
    """
    backend = context["backend"]
    backend_contexts = {name: {} if name == backend else {"versus_backend": name} for name in versus_backends}
    percentile_context = context
    if backend not in backend_contexts and "versus" in context:
        percentile_context = context | backend_contexts[versus_backends[0]]
    metrics = [(f"latency_p{p}", "ms", percentile_context) for p in PERCENTILES]
    if "versus" in context:
        metrics += [("latency_ratio", "ratio", context | added) for added in backend_contexts.values()]
    if backend != "eager":
        unshared = {key: value for key, value in context.items() if key not in ("rounds", "starts", "versus")}
        metrics.append(("logit_distance", "fraction", unshared))
    return metrics


def compare_latency(
    models: Sequence[tuple[str, str]], batches: Sequence[int], threads: int, rounds: int, starts: int = 1
) -> Iterator[list[BackendTiming | str]]:
    """Time each (path, backend) at each batch size, with alternating calls; the reason if a model cannot be prepared.

    For each batch size the rounds are shared by `starts` fresh processes, one after the other. All rounds of one process
    share its memory layout and the machine's state, so several processes show how much these change the times.
    """
    for batch in batches:
        with timing_lock(), tempfile.TemporaryDirectory() as exported:
            job_arguments = {
                "models": list(models),
                "batch": batch,
                "rounds": -(-rounds // starts),
                "exported": exported,
            }
            per_start = [in_child("time_models", threads, **job_arguments)["timed"] for _ in range(starts)]
        yield [_pool_starts(results) for results in zip(*per_start, strict=True)]


def _pool_starts(results: Sequence[dict[str, Any] | str]) -> BackendTiming | str:
    """One model's calls in all processes, as many from each; the reason if it failed in one of them."""
    timings = []
    for result in results:
        if isinstance(result, str):
            return result
        timings.append(BackendTiming(**result))
    calls_per_start = min(len(timing.times) for timing in timings)
    times = [time for timing in timings for time in timing.times[:calls_per_start]]
    return BackendTiming(times, max(timing.logit_distance for timing in timings), timings[0].tolerance)


def timing_lock() -> AbstractContextManager:
    """A lock to hold during a timing, because two timings at once would disturb each other."""
    return locks.locked(writable_folder(model_cache(), "cache") / "timing.lock")


@job
def time_models(models: list[tuple[str, str]], batch: int, rounds: int, exported: str) -> dict[str, Any]:
    """`timed` has for each model the fields of `BackendTiming`, or the reason why it cannot be prepared.

    Files that backends run are read from the folder `exported` if they are there, else written to it.
    """
    import torch

    torch.manual_seed(0)  # the same images in each process, so that the distances are the same too
    with torch.inference_mode():
        prepared = [_prepare_call(*model, batch, Path(exported, str(models.index(model)))) for model in models]
        times = iter(time_alternating([item[0] for item in prepared if not isinstance(item, str)], rounds))
    return {
        "timed": [item if isinstance(item, str) else asdict(BackendTiming(next(times), *item[1:])) for item in prepared]
    }


def _prepare_call(path: str, backend: str, batch: int, stem: Path) -> tuple[Callable[[], Any], float, float] | str:
    """A call of the model with a batch, its distance from eager and the tolerance; or the reason why there is none."""
    import torch

    from vitbench.measurement import backends
    from vitbench.model import artifact

    try:
        model = artifact.load(path)
        size = model.recipe.preprocess.size
        x = torch.randn(batch, 3, size, size)
        call, logit_distance = backends.prepare_checked(backend, model, x, stem)
    except (RuntimeError, ValueError, MemoryError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return lambda: call(x), logit_distance, backends.tolerance(backend, model)
