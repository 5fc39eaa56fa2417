"""Policies of multi-dimensional pruning: how much of each block's neurons and heads, and of the tokens, goes.

A policy is a vector of ratios removed (Hou and Kung 2022, arXiv 2201.00043): one for the neurons of each of the L blocks,
one for the heads of each, one for the dimensions of each block's heads (not in the paper, and not cut by default), and one
for the tokens, 3 L + 1 numbers. What stays is rounded down, as in the paper's code.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from vitbench.base.errors import InputError
from vitbench.model import blocks

DIMENSIONS = ("neurons", "heads", "head_dims", "tokens")
PAPER_DIMENSIONS: Final = ("neurons", "heads", "tokens")
TOKEN_BLOCK_POSITIONS = (1 / 4, 2 / 4, 3 / 4)  # of the depth: blocks 3, 6 and 9 of twelve, counted from 0


def token_blocks(depth: int) -> tuple[int, ...]:
    """After the attention of which blocks tokens go: at a quarter, a half and three quarters of the depth."""
    return tuple(dict.fromkeys(min(depth - 1, int(depth * place)) for place in TOKEN_BLOCK_POSITIONS))


@dataclass(frozen=True)
class UnitCounts:
    """What policies leave, each (P, L): neurons, heads, dimensions of a head, tokens before and after a block's attention."""

    neurons: np.ndarray
    heads: np.ndarray
    head_dims: np.ndarray
    tokens_in: np.ndarray
    tokens_out: np.ndarray

    def units_left(self) -> list[tuple[int, int, int]]:
        """Neurons, heads and dimensions of a head in each block, of the first policy."""
        units = self.neurons[0].tolist(), self.heads[0].tolist(), self.head_dims[0].tolist()
        return list(zip(*units, strict=True))


