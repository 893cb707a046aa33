"""A base with a nested configuration goes through SFT and DPO: every tensor of its adapter moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from scripts import train_dpo, train_sft
from tests.support.chain import manifest, write_chain
from tests.support.nested import save_tiny_gemma3


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train both stages once on a tiny Gemma 3."""
    folder = tmp_path_factory.mktemp("nested")
    save_tiny_gemma3(folder / "model")
    config = str(write_chain(folder))
    assert train_sft.main(["--config", config]) == 0
    assert train_dpo.main(["--config", config]) == 0
    return folder


def test_every_tensor_of_the_adapter_moves(chain: Path) -> None:
    sft, dpo = (load_file(chain / f"out/{stage}_adapter/adapter_model.safetensors") for stage in ("sft", "dpo"))

    assert len(sft) == 2 * 2 * 7, "two matrices on each of seven linear layers in two layers"
    assert all("language_model.layers." in name for name in sft)
    assert all(tensor.any() for tensor in sft.values()), "B starts at zero"
    assert sft.keys() == dpo.keys()
    assert all((dpo[name] != tensor).any() for name, tensor in sft.items())


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_held_out_loss_falls(chain: Path, stage: str) -> None:
    metrics = manifest(chain / f"out/{stage}_adapter")["metrics"]

    assert metrics["held_out_loss"] < metrics["held_out_loss_before"] - 0.01
