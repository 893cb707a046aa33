"""Every family at every stage is what the table says it is: right, refused in these words, or wrong in this way.

    python -m pytest -q -m drill tests/matrix

The table lies in scripts/model/families.json, and `python -m scripts.make_docs` shows it in scripts/model/README.md.
MATRIX_WRITE=1 writes into it what came out: for a family that is new in tests/support/architectures.py, or where a cell is
another one now. Read it before you keep it, and shorten a refusal to the words that count.
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
from tests.matrix.chain import ADAPTERS, Family
from tests.matrix.stages import STAGES
from tests.support.architectures import FAMILIES

TABLE = ROOT / "scripts/model/families.json"
RIGHT, REFUSED, WRONG = "right", "refused", "wrong"  # the latter two are followed by a part of what is said
# The ten that are used most, and some whose layouts are special; `make drill` takes them all.
ALWAYS = (
    "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "OLMo 2", "Granite", "SmolLM3",
    "Gemma 3 (nested)", "GPT-2", "Mixtral", "Gemma 4 (nested)", "Granite 4",
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
    kind, _, words = table[family.name][stage].partition(": ")
    assert found.startswith(kind)
    assert words in found


def test_the_table_has_every_family_and_stage() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))

    assert {name: list(cells) for name, cells in table.items()} == {name: list(STAGES) for name in FAMILIES}


def outcome(family: Family, stage: str) -> str:
    """Say what came of a stage. A refusal of what an earlier stage has just made comes too late to be one."""
    try:
        STAGES[stage](family)
    except UserError as error:
        said = " ".join(str(error).replace(f"{family.folder}/", "").split())
        late = "trained" in vars(family) and stage != "server"
        late = late or any(said.startswith(adapter) for adapter in ADAPTERS)
        return f"{WRONG}: trained, then refused: {said}" if late else f"{REFUSED}: {said}"
    except AssertionError as error:
        what, _, _ = str(error).splitlines()[0].partition(":")  # figures follow, which may be others elsewhere
        return f"{WRONG}: {what}"
    except Exception as error:  # a traceback for a user
        return f"{WRONG}: {type(error).__name__}"
    return RIGHT
