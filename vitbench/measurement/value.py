"""One measured number, before it is a row, and what a row says of its model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitbench.data import ImageData
from vitbench.layers import RUNTIME_LAYERS
from vitbench.recipe import Recipe


@dataclass(frozen=True)
class Value:
    """A metric's value in the unit of its group, how it was had, and its interval and raw samples where there are some."""

    metric: str
    value: float
    source: str
    low: float | None = None
    high: float | None = None
    samples: Sequence[float] | None = None
    hits: str = ""

    def fields(self) -> dict[str, Any]:
        """What goes into the row."""
        return {key: value for key, value in asdict(self).items() if key != "metric"}


def about(recipe: Recipe, data: ImageData | None) -> dict[str, Any]:
    """What a row says of the model and the images."""
    return {
        "model": recipe.original or recipe.architecture.name,
        "dataset": data.name if data else "none",
        "data_fingerprint": data.fingerprint if data else "",
        "method": recipe.method,
        "config": {"origin": recipe.origin, "methods": [step.to_dict() for step in recipe.methods]},
        "seed": recipe.origin.get("train", {}).get("seed", 0),
    }


def scored_in(recipe: Recipe, batch: int) -> dict[str, int]:
    """What a row says of the batches in which a model was scored, where its answers hang on them."""
    layers = {spec["layer"] for spec in recipe.layers.values()}
    return {"scoring_batch": batch} if any(_sees_batch(name) for name in layers) else {}


def _sees_batch(name: str) -> bool:
    return getattr(RUNTIME_LAYERS.get(name), "sees_batch", False)
