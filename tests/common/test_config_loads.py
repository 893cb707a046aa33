"""Every shipped configuration is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.config import load_config
from scripts.dataset.records import sources_of
from tests.conftest import ROOT

# configs/accelerate holds launch files of another program, and mydata.yaml is a user's own.
SHIPPED = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if "accelerate" not in path.parts and not path.stem.startswith("mydata")
)


def test_there_are_configs_to_check() -> None:
    assert {"config.yaml", "demo.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shipped_config_loads_and_its_dataset_exists(path: Path) -> None:
    values = load_config(path).values

    for source in sources_of(values.sft.dataset_path):
        assert (ROOT / source.path).is_file()


def test_demo_config_uses_the_model_that_needs_no_hub() -> None:
    from scripts.model.find import DEMO_MODEL

    values = load_config(ROOT / "configs/demo.yaml").values

    assert values.base_model_id == DEMO_MODEL
    assert values.offline
