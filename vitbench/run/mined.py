"""What was mined: the budget, the models that were tried, and what came out in sentences and as commands."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.registry import make_config, method_of
from vitbench.rows.budgets import is_indistinguishable
from vitbench.rows.runs import Run
from vitbench.rows.words import display_labels
from vitbench.run.bench import Bench
from vitbench.run.cache import CachedModel

UNITS = {  # unit -> cost and factor
    "b": ("bytes", 1),
    "kb": ("bytes", 1e3),
    "mb": ("bytes", 1e6),
    "gb": ("bytes", 1e9),
    "kib": ("bytes", 2**10),
    "mib": ("bytes", 2**20),
    "bytes": ("bytes", 1),
    "macs": ("macs", 1),
    "mmacs": ("macs", 1e6),
    "gmacs": ("macs", 1e9),
    "ms": ("latency", 1),
    "latency": ("latency", 1),
}
SHARE_UNITS = ("bytes", "macs", "latency")
METRICS = {"bytes": "bytes", "macs": "macs", "latency": "latency_p50"}  # cost -> the metric of its rows


@dataclass(frozen=True)
class Budget:
    """A limit on a cost; `share` says that `value` is a share of the model's own cost. Latency is the median at batch 1."""

    cost: str
    value: float
    share: bool

    def limit(self, own: float) -> float:
        """The limit for a model of the cost `own`; raises `InputError` if the model itself is within it."""
        limit = self.value * own if self.share else self.value
        if limit >= own:
            raise InputError(
                f"the budget of {cost_text(self.cost, limit)} is not below what the model has, {cost_text(self.cost, own)}: "
                "nothing is to be done; give a smaller budget"
            )
        return limit


@dataclass(frozen=True)
class MinedModel:
    """A model that was tried: its label in the rows, its config and file, its cost, and its scores on the val split."""

    label: str
    config: Config
    path: Path
    cost: float
    val_top1: float
    val_loss: float


@dataclass(frozen=True)
class Mined:
    """What `mine` found.

    Attributes:
        limit, own: the budget and the given model's cost, in bytes, multiply-accumulates or milliseconds.
        base: the given model with dense weights, from which all others were made.
        models: those that were made, in order.
        best: the model within the budget with the best top-1 on val, then the lowest loss; None if none is within.
        reasons: what could not be made -> why.
        left_out: what was not tried, for lack of time.
        seconds: how long it took.
    """

    cost: str
    limit: float
    own: float
    base: CachedModel
    models: list[MinedModel]
    best: MinedModel | None
    reasons: dict[str, str]
    left_out: list[str]
    seconds: float

    @property
    def within(self) -> list[MinedModel]:
        """The models within the budget."""
        return [model for model in self.models if model.cost <= self.limit]


def parse_budget(text: str) -> Budget:
    """A budget such as 2MB, 500kB, 300Mmacs, 10ms, or a share: 0.25bytes, 0.5macs, 0.8latency."""
    allowed = "give for example 2MB, 500kB, 300Mmacs, 10ms, or a share below 1: 0.25bytes, 0.5macs, 0.8latency"
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]+)", text.strip().lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise InputError(f"the budget {text!r} cannot be read; {allowed}")
    (cost, factor), value = UNITS[match[2]], float(match[1])
    share = match[2] in SHARE_UNITS and value < 1
    if match[2] == "latency" and not share:
        raise InputError(f"the budget {text!r} is no share of the model's own latency; {allowed}")
    return Budget(cost, value * factor, share)


def cost_text(cost: str, value: float) -> str:
    """A cost with its unit."""
    if cost == "latency":
        return f"{value:.3g} ms"
    unit = "B" if cost == "bytes" else "MACs"
    scale, letter = next(
        (scale, letter)
        for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
        if value >= scale or scale == 1
    )
    return f"{value / scale:.3g} {letter}{unit}"


def model_line(model: MinedModel, name: str, cost: str, limit: float) -> str:
    """One line of progress: a model's cost, whether it is within the limit, its accuracy on val, and its name."""
    within = "within" if model.cost <= limit else "above"
    return f"{cost_text(cost, model.cost):>14}  {within:8}  {100 * model.val_top1:6.2f} % on val  {name}"


def findings(mined: Mined, run: Run, data: ImageData) -> list[str]:
    """What came out, in sentences: the choice, its accuracy against the model's on the test images, and its time."""
    bench = Bench(mined.base, data, run)
    limit = cost_text(mined.cost, mined.limit)
    lines = [
        f"{len(mined.models)} models in {mined.seconds / 60:.1f} minutes, {len(mined.within)} of them within {limit}"
    ]
    if mined.left_out:
        lines.append(f"not tried, since the time was up: {', '.join(mined.left_out)}")
    if (best := mined.best) is None:
        return lines
    chosen_name = display_labels(bench.rows, [best.label])[best.label]
    luck = f" (the best of {len(mined.within)}, so in part luck)" if len(mined.within) > 1 else ""
    lines.append(
        f"chosen on {len(data.val)} val images: {chosen_name}, {cost_text(mined.cost, best.cost)} "
        f"(yours {cost_text(mined.cost, mined.own)}), top-1 {100 * best.val_top1:.2f} % there{luck}"
    )
    names = ("the chosen model", "yours")
    lines.append(
        f"on {len(data.test)} test images: {bench.top1_text(best.label)} %, yours {bench.top1_text('baseline')} %; "
        + bench.accuracy_verdict(best.label, "baseline", names)
    )
    tops = {model.label: bench.find_row(model.label, "top1") for model in mined.within}
    chosen, others = tops.pop(best.label), [row for row in tops.values() if row is not None]
    if chosen is not None and others:
        alike = sum(is_indistinguishable(chosen, row) for row in others)
        lines.append(
            f"others within the budget: {len(others)}, of which {alike} are not significantly different from it"
        )
    if bench.find_row(best.label, "latency_ratio", 1) is not None:
        lines.append(bench.time_verdict(best.label, name=names[0]))
    return [line.replace("**", "") for line in lines]


def nothing_within(mined: Mined) -> str:
    """Why there is no best model, with the nearest one."""
    limit = cost_text(mined.cost, mined.limit)
    if not mined.models:
        return f"no model was made within the time, so none is within {limit}; give more --minutes"
    nearest = min(mined.models, key=lambda model: model.cost)
    return (
        f"none of {len(mined.models)} models is within {limit}; the nearest, {nearest.label}, has "
        f"{cost_text(mined.cost, nearest.cost)} and {100 * nearest.val_top1:.2f} % on val; give a larger --budget or more --minutes"
    )


def settings_text(config: Config) -> list[str]:
    """A method's settings that are not its defaults, as `--set` takes them."""
    defaults = make_config(method_of(config).name).to_dict()
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in _changed(config.to_dict(), defaults, "")
    ]


def _changed(values: dict[str, Any], defaults: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            yield from _changed(value, defaults[key], f"{prefix}{key}.")
        elif value != defaults.get(key):
            yield f"{prefix}{key}", value
