"""The table of training stages agrees with the configuration, the scripts and TRL."""

from __future__ import annotations

import importlib
import json

import pytest

from scripts.common.artifacts import read_manifest
from scripts.common.schema import Config, Kto, Training
from scripts.common.stages import (
    ADAPTER_STAGES,
    DPO,
    KTO,
    MODEL_STAGES,
    SFT,
    TRAINING_STAGES,
    TrainingStage,
    planned_stages,
)
from scripts.common.trl_arguments import SCHEMA_FILE
from tests.conftest import ROOT

every_stage = pytest.mark.parametrize("stage", TRAINING_STAGES.values(), ids=TRAINING_STAGES)


def test_stages_are_known_by_their_names() -> None:
    assert {"sft": SFT, "dpo": DPO, "kto": KTO} == TRAINING_STAGES
    assert all(stage.name == name for name, stage in TRAINING_STAGES.items())
    assert ADAPTER_STAGES == ("sft", "dpo", "kto")
    assert MODEL_STAGES == ("sft", "dpo", "kto", "merged")


def test_a_stage_is_planned_where_the_configuration_names_its_data() -> None:
    assert planned_stages(Config()) == [SFT, DPO]
    assert planned_stages(Config(kto=Kto(dataset_path="thumbs.jsonl"))) == [SFT, DPO, KTO]


@every_stage
def test_stage_has_a_section_of_the_configuration(stage: TrainingStage) -> None:
    section = Config.model_fields[stage.name].annotation

    assert isinstance(section, type)
    assert issubclass(section, Training)
    assert isinstance(getattr(Config(), stage.name), Training)


@every_stage
def test_stage_has_a_script_with_a_parser_and_the_flags_of_training(stage: TrainingStage) -> None:
    script = importlib.import_module(stage.script)

    arguments = vars(script.build_parser().parse_args([]))

    assert {"config", "overrides", "resume", "dry_run", "require_deid_report"} <= arguments.keys()
    assert callable(script.main)


@every_stage
def test_stage_has_a_class_of_trl_whose_fields_are_known(stage: TrainingStage) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))

    assert {"learning_rate", "max_steps", "max_length"} <= schema["$defs"][stage.trl_config]["properties"].keys()
    assert stage.name in schema["properties"]


@every_stage
def test_stage_continues_an_earlier_one_or_starts_from_the_base(stage: TrainingStage) -> None:
    names = list(TRAINING_STAGES)

    assert stage.continues is None or names.index(stage.continues) < names.index(stage.name)
    assert hasattr(getattr(Config(), stage.name), "init_from") == (stage.continues is not None)


def test_missing_adapter_names_the_scripts_in_the_order_in_which_they_run() -> None:
    with pytest.raises(Exception, match="no such folder") as caught:
        read_manifest(ROOT / "no-such-adapter")

    scripts = [f"python -m {stage.script}" for stage in planned_stages(Config())]
    places = [str(caught.value).find(script) for script in scripts]
    assert -1 not in places
    assert places == sorted(places)
