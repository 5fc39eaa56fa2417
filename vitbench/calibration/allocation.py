"""What each layer gets, a rank or bits: as little of the model's loss as possible for a given saving."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitbench.base.errors import InputError


@dataclass(frozen=True)
class Layer:
    """One linear layer as the allocation sees it.

    Attributes:
        shape: (out, in) of its weight.
        lost: what the model is expected to lose with each rank from 0 on, in a scale that all layers share.
        share: how much each weight saved counts for: the part of an image's tokens that the layer sees, where
            multiply-accumulates are saved.
    """

    shape: tuple[int, int]
    lost: tuple[float, ...]
    share: float = 1.0

    @property
    def dense(self) -> int:
        """Weights of the dense layer."""
        return self.shape[0] * self.shape[1]

    def saving(self, rank: int) -> float:
        """What a factorisation of this rank saves, in weights; below 0 where it stores more than the dense layer."""
        return self.share * (self.dense - rank * sum(self.shape))

    def choices(self, step: int) -> list[tuple[float, float, int]]:
        """(weights saved, loss, rank) of the dense layer, whose rank is called 0, and of the multiples of `step` that save."""
        ranks = [rank for rank in range(step, min(self.shape), step) if self.saving(rank) > 0]
        return [(0, 0.0, 0), *((self.saving(rank), self.lost[rank], rank) for rank in reversed(ranks))]


class OutOfReach(ValueError):
    """The cheapest choices save `missing` less than was asked for."""

    def __init__(self, missing: float):
        super().__init__(f"the cheapest choices save {missing:,.0f} too little")
        self.missing = missing


def spend(choices: Mapping[str, Sequence[tuple[float, float, int]]], saving: int) -> dict[str, int]:
    """Choices that save at least `saving`, by taking the cheapest step of all layers again and again.

    The first step of a layer may cost a lot of loss for little, and the next ones less; so the steps are those along the
    lower convex hull of (saved, loss), whose costs rise. For a separable loss this is the optimum at each saving that it
    passes.

    Args:
        choices: layer name -> (saved, loss, what is chosen), by what they save; the first saves nothing.

    Returns:
        Layer name -> what is chosen, for the layers that do not keep their first choice.

    Raises:
        OutOfReach: even the last choices save less.
    """
    steps = []
    for name, points in choices.items():
        corners = _hull(points)
        steps += [
            ((loss - before) / (saved - start), name, chosen, saved - start)
            for (start, before, _), (saved, loss, chosen) in zip(corners, corners[1:])
        ]
    found: dict[str, int] = {}
    for _, name, chosen, saved in sorted(steps):
        if saving <= 0:
            break
        found[name] = chosen
        saving -= saved
    if saving > 0:
        raise OutOfReach(saving)
    return found


def greedy(layers: Mapping[str, Layer], saving: int, step: int = 8) -> dict[str, int]:
    """Ranks, by name for the layers that do not stay dense, that save at least `saving` weights (`spend`).

    Raises:
        InputError: even the smallest ranks save less.
    """
    try:
        return spend({name: layer.choices(step) for name, layer in layers.items()}, saving)
    except OutOfReach as error:
        raise InputError(
            f"the budget is {error.missing:,.0f} weights below what ranks of {step} in every layer need; give a larger keep, a "
            "smaller rank_step, or more layers"
        ) from None


def uniform(layers: Mapping[str, Layer], keep: float, step: int = 8) -> dict[str, int]:
    """The same share of every layer's weights: the largest multiple of `step` whose factors are at most `keep` of them."""
    ranks = {name: int(keep * layer.dense / sum(layer.shape)) // step * step for name, layer in layers.items()}
    small = next((name for name, rank in ranks.items() if rank == 0), "")
    if small:
        raise InputError(
            f"keep = {keep} leaves {small} a rank below rank_step = {step}; give a larger keep or a smaller rank_step"
        )
    return {name: rank for name, rank in ranks.items() if layers[name].saving(rank) > 0}


def _hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The corners of the lower convex hull of points sorted by their first coordinate, from the first point on."""
    corners: list[tuple[float, float, int]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-1], point) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return corners


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
