"""Search for the policy with the highest score within a budget: Gaussian process with expected improvement, or random.

A budget of latency uses a table of the time that each part of a block takes on this machine.
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
from vitbench.removal.policy import PolicySpace, UnitCounts, single_ratio_policies

Cost = Callable[[UnitCounts], np.ndarray]


class SearchConfig(Config):
    """How to search.

    Attributes:
        how: "gp" (Gaussian process), "random" (its control), or "one_ratio" (no search: the same ratio everywhere).
        evaluations: how many policies are scored, the first ones included.
        first: how many of them come before the process is asked: those of one ratio (`policy.simple`), then random ones.
        pool: how many feasible policies expected improvement chooses from, half of them about the best so far.
        seed: of all draws.
    """

    how: Literal["gp", "random", "one_ratio"] = "gp"
    evaluations: int = Field(default=40, ge=1)
    first: int = Field(default=10, ge=2)
    pool: int = Field(default=4000, ge=10)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class SearchResult:
    """All policies that were scored, in order, (E, 3 L + 1), and their scores (E,)."""

    policies: np.ndarray
    scores: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """The policy with the highest score."""
        return self.policies[int(self.scores.argmax())]


def expected_improvement(mean: np.ndarray, spread: np.ndarray, best: float) -> np.ndarray:
    """E max(0, y - best) for y ~ N(mean, spread^2): (mean - best) Phi(z) + spread phi(z), z = (mean - best) / spread.

    Where the spread is 0 it is max(0, mean - best). To be maximised.
    """
    from scipy.stats import norm

    gain = np.asarray(mean, float) - best
    spread = np.asarray(spread, float)
    z = np.divide(gain, spread, out=np.zeros_like(gain), where=spread > 0)
    return np.where(spread > 0, gain * norm.cdf(z) + spread * norm.pdf(z), np.maximum(gain, 0))


def search(
    space: PolicySpace,
    cost: Cost,
    limits: tuple[float, float],
    evaluate: Callable[[np.ndarray], float],
    config: SearchConfig,
    memory: Journal | None = None,
) -> SearchResult:
    """Score policies whose cost lies within `limits` and return them all.

    Args:
        evaluate: policy (3 L + 1,) -> score, higher is better.
        memory: notes of scores by policy; what they hold, from a search that was killed or done, is not scored again.

    Raises:
        InputError: no feasible policy was found.
    """
    rng = np.random.default_rng(config.seed)
    known = memory.read() if memory else {}
    policies: list[np.ndarray] = []
    scores: list[float] = []
    starts = single_ratio_policies(space, cost, *limits)[: config.first]
    for step in progress.progress_bar(range(config.evaluations), f"search ({config.how})", unit="policy"):
        if step < len(starts):
            policy = starts[step]
        elif config.how == "gp" and step >= config.first:
            near = space.perturb(rng, _elite(policies, scores), config.pool // 2)
            pool = _feasible(space, cost, limits, np.concatenate([space.sample(rng, config.pool // 2), near]))
            policy = _propose(space, np.array(policies), np.array(scores), pool, config.seed)
        else:
            policy = _feasible(space, cost, limits, space.sample(rng, 64))[0]
        policies.append(policy)
        name = _name(policy)
        if name not in known:
            known[name] = float(evaluate(policy))
            if memory:
                memory.append(name, known[name])
        scores.append(known[name])
    return SearchResult(np.array(policies), np.array(scores))


def _feasible(space: PolicySpace, cost: Cost, limits: tuple[float, float], policies: np.ndarray) -> np.ndarray:
    found = space.scale_to_budget(policies, cost, *limits)
    if not len(found):
        raise InputError(
            f"none of {len(policies)} policies could be brought to a cost between {limits[0]:.4g} and {limits[1]:.4g}: the "
            "steps are too coarse (whole heads, whole tokens); allow a larger tolerance or more dimensions"
        )
    return found


def _elite(policies: list[np.ndarray], scores: list[float], count: int = 3) -> np.ndarray:
    return np.array(policies)[np.argsort(scores)[::-1][:count]]


def _propose(space: PolicySpace, policies: np.ndarray, scores: np.ndarray, pool: np.ndarray, seed: int) -> np.ndarray:
    """The policy of the pool with the highest expected improvement under a Gaussian process with a Matern 3/2 kernel.

    It sees what really goes, not the ratios before rounding; one length for all of it, noise included, scores normalised.
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
        mean, spread = process.predict(space.removed_fractions(pool)[:, space.prunable], return_std=True)
        best = process.predict(
            space.removed_fractions(policies)[:, space.prunable]
        ).max()  # scores are noisy: the best mean, not the luckiest score
    return pool[int(expected_improvement(mean, spread, best).argmax())]


