"""The statistics agree with scipy and with tables worked by hand, stay quiet on chance, and never pretend to be certain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import special, stats

from eval.statistics import crossed, degrees_of_freedom, holm, mcnemar_exact, tango, visible_gap, wilson

Z = 1.959963984540054


def noise(seeds: int, items: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.1, 0.3, (seeds, items))


def outcomes(both: int, only_a: int, only_b: int) -> np.ndarray:
    """Return the differences of two models on the same items under one seed."""
    return np.array([[1.0] * only_a + [-1.0] * only_b + [0.0] * both])


# --- one seed


def test_one_seed_with_one_item_per_prompt_is_the_t_test_of_scipy() -> None:
    found, theirs = crossed(noise(1, 40)), stats.ttest_1samp(noise(1, 40)[0], 0)
    interval, bounds = found.difference(0.9), theirs.confidence_interval(0.9)
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert [interval.low, interval.high] == pytest.approx([bounds.low, bounds.high])
    assert (found.df, found.test) == (39, "t, clusters")


def test_items_of_one_prompt_count_as_one() -> None:
    """Ten copies of each item say no more than the item."""
    alone = crossed(noise(1, 20))
    copied = crossed(np.repeat(noise(1, 20), 10, axis=1), np.repeat(np.arange(20), 10))
    assert copied.p_value == pytest.approx(alone.p_value)
    assert copied.se == pytest.approx(alone.se)
    assert (copied.items, copied.clusters) == (200, 20)
    apart = crossed(np.repeat(noise(1, 20), 10, axis=1))
    assert apart.se < alone.se / 3, "as if there were ten times as many prompts"


def test_loss_per_token_counts_tokens_and_not_items() -> None:
    # Three nats over one token and one nat over nine: 0.4 per token, while the mean of 3 and 1/9 is 1.56.
    assert crossed([[3.0, 1.0]], weights=[1, 9]).value == pytest.approx(0.4)
    assert crossed([[2.0, 2.0], [3.0, 1.0]], weights=[1, 9]).by_seed == pytest.approx((0.4, 0.4))


def test_the_error_of_a_ratio_is_that_of_the_jackknife() -> None:
    sums, tokens = noise(1, 12)[0] * 30, np.random.default_rng(3).integers(5, 60, 12)
    without = [np.delete(sums, place).sum() / np.delete(tokens, place).sum() for place in range(12)]
    around = sums.sum() / tokens.sum()
    expected = np.sqrt(11 / 12 * np.square(np.array(without) - around).sum())
    assert crossed([sums], weights=tokens).se == pytest.approx(expected, rel=0.05)


# --- seeds and prompts


def test_the_variance_is_that_of_seeds_and_of_prompts_without_what_both_contain() -> None:
    values = noise(4, 30) + np.array([[0.3], [-0.2], [0.1], [-0.1]]) + noise(1, 30, seed=5)
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    residual = values - rows[:, None] - columns + values.mean()
    of_seeds, of_prompts = rows.var(ddof=1) / 4, columns.var(ddof=1) / 30
    of_both = np.square(residual).sum() / (4 * 30 * 3 * 29)
    found = crossed(values)
    assert found.value == pytest.approx(values.mean())
    assert found.se**2 == pytest.approx(of_seeds + of_prompts - of_both)
    assert found.sd_seeds == pytest.approx(np.sqrt(4 * (of_seeds - of_both)))
    assert found.by_seed == pytest.approx(tuple(rows))


def test_seeds_that_lie_together_by_chance_do_not_make_the_error_smaller_than_their_items_do() -> None:
    values = noise(3, 40)
    values -= values.mean(axis=1, keepdims=True)  # all three seeds agree to the last digit
    alone = crossed(values.mean(axis=0, keepdims=True))
    assert crossed(values).se >= alone.se


def test_the_degrees_of_freedom_fall_to_those_of_the_seeds_as_these_scatter() -> None:
    found = [degrees_of_freedom(of_seeds, 0.2, 0.1, 5, 84) for of_seeds in (0.1, 0.2, 0.5, 5.0, 500.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(4, rel=0.01)
    assert degrees_of_freedom(0.0, 1.0, 0.0, 1, 84) == 83


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("seeds", "pairs"), [(1, 1), (1, 4), (2, 1), (5, 4)])
def test_p_value_and_interval_agree(binary: bool, seeds: int, pairs: int) -> None:
    """What the test says at a level, the interval of that level says too."""
    disagreed = []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        if binary:
            values = generator.choice([1.0, 0.0, -1.0], (seeds, 12 * pairs), p=[0.25, 0.7, 0.05])
        else:
            values = generator.normal(0.15, 0.3, (seeds, 12 * pairs)) * (generator.random((seeds, 12 * pairs)) < 0.5)
        found = crossed(values, np.repeat(np.arange(12), pairs), binary=binary)
        for confidence in (0.8, 0.95):
            interval = found.difference(confidence)
            if interval.low is None or interval.high is None:
                continue
            leaves_out = interval.low > 1e-12 or interval.high < -1e-12
            disagreed += [seed] * (leaves_out != (found.p_value <= 1 - confidence))
    assert disagreed == []


@pytest.mark.parametrize("binary", [True, False])
def test_swapping_the_models_turns_the_sign(binary: bool) -> None:
    values = np.random.default_rng(2).choice([1.0, 0.0, -1.0], (3, 40), p=[0.3, 0.6, 0.1])
    forward, backward = (crossed(sign * values, binary=binary) for sign in (1, -1))
    assert forward.p_value == pytest.approx(backward.p_value)
    assert forward.difference().low == pytest.approx(-backward.difference().high)


# --- no certainty


def test_no_interval_is_without_width() -> None:
    """Binary measures have a bound where all items are alike; of others no interval can be given."""
    for seeds, value in itertools.product((1, 3), (-1.0, 0.0, 1.0)):
        interval = crossed(np.full((seeds, 40), value), binary=True).difference()
        assert interval.low < interval.high
        assert interval.low <= value <= interval.high
    same = crossed(np.zeros((1, 40)), binary=True).difference()
    assert same.high == pytest.approx(Z**2 / (40 + Z**2)) == -same.low
    assert crossed(np.full((3, 40), 0.25)).difference().low is None
    assert crossed([[0.25]]).difference().low is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_all_items_pass_is_not_certain_to_be_passed(seeds: int) -> None:
    always = crossed(np.ones((seeds, 40)), binary=True).level("share")
    assert (always.value, always.high) == (1.0, 1.0)
    assert always.low == pytest.approx(wilson(40, 40).low, abs=0.02)
    nearly = np.ones((seeds, 40))
    nearly[0, 0] = 0.0
    assert crossed(nearly, binary=True).level("share").low < always.low


def test_fewer_than_six_prompts_that_differ_show_nothing() -> None:
    """No turning of five signs is rarer than one in sixteen."""
    for count, shown in ((5, False), (6, True)):
        values = np.zeros((1, 200))
        values[0, :count] = np.random.default_rng(0).uniform(0.9, 1, count)
        found = crossed(values)
        assert (found.p_value <= 0.05) == shown
        assert (found.difference().low > 0) == shown


# --- binary, one seed, one item per prompt


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (5, 1), (9, 9), (20, 4), (3, 30)])
def test_mcnemar_agrees_with_the_binomial_test(only_a: int, only_b: int) -> None:
    discordant = only_a + only_b
    wanted = stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(wanted)
    assert crossed(outcomes(50, only_a, only_b), binary=True).p_value == pytest.approx(wanted)


def test_mcnemar_by_hand() -> None:
    # Six disagreements, all for a: 2 / 2**6.
    assert mcnemar_exact(6, 0) == pytest.approx(0.03125)


def test_tango_on_a_published_table() -> None:
    # Airway hyper-responsiveness before and after: 7 and 1 of 21 patients changed; Fagerland, Lydersen and Laake (2014)
    # give −0.517 to −0.026 for the difference.
    assert tango(1, 7, 21, Z) == pytest.approx((-0.517, -0.026), abs=5e-4)
    # Where score(gap)² = z², by definition: at b = c = 0 that is z² / (n + z²).
    assert tango(0, 0, 40, Z)[1] == pytest.approx(Z**2 / (40 + Z**2))


def test_a_score_interval_covers_the_truth_where_few_items_differ() -> None:
    """At a true difference of 5 points, of 12 % that differ, the normal interval covers 92 %."""
    generator, covered = np.random.default_rng(0), 0
    for only_a, only_b, _ in generator.multinomial(60, [0.085, 0.035, 0.88], 1000):
        low, high = tango(only_a, only_b, 60, Z)
        covered += low <= 0.05 <= high
    assert 0.935 <= covered / 1000 <= 0.975


# --- shared


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (16, 16), (1, 1), (7, 10), (63, 80), (500, 1000)])
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
    ours = wilson(successes, n)
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high])
    assert 0 <= ours.low <= ours.value == successes / n <= ours.high <= 1


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, and no later one may be smaller.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_the_items_that_are_needed_show_a_difference_in_four_of_five_cases() -> None:
    generator = np.random.default_rng(0)
    needed = crossed([[1.4, -0.6] * 20]).needed_items()  # mean 0.4, standard deviation 1.01
    assert needed is not None
    found = sum(crossed(generator.normal(0.4, 1.01, (1, needed))).p_value <= 0.05 for _ in range(400))
    assert 0.74 <= found / 400 <= 0.86


def test_no_number_that_is_needed_is_there_already() -> None:
    for seed in range(200):
        generator = np.random.default_rng(seed)
        values = generator.choice([1.0, 0.0, -1.0], (1, 7), p=[0.5, 0.4, 0.1])
        needed = crossed(values, binary=True).needed_items()
        assert needed is None or needed > 7


def test_where_seeds_scatter_more_than_the_difference_no_number_of_items_is_enough() -> None:
    values = noise(3, 200) * 0.1 + np.array([[0.3], [-0.3], [0.05]])
    assert crossed(values).needed_items() is None


def test_the_smallest_gap_is_found_in_four_of_five_cases() -> None:
    generator = np.random.default_rng(1)
    gap = crossed([np.sqrt(99 / 100) * np.array([1.0, -1.0] * 50)]).smallest_gap()  # standard deviation 1
    assert gap is not None
    found = sum(crossed(generator.normal(gap, 1, (1, 100))).p_value <= 0.05 for _ in range(400))
    assert 0.72 <= found / 400 <= 0.88


def test_where_few_items_differ_the_smallest_gap_trusts_their_scatter_no_more_than_the_p_value_does() -> None:
    values = np.zeros((5, 47))
    values[:, 0], values[:3, 1] = 1, 1
    values[:2, 2] = -1
    few = crossed(values, binary=True)
    error = abs(few.value) / -float(special.stdtrit(few.df, few.p_value / 2))  # the one that gives this p-value
    gap = few.smallest_gap()
    assert gap is not None
    assert gap / visible_gap(1, few.df, 0.05) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    "call",
    [
        lambda: crossed(np.zeros((1, 0))),
        lambda: crossed([[1.0, float("nan")]]),
        lambda: crossed([1.0, 2.0]),
        lambda: crossed([[1.0]], weights=[0]),
        lambda: crossed([[1.0]], weights=[1, 2]),
        lambda: wilson(2, 1),
    ],
)
def test_what_cannot_be_computed_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"found .*wanted"):
        call()
