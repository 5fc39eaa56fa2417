"""Statistics over rows: intervals of accuracies, paired tests, bootstrap intervals of latency ratios, the Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
QUIET_ROUNDS = 5  # at least this many rounds decide a latency ratio


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(int(correct), int(total)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def pack_hits(hits: np.ndarray) -> str:
    """Hits, (N,) bool in the order of the images, as hexadecimal digits of four hits each; `unpack_hits` is the inverse."""
    return np.packbits(np.asarray(hits, bool)).tobytes().hex()


def unpack_hits(text: str, count: int) -> np.ndarray:
    """The first `count` hits of a text of `pack_hits`, (count,) bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same images: the first's mean minus the second's, with its 95 % interval and p-value."""

    difference: float
    low: float
    high: float
    p: float


def compare_hits(first: np.ndarray, second: np.ndarray) -> PairedComparison:
    """Compare the hits of two models on the same images, (N,) bool each.

    The difference is a fraction of the images. Its interval is normal, from the discordant pairs. p is that of the exact
    McNemar test (McNemar 1947).
    """
    from scipy.stats import binomtest, norm

    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} hits: they are not of the same images")
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
    """Compare two models' values on the same images, such as cross-entropies, (N,) each, by the paired t-test."""
    from scipy.stats import ttest_rel

    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: they are not of the same images")
    test = ttest_rel(first, second)
    low, high = test.confidence_interval(CONFIDENCE)
    return PairedComparison(float(np.mean(first) - np.mean(second)), float(low), float(high), float(test.pvalue))


def quiet_latency_ratio(
    a: Sequence[float], b: Sequence[float], starts: int = 1, seed: int = 0
) -> tuple[float, float, float]:
    """The median of a[i] / b[i] over the least disturbed quarter of the rounds, and its 95 % bootstrap interval.

    a[i] and b[i] are alternating timings of one round. Other load on the machine slows one model more than another for
    minutes, so the median over all rounds would depend on how many of them were disturbed. The least disturbed rounds
    are those with the smallest sum of both timings, each divided by its median. The interval is valid for this run, not
    for other machines or days.

    Args:
        a: the timings of all rounds, process after process.
        b: the timings of the baseline in the same rounds.
        starts: the number of processes that share the rounds evenly. The bootstrap draws processes if there are several,
            since rounds of one process are correlated; otherwise it draws rounds.
        seed: the seed of the bootstrap.
    """
    from scipy.stats import bootstrap

    times, baseline_times = np.asarray(a, float), np.asarray(b, float)
    ratios = times / baseline_times
    disturbance = times / np.median(times) + baseline_times / np.median(baseline_times)
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
    """The mean of independent values, such as those of seeds, and its 95 % Student t interval; NaN bounds for one value."""
    from scipy.stats import t

    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float("nan"), float("nan")
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def pareto_front(cost: Sequence[float], gain: Sequence[float]) -> np.ndarray:
    """Indices of the points for which no other has a higher or equal gain at a lower or equal cost, sorted by cost."""
    costs, gains = np.asarray(cost, float), np.asarray(gain, float)
    front, best = [], -np.inf
    for i in np.lexsort((-gains, costs)):
        if gains[i] > best:
            front.append(i)
            best = gains[i]
    return np.array(front, dtype=int)
