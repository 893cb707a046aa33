"""The statistics agree with scipy and with tables worked by hand, stay quiet on chance, and find a real effect."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from eval import statistics
from eval.statistics import (
    Interval,
    bootstrap_mean,
    holm,
    mcnemar_exact,
    needed_n,
    paired_difference,
    paired_p_value,
    paired_ratio_difference,
    ratio_interval,
    wilson,
)


def skewed(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=n)


def test_the_bootstrap_interval_agrees_with_scipy_at_the_widened_level():
    values = skewed(40)
    ours = bootstrap_mean(values)
    tail = stats.norm.cdf(-math.sqrt(40 / 39) * stats.t.ppf(0.975, 39))
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=1 - 2 * tail, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.015)


@pytest.mark.parametrize("n", [30, 80])
def test_a_95_percent_interval_covers_the_truth_about_95_times_in_100(n):
    generator = np.random.default_rng(n)
    covered = 0
    for _ in range(400):
        interval = bootstrap_mean(generator.normal(1, 2, n), samples=1000)
        covered += interval.low <= 1 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_equal_values_have_an_interval_without_width():
    assert bootstrap_mean([0.1] * 7) == Interval(0.1, 0.1, 0.1)
    assert bootstrap_mean([0.3]) == Interval(0.3, 0.3, 0.3)
    assert ratio_interval([2.0, 4.0], [4, 8]) == Interval(0.5, 0.5, 0.5)
    uneven = ratio_interval([4.0, 1.0], [1, 4])
    assert uneven.low < uneven.value == 1 < uneven.high


def test_the_same_outcomes_twice_differ_by_exactly_nothing():
    sums, counts = skewed(50), np.arange(1, 51)
    assert paired_difference(sums, sums) == Interval(0.0, 0.0, 0.0)
    assert paired_ratio_difference(sums, sums, counts) == Interval(0.0, 0.0, 0.0)
    assert paired_p_value(sums, sums) == 1.0
    assert mcnemar_exact([True, False], [True, False]) == 1.0
    assert needed_n(sums - sums) is None


def test_the_same_call_gives_the_same_answer_and_swapping_turns_the_sign():
    a, b = skewed(60, 1), skewed(60, 2)
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert forward == paired_difference(a, b)
    assert forward.value == pytest.approx(-backward.value)
    assert forward.low == pytest.approx(-backward.high, abs=0.02)
    assert paired_p_value(a, b) == paired_p_value(b, a)


def test_every_interval_of_a_difference_is_one_bootstrap_with_the_settings_that_were_given():
    a, b, ones = skewed(60, 1), skewed(60, 2), np.ones(60)
    for settings in ({}, {"seed": 5}, {"samples": 500}, {"confidence": 0.8}):
        wanted = ratio_interval(a - b, ones, **{"seed": 0, "samples": 10_000, "confidence": 0.95, **settings})
        assert ratio_interval(a - b, ones, **settings) == wanted
        assert bootstrap_mean(a - b, **settings) == wanted
        assert paired_difference(a, b, **settings) == wanted
        assert paired_ratio_difference(a, b, ones, **settings) == wanted
    assert paired_p_value(a, b) == paired_p_value(a, b, seed=0, samples=10_000) != paired_p_value(a, b, seed=1)


def test_cutting_the_work_to_bound_memory_changes_no_result(monkeypatch):
    a, b = skewed(60, 1), skewed(60, 2)
    whole, p_value = paired_difference(a, b, samples=1001), paired_p_value(a, b, samples=1001)
    for chunk in (1, 1234):
        monkeypatch.setattr(statistics, "CHUNK", chunk)
        assert paired_difference(a, b, samples=1001) == whole
        assert paired_p_value(a, b, samples=1001) == pytest.approx(p_value, abs=0.05)
        # The differences sum to zero, so that every flip is as extreme: each is counted once.
        assert paired_p_value([1, 0] * 20, [0, 1] * 20, samples=1001) == 1


def test_loss_per_token_counts_tokens_and_not_items():
    # Three nats over one token and one nat over nine: 0.4 per token, while the mean of 3 and 1/9 is 1.56.
    assert ratio_interval([3.0, 1.0], [1, 9]).value == pytest.approx(0.4)
    assert paired_ratio_difference([3.0, 1.0], [1.0, 2.0], [1, 9]).value == pytest.approx(0.1)


def test_the_ratio_interval_agrees_with_scipy():
    sums, counts = skewed(60) * 30, np.random.default_rng(3).integers(5, 60, 60)
    tail = stats.norm.cdf(-math.sqrt(60 / 59) * stats.t.ppf(0.975, 59))
    theirs = stats.bootstrap(
        (sums, counts), lambda s, c, axis=-1: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        confidence_level=1 - 2 * tail, n_resamples=20_000, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    ours = ratio_interval(sums, counts)
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.02)


def test_the_exact_test_agrees_with_scipy_and_with_counting_by_hand():
    # Differences 1, 2, 3: of eight sign patterns only + + + and - - - reach a sum of 6.
    assert paired_p_value([1, 2, 3], [0, 0, 0]) == pytest.approx(2 / 8)
    assert paired_p_value([1, 2, 3, 5], [0, 0, 0, 5]) == pytest.approx(2 / 8), (
        "an item without a difference says nothing"
    )
    assert paired_p_value([1, 0], [0, 1]) == 1, "no sum is smaller than none"
    assert paired_p_value([3], [1]) == 1
    assert paired_p_value(np.ones(16), np.zeros(16)) == 2 / 2**16
    a, b = skewed(11, 4), skewed(11, 5)
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert paired_p_value(a, b) == pytest.approx(theirs.pvalue)


def test_the_monte_carlo_test_agrees_with_scipy_and_is_never_zero():
    a, b = skewed(60, 6) + 0.25, skewed(60, 7)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=20_000, rng=1,
    )  # fmt: skip
    assert paired_p_value(a, b) == pytest.approx(theirs.pvalue, abs=0.015)
    assert paired_p_value(np.ones(60), np.zeros(60)) == pytest.approx(1 / 10_001)


def test_the_monte_carlo_test_flips_every_item_with_probability_one_half():
    # Ten large and eight small items: the large ones must all have one sign (2 of 2**10 patterns) and the sum of the
    # small signs must not point the other way, which of its 2**8 patterns (1 + C(8, 4) / 2**8) / 2 do.
    differences = [100] * 8 + [1, -1] * 4 + [100] * 2
    wanted = 2 / 2**10 * (1 + math.comb(8, 4) / 2**8) / 2
    assert paired_p_value(differences, np.zeros(18), samples=200_000) == pytest.approx(wanted, rel=0.25)


def test_the_p_value_of_a_ratio_is_that_of_its_sums():
    a, b, counts = skewed(8, 8), skewed(8, 9), np.arange(1, 9)
    observed = abs((a - b).sum() / counts.sum())
    patterns = [np.array(signs) for signs in itertools.product([1, -1], repeat=8)]
    extreme = sum(abs((signs * (a - b)).sum() / counts.sum()) >= observed - 1e-12 for signs in patterns)
    assert paired_p_value(a, b) == pytest.approx(extreme / 256)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (16, 16), (1, 1), (7, 10), (63, 80), (500, 1000)])
def test_wilson_agrees_with_scipy(successes, n):
    theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
    ours = wilson(successes, n)
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high])
    assert 0 <= ours.low <= ours.value == successes / n <= ours.high <= 1


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (5, 1), (9, 9), (20, 4), (3, 30)])
def test_mcnemar_agrees_with_the_binomial_test(only_a, only_b):
    a = [True] * only_a + [False] * only_b + [True, True, False]
    b = [False] * only_a + [True] * only_b + [True, True, False]
    discordant = only_a + only_b
    wanted = stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    assert mcnemar_exact(a, b) == pytest.approx(wanted)


def test_mcnemar_by_hand():
    # Six disagreements, all for a: 2 / 2**6.
    assert mcnemar_exact([True] * 6, [False] * 6) == pytest.approx(0.03125)


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, and no later one may be smaller.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_needed_n_by_hand():
    # sd 2, mean 1/2: (1.95996 + 0.84162)**2 * 16 = 125.6.
    differences = np.array([2.5, -1.5] * 50) * math.sqrt(99 / 100) + 0.5 * (1 - math.sqrt(99 / 100))
    assert needed_n(differences) == 126
    assert needed_n(-differences) == 126
    assert needed_n([0.3]) is None
    assert needed_n([1.0, 1.0]) == 6, "two flips of five equal items give p = 1/16: the test itself needs six"


def test_needed_n_gives_the_promised_power():
    generator = np.random.default_rng(0)
    n = needed_n(np.array([1.4, -0.6] * 20))
    assert n is not None
    found = sum(paired_p_value(generator.normal(0.4, 1.01, n), np.zeros(n), samples=1000) <= 0.05 for _ in range(300))
    assert 0.74 <= found / 300 <= 0.86


def test_chance_gives_no_difference():
    """Two models' outcomes swapped at random per item differ by luck alone: at most 70 of 1,000 may look real."""
    quiet = {"checks": 0, "preference": 0, "loss": 0}
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        # 80 items of which about a third are passed by one model only.
        outcomes = np.stack([generator.random(80) < 0.7, generator.random(80) < 0.8])
        losses = np.stack([generator.exponential(size=80), generator.exponential(size=80) + 0.3])
        swap = generator.random(80) < 0.5
        passed, loss = (np.where(swap, pair[::-1], pair) for pair in (outcomes, losses))
        quiet["checks"] += mcnemar_exact(passed[0], passed[1]) > 0.05
        quiet["preference"] += paired_p_value(passed[0], passed[1], seed, samples=2000) > 0.05
        quiet["loss"] += paired_p_value(loss[0], loss[1], seed, samples=2000) > 0.05
    assert min(quiet.values()) >= 930, quiet
    assert max(quiet.values()) < 1000, "a test that never rejects finds nothing"


