"""A study's folder takes more seeds and variants of the same study, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.studies.plan import find_variants, parse_vary
from scripts.studies.record import Record, find_record
from tests.conftest import write_jsonl
from tests.support.chain import dpo_rows, sft_rows


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Return the path of a configuration with data."""
    write_jsonl(tmp_path / "sft.jsonl", sft_rows())
    write_jsonl(tmp_path / "dpo.jsonl", dpo_rows())
    path = tmp_path / "config.yaml"
    path.write_text(
        f"sft: {{dataset_path: {tmp_path}/sft.jsonl}}\ndpo: {{beta: 0.1, dataset_path: {tmp_path}/dpo.jsonl}}\n"
    )
    return str(path)


def record_of(config: str, *vary: str, overrides: tuple[str, ...] = ()) -> Record:
    """Return the record that a study with these flags finds in its folder, and leave it there."""
    variants = find_variants(config, overrides, parse_vary(vary), many=False)
    folder = Path(config).parent / "study"
    record = find_record(folder, load_config(config, overrides).values, variants)
    record.save(folder)
    return record


def refusal(config: str, *vary: str, overrides: tuple[str, ...] = ()) -> str:
    """Return why a study does not continue in this folder, and prove that it was left as it was."""
    file = Path(config).parent / "study/study.json"
    before = file.read_text()
    with pytest.raises(UserError) as caught:
        record_of(config, *vary, overrides=overrides)
    assert file.read_text() == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("vary", "overrides"),
    [
        (["dpo.beta=0.05,0.1,0.2"], ()),
        (["dpo.beta=0.4"], ()),
        (["dpo.beta=0.1"], ("study.seeds=[3,4]", "seed=9")),
        (["dpo.beta=0.1"], ("dpo.beta=0.3", "eval.batch_size=3", "tracking.experiment=other", "performance.threads=1")),
        (["dpo.beta=0.1"], ("sft.output_dir=elsewhere", "dpo.init_from=elsewhere", "dpo.output_dir=there")),
    ],
)
def test_more_seeds_and_variants_belong_to_the_same_study(config: str, vary: list[str], overrides: tuple) -> None:
    first = record_of(config, "dpo.beta=0.05,0.1")

    assert record_of(config, *vary, overrides=overrides).settings == first.settings


@pytest.mark.parametrize(
    ("vary", "overrides", "said"),
    [
        (["dpo.beta=0.05"], ("lora.r=4",), "lora.r: was 16, is 4"),
        (["dpo.beta=0.05"], ("data.split_seed=1",), "data.split_seed: was 0, is 1"),
        (["dpo.beta=0.05"], ("dpo.trainer.max_steps=5",), "dpo.trainer.max_steps: was null, is 5"),
        (["dpo.beta=0.05"], ("performance.dtype=bf16",), "performance.dtype: was \"auto\", is bf16"),
        ([], (), "dpo.beta: was one of --vary, is 0.1"),
        (["dpo.beta=0.05", "lora.r=4,8"], (), "lora.r: was 16, is one of --vary"),
        (["dpo.beta=0.05"], ("dpo.init_from=null", "dpo.reference=base"), "dpo.init_from: was sft, is null"),
    ],
)  # fmt: skip
def test_another_study_is_refused_with_what_differs(config: str, vary: list[str], overrides: tuple, said: str) -> None:
    record_of(config, "dpo.beta=0.05,0.1")

    message = refusal(config, *vary, overrides=overrides)

    assert said.replace('"', "") in message.replace('"', "")
    assert "--set study.output_dir=" in message


def test_changed_data_are_another_study_and_another_file_beside_them_is_not(config: str) -> None:
    folder = Path(config).parent
    record_of(config, f"sft.dataset_path={folder}/sft.jsonl")
    write_jsonl(folder / "more.jsonl", sft_rows(9))

    more = record_of(config, f"sft.dataset_path={folder}/sft.jsonl,{folder}/more.jsonl")
    write_jsonl(folder / "dpo.jsonl", dpo_rows(9))

    assert len(more.data) == 3
    assert f"{folder}/dpo.jsonl: was {more.data[f'{folder}/dpo.jsonl'][:8]}" in refusal(
        config, f"sft.dataset_path={folder}/sft.jsonl"
    )


def test_more_arms_belong_to_the_same_study_and_other_settings_of_theirs_do_not(config: str) -> None:
    arms = ("study.arms=[dpo,kto_demonstrations]",)
    record_of(config)
    record_of(config, overrides=arms)

    assert "kto.beta: was 0.1, is 0.2" in refusal(config, overrides=(*arms, "kto.beta=0.2"))
    assert "pairs.temperature: was 0.8, is 1" in refusal(config, overrides=(*arms, "pairs.temperature=1"))
    assert record_of(config, overrides=("kto.beta=0.2",)).result is None


def test_missing_pairs_show_before_anything_is_trained(config: str) -> None:
    (Path(config).parent / "dpo.jsonl").unlink()

    with pytest.raises(UserError, match=r"dpo.dataset_path: .*dpo.jsonl"):
        record_of(config)
    assert not (Path(config).parent / "study").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"variants": 3}', "\x00"])
def test_a_folder_of_something_else_is_left_alone(config: str, content: str) -> None:
    folder = Path(config).parent / "study"
    folder.mkdir()
    (folder / "study.json").write_text(content)

    assert "is not that of a study" in refusal(config)


def test_an_empty_folder_is_taken(config: str) -> None:
    (Path(config).parent / "study").mkdir()

    assert record_of(config).result is None
