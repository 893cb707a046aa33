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
            return mcnemar_exact(*self._counts)
        p_value = 2 * float(special.stdtr(self.df, -abs(self.value) / self.se)) if self.se else 0.0
        return min(1.0, max(p_value, math.pow(2, 1 - self.differing)))

    def difference(self, confidence: float = 0.95) -> Interval:
        """Return the interval of a difference; it leaves out zero only where the p-value says so.

        Binary outcomes have Tango's score interval with one seed and one item per cluster, and reach out to it, a
        cluster counted as an item, where fewer than six clusters differ. All others have that of the t test.
        """
        bounds = [self.value - self._reach(confidence), self.value + self._reach(confidence)]
        if self.binary and (self.single or self._is_rare(self.differing, confidence)):
            score = tango(*self._counts, self.clusters, confidence)
            bounds = list(score) if self.single else [min(bounds[0], score[0]), max(bounds[1], score[1])]
        elif not self.se or not self.clusters > 1:
            return Interval(self.value, None, None)
        if self.p_value > 1 - confidence:
            bounds = [min(bounds[0], 0.0), max(bounds[1], 0.0)]
        return Interval(self.value, *bounds)

    def level(self, unit: str, confidence: float = 0.95) -> Interval:
        """Return the interval of what one arm reaches; `share` keeps it between 0 and 1.

        Binary outcomes have Wilson's score interval with one seed and one item per cluster, and reach out to it where
        fewer than six clusters pass, or fail.
        """
        bounds = [self.value - self._reach(confidence), self.value + self._reach(confidence)]
        rare = self._is_rare(self.clusters * min(self.value, 1 - self.value), confidence)
        if self.binary and (self.single or rare):
            score = _score_bounds(self.value * self.clusters, self.clusters, confidence)
            bounds = list(score) if self.single else [min(bounds[0], score[0]), max(bounds[1], score[1])]
        elif not self.se or not self.clusters > 1:
            return Interval(self.value, None, None)
        if unit == "share":
            bounds = [max(bounds[0], 0.0), min(bounds[1], 1.0)]
        return Interval(self.value, *bounds)

    def smallest_gap(self, alpha: float = SIGNIFICANT) -> float | None:
        """Return the smallest true difference that would be shown in four of five such comparisons."""
        return (_quantile(self.df, 1 - alpha / 2) + _quantile(self.df, POWER)) * self.se if self.se else None

    def needed_items(self, alpha: float = SIGNIFICANT) -> int | None:
        """Return how many items, more than there are, would show a difference of the size seen in four of five cases.

        None where no number would: the difference is zero, or too small for the scatter of so few seeds.
        """
        fixed = self.sd_seeds**2 / self.seeds if self.seeds > 1 else 0.0
        wanted = (self.value / (_quantile(self.df, 1 - alpha / 2) + _quantile(self.df, POWER))) ** 2 - fixed
        if not self.se or wanted <= 0:
            return None
        more = max((self.se**2 - fixed) / wanted, (1 - math.log2(alpha)) / max(self.differing, 1))
        return max(self.items + 1, math.ceil(self.items * more))

    def _reach(self, confidence: float) -> float:
        return _quantile(self.df, (1 + confidence) / 2) * self.se if self.se else 0.0

    @staticmethod
    def _is_rare(count: float, confidence: float) -> bool:
        return math.pow(2, 1 - count) > 1 - confidence

    @property
    def _counts(self) -> tuple[float, float]:
        """Return in how many clusters a alone and b alone passes, for a difference that is ±1 or 0 in each."""
        net = self.value * self.clusters
        total = max(float(self.differing), abs(net)) if self.single else abs(net)
        return (total + net) / 2, (total - net) / 2


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

    Degrees of freedom. Satterthwaite's (Biometrics Bulletin 2, 1946) are too many where few seeds by chance lie close
    together: up to 9 % false alarms at 5 %. These weigh the reciprocals by share: 1 / df = u / (S - 1) + (1 - u) / (G - 1).
    u is A's share of the variance, times A² / (A² + R² / 2): seeds that scatter no more than their items explain borrow
    df from these, seeds that scatter far more have S - 1. The factor is chosen by simulation, so that no scatter of seeds
    gives more than 6 % false alarms: `python -m eval.benchmarks.verdict` shows it.
    With one seed this is the cluster-robust variance with G - 1 df.
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
    free = max(count - 1, 1)
    inverse = 1 / free
    if seeds > 1 and variance:
        share = first / variance * first**2 / (first**2 + of_both**2 / 2)
        inverse = share / (seeds - 1) + (1 - share) / free
    return Inference(
        value=value,
        se=math.sqrt(variance),
        df=1 / inverse,
        seeds=seeds,
        items=items,
        clusters=count,
        differing=differing,
        sd_seeds=math.sqrt(max(of_seeds - of_both, 0.0) * seeds),
        sd_items=math.sqrt(count * (second + seeds * of_both)) if variance else 0.0,
        by_seed=tuple(per_seed.tolist()),
        binary=binary,
        single=seeds == 1 and count == items,
    )


def mcnemar_exact(only_a: float, only_b: float) -> float:
    """Return the two-sided p-value that a and b pass equally often, from the items that one of them passes alone.

    Source: McNemar (1947) with the binomial distribution instead of chi-square.
    """
    disagreements = round(only_a + only_b)
    return min(1.0, 2 * float(special.bdtr(round(min(only_a, only_b)), disagreements, 0.5))) if disagreements else 1.0


def tango(only_a: float, only_b: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a difference of two shares on the same n items; it has width even where none differ.

    Source: Tango, Equivalence Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design,
    Statistics in Medicine 17 (1998).
    """
    difference, z = (only_a - only_b) / n, float(special.ndtri((1 + confidence) / 2))

    def score(gap: float) -> float:
        linear = -only_a - only_b + (2 * n - only_a + only_b) * gap
        rest = (math.sqrt(linear**2 + 8 * n * only_b * gap * (1 - gap)) - linear) / (4 * n)
        variance = n * (2 * rest + gap * (1 - gap))
        distance = only_a - only_b - n * gap
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def bound(end: float, level: float) -> float:
        inside, outside = difference, end
        for _ in range(60):  # halves [0, 2] to the last digit
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(score(middle)) < level else (inside, middle)
        return outside

    low = -1.0 if difference == -1 else bound(-1.0, z)
    return low, 1.0 if difference == 1 else bound(1.0, z)


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Return a rate with its score interval, which holds near 0 and 1 and for few items.

    A tie may count half, which scipy's `binomtest` does not take. Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    if n == 0 or not 0 <= successes <= n:
        raise ValueError(f"found {successes} successes of {n}; wanted 0 to n of at least one")
    return Interval(successes / n, *_score_bounds(successes, n, confidence))


def _score_bounds(successes: float, n: int, confidence: float) -> tuple[float, float]:
    rate, z = min(max(successes / n, 0.0), 1.0), float(special.ndtri((1 + confidence) / 2))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and n the bound is the rate itself; rounding must not move it past.
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


def _quantile(df: float, level: float) -> float:
    return float(special.stdtrit(df, level))
