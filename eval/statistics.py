"""Say how sure a comparison can be: what seeds and prompts bring to an error, intervals, tests, and their correction.

Every function is pure: the same numbers give the same answer.

The model. A measure has a value y for each seed s and item i, for a difference that of two arms on the same item and seed.
Items come in clusters c, such as the pairs of one prompt. Seeds and clusters are drawn at random and crossed:

    y = mean + seed_s + cluster_c + (seed × cluster)_sc + residual_i

so that items of one cluster are not independent, and more items do not help against seeds that scatter. With one seed the
seed is fixed: what is said then is said of these adapters alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.optimize import brentq

Floats = NDArray[np.float64]

SIGNIFICANT = 0.05  # a difference counts as shown below this p-value, after correction
POWER = 0.8  # of a difference that is called large enough to be seen


@dataclass(frozen=True)
class Interval:
    """Hold an estimate with its confidence interval; the bounds are None where none can be given."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Inference:
    """Hold what seeds and clusters say of a mean: the estimate, its standard error and degrees of freedom."""

    value: float
    se: float
    df: float
    seeds: int
    items: int
    clusters: int
    differing: int  # clusters whose values are not all zero
    size: float  # mean of the absolute values
    sd_seeds: float  # how far seeds scatter beyond what their items explain
    sd_items: float  # how far clusters scatter under one seed
    by_seed: tuple[float, ...]
    binary: bool = False
    single: bool = False  # one seed and one item per cluster

    @property
    def test(self) -> str:
        """Name the test behind the p-value."""
        if self.single and self.binary:
            return "McNemar, exact"
        return "t, clusters" if self.seeds == 1 else "t, seeds × clusters"

    @property
    def p_value(self) -> float:
        """Return the two-sided p-value of a difference of zero.

        Exact where both outcomes are binary, with one seed and one item per cluster: McNemar (1947) with the binomial
        distribution. Otherwise Student's t, but never below 2 / 2**k for k clusters that differ, which is the smallest
        p-value that turning their signs at random can give: so fewer than six show nothing at 5 %.
        """
        if self.single and self.binary:
            return mcnemar_exact(*self._wins(self.clusters))
        if not self.value:
            return 1.0
        if not self.se:
            p_value = 0.0
        elif self.binary:
            p_value = 2 * float(
                special.stdtr(self.df, -abs(self.value) * math.sqrt(self._independent_items / self.size))
            )
        else:
            p_value = 2 * float(special.stdtr(self.df, -abs(self.value) / self.se))
        return min(1.0, max(p_value, math.pow(2, 1 - self.differing)))

    def difference(self, confidence: float = 0.95) -> Interval:
        """Return the interval of a difference; it leaves out zero only where the p-value says so.

        Binary outcomes have Tango's score interval, for as many independent items as have this standard error, and with
        the quantile of t. All others have that of the t test, and none where all clusters differ alike.
        """
        if self.binary:
            n = self._independent_items
            low, high = tango(*self._wins(n), n, self._quantile(confidence))
        elif self.se:
            low, high = (self.value + sign * self._quantile(confidence) * self.se for sign in (-1, 1))
        else:
            return Interval(self.value, None, None)
        if self.p_value > 1 - confidence:
            low, high = min(low, 0.0), max(high, 0.0)
        return Interval(self.value, low, high)

    def level(self, unit: str, confidence: float = 0.95) -> Interval:
        """Return the interval of what one arm reaches; a `share` stays between 0 and 1.

        Binary outcomes have Wilson's score interval, as differences have Tango's.
        """
        if self.binary:
            return Interval(self.value, *_score_bounds(self.value, self._independent_items, self._quantile(confidence)))
        if not self.se:
            return Interval(self.value, None, None)
        low, high = (self.value + sign * self._quantile(confidence) * self.se for sign in (-1, 1))
        return (
            Interval(self.value, max(low, 0.0), min(high, 1.0)) if unit == "share" else Interval(self.value, low, high)
        )

    def smallest_gap(self, alpha: float = SIGNIFICANT) -> float | None:
        """Return the smallest true difference that would be shown in four of five such comparisons."""
        return visible_gap(self._cautious_se, self.df, alpha) if self.se else None

    def needed_items(self, alpha: float = SIGNIFICANT) -> int | None:
        """Return how many items, more than there are, would show a difference of the size seen in four of five cases.

        None where no number would: the difference is zero, or too small for the scatter of so few seeds.
        """
        fixed = self.sd_seeds**2 / self.seeds if self.seeds > 1 else 0.0
        wanted = (self.value / visible_gap(1.0, self.df, alpha)) ** 2 - fixed
        if not self.se or wanted <= 0:
            return None
        more = max((self._cautious_se**2 - fixed) / wanted, (1 - math.log2(alpha)) / max(self.differing, 1))
        return max(self.items + 1, math.ceil(self.items * more))

    @property
    def _cautious_se(self) -> float:
        """Return the standard error; of binary outcomes that of the test, which does not trust the scatter of a few."""
        if not self.binary:
            return self.se
        return max(self.se, math.sqrt(max(self.size - self.value**2, 0.0) / self._independent_items))

    @property
    def _independent_items(self) -> float:
        """Return how many independent items would give binary outcomes this standard error.

        Rao and Scott, A Simple Method for the Analysis of Clustered Binary Data, Biometrics 48 (1992). No more than there
        are clusters where fewer than six pass, or fail, or differ: their scatter says little.
        """
        spread = self.size - self.value**2
        rare = self.clusters * min(self.size, 1 - abs(self.value)) < 6 or self.differing < 6
        if self.single or not self.se or spread <= 0:
            return float(self.clusters)
        return min(spread / self.se**2, self.clusters) if rare else spread / self.se**2

    def _wins(self, n: float) -> tuple[float, float]:
        """Return the share of items that a, and that b alone passes, as numbers of n."""
        return n * (self.size + self.value) / 2, n * (self.size - self.value) / 2

    def _quantile(self, confidence: float) -> float:
        level = (1 + confidence) / 2
        return float(special.ndtri(level)) if self.single and self.binary else _t(self.df, level)


