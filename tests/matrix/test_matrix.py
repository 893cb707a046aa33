"""Every family at every stage is what the table says it is: right, refused in these words, or wrong in this way.

    python -m pytest -q -m drill tests/matrix

The table lies in scripts/model/families.json, and `python -m scripts.make_docs` shows it in scripts/model/README.md.
MATRIX_WRITE=1 writes into it what came out, to be read before it is kept.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.paths import ROOT
from tests.matrix.chain import Family
from tests.matrix.stages import STAGES
from tests.support.families import FAMILIES

TABLE = ROOT / "scripts/model/families.json"
REFUSED = "refused: "  # followed by a part of the message
# The ten that are used most, and some whose layouts are special; `make drill` takes them all.
ALWAYS = (
    "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "OLMo 2", "Granite", "SmolLM3",
    "Gemma 3 (nested)", "GPT-2", "Mixtral", "OPT",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _heap_at_rest() -> Iterator[None]:
    """Keep what the imports left out of every collection: each stage collects several times, half a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(
    scope="module",
    params=[*ALWAYS, *(pytest.param(name, marks=pytest.mark.drill, id=f"{name} in the drill") for name in FAMILIES)],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Family:
    return Family(request.param, tmp_path_factory.mktemp("family"), empty_store)


@pytest.mark.parametrize("stage", STAGES)
def test_cell_is_what_the_table_says(family: Family, stage: str) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found = outcome(family, stage)
    if os.environ.get("MATRIX_WRITE") == "1":
        table.setdefault(family.name, {})[stage] = found
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    said = table[family.name][stage]
    assert found == said or (
        said.startswith(REFUSED) and found.startswith(REFUSED) and said.removeprefix(REFUSED) in found
    )


def test_the_table_has_every_family_and_stage() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))

    assert {name: list(cells) for name, cells in table.items()} == {name: list(STAGES) for name in FAMILIES}


def outcome(family: Family, stage: str) -> str:
    """Say what came of a stage; a refusal that comes after training has done its work is no refusal."""
    try:
        STAGES[stage](family)
    except UserError as error:
        said = " ".join(str(error).replace(f"{family.folder}/", "").split())
        late = "trained" in vars(family) and stage != "server"
        return f"wrong: trained, then refused: {said}" if late else REFUSED + said
    except AssertionError as error:
        return f"wrong: {str(error).splitlines()[0]}"
    except Exception as error:  # a traceback for a user
        return f"wrong: {type(error).__name__}"
    return "right"