def test_a_gap_of_20_points_at_80_items_is_found():
    """McNemar at 50 % against 70 %, 36 % discordant (28 to 8): exact power is 0.81."""
    power = sum(
        stats.binom.pmf(m, 80, 0.36) * stats.binom.pmf(k, m, 28 / 36)
        for m in range(1, 81)
        for k in range(m + 1)
        if mcnemar_exact([True] * k + [False] * (m - k), [False] * k + [True] * (m - k)) <= 0.05
    )
    found = 0
    for seed in range(1000):
        kind = np.random.default_rng(seed).choice(4, 80, p=[0.42, 0.28, 0.08, 0.22])  # both, only a, only b, neither
        found += mcnemar_exact(kind <= 1, (kind == 0) | (kind == 2)) <= 0.05
    assert found / 1000 == pytest.approx(power, abs=0.04)
    assert power > 0.8


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean([]),
        lambda: bootstrap_mean([1.0, float("nan")]),
        lambda: paired_difference([1.0, 2.0], [1.0]),
        lambda: ratio_interval([1.0], [0]),
        lambda: wilson(2, 1),
        lambda: mcnemar_exact([True], []),
    ],
)
def test_what_cannot_be_computed_is_refused(call):
    with pytest.raises(ValueError, match=r"found .*wanted"):
        call()
