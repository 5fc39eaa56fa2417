"""Ask a method for a budget: it finds the setting of its own that saves least and is within."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from vitbench import artifact, progress
from vitbench.configs import Config
from vitbench.data import ImageData
from vitbench.errors import InputError, one_of
from vitbench.measurement import timing
from vitbench.measurement.cost import count_macs
from vitbench.methods import METHODS, compress, make_config
from vitbench.statistics import quiet_ratio

COSTS = ("bytes", "macs", "latency")
SLACK = 512  # bytes by which a trained model's recipe may be longer than that of the same model untrained


def fit(
    model: nn.Module,
    name: str,
    data: ImageData | None = None,
    *,
    cost: str = "bytes",
    target: float,
    settings: dict[str, Any] | None = None,
    batch: int = 1,
    threads: int = 2,
    rounds: int = 20,
) -> Config:
    """The config of method `name` on its ladder that saves least while its cost is at most the target.

    Costs are those of real models, saved and loaded, but not trained; the ladder is halved until one rung is left.

    Args:
        model: what will be compressed; it is not changed.
        cost: "bytes" on disk, "macs" of one image, or "latency", the median time in eager mode in turn with `model` itself.
        target: a share of the model's own cost if at most 1, else bytes or multiply-accumulates.
        settings: of the method, apart from those that its ladder has.
        batch, threads, rounds: of the timings.

    Raises:
        InputError: a method without a ladder (int8 has nothing to turn), a setting that the ladder has, a target that is not
            one, or one below what the method can reach.
    """
    method, settings = METHODS[one_of("method", name, METHODS)], settings or {}
    one_of("cost", cost, COSTS)
    if method.ladder is None:
        able = ", ".join(other for other in METHODS if METHODS[other].ladder)
        raise InputError(f"{name} has no setting that a budget could turn; allowed: {able}")
    rungs = method.ladder(model)
    if both := settings.keys() & rungs[0].keys():
        raise InputError(f"{name}: the budget finds {', '.join(sorted(both))}; leave it out of the settings")
    with tempfile.TemporaryDirectory() as folder:
        base = artifact.save(model, Path(folder, "base"))
        count = counter(cost, base, batch, threads, rounds)
        limit = limit_of(cost, target, 1.0 if cost == "latency" else count(base))

        def spent(place: int) -> float:
            values = untrained(method.config, settings | rungs[place])
            small = compress(model, make_config(name, values), data)
            path = artifact.save(small, Path(folder, "small"))
            found = count(path)
            shutil.rmtree(path)
            return found

        low, high = 0, len(rungs) - 1  # the first rung within the limit is among these
        if (least := spent(high)) > limit:
            raise InputError(
                f"{name} cannot get to {cost} = {limit:.4g}: its smallest setting, {rungs[high]}, has {least:.4g}"
            )
        with progress.bar(range((high - low).bit_length()), f"fitting {name} to {cost}", unit="model") as steps:
            for _ in steps:  # enough to get down to one rung; a step with one left is none
                if low == high:
                    continue
                middle = (low + high) // 2
                low, high = (low, middle) if spent(middle) <= limit else (middle + 1, high)
    return make_config(name, settings | rungs[high])


def limit_of(cost: str, target: float, own: float) -> float:
    """The target as a number: a share of the model's own cost if it is at most 1."""
    if not target > 0 or (cost == "latency" and target > 1):
        more = "" if cost == "latency" else f", or {cost}"
        raise InputError(f"{cost} = {target}: give a share of the model's own in (0, 1]{more}")
    return target * own if target <= 1 else target


def untrained(config: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """The settings without what takes time and does not change the cost."""
    idle: dict[str, Any] = {"train": {"epochs": 0}, "reconstruction": 0, "warm_steps": 0}
    own = {key: value for key, value in idle.items() if key in config.model_fields}
    return values | own


def counter(cost: str, base: Path, batch: int = 1, threads: int = 2, rounds: int = 20) -> Callable[[Path], float]:
    """What a saved model spends."""
    if cost == "bytes":
        return lambda path: artifact.size_on_disk(path) + (0 if path == base else SLACK)
    if cost == "macs":
        return lambda path: count_macs(artifact.load(path))

    def latency(path: Path) -> float:
        ((own, other),) = timing.race([(str(path), "eager"), (str(base), "eager")], [batch], threads, rounds)
        return quiet_ratio(own.times, other.times)[0]

    return latency
