"""What mining tries on a model for a budget, in order: rounded weights, methods that only calibrate, and methods that train."""

from dataclasses import dataclass
from typing import Any

from vitbench.methods.registry import METHODS

CURVE_BITS = (8, 4, 3)  # of rounded weights, tried at any budget in bytes: a curve to judge the others by
SETTINGS: dict[str, dict[str, Any]] = {"weight_only": {"rounding": "second_order"}}


@dataclass(frozen=True)
class Candidate:
    """A method to try; `fitted`: at the operating point for the budget; `epochs`: of training."""

    method: str
    settings: dict[str, Any]
    fitted: bool = True
    epochs: int = 0

    @property
    def name(self) -> str:
        """The method and its settings."""
        settings = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([self.method, *settings, *([f"trained for {self.epochs} epochs"] if self.epochs else [])])


def candidates(model: Any, cost: str, epochs: int) -> list[Candidate]:
    """What is tried on a model, in order: rounded weights, what only calibrates, and what trains."""
    untrained, trained = [], []
    points_of = METHODS["weight_only"].operating_points
    if cost == "bytes" and points_of is not None:
        points = [point for point in points_of(model) if point["bits"] in CURVE_BITS]
        untrained += [Candidate("weight_only", point, fitted=False) for point in points]
    for name in sorted(METHODS, key=lambda name: name not in SETTINGS):
        method, settings = METHODS[name], SETTINGS.get(name, {})
        if cost == "bytes" and method.reduces == "macs":
            continue
        training = getattr(method.config(), "train", None)
        if method.operating_points is None:
            if training is None and cost != "macs":  # no setting to turn and nothing to train: it is tried as it is
                untrained.append(Candidate(name, settings, fitted=False))
            continue
        if training is not None and not training.epochs:
            untrained.append(Candidate(name, settings))
        if training is not None and epochs:
            trained.append(Candidate(name, settings, epochs=epochs))
    return untrained + trained
