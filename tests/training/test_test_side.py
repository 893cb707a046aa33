"""The test side is the report's alone: nothing on it reaches training, however it is answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import train_dpo, train_sft
from scripts.common.artifacts import sha256_file
from scripts.common.config import load_config
from scripts.dataset.records import PARSERS, load_datasets
from scripts.dataset.split import side_of
from tests.conftest import write_jsonl
from tests.support.chain import manifest, write_chain

TRAIN = {"sft": train_sft.main, "dpo": train_dpo.main}
KINDS = {"sft": "conversations", "dpo": "preferences"}
# Longer than a record may be, and with reasoning, which would make the model think wherever the template knows how.
POISON = "<think>\npoison\n</think>\n\n" + "poison " * 400
MEASURED_TIME = ("seconds", "tokens_per_second", "memory")


def poison(folder: Path, stage: str) -> int:
    """Change every answer on the test side of a stage's file; return how many records that were."""
    config = load_config(folder / "config.yaml").values
    path = folder / f"{stage}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    (file,) = load_datasets(str(path), PARSERS[KINDS[stage]], config.data, "x")
    on_test = [side_of(record, config.data) == "test" for record in file.records]
    answers = {"sft": {"output": POISON}, "dpo": {"chosen": POISON, "rejected": "antidote " * 400}}[stage]
    write_jsonl(path, [row | answers if test else row for row, test in zip(rows, on_test, strict=True)])
    return sum(on_test)


def results(folder: Path, stage: str) -> dict[str, object]:
    """Return the weights, and every figure of a run that is not of time or memory."""
    metrics = manifest(folder / f"out/{stage}_adapter")["metrics"]
    figures = {name: value for name, value in metrics.items() if not any(part in name for part in MEASURED_TIME)}
    return {"weights": sha256_file(folder / f"out/{stage}_adapter/adapter_model.safetensors"), **figures}


def test_other_answers_on_the_test_side_change_no_weight_checkpoint_or_figure(tmp_path: Path) -> None:
    """Not by a single bit, in either stage; the checkpoint that validation chose is in the weights."""
    steps = {"trainer": {"max_steps": 4, "eval_steps": 1, "save_steps": 1}, "learning_rate": 0.05}
    config = str(write_chain(tmp_path, sft=steps, dpo=steps))
    for stage, main in TRAIN.items():
        assert main(["--config", config]) == 0
        clean = results(tmp_path, stage)

        assert poison(tmp_path, stage) > 3
        assert main(["--config", config]) == 0

        assert results(tmp_path, stage) == clean
        assert clean["held_out_loss"] is not None


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_dry_run_does_not_look_at_its_answers_either(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(write_chain(tmp_path))
    more = ["--set", "dpo.init_from=null", "--set", "dpo.reference=base", "--dry-run"]

    assert TRAIN[stage](["--config", config, *more]) == 0
    clean = capsys.readouterr().err.count("\n")
    assert poison(tmp_path, stage) > 3
    assert TRAIN[stage](["--config", config, *more]) == 0

    said = capsys.readouterr().err
    assert "poison" not in said
    assert said.count("\n") == clean
