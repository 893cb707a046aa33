"""A planted effect is found: adapters of half broken answers are worse than those of whole ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import compare
from eval.benchmarks.studies import BROKEN, outcome_of, row_of, write_project
from scripts import train_sft
from scripts.common.config import load_config
from scripts.dataset.records import load_datasets, parse_record
from scripts.dataset.split import side_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the project once."""
    return write_project(tmp_path_factory.mktemp("studies"), steps=12)


def test_half_of_the_training_answers_are_broken_and_no_other(config: Path) -> None:
    values = load_config(config).values
    (file,) = load_datasets(str(config.parent / "broken.jsonl"), parse_record, values.data, "x")
    broken = {side: 0 for side in ("train", "validation", "test")}
    for record in file.records:
        broken[side_of(record, values.data)] += record.answer == BROKEN
    trained = sum(side_of(record, values.data) == "train" for record in file.records)
    assert broken == {"train": (trained + 1) // 2, "validation": 0, "test": 0}


@pytest.mark.slow
def test_a_planted_effect_is_found(config: Path) -> None:
    folder = config.parent
    for name, data in (("whole", "sft"), ("broken", "broken")):
        settings = [f"sft.dataset_path={folder}/{data}.jsonl", f"sft.output_dir={folder}/{name}"]
        flags = [part for setting in settings for part in ("--set", setting)]
        assert train_sft.main(["--config", str(config), *flags]) == 0
    out = ["--set", f"eval.output_dir={folder}/planted", "--models", f"whole={folder}/whole", f"broken={folder}/broken"]

    assert compare.main(["--config", str(config), *out]) == 0

    assert outcome_of(folder / "planted") == "worse"
    assert json.loads((folder / "planted/report.json").read_text())["verdict"]["winner"] == "whole"
    assert row_of("planted", [0], folder / "planted").startswith(
        "| planted | 0 | These two adapters: broken is worse than"
    )
