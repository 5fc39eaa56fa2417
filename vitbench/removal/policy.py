"""Policies of multi-dimensional pruning: the fractions of neurons, heads and tokens to remove, and budgets for their cost.

A policy is a vector of the ratios that are removed (Hou and Kung 2022, arXiv 2201.00043): one for the neurons of each of the
L blocks, one for the heads of each, one for the dimensions of each block's heads (not in the paper, and not pruned by default),
and one for the tokens, 3 L + 1 numbers. The counts that are kept are rounded down, as in the paper's code.
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
    """The blocks after whose attention tokens are removed: those at a quarter, a half and three quarters of the depth."""
    return tuple(dict.fromkeys(min(depth - 1, int(depth * position)) for position in TOKEN_BLOCK_POSITIONS))


@dataclass(frozen=True)
class UnitCounts:
    """The counts that policies keep in each block, (P, L) each.

    Attributes:
        neurons, heads, head_dims: neurons, heads, and dimensions of one head.
        tokens_in, tokens_out: tokens before and after the block's attention.
    """

    neurons: np.ndarray
    heads: np.ndarray
    head_dims: np.ndarray
    tokens_in: np.ndarray
    tokens_out: np.ndarray

    def units_left(self) -> list[tuple[int, int, int]]:
        """Neurons, heads and dimensions of a head in each block, of the first policy."""
        units = self.neurons[0].tolist(), self.heads[0].tolist(), self.head_dims[0].tolist()
        return list(zip(*units, strict=True))


Cost = Callable[[UnitCounts], np.ndarray]  # counts of P policies -> their costs, (P,)


@dataclass(frozen=True)
class PolicySpace:
    """The policies for one model.

    Attributes:
        neurons, heads, head_dims: counts in each block of the dense model, (L,); `head_dims` are dimensions of one head.
        tokens: the number of input tokens, of which the first `prefix` are always kept.
        token_blocks: the blocks after whose attention tokens are removed.
        has_fused_token: whether one token that fuses the removed ones is added.
        dimensions: those of `DIMENSIONS` that may be pruned.
        max_ratio: the largest ratio.
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
        """The number of ratios of a policy."""
        return 3 * self.depth + 1

    @property
    def prunable(self) -> np.ndarray:
        """Whether each ratio may be above 0, (3 L + 1,)."""
        return self.expand_dimensions(np.isin(DIMENSIONS, self.dimensions))

    def expand_dimensions(self, values: np.ndarray) -> np.ndarray:
        """Repeat one value for each of `DIMENSIONS`, (..., 4), for all ratios of the dimension, (..., 3 L + 1)."""
        return np.repeat(values, [self.depth, self.depth, self.depth, 1], axis=-1)

    def counts(self, policies: np.ndarray) -> UnitCounts:
        """The counts that policies (P, 3 L + 1) keep.

        Of N tokens, a block that removes tokens keeps int(N (1 - ratio)), and adds one if the removed ones are fused; it
        keeps at least the prefix and one more.
        """
        policies = np.atleast_2d(policies)
        ratios = np.split(policies, self.depth * np.arange(1, 4), axis=1)
        units = [_floor(total * (1 - ratio)) for total, ratio in zip(self._units, ratios, strict=False)]
        tokens, tokens_in, tokens_out = np.full(len(policies), self.tokens), [], []
        min_tokens = self.prefix + 1 + self.has_fused_token
        for index in range(self.depth):
            tokens_in.append(tokens)
            if index in self.token_blocks:
                tokens_left = _floor(tokens * (1 - policies[:, -1])) + self.has_fused_token
                tokens = np.where(policies[:, -1] > 0, np.clip(tokens_left, min_tokens, tokens), tokens)
            tokens_out.append(tokens)
        neurons, heads, head_dims = units
        return UnitCounts(neurons, heads, head_dims, np.stack(tokens_in, 1), np.stack(tokens_out, 1))

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` random policies, (count, 3 L + 1): ratios are uniform up to a random limit for each dimension.

        A limit is 0 with probability 1/3, so that some policies leave a dimension unpruned.
        """
        prunable = np.isin(DIMENSIONS, self.dimensions)
        limits = rng.random((count, 4)) * (rng.random((count, 4)) > 1 / 3) * prunable
        limits[limits.sum(1) == 0] = prunable
        return self.max_ratio * rng.random((count, self.size)) * self.expand_dimensions(limits)

    def perturb(self, rng: np.random.Generator, policies: np.ndarray, count: int) -> np.ndarray:
        """`count` policies near those in `policies`: some ratios change a little, and some heads by one."""
        start = policies[rng.integers(len(policies), size=count)]
        noise_scale = 10 ** rng.uniform(-2, -0.5, (count, 1))
        perturbed = start + noise_scale * (rng.random(start.shape) < 1 / 3) * rng.standard_normal(start.shape)
        heads = slice(self.depth, 2 * self.depth)  # a ratio above 0 removes a whole head, so heads change by whole ones
        head_steps = rng.choice([-1, 0, 1], start[:, heads].shape, p=[0.1, 0.8, 0.1]) / self.heads
        perturbed[:, heads] = self.removed_fractions(start)[:, heads] + head_steps
        return np.clip(perturbed, 0, self.max_ratio) * self.prunable

    def removed_fractions(self, policies: np.ndarray) -> np.ndarray:
        """The fractions that are removed after rounding, for each ratio, (P, 3 L + 1); of tokens after the last block."""
        counts = self.counts(policies)
        units_left = counts.neurons, counts.heads, counts.head_dims
        kept = [count / total for count, total in zip(units_left, self._units, strict=True)]
        return 1 - np.concatenate([*kept, counts.tokens_out[:, -1:] / self.tokens], axis=1)

    def scale_to_budget(self, policies: np.ndarray, cost: Cost, low: float, high: float) -> np.ndarray:
        """Scale policies, with ratios up to `max_ratio`, to a cost in [low, high], and drop those for which it is impossible."""
        lower, upper = np.zeros(len(policies)), np.full(len(policies), 100.0)
        for _ in range(32):
            factor = (lower + upper) / 2
            too_expensive = cost(self.counts(self._scaled(policies, factor))) > (low + high) / 2
            lower, upper = np.where(too_expensive, factor, lower), np.where(too_expensive, upper, factor)
        # the two policies next to the middle of the budget, whose costs differ because counts are whole numbers
        cheaper, dearer = self._scaled(policies, upper), self._scaled(policies, lower)
        scaled = np.where((cost(self.counts(cheaper)) >= low)[:, None], cheaper, dearer)
        costs = cost(self.counts(scaled))
        return scaled[(low <= costs) & (costs <= high)]

    def _scaled(self, policies: np.ndarray, factors: np.ndarray) -> np.ndarray:
        return np.minimum(policies * factors[:, None], self.max_ratio)


def _floor(x: np.ndarray) -> np.ndarray:
    return np.maximum(1, np.floor(x + 1e-9)).astype(int)


def mac_cost(width: int, reduction: str, prefix: int) -> Cost:
    """A cost that counts the multiply-accumulates of the blocks for one image."""

    def cost(counts: UnitCounts) -> np.ndarray:
        units = counts.heads, counts.head_dims, counts.neurons
        return blocks.block_macs(*units, counts.tokens_in, counts.tokens_out, width, reduction, prefix=prefix)

    return cost


def budget(space: PolicySpace, cost: Cost, keep: float, tolerance: float) -> tuple[float, float]:
    """The lowest and highest cost of a budget: the share `keep` of the dense model's cost, +- `tolerance` of that share.

    Raises:
        InputError: no policy of the space is cheap enough.
    """
    dense_cost = float(cost(space.counts(np.zeros(space.size)))[0])
    min_cost = float(cost(space.counts(space.max_ratio * space.prunable))[0])
    low, high = (keep * dense_cost * (1 + sign * tolerance) for sign in (-1, 1))
    if min_cost > high:
        raise InputError(
            f"no policy keeps {keep:g} of the cost: with {space.max_ratio:g} of all {', '.join(space.dimensions)} removed "
            f"{min_cost / dense_cost:.3f} is left; give a larger ratio (most), more dimensions, or a larger keep"
        )
    return low, high


def single_ratio_policy(space: PolicySpace, cost: Cost, low: float, high: float) -> np.ndarray:
    """The policy with one ratio for all prunable dimensions whose cost is closest to the middle of the budget, (3 L + 1,)."""
    grid = np.linspace(0, space.max_ratio, 2001)[:, None] * space.prunable
    costs = cost(space.counts(grid))
    return grid[int(np.abs(costs - (low + high) / 2).argmin())]


def single_ratio_policies(space: PolicySpace, cost: Cost, low: float, high: float) -> np.ndarray:
    """The policies within the budget that have one ratio for a subset of the dimensions, largest subsets first, (S, 3 L + 1).

    A search that starts from them ends with at least the score of the best of them.
    """
    dimension_sets = itertools.chain.from_iterable(
        itertools.combinations(space.dimensions, size) for size in range(len(space.dimensions), 0, -1)
    )
    policies = [
        single_ratio_policy(dataclasses.replace(space, dimensions=dimensions), cost, low, high)
        for dimensions in dimension_sets
    ]
    costs = [float(cost(space.counts(policy))[0]) for policy in policies]
    in_budget = [policy for policy, policy_cost in zip(policies, costs, strict=True) if low <= policy_cost <= high]
    return np.array(in_budget).reshape(-1, space.size)


def counts_to_dict(counts: UnitCounts) -> dict[str, list[int]]:
    """The counts of the first policy as lists; "after" holds the tokens after each block's attention."""
    arrays = {
        "neurons": counts.neurons,
        "heads": counts.heads,
        "head_dims": counts.head_dims,
        "after": counts.tokens_out,
    }
    return {name: values[0].tolist() for name, values in arrays.items()}
