"""What `sft.trainer` takes, and where it sends what has a key of its own."""

from __future__ import annotations

import json

import pytest

from scripts.common.config import load_config
from scripts.common.schema import Config
from scripts.common.trl_arguments import OWNED_TRAINER_ARGUMENTS, REMOVED_TRAINER_ARGUMENTS
from tests.support.configs import HEADING, refusal

FIRST_CLASS = sorted({*Config.model_fields["sft"].annotation.model_fields} - {"trainer"})


@pytest.mark.parametrize("name", sorted({*FIRST_CLASS, *OWNED_TRAINER_ARGUMENTS, *REMOVED_TRAINER_ARGUMENTS}))
def test_trainer_block_refuses_what_has_another_place(config_file, name: str) -> None:
    path = config_file(f"sft:\n  trainer:\n    {name}: 1\n")

    message = refusal(path)

    assert f"{path}:3: sft.trainer.{name}: " in message
    if name in FIRST_CLASS:
        assert f"write sft.{name}" in message
    else:
        place = {**REMOVED_TRAINER_ARGUMENTS, **OWNED_TRAINER_ARGUMENTS}[name]
        assert place.format(section="sft") in message


def test_trainer_block_refuses_a_misspelt_argument_with_the_right_one(config_file) -> None:
    path = config_file("sft:\n  trainer:\n    save_stratgy: 'no'\n")

    assert f"{path}:3: sft.trainer.save_stratgy: TRL's SFTConfig has no such argument" in refusal(path)
    assert "did you mean `sft.trainer.save_strategy`?" in refusal(path)


def test_trainer_block_within_the_trainer_block_is_no_argument(config_file) -> None:
    path = config_file("sft:\n  trainer:\n    trainer: 1\n")

    assert f"{path}:3: sft.trainer.trainer: TRL's SFTConfig has no such argument; " in refusal(path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("eval_strategy", "sometimes", 'found "sometimes"; wanted "no" or "steps" or "epoch"'),
        ("max_steps", "many", 'found "many"; wanted a whole number'),
        ("max_steps", "true", "found true; wanted a whole number"),
        ("max_steps", "ü" * 200, f'found "{"ü" * 79}; wanted a whole number'),
        ("weight_decay", "true", "found true; wanted a number"),
        ("full_determinism", "1", "found 1; wanted true or false"),
        ("debug", "3", "found 3; wanted text or a list"),
        ("lr_scheduler_kwargs", "3", "found 3; wanted lines of `key: value` or text or null"),
        ("save_steps", "0", "found 0; wanted a number above 0"),
        ("logging_steps", "-1", "found -1; wanted a number above 0"),
        ("eval_steps", "null", "found null; wanted a number above 0"),
    ],
)
def test_trainer_block_refuses_a_value_of_the_wrong_kind(config_file, name: str, value: str, said: str) -> None:
    path = config_file(f"sft:\n  trainer:\n    {name}: {value}\n")

    assert refusal(path) == f"{HEADING}{path}:3: sft.trainer.{name}: {said}"


@pytest.mark.parametrize(
    "block",
    [
        {"max_steps": 3, "eval_strategy": "no", "save_strategy": "epoch", "weight_decay": 0.1, "warmup_steps": 0.1},
        {"full_determinism": True, "debug": ["underflow_overflow"], "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"save_steps": 1, "logging_steps": 0.5, "weight_decay": 0, "save_total_limit": None},
        {"trackio_static_space_id": "any kind of value"},
    ],
)
def test_trainer_block_takes_what_trl_takes(config_file, block: dict) -> None:
    loaded = load_config(config_file(f"sft: {json.dumps({'trainer': block})}\n"))

    assert loaded.values.sft.trainer == block
