"""Metrics: their figures, and the files of earlier versions that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.metrics import (
    Metric,
    adjust_p_values,
    binary_metric,
    mean_metric,
    ratio_metric,
    reference_of,
    spread_over_seeds,
)
from eval.report import read_report
from eval.statistics import holm, mcnemar_exact, wilson
from tests.support.manifests import complete_manifest

BASE, SFT = [True, False, False, True, False, False], [True, True, True, True, True, False]


def test_a_rate_carries_its_score_interval_and_the_exact_paired_test() -> None:
    metric = binary_metric("name", "Title", "checks", {"base": BASE, "sft": SFT}, phrase="the rate", items="pairs")
    expected = wilson(5, 6)
    estimate, (difference,) = metric.models["sft"], metric.differences
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == (expected.value, expected.low, expected.high)
    assert (difference.a, difference.b, difference.value) == ("sft", "base", pytest.approx(0.5))
    assert difference.p_value == mcnemar_exact(SFT, BASE)
    assert (metric.n, metric.items, metric.phrase) == (6, "pairs", "the rate")


def test_p_values_are_corrected_over_the_family() -> None:
    metrics = [
        mean_metric("mean", "Mean", "", "higher", "checks", {"base": [0.0] * 9, "sft": [1.0] * 9}),
        ratio_metric("loss", "Loss", "nats", "loss", {"base": [2.0, 1.0], "sft": [1.0, 2.0]}, [1, 3]),
    ]
    adjust_p_values(metrics)
    differences = [metric.differences[0] for metric in metrics]
    assert [d.p_adjusted for d in differences] == holm([d.p_value for d in differences])
    assert [d.shown for d in differences] == [True, False]


def test_the_spread_over_seeds_is_that_of_each_trained_model() -> None:
    per_run = [
        [binary_metric("name", "Title", "checks", {"base": BASE, "sft": outcomes})] for outcomes in (SFT, BASE, SFT)
    ]
    (row,) = spread_over_seeds(per_run, [0, 1, 2]).metrics
    assert (row.title, row.base) == ("Title", pytest.approx(1 / 3))
    assert row.models["sft"].values == pytest.approx([5 / 6, 1 / 3, 5 / 6])
    assert set(row.models) == {"sft"}


@pytest.mark.parametrize(
    ("trained_against", "continued", "reference"),
    [
        ("sft", "the sft beside it", "sft"),
        ("sft", "another adapter", None),
        ("base", "the sft beside it", "base"),
        ("base", "another adapter", "base"),
        ("base", "nothing", "base"),
    ],
)
def test_the_reference_is_the_model_that_an_adapter_was_trained_against(
    trained_against: str, continued: str, reference: str | None
) -> None:
    """Whether it is called by the same name or not: SFT may have been trained again since."""
    sft = complete_manifest(files={"weights": "1"})
    parents = {
        "the sft beside it": sft.as_parent("elsewhere"),
        "another adapter": complete_manifest(files={"weights": "2"}).as_parent("outputs/sft_adapter"),
    }
    dpo = complete_manifest("dpo", parent=parents.get(continued), config={"dpo": {"reference": trained_against}})

    assert reference_of(dpo, {"sft": sft, "dpo": dpo}) == reference
    assert reference_of(sft, {"sft": sft, "dpo": dpo}) == "base"


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
    assert report.metrics[0].model_dump(include=set(OLD["metrics"][0]) - {"models"}) == {
        key: value for key, value in OLD["metrics"][0].items() if key != "models"
    }
    assert isinstance(report.benchmarks.metrics[0], Metric)
    assert report.samples[0].reference == "r"
