"""Search for the policy with the highest score within a budget, by a Gaussian process with expected improvement or at random.

For a latency budget the cost comes from a table of the measured times of a block's parts.
"""

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from vitbench.base import progress
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.base.store import Journal
from vitbench.model import blocks
from vitbench.removal.policy import Cost, PolicySpace, UnitCounts, single_ratio_policies


class SearchConfig(Config):
    """Settings of a search.

    Attributes:
        how: "gp" (Gaussian process), "random" (its control), "one_ratio" (no search: the same ratio everywhere), or "knapsack"
            (an exact choice by measured losses, `vitbench.removal.knapsack`, which does not use the other settings).
        evaluations: the number of policies that are scored, the first ones included.
        first: the number of policies before the process proposes any: those with a single ratio
            (`policy.single_ratio_policies`), then random ones.
        pool: the number of feasible policies among which expected improvement chooses, half of them near the best so far.
        seed: the seed of all random draws.
    """

    how: Literal["gp", "random", "one_ratio", "knapsack"] = "gp"
    evaluations: int = Field(default=40, ge=1)
    first: int = Field(default=10, ge=2)
    pool: int = Field(default=4000, ge=10)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class SearchResult:
    """All scored policies in order, (E, 3 L + 1), and their scores, (E,)."""

    policies: np.ndarray
    scores: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """The policy with the highest score."""
        return self.policies[int(self.scores.argmax())]


def expected_improvement(mean: np.ndarray, std: np.ndarray, best: float) -> np.ndarray:
    """E max(0, y - best) for y ~ N(mean, std^2): (mean - best) Phi(z) + std phi(z), z = (mean - best) / std.

    With std = 0 it is max(0, mean - best). A search maximises it.
    """
    from scipy.stats import norm

    improvement = np.asarray(mean, float) - best
    std = np.asarray(std, float)
    z = np.divide(improvement, std, out=np.zeros_like(improvement), where=std > 0)
    return np.where(std > 0, improvement * norm.cdf(z) + std * norm.pdf(z), np.maximum(improvement, 0))


