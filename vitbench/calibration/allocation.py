"""Allocation of ranks or bits to layers: the least expected loss for a given saving."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitbench.base.errors import InputError


@dataclass(frozen=True)
class LayerErrors:
    """A linear layer's sizes and its expected loss at each rank.

    Attributes:
        shape: (out, in) of its weight.
        error_by_rank: the expected increase of the model's loss for each rank from 0 on, on one scale for all layers.
        token_share: what each saved weight counts. If multiply-accumulates are to be saved, it is the fraction of an image's
            tokens that the layer processes.
    """

    shape: tuple[int, int]
    error_by_rank: tuple[float, ...]
    token_share: float = 1.0

    @property
    def dense(self) -> int:
        """Weights of the dense layer."""
        return self.shape[0] * self.shape[1]

    def saving(self, rank: int) -> float:
        """Weights saved by a factorisation of this rank; negative if it has more weights than the dense layer."""
        return self.token_share * (self.dense - rank * sum(self.shape))

    def choices(self, step: int) -> list[tuple[float, float, int]]:
        """(weights saved, loss, rank) of the dense layer, with rank 0, and of the multiples of `step` that save weights."""
        ranks = [rank for rank in range(step, min(self.shape), step) if self.saving(rank) > 0]
        return [(0, 0.0, 0), *((self.saving(rank), self.error_by_rank[rank], rank) for rank in reversed(ranks))]


class BudgetUnreachable(ValueError):
    """The choices that save most are `missing` below the requested saving."""

    def __init__(self, missing: float):
        super().__init__(f"the choices that save most are {missing:,.0f} below the requested saving")
        self.missing = missing


def greedy_allocation(choices: Mapping[str, Sequence[tuple[float, float, int]]], saving: float) -> dict[str, int]:
    """Choose rank or bits for each layer to save at least `saving`, with greedy steps of the least loss for each saving.

    Steps follow the lower convex hull of (saved, loss), because the raw steps of a layer may become cheaper later, and
    those along the hull do not. For a separable loss the result is optimal at each saving that the steps reach.

    Args:
        choices: layer name -> (saved, loss, choice), in the order of `saved`; the first saves nothing.

    Returns:
        Layer name -> choice, for the layers that do not keep their first choice.

    Raises:
        BudgetUnreachable: the last choices of all layers save less.
    """
    steps = []
    for name, points in choices.items():
        corners = _lower_convex_hull(points)
        steps += [
            ((loss - loss_before) / (saved - saved_before), name, choice, saved - saved_before)
            for (saved_before, loss_before, _), (saved, loss, choice) in zip(corners, corners[1:])
        ]
    allocation: dict[str, int] = {}
    for _, name, choice, saved in sorted(steps):
        if saving <= 0:
            break
        allocation[name] = choice
        saving -= saved
    if saving > 0:
        raise BudgetUnreachable(saving)
    return allocation


def spend_remainder(
    choices: Mapping[str, Sequence[tuple[float, float, int]]], allocation: Mapping[str, int], saving: float
) -> dict[str, int]:
    """Raise the ranks or bits of an allocation that saves more than `saving`, until no raise fits.

    A step of `greedy_allocation` may be as large as a layer, and its last one saves more than is asked. Each raise here goes
    to the layer and the choice that lower the loss most for each weight; of equal ones, to the first layer.

    Args:
        choices, allocation: as in `greedy_allocation`.

    Returns:
        Layer name -> choice, for the layers that do not keep their first choice. What is left of the budget is less than any
        raise takes.
    """
    places = {
        name: next(i for i, (*_, choice) in enumerate(points) if choice == allocation.get(name, points[0][2]))
        for name, points in choices.items()
    }
    remainder = sum(choices[name][place][0] for name, place in places.items()) - saving
    while True:
        raises = []
        for order, (name, place) in enumerate(places.items()):
            saved, loss, _ = choices[name][place]
            for new_place, (new_saved, new_loss, _) in enumerate(choices[name][:place]):
                if saved - new_saved <= remainder:
                    raises.append(((new_loss - loss) / (saved - new_saved), order, name, new_place))
        if not raises:
            return {name: choices[name][place][2] for name, place in places.items() if place}
        *_, name, new_place = min(raises)
        remainder -= choices[name][places[name]][0] - choices[name][new_place][0]
        places[name] = new_place


def greedy_ranks(
    layers: Mapping[str, LayerErrors], saving: int, step: int = 8, *, spend: bool = True
) -> dict[str, int]:
    """Choose ranks that save `saving` weights, or the least more that multiples of `step` allow.

    Args:
        spend: whether `spend_remainder` follows `greedy_allocation`.

    Returns:
        Layer name -> rank, for the layers that do not stay dense.

    Raises:
        InputError: the smallest ranks save less.
    """
    choices = {name: layer.choices(step) for name, layer in layers.items()}
    try:
        ranks = greedy_allocation(choices, saving)
    except BudgetUnreachable as error:
        raise InputError(
            f"the budget is {error.missing:,.0f} weights below what rank {step} in every layer needs; give a larger keep, a "
            "smaller rank_step, or more layers"
        ) from None
    return spend_remainder(choices, ranks, saving) if spend else ranks


def uniform_ranks(layers: Mapping[str, LayerErrors], saving: int, step: int = 8) -> dict[str, int]:
    """Choose ranks that save as many weights as those of `greedy_ranks` do, with the same fraction kept of each layer.

    Equal fractions f are the optimum of the loss (1 - f)^2 for each weight, so greedy steps of that loss find them, with
    ranks that are multiples of `step`. Fractions then differ by a step, or by two where only the smallest
    layers' steps fit into what is left of the budget.

    Returns:
        Layer name -> rank, for the layers that do not stay dense.

    Raises:
        InputError: the smallest ranks save less.
    """
    return greedy_ranks({name: _loss_of_fractions(layer) for name, layer in layers.items()}, saving, step)


def _loss_of_fractions(layer: LayerErrors) -> LayerErrors:
    """The layer with the loss `token_share` x dense x (1 - f)^2 of each rank, whose factors have the fraction f of its weights."""
    removed = [max(0.0, 1 - rank * sum(layer.shape) / layer.dense) for rank in range(min(layer.shape) + 1)]
    return dataclasses.replace(
        layer, error_by_rank=tuple(layer.token_share * layer.dense * share**2 for share in removed)
    )


def floored_ranks(layers: Mapping[str, LayerErrors], keep: float, step: int = 8) -> dict[str, int]:
    """For each layer the largest rank, a multiple of `step`, whose factors have at most `keep` of the layer's weights.

    All layers together may keep half of `keep`, because each rounds its rank down. `uniform_ranks` spends the rest.

    Returns:
        Layer name -> rank, for the layers where this saves weights.

    Raises:
        InputError: `keep` is too small for a rank of `step` in some layer.
    """
    ranks = {name: int(keep * layer.dense / sum(layer.shape)) // step * step for name, layer in layers.items()}
    layer_without_rank = next((name for name, rank in ranks.items() if rank == 0), "")
    if layer_without_rank:
        raise InputError(
            f"keep = {keep} leaves {layer_without_rank} a rank below rank_step = {step}; give a larger keep or a smaller "
            "rank_step"
        )
    return {name: rank for name, rank in ranks.items() if layers[name].saving(rank) > 0}


def _lower_convex_hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The corners of the lower convex hull of points sorted by their first coordinate, from the first point on."""
    corners: list[tuple[float, float, int]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-1], point) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return corners


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
