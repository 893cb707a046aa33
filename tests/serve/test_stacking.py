"""Adapters stacked on layers to which a network hands its tokens in another shape than (B, T, in)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.model.adapter import load_adapter
from tests.serve.test_engine import models_of
from tests.support.experts import save_tiny_mixture
from tests.support.models import load
from tests.support.serving import save_adapter


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_every_row_gets_its_own_adapter_in_layers_that_read_tokens_otherwise(
    tmp_path: Path, write_config, family
) -> None:
    """A shared expert of Qwen 2 reads (B * T, in), the keys of DeepSeek come from (B, 1, T, in)."""
    base = save_tiny_mixture(tmp_path / "base", family)
    adapters = {
        "sft": save_adapter(tmp_path / "sft", base),
        "dpo": save_adapter(tmp_path / "dpo", base, "dpo", seed=2, r=7),
    }
    models = models_of(base, adapters, write_config)
    names = ["sft", "base", "dpo", "sft"]
    ids = torch.randint(5, 500, (len(names), 9), generator=torch.Generator().manual_seed(0))

    models.rows.set(names)
    with torch.no_grad():
        mixed = models.network(ids).logits
        for row, name in enumerate(names):
            alone = load(base) if name == "base" else load_adapter(load(base), adapters[name]).eval()
            assert torch.allclose(mixed[row], alone(ids[row : row + 1]).logits[0], atol=1e-5), name