@dataclass(frozen=True)
class PolicySpace:
    """The policies for one model.

    Attributes:
        neurons, heads, head_dims: of each block of the dense model, (L,); `head_dims` are those of one head.
        tokens: that come in, `prefix` of which always stay.
        at: the blocks after whose attention tokens go.
        fused: whether one token is added for those that go.
        dimensions: which of `DIMENSIONS` may be cut.
        most: the largest ratio.
    """

    neurons: np.ndarray
    heads: np.ndarray
    head_dims: np.ndarray
    tokens: int
    prefix: int
    token_blocks: tuple[int, ...]
    has_fused_token: bool = True
    dimensions: tuple[str, ...] = PAPER_DIMENSIONS
    max_ratio: float = 0.5

    @property
    def depth(self) -> int:
        return len(self.neurons)

    @property
    def _units(self) -> tuple[np.ndarray, ...]:
        return self.neurons, self.heads, self.head_dims

    @property
    def size(self) -> int:
        """How many ratios a policy has."""
        return 3 * self.depth + 1

    @property
    def prunable(self) -> np.ndarray:
        """Which ratios may be above 0."""
        return self.expand_dimensions(np.isin(DIMENSIONS, self.dimensions))

    def expand_dimensions(self, values: np.ndarray) -> np.ndarray:
        """Values of the four `DIMENSIONS`, (..., 4), given to each of their ratios, (..., 3 L + 1)."""
        return np.repeat(values, [self.depth, self.depth, self.depth, 1], axis=-1)

    def counts(self, policies: np.ndarray) -> UnitCounts:
        """What policies (P, 3 L + 1) leave.

        Of N tokens, int(N (1 - ratio)) stay where tokens go, and one more if those that go are fused; never fewer than
        the prefix and one.
        """
        policies = np.atleast_2d(policies)
        ratios = np.split(policies, self.depth * np.arange(1, 4), axis=1)
        units = [_floor(whole * (1 - ratio)) for whole, ratio in zip(self._units, ratios, strict=False)]
        n, before, after = np.full(len(policies), self.tokens), [], []
        for index in range(self.depth):
            before.append(n)
            if index in self.token_blocks:
                fewer = _floor(n * (1 - policies[:, -1])) + self.has_fused_token
                n = np.where(policies[:, -1] > 0, np.clip(fewer, self.prefix + 1 + self.has_fused_token, n), n)
            after.append(n)
        neurons, heads, head_dims = units
        return UnitCounts(neurons, heads, head_dims, np.stack(before, 1), np.stack(after, 1))

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` policies, (count, 3 L + 1): ratios drawn evenly up to a limit that each dimension draws for itself.

        A third of the limits is 0, so that policies which spare a dimension are found too.
        """
        free = np.isin(DIMENSIONS, self.dimensions)
        limits = rng.random((count, 4)) * (rng.random((count, 4)) > 1 / 3) * free
        limits[limits.sum(1) == 0] = free
        return self.max_ratio * rng.random((count, self.size)) * self.expand_dimensions(limits)

    def perturb(self, rng: np.random.Generator, policies: np.ndarray, count: int) -> np.ndarray:
        """`count` policies about those given: some ratios moved a little, some heads more or less."""
        start = policies[rng.integers(len(policies), size=count)]
        spread = 10 ** rng.uniform(-2, -0.5, (count, 1))
        moved = start + spread * (rng.random(start.shape) < 1 / 3) * rng.standard_normal(start.shape)
        heads = slice(self.depth, 2 * self.depth)  # any ratio above 0 takes a whole head, so they move by whole heads
        step = rng.choice([-1, 0, 1], start[:, heads].shape, p=[0.1, 0.8, 0.1]) / self.heads
        moved[:, heads] = self.removed_fractions(start)[:, heads] + step
        return np.clip(moved, 0, self.max_ratio) * self.prunable

    def removed_fractions(self, policies: np.ndarray) -> np.ndarray:
        """The shares that really go, after rounding, of each ratio's units; for tokens that at the end: (P, 3 L + 1)."""
        counts = self.counts(policies)
        left = counts.neurons, counts.heads, counts.head_dims
        units = [count / whole for count, whole in zip(left, self._units, strict=True)]
        return 1 - np.concatenate([*units, counts.tokens_out[:, -1:] / self.tokens], axis=1)

    def scale_to_budget(
        self, policies: np.ndarray, cost: Callable[[UnitCounts], np.ndarray], low: float, high: float
    ) -> np.ndarray:
        """Policies scaled, up to `most`, until their cost lies in [low, high]; those that cannot are left out."""
        lower, upper = np.zeros(len(policies)), np.full(len(policies), 100.0)
        for _ in range(32):
            middle = (lower + upper) / 2
            dear = cost(self.counts(self._scaled(policies, middle))) > (low + high) / 2
            lower, upper = np.where(dear, middle, lower), np.where(dear, upper, middle)
        below, above = (self._scaled(policies, by) for by in (upper, lower))  # of the middle; steps may be coarse
        found = np.where((cost(self.counts(below)) >= low)[:, None], below, above)
        costs = cost(self.counts(found))
        return found[(low <= costs) & (costs <= high)]

    def _scaled(self, policies: np.ndarray, by: np.ndarray) -> np.ndarray:
        return np.minimum(policies * by[:, None], self.max_ratio)


def _floor(x: np.ndarray) -> np.ndarray:
    return np.maximum(1, np.floor(x + 1e-9)).astype(int)


def mac_cost(width: int, reduction: str, prefix: int) -> Callable[[UnitCounts], np.ndarray]:
    """Multiply-accumulates of the blocks that policies leave."""

    def cost(counts: UnitCounts) -> np.ndarray:
        return blocks.block_macs(
            counts.heads,
            counts.head_dims,
            counts.neurons,
            counts.tokens_in,
            counts.tokens_out,
            width,
            reduction,
            prefix=prefix,
        )

    return cost


def budget(
    space: PolicySpace, cost: Callable[[UnitCounts], np.ndarray], keep: float, tolerance: float
) -> tuple[float, float]:
    """The costs between which a policy keeps the share `keep` of the dense model's, +- `tolerance` of that.

    Raises:
        InputError: no policy is as cheap as that.
    """
    dense = float(cost(space.counts(np.zeros(space.size)))[0])
    least = float(cost(space.counts(space.max_ratio * space.prunable))[0])
    low, high = (keep * dense * (1 + sign * tolerance) for sign in (-1, 1))
    if least > high:
        raise InputError(
            f"no policy keeps {keep:g} of the cost: with {space.max_ratio:g} of all {', '.join(space.dimensions)} gone "
            f"{least / dense:.3f} is left; allow a larger share to go (most), more dimensions, or keep more"
        )
    return low, high


def single_ratio_policy(
    space: PolicySpace, cost: Callable[[UnitCounts], np.ndarray], low: float, high: float
) -> np.ndarray:
    """The policy of one ratio for all that may be cut that is closest to the middle of the budget, (3 L + 1,)."""
    grid = np.linspace(0, space.max_ratio, 2001)[:, None] * space.prunable
    costs = cost(space.counts(grid))
    return grid[int(np.abs(costs - (low + high) / 2).argmin())]


def single_ratio_policies(
    space: PolicySpace, cost: Callable[[UnitCounts], np.ndarray], low: float, high: float
) -> np.ndarray:
    """The policies of one ratio for some of the dimensions that may be cut, most dimensions first, (S, 3 L + 1).

    Those that the budget admits; a search that starts from them ends at least as high as the best of them.
    """
    sets = (each for n in range(len(space.dimensions), 0, -1) for each in itertools.combinations(space.dimensions, n))
    found = [single_ratio_policy(dataclasses.replace(space, dimensions=each), cost, low, high) for each in sets]
    costs = [float(cost(space.counts(policy))[0]) for policy in found]
    return np.array([policy for policy, c in zip(found, costs, strict=True) if low <= c <= high]).reshape(
        -1, space.size
    )


def counts_to_dict(counts: UnitCounts) -> dict[str, list[int]]:
    """The counts of the first policy as lists; "after" holds the tokens after each block's attention."""
    arrays = {
        "neurons": counts.neurons,
        "heads": counts.heads,
        "head_dims": counts.head_dims,
        "after": counts.tokens_out,
    }
    return {name: values[0].tolist() for name, values in arrays.items()}
