"""The curves a person looks at, and how parameters are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.training.save import draw_curves, flatten


def test_curves_are_drawn_with_and_without_rewards(tmp_path: Path) -> None:
    from matplotlib import image

    sft = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.1}, {"step": 2, "loss": 1.5}]
    dpo = [{**entry, "rewards/margins": 0.1, "rewards/chosen": 0.2, "rewards/rejected": 0.1} for entry in sft]

    draw_curves(sft, tmp_path / "sft.png", "sft")
    draw_curves(dpo, tmp_path / "dpo.png", "dpo")

    one, two = (image.imread(tmp_path / name) for name in ("sft.png", "dpo.png"))
    assert one.shape[1] > 400
    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=4)
    assert one.std() > 0.05


def test_nested_values_are_named_by_their_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
