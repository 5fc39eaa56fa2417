"""Latency: percentiles of single calls in a fresh process, in turn with a second model for a ratio."""

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
    """A model's calls in a backend: milliseconds, how far its logits were from eager's, and how far they may be.

    Distances are relative to the largest logit (`backends.logit_distance`).
    """

    times: list[float]
    apart: float
    allowed: float


def latency(path: Path, versus: str | Path, measures: Measures) -> Iterator[Measurement]:
    """Time the model at `path`, batch size by batch size, in as many child processes as there are `starts`.

    If `versus` is given, its calls in each of `versus_backends` alternate with the model's, for a ratio to each.
    """
    starts, backend = measures.starts, measures.backend
    models = [(os.path.abspath(path), backend)]
    if versus:
        models += [(os.path.abspath(versus), name) for name in measures.versus_backends]
    for found in compare_latency(models, measures.batches, measures.threads, measures.rounds, starts):
        if failed := [each for each in found if isinstance(each, str)]:
            raise ChildError(failed[0])
        yield from latency_values(backend, found[0], [other.times for other in found[1:]], starts=starts)


def latency_values(
    backend: str, own: BackendTiming, others: Sequence[list[float]], where: str = "", starts: int = 1
) -> Iterator[Measurement]:
    """What `slots` lists, in order: percentiles, ratios to each of the others, in turn with which it was timed, the distance."""
    turn = ", in turn with the baseline" if others else ""
    where = where or ("in a fresh process" if starts == 1 else f"in {starts} fresh processes") + MALLOC_NOTE
    how = f"measured: {len(own.times)} calls {where} after warm-up{turn}"
    for p in PERCENTILES:
        samples = own.times if p == 50 else None
        yield Measurement(f"latency_p{p}", float(np.percentile(own.times, p)), how, samples=samples)
    for other in others:
        ratio, low, high = quiet_latency_ratio(own.times, other, starts)
        yield Measurement(
            "latency_ratio",
            ratio,
            how + "; median ratio of the quietest quarter of the rounds, bootstrap 95 %",
            low,
            high,
            samples=other,
        )
    if backend != "eager":
        how = f"measured: largest difference from eager's logits over the largest of them; {own.allowed} is allowed"
        yield Measurement("logit_distance", own.apart, how)


def shared_rounds(rounds: int, starts: int) -> dict[str, int]:
    """What a row's context says of the rounds, and of the processes that share them if there are several."""
    return {"rounds": rounds} | ({"starts": starts} if starts > 1 else {})


def latency_metrics(timed: dict[str, Any], versus_backends: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """The metric, unit and context of each of `values`; `timed` is the context that they share, `versus` in it if there is one."""
    backend = timed["backend"]
    apart = {other: {} if other == backend else {"versus_backend": other} for other in versus_backends}
    own = timed | ({} if backend in apart or "versus" not in timed else apart[versus_backends[0]])
    ratios = [("latency_ratio", "ratio", timed | apart[other]) for other in apart if "versus" in timed]
    alone = {key: value for key, value in timed.items() if key not in ("rounds", "starts", "versus")}
    distance = [] if backend == "eager" else [("logit_distance", "fraction", alone)]
    return [(f"latency_p{p}", "ms", own) for p in PERCENTILES] + ratios + distance


def compare_latency(
    models: Sequence[tuple[str, str]], batches: Sequence[int], threads: int, rounds: int, starts: int = 1
) -> Iterator[list[BackendTiming | str]]:
    """Each (path, backend) timed, all in turn, or why a model cannot be prepared.

    For each batch size the rounds are shared by `starts` fresh processes, one after the other: where a process's memory comes
    to lie, and what the machine does in its minute, moves all of its rounds alike.
    """
    order = {"models": list(models), "rounds": -(-rounds // starts)}
    for batch in batches:
        with timing_lock(), tempfile.TemporaryDirectory() as exported:
            found = [
                in_child("time_models", threads, batch=batch, exported=exported, **order)["timed"]
                for _ in range(starts)
            ]
        yield [_pool_starts(parts) for parts in zip(*found, strict=True)]


def _pool_starts(parts: Sequence[dict[str, Any] | str]) -> BackendTiming | str:
    """One model's calls in all of the processes, evenly many in each; or why it failed in one of them."""
    if failed := [part for part in parts if isinstance(part, str)]:
        return failed[0]
    fewest = min(len(part["times"]) for part in parts)
    times = [time for part in parts for time in part["times"][:fewest]]
    return BackendTiming(times, max(part["apart"] for part in parts), parts[0]["allowed"])


def timing_lock() -> AbstractContextManager:
    """To hold while something is timed: two timings at once would disturb each other."""
    return locks.locked(writable_folder(model_cache(), "cache") / "timing.lock")


@job
def time_models(models: list[tuple[str, str]], batch: int, rounds: int, exported: str) -> dict[str, Any]:
    """`timed[model]` has the fields of `Timed`, or is why there are none. The order in a round alternates.

    Files that backends run are taken from the folder `exported`, and left there.
    """
    import torch

    torch.manual_seed(0)  # of the images, so that distances come out the same again
    with torch.inference_mode():
        ready = [_prepare_call(*model, batch, Path(exported, str(models.index(model)))) for model in models]
        times = iter(time_alternating([each[0] for each in ready if not isinstance(each, str)], rounds))
    return {
        "timed": [each if isinstance(each, str) else asdict(BackendTiming(next(times), *each[1:])) for each in ready]
    }


def _prepare_call(path: str, backend: str, batch: int, stem: Path) -> tuple[Callable[[], Any], float, float] | str:
    """A call of the model with a batch in the backend, and its distance from eager and the one allowed; or why there is none."""
    import torch

    from vitbench.measurement import backends
    from vitbench.model import artifact

    try:
        model = artifact.load(path)
        size = model.recipe.preprocess.size
        x = torch.randn(batch, 3, size, size)
        run, apart = backends.prepare_checked(backend, model, x, stem)
    except (RuntimeError, ValueError, MemoryError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return lambda: run(x), apart, backends.tolerance(backend, model)
