"""Latency: percentiles of single calls in a fresh process, in turn with a second model for a ratio."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vitbench.measure.child import in_child, job
from vitbench.measure.value import Value
from vitbench.paths import model_cache, writable_folder
from vitbench.standalone import turns
from vitbench.statistics import median_ratio

PERCENTILES = (50, 90, 95, 99)


def latency(
    path: Path,
    versus: str | Path,
    batches: Sequence[int],
    threads: int,
    rounds: int,
    backend: str,
    versus_backends: Sequence[str],
) -> Iterator[Value]:
    """Time the model at `path` in a child process, batch size by batch size.

    If `versus` is given, it takes turns with that model in each of `versus_backends`, for a ratio to each.
    """
    models = [(str(path), backend), *([(str(versus), other) for other in versus_backends] if versus else [])]
    with locked():
        timed = in_child("time_models", threads, models=models, batches=list(batches), rounds=rounds)["times"]
    for own, *others in timed:
        how = f"measured: {len(own)} calls in a fresh process after warm-up{', in turn with the baseline' if versus else ''}"
        for p in PERCENTILES:
            yield Value(f"latency_p{p}", float(np.percentile(own, p)), how, samples=own if p == 50 else None)
        for other in others:
            ratio, low, high = median_ratio(own, other)
            yield Value("latency_ratio", ratio, how + "; ratio of medians, bootstrap 95 %", low, high, samples=other)


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
