"""Which prompt is answered at the end of training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from scripts.common.config import load_config
from scripts.dataset.split import side_of
from scripts.training.sample import held_out_before
from tests.conftest import write_jsonl
from tests.support.records import load


@pytest.mark.parametrize(("stage", "some"), [("dpo", True), ("kto", True), ("sft", False)])
def test_pairs_made_of_training_prompts_leave_the_prompts_that_sft_holds_out(
    write_config, tmp_path, stage, some
) -> None:
    rows = [{"instruction": f"Question {number}?", "output": "Yes."} for number in range(30)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    config = write_config(data={"validation_ratio": 0.3}, sft={"dataset_path": str(tmp_path / "mine.jsonl")})
    values = load_config(config).values

    found = list(held_out_before(SimpleNamespace(stage=stage, values=values)))

    validation = [record for record in load(tmp_path / "mine.jsonl") if side_of(record, values.data) == "validation"]
    assert validation
    assert found == (validation if some else [])
