"""Metrics: their figures, what is compared with what, and the files of earlier versions that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.metrics import Metric, build_metrics, paired_rows
from eval.report import read_report
from eval.statistics import holm, mcnemar_exact, wilson
from eval.verdict import Question
from scripts.common.errors import UserError
from tests.support.tables import passes, table

BASE, SFT = [1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]
QUESTION = Question(a="dpo", b="sft", measures=["all_rules"])


def question(a: str, b: str, *measures: str, **facts: object) -> Question:
    """Ask about these measures."""
    return Question(a=a, b=b, measures=list(measures), **facts)


def test_one_seed_of_a_rate_carries_its_score_interval_and_the_exact_paired_test() -> None:
    (metric,) = build_metrics([table({"base": [BASE], "sft": [SFT]})], question("sft", "base", "all_rules"))
    expected = wilson(5, 6)
    estimate, (difference,) = metric.models["sft"], metric.differences
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == (expected.value, expected.low, expected.high)
    assert (difference.a, difference.b, difference.value) == ("sft", "base", pytest.approx(0.5))
    assert difference.p_value == mcnemar_exact(3, 0)
    assert (difference.test, difference.df, difference.seeds) == ("McNemar, exact", None, 1)
    assert (metric.n, metric.items, metric.clusters, metric.primary) == (6, "prompts", 6, True)


def test_several_seeds_say_how_far_seeds_and_prompts_scatter() -> None:
    rows = {"base": passes(0.3), "sft": passes(0.5, seeds=3, chance=1), "dpo": passes(0.7, seeds=3, chance=2)}
    (metric,) = build_metrics([table(rows)], QUESTION)
    difference = metric.differences[-1]
    assert (difference.a, difference.b, difference.seeds, difference.test) == ("dpo", "sft", 3, "t, seeds × clusters")
    assert difference.df == pytest.approx(3, abs=1.2), "three seeds, however many prompts"
    assert difference.sd_seeds is not None
    assert difference.sd_items > 0.4
    assert len(metric.by_seed["sft"]) == 3
    assert len(metric.by_seed["base"]) == 1
    assert metric.models["sft"].value == pytest.approx(sum(metric.by_seed["sft"]) / 3)


def test_arms_are_compared_over_the_seeds_that_both_have() -> None:
    """The base, and an arm of one member, stand beside each seed; without a shared one there is nothing to pair."""
    rows = {"base": [[0, 0]], "sft": [[1, 0], [0, 1], [1, 1]], "dpo": [[0, 0], [1, 1]]}
    measure = table(rows, seeds={"base": (None,), "sft": (0, 1, 2), "dpo": (2, 1)})
    ours, theirs = paired_rows(measure, "dpo", "sft")
    assert ours.tolist() == [[0, 0], [1, 1]]
    assert theirs.tolist() == [[1, 1], [0, 1]]
    assert (paired_rows(measure, "sft", "base")[0] - paired_rows(measure, "sft", "base")[1]).shape == (3, 2)
    (metric,) = build_metrics([measure], QUESTION)
    difference = metric.differences[-1]
    assert difference.value_a - difference.value_b == pytest.approx(difference.value)
    assert difference.value_b == pytest.approx(0.75), "not 4 / 6, which is that of three seeds"
    strangers = table(rows, seeds={"base": (None,), "sft": (0, 1, 2), "dpo": (7, 8)})
    with pytest.raises(UserError, match="dpo and sft have no seed in common"):
        build_metrics([strangers], QUESTION)


def test_the_pair_in_question_is_turned_as_it_is_asked() -> None:
    (metric,) = build_metrics([table({"sft": [BASE], "dpo": [SFT]})], question("sft", "dpo", "all_rules"))
    assert [(d.a, d.b, d.value) for d in metric.differences] == [("sft", "dpo", pytest.approx(-0.5))]


def test_p_values_of_the_question_and_of_all_else_are_corrected_as_two_families() -> None:
    rows = {"base": passes(0.3), "sft": passes(0.45, chance=1), "dpo": passes(0.6, chance=2)}
    others = {"base": passes(0.3, chance=4), "sft": passes(0.5, chance=5), "dpo": passes(0.5, chance=6)}
    tables = [table(rows), table(others, "preference_accuracy"), table(rows, "check_1")]
    metrics = build_metrics(tables, question("dpo", "sft", "all_rules", "preference_accuracy"))
    asked = [m.differences[-1] for m in metrics[:2]]
    rest = [d for m in metrics for d in m.differences if d.outcome is None]
    assert len(rest) == 7
    for family in (asked, rest):
        assert [d.p_adjusted for d in family] == holm([d.p_value for d in family])


def test_what_could_have_been_seen_is_said_at_the_corrected_alpha() -> None:
    rows = {"sft": passes(0.5), "dpo": passes(0.52, chance=2)}
    gaps = [
        build_metrics([table(rows), table(rows, "again")], question("dpo", "sft", *measures))[0]
        .differences[0]
        .smallest_gap
        for measures in (["all_rules"], ["all_rules", "again"])
    ]
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_nothing_that_is_needed_is_there_already(seeds: int) -> None:
    """Seven prompts of which five speak for one model: it would not take "about 7 prompts" to show it."""
    for chance in range(60):
        rows = {"sft": passes(0.3, 7, seeds, chance), "dpo": passes(0.8, 7, seeds, chance + 1000)}
        (difference,) = build_metrics([table(rows)], QUESTION)[0].differences
        assert difference.needed_n is None or difference.needed_n > 7
        assert difference.smallest_gap is None or difference.shown or difference.smallest_gap > abs(difference.value)


def test_equal_outcomes_have_no_interval_without_width() -> None:
    same = {"sft": [[1.0] * 40], "dpo": [[1.0] * 40]}
    loss = {"sft": [[2.0] * 40], "dpo": [[2.0] * 40]}
    binary, ratio = build_metrics(
        [table(same), table(loss, "held_out_loss", weights=[2.0] * 40, unit="nats per token", better="lower")], QUESTION
    )
    assert binary.differences[0].ci_low < 0 < binary.differences[0].ci_high
    assert binary.models["sft"].ci_low < 1
    assert (ratio.differences[0].ci_low, ratio.differences[0].p_value) == (None, 1.0)
    assert ratio.models["sft"].ci_low is None


def test_pairs_of_one_prompt_are_not_taken_for_independent() -> None:
    """Twenty prompts of ten pairs, where a model wins or loses whole prompts by chance: few reports find a difference."""
    from numpy.random import default_rng

    found = 0
    for chance in range(200):
        wins = default_rng(chance).choice([1, 0], (1, 20)).repeat(10, axis=1)
        (metric,) = build_metrics([table({"sft": (1 - wins).tolist(), "dpo": wins.tolist()}, pairs=10)], QUESTION)
        found += metric.differences[0].shown
    assert found <= 20, f"{found} of 200 false alarms"


OLD = {
    "schema": 1, "created": "2026-01-02T03:04:05+00:00", "title": "base · sft on model", "models": ["base", "sft"],
    "verdict": {
        "text": "Between SFT and the base no difference can be shown with n = 6.", "outcome": "no_difference",
        "compared": ["sft", "base"], "winner": None, "needed_n": None,
    },
    "metrics": [
        {
            "name": "held_out_loss", "title": "Loss of the reference answers", "unit": "nats per token", "better": "lower",
            "group": "loss", "n": 6, "baselines": {},
            "models": {"base": {"value": 2.0, "ci_low": 1.0, "ci_high": 3.0}, "sft": {"value": 1.0, "ci_low": 1.0, "ci_high": 3.0}},
            "differences": [
                {
                    "a": "sft", "b": "base", "value": -1.0, "ci_low": -2.0, "ci_high": 0.5, "p_value": 0.3, "test": "flip",
                    "needed_n": None, "p_adjusted": 0.3, "shown": False,
                },
            ],
        },
    ],
    "health": {
        "base": {"mean_tokens": 3.0, "repetition": 0.0, "eos_rate": 1.0, "distinct_2": 1.0, "kl_to_base": None, "kl_to_sft": None}
    },
    "training": {"sft": {"steps": 3, "held_out_loss": 1.0}}, "lineage": {"base": {"id": "model", "fingerprint": "f"}},
    "benchmarks": {
        "metrics": [
            {
                "name": "acc", "title": "t: acc", "unit": "", "better": "higher", "group": "lm-eval", "n": 3, "task": "t",
                "models": {"base": {"value": 0.5, "ci_low": None, "ci_high": None, "stderr": None}}, "baselines": {},
                "differences": [],
            },
        ],
        "warnings": [], "settings": {"t": {"limit": None}},
    },
    "judge": None, "notes": [],
    "runs": {"seeds": [0, 0], "metrics": [{"title": "t", "base": None, "models": {"sft": {"mean": 1.0, "spread": 0.0, "values": [1.0, 1.0]}}}]},
}  # fmt: skip


def test_the_report_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(OLD), encoding="utf-8")
    sample = {
        "source": "d",
        "prompt": "p",
        "reference": "r",
        "answers": {"base": "a", "sft": "b"},
        "checks": {},
        "changed": 1.0,
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    report = read_report(tmp_path)
    assert report.metrics[0].phrase == ""
    (written,) = OLD["metrics"]
    assert report.metrics[0].model_dump(include=set(written) - {"models", "differences"}) == {
        key: value for key, value in written.items() if key not in ("models", "differences")
    }
    assert [d.model_dump(include=set(written["differences"][0])) for d in report.metrics[0].differences] == written[
        "differences"
    ]
    assert report.verdict.outcome == "undecided", "no difference could be shown"
    assert isinstance(report.benchmarks.metrics[0], Metric)
    assert report.samples[0].reference == "r"
