"""The shape of a model, whichever way its family writes it down."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from scripts.model.shape import ModelShape, position_table, siblings
from tests.support.architectures import family_config
from tests.support.nested import save_tiny_gemma3

LLAMA = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip


def test_llama() -> None:
    shape = ModelShape.of(AutoConfig.for_model("llama", **LLAMA))

    assert shape == ModelShape(
        layers=3, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, positions=8192, windows=(None,) * 3
    )  # fmt: skip
    assert shape.window is None


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
OLD = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 64}


@pytest.mark.parametrize(
    ("family", "shape", "positions"),
    [
        ("gpt2", OLD, 64),
        ("gptj", {**OLD, "rotary_dim": 4}, 64),
        ("gpt_bigcode", OLD, 64),
        ("openai-gpt", OLD, 64),
        ("opt", {**SMALL, "max_position_embeddings": 64, "word_embed_proj_dim": 32}, 64),
        ("biogpt", {**SMALL, "max_position_embeddings": 64}, 64),
        ("llama", {**SMALL, "max_position_embeddings": 64}, None),
        ("qwen3", {**SMALL, "max_position_embeddings": 64}, None),
        ("gpt_neox", {**SMALL, "max_position_embeddings": 64}, None),
        (
            "xglm",
            {"d_model": 32, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 64},
            None,
        ),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}, None),
        ("nemotron_h", {"max_position_embeddings": 64}, None),
    ],
)
def test_positions_end_only_where_they_are_a_table(
    family: str, shape: dict, positions: int | None, tmp_path: Path
) -> None:
    AutoConfig.for_model(family, **shape).save_pretrained(tmp_path)

    assert position_table(tmp_path) == positions


def test_positions_of_a_nested_base_are_those_of_its_language_model(tmp_path: Path) -> None:
    """Its vision tower has a table."""
    assert position_table(save_tiny_gemma3(tmp_path)) is None


def test_head_size_that_is_stated_wins_over_the_one_that_follows() -> None:
    assert ModelShape.of(AutoConfig.for_model("llama", **LLAMA, head_dim=128)).head_dim == 128


def test_gpt2_calls_everything_otherwise() -> None:
    shape = ModelShape.of(
        AutoConfig.for_model("gpt2", n_embd=48, n_layer=2, n_head=4, n_positions=512, vocab_size=1000)
    )

    assert shape == ModelShape(
        layers=2, hidden=48, intermediate=192, heads=4, kv_heads=4, head_dim=12, vocab=1000, positions=512, windows=(None, None)
    )  # fmt: skip
    assert ModelShape.of(AutoConfig.for_model("gpt2", n_embd=48, n_head=4, n_inner=100)).intermediate == 100


@pytest.mark.parametrize(("window", "windows"), [(4096, (4096, 4096)), (None, (None, None))])
def test_mistral_gives_every_layer_its_window(window: int | None, windows: tuple) -> None:
    layers = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape = ModelShape.of(AutoConfig.for_model("mistral", **layers, sliding_window=window))

    assert shape.windows == windows
    assert shape.window == window
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (8, 2, 8)


def test_local_layers_of_gpt_neo_have_a_window_that_is_counted_from_the_end() -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    shape = ModelShape.of(AutoConfig.for_model("gpt_neo", **sizes, window_size=64))

    assert shape.windows == (None, 64)
    assert shape.ends_aligned


def test_longrope_ends_where_it_changes_its_factors() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 256,
             "original_max_position_embeddings": 64}  # fmt: skip
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    shape = ModelShape.of(AutoConfig.for_model("phi3", **sizes, rope_parameters=rope))

    assert shape.rope_switch == 64
    assert shape.positions == 256
    assert ModelShape.of(AutoConfig.for_model("phi3", **sizes)).rope_switch is None


def test_nested_gemma3_is_that_of_its_language_model(tmp_path: Path) -> None:
    shape = ModelShape.of_folder(save_tiny_gemma3(tmp_path / "gemma3"))

    assert shape.vocab > 256
    assert shape == ModelShape(
        layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8, vocab=shape.vocab, positions=512, windows=(16, None)
    )  # fmt: skip
    assert shape.window == 16


def test_smallest_window_counts() -> None:
    shape = ModelShape.of(AutoConfig.for_model("llama", **LLAMA))

    assert ModelShape(**{**vars(shape), "windows": (None, 512, 128)}).window == 128


def test_layers_that_are_given_the_same_input_form_a_group() -> None:
    names = [
        "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj",
        "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "c_attn",
    ]  # fmt: skip

    assert siblings(names) == [names[:3], names[3:4], names[4:6], names[6:7], names[7:8], names[8:]]


def test_sizes_are_the_largest_and_windows_those_of_each_layer_where_layers_differ() -> None:
    config = family_config("Gemma 4")
    shape = ModelShape.of(config)

    assert (shape.head_dim, shape.heads, shape.kv_heads, shape.windows) == (16, 4, 2, (16, None))
    assert ModelShape.of(family_config("Gemma 4 (nested)")) == shape


def test_layers_without_attention_have_a_shape() -> None:
    shape = ModelShape.of(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2))

    assert (shape.layers, shape.hidden, shape.heads, shape.windows) == (2, 32, 0, (None, None))
