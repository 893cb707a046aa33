"""The memory estimate, made before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora, Performance, Quantization
from scripts.model.adapter import add_lora
from scripts.model.base import load_base
from scripts.model.memory import estimate_memory, kept_values
from scripts.model.shape import ModelShape
from scripts.speed.speed_up import speed_up, stands_in_for

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
    assert checkpointing or one.total > 30


def test_estimate_by_hand(tmp_path: Path) -> None:
    """2 layers of hidden size 64 and intermediate size 128 on 3 rows of 10 tokens, 5 of which are answered."""
    AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
    ).save_pretrained(tmp_path)
    config = Config(lora=Lora(r=2), performance=Performance(fast_path=False))
    kept = 3.5 * 64 + 2 * (64 + 64) + 2 * 64 + 4 * 128 + 7 * 2  # two norms

    estimate = estimate_memory(
        tmp_path, config, sequences=3, longest=10, answer_tokens=5, bytes_per_value=4, cpu=True, checkpointing=False, compiled=False
    )  # fmt: skip

    assert estimate.weights == 0
    assert estimate.adapter * 2**30 == pytest.approx(2 * 2 * (8 * 64 + 3 * (64 + 128)) * 16)
    assert estimate.activations * 2**30 == pytest.approx(30 * 2 * kept * 1.3 * 4)
    assert estimate.logits * 2**30 == pytest.approx(5 * 1000 * 4 * 2)
    assert estimate.total == pytest.approx(sum(vars(estimate).values()))
    assert estimate.loading == 0


def test_short_rows_take_what_the_mapped_weight_files_take(tiny_llama: Path) -> None:
    """While the base loads, its files lie in memory beside the weights that are moved out of them."""
    size = {"bytes_per_value": 4, "cpu": True, "checkpointing": False, "compiled": False}
    short, long = (
        estimate_memory(tiny_llama, Config(), sequences=rows, longest=2, answer_tokens=1, **size)
        for rows in (1, 20_000)
    )

    assert short.total == pytest.approx(short.libraries + short.adapter + short.weights + short.loading)
    assert short.loading == pytest.approx(short.weights, rel=0.05)
    assert "while it loads" in str(short)
    assert long.total == pytest.approx(long.libraries + long.adapter + long.weights + long.activations + long.logits)


def test_logits_of_a_large_vocabulary_take_no_more_than_the_tile_that_is_kept(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", vocab_size=262_144).save_pretrained(tmp_path)

    assert estimate_memory(tmp_path, Config(), **(BATCH | {"answer_tokens": 5000}), checkpointing=False, compiled=False).logits == 1.0 + 2.0, "and the head's weights, packed"  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", "llama", "qwen3"])
def test_values_kept_for_the_backward_pass_are_those_that_torch_keeps(tmp_path: Path, family: str, dtype) -> None:
    """Counted by torch's own hooks, in the layers that a longer model has more of; some are not of a token, as cast adapters."""
    counted = []
    for layers in (1, 2):
        folder = save_wide_model(tmp_path / str(layers), family, layers, dtype)
        counted.append(saved_values(folder, dtype))
    per_layer = counted[1] - counted[0]

    lean = stands_in_for(folder)
    assert lean == (family != "gemma3")
    assert kept_values(folder, ModelShape.of_folder(folder), 16, dtype.itemsize, lean) == pytest.approx(
        per_layer, rel=0.15
    )


def save_wide_model(folder: Path, family: str, layers: int, dtype: torch.dtype) -> Path:
    """Save a model whose layers are wide enough that its widths decide."""
    text = {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 64,
        "num_key_value_heads": 2, "head_dim": 64, "layer_types": ["full_attention"] * layers,
    }  # fmt: skip
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
    }
    nested = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model(family, **(nested if family == "gemma3" else text))
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def saved_values(folder: Path, dtype: torch.dtype, tokens: int = 64) -> float:
    """Count the values per token that a model with adapters, as it trains, keeps for its backward pass."""
    config = Config()
    model = add_lora(load_base(folder, config, Machine("cpu", dtype, 1, 1, ())), config.lora, "base")
    speed_up(model)
    decoder, ids = model.get_base_model().base_model, torch.arange(tokens)[None]
    decoder.train()(input_ids=ids, use_cache=False)  # moves the weights, and proves the lean decoder
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        output = decoder.train()(input_ids=ids, use_cache=False)
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    del output
    return size / tokens / dtype.itemsize
