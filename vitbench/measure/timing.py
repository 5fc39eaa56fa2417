"""Latency: percentiles of single calls in a fresh process, in turn with a second model for a ratio."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vitbench.measure.child import ChildError, in_child, job
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
    for found in race(models, batches, threads, rounds):
        if failed := [times for times in found if isinstance(times, str)]:
            raise ChildError(failed[0])
        yield from values(found[0], found[1:])


def values(own: list[float], others: Sequence[list[float]], where: str = "in a fresh process") -> Iterator[Value]:
    """The percentiles of a model's calls, and their ratio to each of the others' in turn with which they were made."""
    turn = ", in turn with the baseline" if others else ""
    how = f"measured: {len(own)} calls {where} after warm-up{turn}"
    for p in PERCENTILES:
        yield Value(f"latency_p{p}", float(np.percentile(own, p)), how, samples=own if p == 50 else None)
    for other in others:
        ratio, low, high = median_ratio(own, other)
        yield Value("latency_ratio", ratio, how + "; ratio of medians, bootstrap 95 %", low, high, samples=other)


def slots(timed: dict[str, Any], versus_backends: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """The metric, unit and context of each of `values`; `timed` is the context that they share, `versus` in it if there is one."""
    backend = timed["backend"]
    apart = {other: {} if other == backend else {"versus_backend": other} for other in versus_backends}
    own = timed | ({} if backend in apart or "versus" not in timed else apart[versus_backends[0]])
    ratios = [("latency_ratio", "ratio", timed | apart[other]) for other in apart if "versus" in timed]
    return [(f"latency_p{p}", "ms", own) for p in PERCENTILES] + ratios


def race(
    models: Sequence[tuple[str, str]], batches: Sequence[int], threads: int, rounds: int
) -> Iterator[list[list[float] | str]]:
    """Milliseconds of the calls of each (path, backend), all in turn in a fresh process for each batch size.

    In the place of the times of a model that cannot be prepared stands the reason.
    """
    for batch in batches:
        with locked():
            found = in_child("time_models", threads, models=list(models), batch=batch, rounds=rounds)
        yield found["times"]


def locked() -> FileLock:
    """To hold while something is timed: two timings at once would disturb each other."""
    return FileLock(writable_folder(model_cache(), "cache") / "timing.lock")


@job
def time_models(models: list[tuple[str, str]], batch: int, rounds: int) -> dict[str, Any]:
    """`times[model]` is a list, or why there is none. The order in a round alternates."""
    import torch

    with torch.inference_mode():
        ready = [_call(path, backend, batch) for path, backend in models]
        times = iter(turns([call for call in ready if not isinstance(call, str)], rounds))
    return {"times": [call if isinstance(call, str) else next(times) for call in ready]}


def _call(path: str, backend: str, batch: int) -> Callable[[], Any] | str:
    """The model ready to answer a batch in the backend, or why it is not."""
    import torch

    from vitbench import artifact, backends

    try:
        model = artifact.load(path)
        size = model.recipe.preprocess.size
        x = torch.randn(batch, 3, size, size)
        run = backends.prepare(backend, model, x)
    except (RuntimeError, ValueError, MemoryError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return lambda: run(x)
