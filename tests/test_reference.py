"""What is generated from the schema is current; `python -m scripts.common.reference` writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts.common import reference
from scripts.common.config import SCHEMA_FILE, load_config
from scripts.common.schema import Config
from tests.conftest import ROOT
from tests.test_no_dead_keys import keys


def test_schema_json_is_current() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == reference.schema_json()


def test_config_yaml_is_current() -> None:
    path = ROOT / "configs" / "config.yaml"

    assert path.read_text(encoding="utf-8") == reference.config_yaml(reference.STATED)


def test_readme_reference_is_current() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    text = readme.read_text(encoding="utf-8")

    assert reference.README_START in text
    assert text == reference.updated_readme(text)


def test_removing_the_comment_marks_of_config_yaml_gives_every_key_at_its_default(tmp_path: Path) -> None:
    names = {part for key in keys(Config) for part in key.split(".")}
    text = reference.config_yaml(reference.STATED)
    path = tmp_path / "all.yaml"
    path.write_text(re.sub(rf"(?m)^( *)# ({'|'.join(names)}): ", r"\1\2: ", text), encoding="utf-8")

    loaded = load_config(path)

    # What the file states on purpose is the only difference to the schema: what has no default, and both adapters.
    stated = {"dpo": {"beta": 0.1}, "serve": {"adapters": {"sft": "outputs/sft_adapter"}}}
    assert loaded.values == Config.model_validate(stated)
    for key in keys(Config):
        assert loaded.origin(key).startswith(str(path)), f"{key} is not shown"


def test_schema_json_knows_trl_arguments_and_not_ours() -> None:
    properties = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["$defs"]["SFTConfig"]["properties"]

    assert {"max_steps", "eval_strategy", "save_strategy", "weight_decay"} <= properties.keys()
    assert not {"output_dir", "seed", "report_to", "packing"} & properties.keys()
