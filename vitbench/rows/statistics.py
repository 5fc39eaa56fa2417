"""Intervals over rows: binomial for accuracy, bootstrap for ratios of paired timings, and the Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
QUIET_ROUNDS = 5  # at least so many rounds decide a ratio of times


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(int(correct), int(total)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def pack_hits(hits: np.ndarray) -> str:
    """Right and wrong answers, in order, as hexadecimal digits of four each; `unpack_hits` has them back."""
    return np.packbits(np.asarray(hits, bool)).tobytes().hex()


def unpack_hits(text: str, count: int) -> np.ndarray:
    """The first `count` answers of `pack_hits`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same images: by how much the first's mean is above the second's, its 95 % interval, and p."""

    difference: float
    low: float
    high: float
    p: float


def compare_hits(first: np.ndarray, second: np.ndarray) -> PairedComparison:
    """Compare the right and wrong answers of two models, image by image.

    The difference is a fraction of the images, its interval normal, from the discordant pairs; p is that of the exact
    McNemar test.
    """
    from scipy.stats import binomtest, norm

    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} answers: they are not to the same images")
    only_first, only_second, count = int((first & ~second).sum()), int((~first & second).sum()), len(first)
    difference = (only_first - only_second) / count
    half_width = (
        norm.ppf((1 + CONFIDENCE) / 2)
        * np.sqrt(max(only_first + only_second - (only_first - only_second) ** 2 / count, 0))
        / count
    )
    p = binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    return PairedComparison(difference, difference - half_width, difference + half_width, float(p))


def compare_means(first: Sequence[float], second: Sequence[float]) -> PairedComparison:
    """Compare two models' values on the same images, cross-entropies say, by the paired t test."""
    from scipy.stats import ttest_rel

    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: they are not of the same images")
    test = ttest_rel(first, second)
    interval = test.confidence_interval(CONFIDENCE)
    return PairedComparison(float(np.mean(first) - np.mean(second)), *map(float, interval), float(test.pvalue))


def quiet_latency_ratio(
    a: Sequence[float], b: Sequence[float], starts: int = 1, seed: int = 0
) -> tuple[float, float, float]:
    """The median of a[i] / b[i] over the quarter of the rounds in which the machine was least disturbed, and its 95 % bootstrap interval.

    a[i] and b[i] are timings of one round, taken in turn. What else runs on a machine slows one model more than another, for minutes
    at a time, so that a median over all rounds depends on how many of them were disturbed. Those count in which the two
    together, each over its own median, took least. The interval is that of this run; it does not cover another machine or day.

    Args:
        a: of all rounds, those of one process after those of another.
        starts: processes that share the rounds evenly. If there are several they are what the bootstrap draws, since the rounds
            of one process are alike; else it draws rounds.
    """
    from scipy.stats import bootstrap

    a, b = np.asarray(a, float), np.asarray(b, float)
    ratios, disturbance = a / b, a / np.median(a) + b / np.median(b)
    rounds_by_start = np.arange(len(a)).reshape(starts if starts > 1 else len(a), -1)
    quiet_count = min(len(a), max(QUIET_ROUNDS, len(a) // 4))

    def median(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        rounds = rounds_by_start[drawn].reshape(*drawn.shape[:-1], -1)
        quietest = np.argsort(disturbance[rounds], axis=-1, kind="stable")[..., :quiet_count]
        return np.median(np.take_along_axis(ratios[rounds], quietest, -1), axis=-1)

    all_starts = np.arange(len(rounds_by_start))
    interval = bootstrap(
        (all_starts,), median, n_resamples=2000, confidence_level=CONFIDENCE, method="percentile", rng=seed
    ).confidence_interval
    return float(median(all_starts)), float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of a few independent values (seeds, say) and its 95 % Student t interval; NaN bounds for fewer than two."""
    from scipy.stats import t

    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float("nan"), float("nan")
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def pareto_front(cost: Sequence[float], gain: Sequence[float]) -> np.ndarray:
    """Positions of the points that no other beats: no higher gain at the same or lower cost. Sorted by cost."""
    cost, gain = np.asarray(cost, float), np.asarray(gain, float)
    front, best = [], -np.inf
    for i in np.lexsort((-gain, cost)):
        if gain[i] > best:
            front.append(i)
            best = gain[i]
    return np.array(front, dtype=int)
