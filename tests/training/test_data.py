"""What the manifest says about the data of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import train_dpo, train_sft
from scripts.common.artifacts import DatasetFacts
from scripts.common.config import load_config
from scripts.common.schema import Data, WeightedDataset
from scripts.dataset.records import load_datasets, parse_preference, parse_record
from scripts.dataset.split import split_records
from scripts.training.data import TrainingData, read_data, render_rows
from scripts.training.start import find_start
from tests.conftest import save_tiny_model, write_jsonl
from tests.support.training import run_of

POSITIONS = 96  # of the tiny GPT-2 below
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

    described = facts(f"{tmp_path}/a.json", f"{tmp_path}/a.jsonl")
    counts = [entry.train + entry.validation + entry.test + entry.near_duplicates for entry in described]

    assert counts == [10, 20]


def test_sample_data_is_counted_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = facts("data/sft/sample_sft.jsonl")
    monkeypatch.chdir(tmp_path)

    assert facts("data/sft/sample_sft.jsonl")[0].train == here[0].train > 100


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a GPT-2 with few positions."""
    return save_tiny_model(tmp_path_factory.mktemp("positions") / "gpt2", "gpt2", n_positions=POSITIONS)


def write_answers(folder: Path, *words: int) -> Path:
    """Write records and pairs whose answers have so many words beside short ones, and a configuration."""
    answers = ["yes"] * 12 + ["no " * count + "." for count in words]
    write_jsonl(folder / "sft.jsonl", [{"instruction": f"say {n}", "output": a} for n, a in enumerate(answers)])
    write_jsonl(
        folder / "dpo.jsonl", [{"prompt": f"say {n}", "chosen": a, "rejected": f"x {a}"} for n, a in enumerate(answers)]
    )
    sections: dict = {
        name: {
            "dataset_path": f"{name}.jsonl",
            "max_length": 2000,
            "per_device_train_batch_size": 2,
            "trainer": {"max_steps": 2},
        }
        for name in ("sft", "dpo")
    }
    sections["dpo"] |= {"beta": 0.1, "init_from": None, "reference": "base", "learning_rate": 1e-2}
    tree = {
        **sections,
        "data": {"test_ratio": 0},
        "offline": True,
        "performance": {"dtype": "fp32", "threads": 1, "compile": False},
    }
    tree["tracking"] = {"mlflow_tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return path


MAINS = {"sft": train_sft.main, "dpo": train_dpo.main}


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_record_longer_than_the_positions_of_the_base_is_refused(
    stage: str, more: list[str], gpt2: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(write_answers(tmp_path, 150)), "--set", f"base_model_id={gpt2}"]

    assert MAINS[stage]([*common, *more]) == 2

    said = capsys.readouterr().err
    assert (
        f"1 records are longer than the base has positions (96), which {stage}.max_length (2000) cannot change" in said
    )
    assert f"{stage}.jsonl:13: " in said
    assert "Choose a base with at least 1" in said
    assert "shorten them, or set data.on_bad_row: skip." in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_record_longer_than_the_positions_is_left_out_when_asked(
    stage: str, gpt2: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"base_model_id={gpt2}", "data.on_bad_row=skip", "data.validation_ratio=0"]
    common = ["--config", str(write_answers(tmp_path, 150)), *(part for item in overrides for part in ("--set", item))]

    assert MAINS[stage](common) == 0

    assert "They are left out." in capsys.readouterr().err


def test_limit_below_the_positions_is_raised_to_them_at_most(gpt2: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"base_model_id={gpt2}", "sft.max_length=40"]
    common = ["--config", str(write_answers(tmp_path, 150)), *(part for item in overrides for part in ("--set", item))]

    assert train_sft.main([*common, "--dry-run"]) == 2

    said = capsys.readouterr().err
    assert "1 records are longer than sft.max_length (40), so the end of their answers would be cut" in said
    assert "Raise sft.max_length to 96, all the positions the base has, shorten them" in said


def test_pair_whose_sides_fit_alone_trains_in_one_row(gpt2: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Prompt and both answers stand in one row then, longer than the positions, which begin again for the second."""
    monkeypatch.chdir(tmp_path)
    overrides = [f"base_model_id={gpt2}", "data.validation_ratio=0"]
    path = write_answers(tmp_path, *[50] * 12)
    common = ["--config", str(path), *(part for item in overrides for part in ("--set", item))]
    run = run_of("dpo", load_config(path, overrides), tmp_path)
    start = find_start(run)
    pairs, _ = render_rows(
        run,
        start,
        read_data(run, parse_preference, None).split,
    )
    longest = max(pairs, key=lambda pair: len(pair.input_ids))
    assert len(longest.input_ids) <= POSITIONS < len(longest.in_one_row().input_ids)

    assert train_dpo.main(common) == 0


def test_held_out_prompts_near_the_last_position_are_answered_up_to_it(gpt2: Path, tmp_path: Path, monkeypatch) -> None:
    """The watch on degeneration writes answers of its own, which would pass the last position."""
    monkeypatch.chdir(tmp_path)
    path = write_answers(tmp_path)
    rows = [{"prompt": f"{n} " + "no " * 60, "chosen": "yes", "rejected": "x"} for n in range(20)]
    write_jsonl(tmp_path / "dpo.jsonl", rows)

    assert train_dpo.main(["--config", str(path), "--set", f"base_model_id={gpt2}"]) == 0


def test_rotary_base_trains_beyond_its_positions_with_a_warning(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_tiny_model(tmp_path / "llama", max_position_embeddings=POSITIONS)
    overrides = [f"base_model_id={base}", "data.validation_ratio=0"]
    common = ["--config", str(write_answers(tmp_path, 150)), *(part for item in overrides for part in ("--set", item))]

    assert train_sft.main([*common, "--dry-run"]) == 0

    assert "but the base was made for 96" in capsys.readouterr().err
