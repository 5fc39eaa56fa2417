"""Latency: percentiles of single calls in a fresh process, in turn with a second model for a ratio."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vitbench.measure.child import in_child, job
from vitbench.measure.value import Value
from vitbench.paths import model_cache, writable_folder
from vitbench.statistics import median_ratio

PERCENTILES = (50, 90, 95, 99)
WARM_CALLS, WARM_SECONDS, STABLE = 10, 10.0, 0.05
MIN_ROUNDS, MAX_SECONDS = 20, 60.0


def metrics(against_baseline: bool) -> dict[str, str]:
    """Metric -> unit of what `latency` yields for each batch size, in order."""
    ratio = {"latency_ratio": "ratio"} if against_baseline else {}
    return {f"latency_p{p}": "ms" for p in PERCENTILES} | ratio


def latency(
    path: Path,
    versus: str | Path,
    batches: Sequence[int],
    threads: int,
    rounds: int,
    backend: str,
    versus_backend: str,
) -> Iterator[Value]:
    """Time the model at `path`, in turn with the one at `versus` if given, in a child process, batch size by batch size."""
    models = [(str(path), backend), *([(str(versus), versus_backend)] if versus else [])]
    with locked():
        timed = in_child("time_models", threads, models=models, batches=list(batches), rounds=rounds)["times"]
    for times in timed:
        own = times[0]
        how = f"measured: {len(own)} calls in a fresh process after warm-up{', in turn with the baseline' if versus else ''}"
        for p in PERCENTILES:
            yield Value(f"latency_p{p}", float(np.percentile(own, p)), how, samples=own if p == 50 else None)
        if versus:
            ratio, low, high = median_ratio(own, times[1])
            yield Value("latency_ratio", ratio, how + "; ratio of medians, bootstrap 95 %", low, high, samples=times[1])


def locked() -> FileLock:
    """To hold while something is timed: two timings at once would disturb each other."""
    return FileLock(writable_folder(model_cache(), "cache") / "timing.lock")


@job
def time_models(models: list[tuple[str, str]], batches: list[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of each call of each (path, backend): `times[batch][model]` is a list. The order in a round alternates."""
    import torch

    from vitbench import artifact

    loaded, run_by = [artifact.load(path) for path, _ in models], [backend for _, backend in models]
    with torch.inference_mode():
        return {"times": [_time_batch(loaded, run_by, batch, rounds) for batch in batches]}


def _time_batch(models: list, run_by: list[str], batch: int, rounds: int) -> list[list[float]]:
    import torch

    from vitbench import backends

    inputs = [torch.randn(batch, 3, size, size) for size in (model.recipe.preprocess.size for model in models)]
    ready = [backends.prepare(backend, model, x) for backend, model, x in zip(run_by, models, inputs, strict=True)]
    return turns([lambda run=run, x=x: run(x) for run, x in zip(ready, inputs, strict=True)], rounds)


def turns(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of each of `rounds` calls of each of `calls`, in turn after warm-up; rather fewer than too long."""

    def call(i: int) -> float:
        start = time.perf_counter()
        calls[i]()
        return (time.perf_counter() - start) * 1000

    times: list[list[float]] = [[] for _ in calls]
    for i in range(len(calls)):
        _warm_up(lambda i=i: call(i))
    start = time.monotonic()
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.monotonic() - start > MAX_SECONDS:
            break
        for i in sorted(range(len(calls)), reverse=turn % 2 == 1):
            times[i].append(call(i))
    return times


def _warm_up(call) -> None:
    """Call until the median of the last calls has settled, within a time limit."""
    start, before = time.monotonic(), float("inf")
    while True:
        now = float(np.median([call() for _ in range(WARM_CALLS)]))
        if abs(now - before) <= STABLE * now or time.monotonic() - start > WARM_SECONDS:
            return
        before = now