def _name(policy: np.ndarray) -> str:
    return " ".join(f"{ratio:.12g}" for ratio in policy)


CALLS, GRID = 15, 5  # timed calls of each cell; places along neurons and along tokens


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of attention by heads, their width and tokens, and of the MLP by neurons and tokens; linear in between.

    As a cost it adds up the blocks; what is outside of them (embedding, norms, head) is timed once as `rest`. It is eager
    mode with torch's present thread count, and assumes that parts take as long together as alone.
    """

    tokens: np.ndarray
    heads: np.ndarray
    head_dims: np.ndarray
    neurons: np.ndarray
    attention: np.ndarray
    mlp: np.ndarray
    rest: float

    def __call__(self, counts: UnitCounts) -> np.ndarray:
        """Seconds for each of P policies: (P,)."""
        from scipy.interpolate import RegularGridInterpolator

        attention = RegularGridInterpolator((self.heads, self.head_dims, self.tokens), self.attention)
        mlp = RegularGridInterpolator((self.neurons, self.tokens), self.mlp)
        seconds = attention(np.stack([counts.heads, counts.head_dims, counts.tokens_in], -1))
        return self.rest + (seconds + mlp(np.stack([counts.neurons, counts.tokens_out], -1))).sum(-1)

    @classmethod
    @torch.inference_mode()
    def measure(cls, model: nn.Module, space: PolicySpace, batch: int) -> "LatencyTable":
        """Time parts of the model's first block at sizes that cover the space, for `batch` images."""
        block, whole = model.blocks[0], np.zeros(space.size)
        least = space.counts(whole + space.max_ratio)
        tokens = np.unique(np.linspace(least.tokens_out.min(), space.tokens, GRID).astype(int))
        heads = np.arange(1, space.heads.max() + 1)
        head_dims = np.unique([least.head_dims.min(), space.head_dims.max()])
        neurons = np.unique(np.linspace(least.neurons.min(), space.neurons.max(), GRID).astype(int))
        inputs = [torch.randn(batch, int(n), model.embed_dim) for n in tokens]
        attention = [_attention(block, int(h), int(width)) for h in heads for width in head_dims]
        parts = attention + [_mlp(block, int(n)) for n in neurons]
        times = np.array(
            [[_seconds(part, x) for x in inputs] for part in progress.progress_bar(parts, "latency table", unit="part")]
        )
        by_part = times[: len(attention)].reshape(len(heads), len(head_dims), len(tokens)), times[len(attention) :]
        table = cls(tokens, heads, head_dims, neurons, *by_part, rest=0.0)
        size = model.recipe.preprocess.size
        rest = _seconds(model, torch.randn(batch, 3, size, size)) - float(table(space.counts(whole))[0])
        return dataclasses.replace(table, rest=max(0.0, rest))


def _attention(block: nn.Module, heads: int, head_dim: int) -> nn.Module:
    """Attention like this block's, with its norm, of another size and with random weights."""
    made, d = copy.deepcopy(block), block.attn.qkv.in_features
    blocks.set_attention_shape(made.attn, heads, head_dim)
    made.attn.qkv = nn.Linear(d, 3 * made.attn.attn_dim, bias=made.attn.qkv.bias is not None)
    made.attn.proj = nn.Linear(made.attn.attn_dim, d)
    return nn.Sequential(made.norm1, made.attn).eval()


def _mlp(block: nn.Module, neurons: int) -> nn.Module:
    """An MLP like this block's, with its norm, of another size and with random weights."""
    made, d = copy.deepcopy(block), block.attn.qkv.in_features
    made.mlp.fc1, made.mlp.fc2 = nn.Linear(d, neurons), nn.Linear(neurons, d)
    return nn.Sequential(made.norm2, made.mlp).eval()


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    times = []
    for _ in range(CALLS + 5):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:]))
