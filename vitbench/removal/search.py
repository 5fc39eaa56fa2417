"""Search for the policy with the highest score within a budget: Gaussian process with expected improvement, or at random."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from vitbench import progress
from vitbench.base.store import Notes
from vitbench.configs import Config
from vitbench.errors import InputError
from vitbench.removal.policy import Counts, Space, simple

Cost = Callable[[Counts], np.ndarray]


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
class Found:
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
    space: Space,
    cost: Cost,
    limits: tuple[float, float],
    evaluate: Callable[[np.ndarray], float],
    config: SearchConfig,
    memory: Notes | None = None,
) -> Found:
    """Score policies whose cost lies within `limits` and return them all.

    Args:
        evaluate: policy (3 L + 1,) -> score, higher is better.
        memory: notes of scores by policy; what they hold, from a search that was killed or done, is not scored again.

    Raises:
        InputError: no feasible policy was found.
    """
    rng = np.random.default_rng(config.seed)
    known, policies, scores = memory.read() if memory else {}, [], []
    starts = simple(space, cost, *limits)[: config.first]
    for step in progress.bar(range(config.evaluations), f"search ({config.how})", unit="policy"):
        if step < len(starts):
            policy = starts[step]
        elif config.how == "gp" and step >= config.first:
            near = space.near(rng, _elite(policies, scores), config.pool // 2)
            pool = _feasible(space, cost, limits, np.concatenate([space.sample(rng, config.pool // 2), near]))
            policy = _propose(space, np.array(policies), np.array(scores), pool, config.seed)
        else:
            policy = _feasible(space, cost, limits, space.sample(rng, 64))[0]
        policies.append(policy)
        name = _name(policy)
        if name not in known:
            known[name] = float(evaluate(policy))
            if memory:
                memory.add(name, known[name])
        scores.append(known[name])
    return Found(np.array(policies), np.array(scores))


def _feasible(space: Space, cost: Cost, limits: tuple[float, float], policies: np.ndarray) -> np.ndarray:
    found = space.fitted(policies, cost, *limits)
    if not len(found):
        raise InputError(
            f"none of {len(policies)} policies could be brought to a cost between {limits[0]:.4g} and {limits[1]:.4g}: the "
            "steps are too coarse (whole heads, whole tokens); allow a larger tolerance or more dimensions"
        )
    return found


def _elite(policies: list[np.ndarray], scores: list[float], count: int = 3) -> np.ndarray:
    return np.array(policies)[np.argsort(scores)[::-1][:count]]


def _propose(space: Space, policies: np.ndarray, scores: np.ndarray, pool: np.ndarray, seed: int) -> np.ndarray:
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
        process.fit(space.removed(policies)[:, space.free], scores)
        mean, spread = process.predict(space.removed(pool)[:, space.free], return_std=True)
        best = process.predict(
            space.removed(policies)[:, space.free]
        ).max()  # scores are noisy: the best mean, not the luckiest score
    return pool[int(expected_improvement(mean, spread, best).argmax())]


def _name(policy: np.ndarray) -> str:
    return " ".join(f"{ratio:.12g}" for ratio in policy)
