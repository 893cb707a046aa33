"""What the manifest says about the data, and the curves a person looks at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.common.finishing import dataset_entries, draw_curves, flatten
from scripts.common.records import load_datasets, parse_record, split_records
from scripts.common.schema import Data, WeightedDataset
from tests.conftest import write_jsonl

DATA = Data(validation_ratio=0.3)


def entries(*paths: str) -> list[dict]:
    """Describe datasets as the manifest does."""
    files = load_datasets([WeightedDataset(path=path) for path in paths], parse_record, DATA, "sft.dataset_path")
    return dataset_entries(files, split_records(files, DATA, seed=0))


def rows(word: str, count: int) -> list[dict[str, str]]:
    """Make records."""
    return [{"instruction": f"{word} {n}", "output": "a"} for n in range(count)]


def test_each_dataset_counts_its_own_records_when_one_path_begins_like_another(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows("x", 10)))
    write_jsonl(tmp_path / "a.jsonl", rows("y", 20))

    counts = [entry["train"] + entry["validation"] for entry in entries(f"{tmp_path}/a.json", f"{tmp_path}/a.jsonl")]

    assert counts == [10, 20]


def test_sample_data_is_counted_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = entries("data/sft/sample_sft.jsonl")
    monkeypatch.chdir(tmp_path)

    assert entries("data/sft/sample_sft.jsonl")[0]["train"] == here[0]["train"] > 100


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