def search(
    space: PolicySpace,
    cost: Cost,
    limits: tuple[float, float],
    evaluate: Callable[[np.ndarray], float],
    config: SearchConfig,
    journal: Journal | None = None,
) -> SearchResult:
    """Score `config.evaluations` policies whose cost is within `limits`, and return them all.

    Args:
        evaluate: policy (3 L + 1,) -> score, higher is better.
        journal: scores by policy on disk; policies that an earlier search has scored, killed or not, are not scored again.

    Raises:
        InputError: no feasible policy was found.
    """
    rng = np.random.default_rng(config.seed)
    known_scores = journal.read() if journal else {}
    policies: list[np.ndarray] = []
    scores: list[float] = []
    initial_policies = single_ratio_policies(space, cost, *limits)[: config.first]
    for step in progress.progress_bar(range(config.evaluations), f"search ({config.how})", unit="policy"):
        if step < len(initial_policies):
            policy = initial_policies[step]
        elif config.how == "gp" and step >= config.first:
            perturbed = space.perturb(rng, _best_policies(policies, scores), config.pool // 2)
            pool = _feasible(space, cost, limits, np.concatenate([space.sample(rng, config.pool // 2), perturbed]))
            policy = _next_policy(space, np.array(policies), np.array(scores), pool, config.seed)
        else:
            policy = _feasible(space, cost, limits, space.sample(rng, 64))[0]
        policies.append(policy)
        key = _policy_key(policy)
        if key not in known_scores:
            known_scores[key] = float(evaluate(policy))
            if journal:
                journal.append(key, known_scores[key])
        scores.append(known_scores[key])
    return SearchResult(np.array(policies), np.array(scores))


def _feasible(space: PolicySpace, cost: Cost, limits: tuple[float, float], policies: np.ndarray) -> np.ndarray:
    feasible = space.scale_to_budget(policies, cost, *limits)
    if not len(feasible):
        raise InputError(
            f"none of {len(policies)} policies can be scaled to a cost between {limits[0]:.4g} and {limits[1]:.4g}, because "
            "the steps are too coarse (whole heads, whole tokens); give a larger tolerance or more dimensions"
        )
    return feasible


def _best_policies(policies: list[np.ndarray], scores: list[float], count: int = 3) -> np.ndarray:
    return np.array(policies)[np.argsort(scores)[::-1][:count]]


def _next_policy(
    space: PolicySpace, policies: np.ndarray, scores: np.ndarray, pool: np.ndarray, seed: int
) -> np.ndarray:
    """The policy of the pool with the highest expected improvement under a Gaussian process with a Matern 3/2 kernel.

    Its inputs are the fractions that are removed after rounding, not the ratios. It has one length scale for all inputs and a
    noise term, and the scores are normalised.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0) * Matern(length_scale=0.5, length_scale_bounds=(0.05, 20.0), nu=1.5)
    kernel += WhiteKernel(1e-2, (1e-6, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(space.removed_fractions(policies)[:, space.prunable], scores)
        mean, std = process.predict(space.removed_fractions(pool)[:, space.prunable], return_std=True)
        # scores are noisy, so the best is the highest mean and not the highest score
        best = process.predict(space.removed_fractions(policies)[:, space.prunable]).max()
    return pool[int(expected_improvement(mean, std, best).argmax())]


def _policy_key(policy: np.ndarray) -> str:
    return " ".join(f"{ratio:.12g}" for ratio in policy)


CALLS, GRID = 15, 5  # timed calls of each entry of the table; sizes along neurons and along tokens


@dataclass(frozen=True)
class LatencyTable:
    """Times of attention by heads, their width and tokens, and of the MLP by neurons and tokens, in seconds.

    As a cost it interpolates linearly and adds up the blocks. The other parts (patch embedding, norms, head) are timed once,
    `other_seconds`. Times are those of eager mode with torch's current number of threads, under the assumption that a model
    takes the sum of the times of its parts.
    """

    tokens: np.ndarray
    heads: np.ndarray
    head_dims: np.ndarray
    neurons: np.ndarray
    attention: np.ndarray
    mlp: np.ndarray
    other_seconds: float

    def __call__(self, counts: UnitCounts) -> np.ndarray:
        """Seconds for each of P policies: (P,)."""
        from scipy.interpolate import RegularGridInterpolator

        attention = RegularGridInterpolator((self.heads, self.head_dims, self.tokens), self.attention)
        mlp = RegularGridInterpolator((self.neurons, self.tokens), self.mlp)
        seconds = attention(np.stack([counts.heads, counts.head_dims, counts.tokens_in], -1))
        return self.other_seconds + (seconds + mlp(np.stack([counts.neurons, counts.tokens_out], -1))).sum(-1)

    @classmethod
    @torch.inference_mode()
    def measure(cls, model: nn.Module, space: PolicySpace, batch: int) -> "LatencyTable":
        """Time the parts of the model's first block with sizes that cover the space, for `batch` images."""
        block, no_removal = model.blocks[0], np.zeros(space.size)
        min_counts = space.counts(no_removal + space.max_ratio)
        tokens = np.unique(np.linspace(min_counts.tokens_out.min(), space.tokens, GRID).astype(int))
        heads = np.arange(1, space.heads.max() + 1)
        head_dims = np.unique([min_counts.head_dims.min(), space.head_dims.max()])
        neurons = np.unique(np.linspace(min_counts.neurons.min(), space.neurons.max(), GRID).astype(int))
        inputs = [torch.randn(batch, int(n), model.embed_dim) for n in tokens]
        attention = [_attention(block, int(h), int(width)) for h in heads for width in head_dims]
        parts = attention + [_mlp(block, int(n)) for n in neurons]
        times = np.array(
            [[_seconds(part, x) for x in inputs] for part in progress.progress_bar(parts, "latency table", unit="part")]
        )
        by_part = times[: len(attention)].reshape(len(heads), len(head_dims), len(tokens)), times[len(attention) :]
        table = cls(tokens, heads, head_dims, neurons, *by_part, other_seconds=0.0)
        size = model.recipe.preprocess.size
        model_seconds = _seconds(model, torch.randn(batch, 3, size, size))
        other_seconds = model_seconds - float(table(space.counts(no_removal))[0])
        return dataclasses.replace(table, other_seconds=max(0.0, other_seconds))


def _attention(block: nn.Module, heads: int, head_dim: int) -> nn.Module:
    """The norm and attention of a block with another number and width of heads, and random weights."""
    resized_block, width = copy.deepcopy(block), block.attn.qkv.in_features
    attn = resized_block.attn
    blocks.set_attention_shape(attn, heads, head_dim)
    attn.qkv = nn.Linear(width, 3 * attn.attn_dim, bias=attn.qkv.bias is not None)
    attn.proj = nn.Linear(attn.attn_dim, width)
    return nn.Sequential(resized_block.norm1, attn).eval()


def _mlp(block: nn.Module, neurons: int) -> nn.Module:
    """The norm and MLP of a block with another number of neurons, and random weights."""
    resized_block, width = copy.deepcopy(block), block.attn.qkv.in_features
    resized_block.mlp.fc1, resized_block.mlp.fc2 = nn.Linear(width, neurons), nn.Linear(neurons, width)
    return nn.Sequential(resized_block.norm2, resized_block.mlp).eval()


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    """The median time of a call, in seconds."""
    times = []
    for _ in range(CALLS + 5):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:]))
