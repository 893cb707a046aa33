"""What is generated from code is current; `python -m scripts.make_docs` writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts import make_docs
from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.common.schema import Config
from scripts.common.trl_arguments import SCHEMA_FILE
from tests.conftest import ROOT
from tests.repo.test_no_dead_keys import keys

GENERATED = (
    "configs/schema.json", "configs/config.yaml", "configs/README.md", "scripts/README.md", "scripts/dataset/README.md",
    "scripts/model/README.md", "serve/README.md", "eval/README.md", "README.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> dict[Path, str]:
    return make_docs.documents()


@pytest.mark.parametrize("name", GENERATED)
def test_document_is_current(documents: dict[Path, str], name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == documents[ROOT / name]


def test_every_generated_document_is_compared(documents: dict[Path, str]) -> None:
    assert set(documents) == {ROOT / name for name in GENERATED}


def test_only_what_stands_between_the_markers_is_written(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- keys: generated -->\nstale\n<!-- end of keys -->\nafter\n", encoding="utf-8")

    text = make_docs.with_part(readme, "keys", "new")

    assert text == "before\n<!-- keys: generated -->\nnew\n<!-- end of keys -->\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- keys: generated -->", "<!-- end of keys -->"])
def test_a_missing_marker_is_named(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")

    with pytest.raises(UserError, match=r"README\.md: .*<!-- keys: generated -->"):
        make_docs.with_part(readme, "keys", "new")


def test_every_key_has_its_row() -> None:
    rows = make_docs.key_table().splitlines()

    assert [re.findall(r"^\| `([\w.]+)` \| .+ \| .+\. \|$", row) for row in rows[2:]] == [[key] for key in keys(Config)]


def test_every_folder_and_module_has_a_purpose_in_the_tree() -> None:
    lines = make_docs.tree().splitlines()
    modules = [path for room in ("scripts", "serve", "eval") for path in (ROOT / room).rglob("*.py")]

    assert len(lines) == len(modules)  # a folder's line is that of its __init__.py
    assert [line for line in lines if not re.search(r": \S.{10,}$", line)] == []


def test_removing_the_comment_marks_of_config_yaml_gives_every_key_at_its_default(tmp_path: Path) -> None:
    names = {part for key in keys(Config) for part in key.split(".")}
    text = make_docs.config_yaml(make_docs.STATED)
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