def crossed(
    values: ArrayLike, clusters: ArrayLike | None = None, weights: ArrayLike | None = None, *, binary: bool = False
) -> Inference:
    """Estimate a mean over seeds and items with both sources of its error.

    values: (seeds, items), for a difference that of the two arms; clusters: a number from 0 for each item, each item its own
    cluster by default; with weights values are sums, and the estimate is sum(values) / sum(weights), mean over seeds.

    With A the variance of the mean that the scatter of seeds explains, C that of clusters, R that of seed × cluster and
    residual, which both contain: the variance is max(A, R) + max(C - R, 0). That is the two-way variance of Cameron, Gelbach
    and Miller (Journal of Business & Economic Statistics 29, 2011), never below what one way alone gives, as MacKinnon,
    Nielsen and Webb advise (arXiv:2406.08880); C and R come from leaving out one cluster at a time, as theirs do.

    With one seed this is the cluster-robust variance with G - 1 degrees of freedom; with more see degrees_of_freedom.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"found values of shape {values.shape}; wanted finite numbers, a row per seed")
    seeds, items = values.shape
    if clusters is None:
        sums, sizes = values, np.ones(items) if weights is None else np.asarray(weights, dtype=np.float64)
    else:
        codes = np.asarray(clusters)
        count = int(codes.max()) + 1
        cells = (codes + count * np.arange(seeds)[:, None]).ravel()
        sums = np.bincount(cells, values.ravel(), minlength=seeds * count).reshape(seeds, count)
        sizes = np.bincount(codes, weights, minlength=count).astype(np.float64)
    if sizes.shape != sums.shape[1:] or not (sizes > 0).all():
        raise ValueError(f"found {sizes.shape} weights for {items} items; wanted one for each, all above zero")
    count, total = len(sizes), sizes.sum()
    per_seed = sums.sum(axis=1) / total
    value = float(per_seed.mean())
    tiny = 1e-12 * float(np.abs(values).max())
    differing = int(np.count_nonzero(np.abs(sums).max(axis=0) > tiny))
    of_seeds = float(per_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    of_clusters = of_both = 0.0
    if count > 1:
        moved = (sums - per_seed[:, None] * sizes) * ((count - 1) / (total - sizes))
        column = moved.mean(axis=0)
        of_clusters = float(column @ column) / (count * (count - 1))
        if seeds > 1:
            of_both = float(np.square(moved - column).sum()) / (seeds * count * (seeds - 1) * (count - 1))
    first, second = max(of_seeds, of_both), max(of_clusters - of_both, 0.0)
    variance = first + second
    if variance <= tiny**2:
        variance = first = second = of_seeds = of_both = 0.0
    return Inference(
        value=value,
        se=math.sqrt(variance),
        df=degrees_of_freedom(first, second, of_both, seeds, count),
        seeds=seeds,
        items=items,
        clusters=count,
        differing=differing,
        size=float(np.abs(values).mean()),
        sd_seeds=math.sqrt(max(of_seeds - of_both, 0.0) * seeds),
        sd_items=math.sqrt(count * (second + seeds * of_both)) if variance else 0.0,
        by_seed=tuple(per_seed.tolist()),
        binary=binary,
        single=seeds == 1 and count == items,
    )


def degrees_of_freedom(of_seeds: float, of_clusters: float, of_both: float, seeds: int, clusters: int) -> float:
    """Return the degrees of freedom of a variance of_seeds + of_clusters, of which of_both would be there without either.

    Satterthwaite's (Biometrics Bulletin 2, 1946) are too many where few seeds by chance lie close together: up to 9 % false
    alarms at 5 %. These weigh the reciprocals by share: 1 / df = u / (S - 1) + (1 - u) / (G - 1). u is of_seeds' share of the
    variance, times of_seeds² / (of_seeds² + of_both² / 2): seeds that scatter no more than their items explain borrow from
    these, seeds that scatter far more have S - 1. The factor was chosen by simulation, so that no scatter of seeds gives
    more than 6 % false alarms: `python -m eval.benchmarks.verdict` shows it.
    """
    free = max(clusters - 1, 1)
    variance = of_seeds + of_clusters
    if seeds == 1 or not of_seeds:  # seeds that all give the same add nothing
        return free
    share = of_seeds / variance * of_seeds**2 / (of_seeds**2 + of_both**2 / 2)
    return 1 / (share / (seeds - 1) + (1 - share) / free)


def mcnemar_exact(only_a: float, only_b: float) -> float:
    """Return the two-sided p-value that a and b pass equally often, from the items that one of them passes alone.

    Source: McNemar (1947) with the binomial distribution instead of chi-square.
    """
    disagreements = round(only_a + only_b)
    return min(1.0, 2 * float(special.bdtr(round(min(only_a, only_b)), disagreements, 0.5))) if disagreements else 1.0


def tango(only_a: float, only_b: float, n: float, z: float) -> tuple[float, float]:
    """Return the score interval of a difference of two shares on the same n items; it has width even where none differ.

    Source: Tango, Equivalence Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design,
    Statistics in Medicine 17 (1998).
    """
    difference = (only_a - only_b) / n

    def excess(gap: float) -> float:
        linear = -only_a - only_b + (2 * n - only_a + only_b) * gap
        rest = (math.sqrt(max(linear**2 + 8 * n * only_b * gap * (1 - gap), 0.0)) - linear) / (4 * n)
        return (only_a - only_b - n * gap) ** 2 - z**2 * n * (2 * rest + gap * (1 - gap))

    def bound(end: float) -> float:
        beside = difference + 1e-9 * (end - difference)  # where all items are alike, the difference itself is a root
        return float(brentq(excess, beside, end)) if excess(beside) < 0 < excess(end) else end

    return bound(-1.0), bound(1.0)


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Return a rate with its score interval, which holds near 0 and 1 and for few items.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"found {successes} successes of {n}; wanted 0 to n of at least one")
    return Interval(successes / n, *_score_bounds(successes / n, n, float(special.ndtri((1 + confidence) / 2))))


def _score_bounds(rate: float, n: float, z: float) -> tuple[float, float]:
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(rate * (1 - rate), 0.0) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound is the rate itself; rounding must not move it past.
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that a false alarm among all of them stays below alpha.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, highest = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def visible_gap(se: float, df: float, alpha: float) -> float:
    """Return the true difference that a t test shows in four of five cases, at this standard error."""
    return se * (_t(df, 1 - alpha / 2) + _t(df, POWER))


def _t(df: float, level: float) -> float:
    return float(special.stdtrit(df, level))
