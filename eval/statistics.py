"""Say how sure a comparison can be: intervals, paired tests, correction for several of them, and the sample size needed.

Every function is pure and seeded: the same numbers give the same answer. Items are independent; a and b are paired per item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

SIGNIFICANT = 0.05  # a difference counts as shown below this p-value, after correction
EXACT_FLIPS = 16  # up to here all 2**k sign patterns are counted
CHUNK = 2_000_000  # random numbers held at once


@dataclass(frozen=True)
class Interval:
    """Hold an estimate with its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: ArrayLike, seed: int = 0, samples: int = 10_000, confidence: float = 0.95) -> Interval:
    """Return the mean over items with its bootstrap interval; see ratio_interval."""
    values = _column(values)
    return ratio_interval(values, np.ones_like(values), seed, samples, confidence)


def paired_difference(
    a: ArrayLike, b: ArrayLike, seed: int = 0, samples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Return the mean of a - b with its paired bootstrap interval."""
    return bootstrap_mean(_difference(a, b), seed, samples, confidence)


def ratio_interval(
    sums: ArrayLike, counts: ArrayLike, seed: int = 0, samples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Return sum(sums) / sum(counts), such as loss per token, with its bootstrap interval over items.

    The expanded percentile interval: quantiles widened by t and by sqrt(n / (n - 1)). The plain percentile interval is
    too short below about 100 items, and BCa corrects skew but not that shortness.
    Where no item differs from the others the interval is the value itself.
    Source: Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69 (2015), arXiv:1411.5279.
    """
    sums, counts = _column(sums), _column(counts)
    if len(sums) != len(counts) or not (counts > 0).all():
        raise ValueError(f"found {len(sums)} sums and {len(counts)} counts; wanted as many counts, all above zero")
    ratios = sums / counts
    if np.ptp(ratios) == 0:
        value = float(ratios[0])
        return Interval(value, value, value)
    n = len(sums)
    generator = np.random.default_rng(seed)
    drawn, rows = [], CHUNK // n + 1
    for start in range(0, samples, rows):
        picks = generator.integers(0, n, (min(rows, samples - start), n))
        drawn.append(sums[picks].sum(axis=1) / counts[picks].sum(axis=1))
    wide = math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1)
    low, high = np.quantile(np.concatenate(drawn), stats.norm.cdf([-wide, wide]))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def paired_ratio_difference(
    sums_a: ArrayLike,
    sums_b: ArrayLike,
    counts: ArrayLike,
    seed: int = 0,
    samples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Return sum(sums_a - sums_b) / sum(counts) with its paired bootstrap interval over items.

    Its p-value is paired_p_value(sums_a, sums_b): flipping items leaves the total count as it is.
    """
    return ratio_interval(_difference(sums_a, sums_b), counts, seed, samples, confidence)


def paired_p_value(a: ArrayLike, b: ArrayLike, seed: int = 0, samples: int = 10_000) -> float:
    """Return the two-sided p-value of a mean difference when a and b are swapped at random per item.

    Exact for up to 16 items that differ (the others change nothing), otherwise Monte Carlo counting the data itself.
    scipy's `permutation_test` says the same, but takes about fifty times as long.
    Source: Fisher's sign-flip test; the +1 after Phipson and Smyth, Permutation P-values Should Never Be Zero (2010).
    """
    difference = _difference(a, b)
    difference = difference[difference != 0]
    k = len(difference)
    observed = abs(difference.sum()) * (1 - 1e-12)  # sums in another order differ in the last digits
    if k <= EXACT_FLIPS:
        signs = (np.arange(2**k)[:, None] >> np.arange(k) & 1) * 2 - 1
        return float(np.mean(np.abs(signs @ difference) >= observed))
    generator = np.random.default_rng(seed)
    extreme, rows = 0, CHUNK // k + 1
    for start in range(0, samples, rows):
        size = (min(rows, samples - start), -(-k // 8))
        bits = np.unpackbits(generator.integers(0, 256, size, dtype=np.uint8), axis=1, count=k)
        # A flip of the set S changes the sum by twice the sum over S.
        flipped = difference.sum() - 2 * (bits @ difference)
        extreme += int(np.count_nonzero(np.abs(flipped) >= observed))
    return (extreme + 1) / (samples + 1)


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Return a rate with its score interval, which holds near 0 and 1 and for few items.

    A tie may count half, which scipy's `binomtest` does not take. Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"found {successes} successes of {n}; wanted 0 to n of at least one")
    rate, z = successes / n, float(stats.norm.ppf((1 + confidence) / 2))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and n the bound is the rate itself; rounding must not move it past.
    return Interval(rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half)))


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Return the two-sided p-value that a and b pass equally often, from the items where they disagree.

    Source: McNemar (1947) with the binomial distribution instead of chi-square.
    """
    difference = _difference(a, b)
    only_a, disagreements = int((difference > 0).sum()), int(np.count_nonzero(difference))
    return float(stats.binomtest(only_a, disagreements).pvalue) if disagreements else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that a false alarm among all of them stays below alpha.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, highest = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def needed_n(differences: ArrayLike, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Return how many items would show a mean difference of the observed size; None when it is zero or n is 1.

    Normal approximation ((z_alpha/2 + z_power) * sd / mean)**2. For a ratio pass the differences of the sums.
    """
    differences = _column(differences)
    mean = float(differences.mean())
    if len(differences) < 2 or mean == 0:
        return None
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))
    fewest = math.ceil(1 - math.log2(alpha))  # with fewer no sign-flip test reaches alpha
    return max(fewest, math.ceil((z * float(differences.std(ddof=1)) / mean) ** 2))


def _column(values: ArrayLike) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or len(column) == 0 or not np.isfinite(column).all():
        raise ValueError(f"found values of shape {column.shape}; wanted a list of at least one finite number")
    return column


def _difference(a: ArrayLike, b: ArrayLike) -> Floats:
    left, right = _column(a), _column(b)
    if len(left) != len(right):
        raise ValueError(f"found {len(left)} and {len(right)} values; wanted one of each per item")
    return left - right
