"""The memory estimate, made before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora, Performance, Quantization
from scripts.model.base import load_base
from scripts.model.memory import estimate_memory

CPU = Machine("cpu", torch.bfloat16, 1, 1, ())


@pytest.mark.parametrize("quantization", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_estimated_weights_are_those_that_are_held(tiny_llama: Path, quantization: dict) -> None:
    """Embeddings and head are not shrunk, which a small model with a large vocabulary is mostly made of."""
    pytest.importorskip("bitsandbytes")
    config = Config(quantization=Quantization(**quantization))

    shape = {
        "sequences": 1,
        "longest": 1,
        "answer_tokens": 1,
        "bytes_per_value": 2,
        "cpu": True,
        "checkpointing": False,
        "compiled": False,
    }
    estimate = estimate_memory(tiny_llama, config, **shape)

    assert estimate.weights * 2**30 == pytest.approx(
        load_base(tiny_llama, config, CPU).get_memory_footprint(), rel=0.03
    )


# The decoder of Gemma-3-4B as its config.json has it, under `text_config`; what it leaves out are the defaults.
GEMMA_3_4B = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
BATCH = {"sequences": 8, "longest": 640, "answer_tokens": 800, "bytes_per_value": 2, "cpu": True}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nested_configuration_is_estimated_like_the_same_numbers_flat(tmp_path: Path, checkpointing: bool) -> None:
    nested, flat = tmp_path / "nested", tmp_path / "flat"
    for folder, config in (
        (nested, {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **GEMMA_3_4B}}),
        (flat, {"model_type": "gemma3_text", **GEMMA_3_4B}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))

    one, other = (
        estimate_memory(folder, Config(), **BATCH, checkpointing=checkpointing, compiled=False)
        for folder in (nested, flat)
    )

    assert one == other
    assert checkpointing or one.total == pytest.approx(33.7, abs=0.05)


def test_estimate_by_hand(tmp_path: Path) -> None:
    """2 layers of hidden size 64 and intermediate size 128 on 3 rows of 10 tokens, 5 of which are answered."""
    AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
    ).save_pretrained(tmp_path)
    config = Config(lora=Lora(r=2), performance=Performance(fast_path=False))

    estimate = estimate_memory(
        tmp_path, config, sequences=3, longest=10, answer_tokens=5, bytes_per_value=4, cpu=True, checkpointing=False, compiled=False
    )  # fmt: skip

    assert estimate.weights == 0
    assert estimate.adapter * 2**30 == pytest.approx(2 * 2 * (8 * 64 + 3 * (64 + 128)) * 16)
    assert estimate.activations * 2**30 == pytest.approx(30 * 2 * (16 * 64 + 5 * 128) * 4)
    assert estimate.logits * 2**30 == pytest.approx(5 * 1000 * 4 * 2)
    assert estimate.total == pytest.approx(sum(vars(estimate).values()))
