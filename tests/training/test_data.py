"""What the manifest says about the data of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.common.artifacts import DatasetFacts
from scripts.common.schema import Data, WeightedDataset
from scripts.dataset.records import load_datasets, parse_record
from scripts.dataset.split import split_records
from scripts.training.data import TrainingData
from tests.conftest import write_jsonl

DATA = Data(validation_ratio=0.3)


def facts(*paths: str) -> list[DatasetFacts]:
    """Describe datasets as the manifest does."""
    files = load_datasets([WeightedDataset(path=path) for path in paths], parse_record, DATA, "sft.dataset_path")
    return TrainingData(files, split_records(files, DATA, seed=0)).facts


def rows(word: str, count: int) -> list[dict[str, str]]:
    """Make records."""
    return [{"instruction": f"{word} {n}", "output": "a"} for n in range(count)]


def test_each_dataset_counts_its_own_records_when_one_path_begins_like_another(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows("x", 10)))
    write_jsonl(tmp_path / "a.jsonl", rows("y", 20))

    counts = [entry.train + entry.validation for entry in facts(f"{tmp_path}/a.json", f"{tmp_path}/a.jsonl")]

    assert counts == [10, 20]


def test_sample_data_is_counted_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = facts("data/sft/sample_sft.jsonl")
    monkeypatch.chdir(tmp_path)

    assert facts("data/sft/sample_sft.jsonl")[0].train == here[0].train > 100
