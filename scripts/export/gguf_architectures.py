"""Which architectures become a GGUF: for each, what a reader of the format takes for granted about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.model.shape import ModelShape

INSTEAD = "Export safetensors and convert them with llama.cpp's convert_hf_to_gguf.py."

# Numbers of a configuration that some architectures compute with, and where a file has them.
NUMBERS = {
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}

YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")  # readers have their own


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp takes for granted about an architecture."""

    name: str  # in the file
    pairs: bool = False  # it rotates neighbours, where transformers rotates halves
    norms_from_one: bool = False  # it multiplies by what is stored, where transformers adds 1
    windows: bool = False  # it knows sliding windows; others see everything
    scalings: tuple[str, ...] = ("linear", "yarn")  # of positions, beside none
    numbers: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()  # layers that may have one
    partial: bool = False  # it may rotate a part of each head
    tied: tuple[bool, ...] = (False, True)  # whether the head has the embedding's weights
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})


LLAMA = Architecture("llama", pairs=True, scalings=("linear", "yarn", "llama3"))
GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {  # by the model_type in config.json
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": Architecture("smollm3", pairs=True),
    "granite": Architecture(
        "granite",
        pairs=True,
        numbers=("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
    ),
    "qwen2": Architecture("qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": Architecture("qwen3"),
    "olmo2": Architecture("olmo2", tied=(False,)),
    "phi3": Architecture("phi3", scalings=("longrope",), partial=True),
    "gemma2": Architecture(
        "gemma2",
        norms_from_one=True,
        windows=True,
        numbers=("attn_logit_softcapping", "final_logit_softcapping"),
        tied=(True,),
        fixed=GEMMA,
    ),
    "gemma3_text": Architecture("gemma3", norms_from_one=True, windows=True, scalings=("linear",), fixed=GEMMA),
}


def check_model_type(base_folder: Path) -> None:
    """Refuse a base whose config.json names another architecture; needs neither torch nor the weights."""
    try:
        described = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
        found = described.get("text_config", described)["model_type"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # whoever loads the model says what is wrong with it
    if found not in ARCHITECTURES:
        raise UserError(
            f"--format gguf: {base_folder / 'config.json'} names the architecture {found}, "
            f"wanted {', '.join(ARCHITECTURES)}. {INSTEAD}"
        )


def architecture_of(config: Any) -> Architecture:
    """Return what readers take for granted about a model, proving that it holds.

    Raises: UserError when it does not.
    """
    text = config.get_text_config(decoder=True)
    found = ARCHITECTURES[text.model_type]
    if odd := next(_odd_things(found, text), None):
        raise UserError(
            f"--format gguf: this {text.model_type} has {odd}, which readers of GGUF do not expect. {INSTEAD}"
        )
    return found


def _odd_things(known: Architecture, text: Any) -> Iterator[str]:
    """Yield what readers would compute otherwise, without a word."""
    shape = ModelShape.of(text)
    for key, wanted in known.fixed.items():
        if (value := getattr(text, key)) != wanted:
            yield f"{key} {value}"
    for key in NUMBERS:
        if key not in known.numbers and getattr(text, key, None) is not None:
            yield f"{key} {getattr(text, key)}"
    rope = rope_of(text)
    if rope["rope_type"] not in ("default", *known.scalings):
        yield f"rope scaling `{rope['rope_type']}`"
    if rope["rope_type"] == "yarn" and (more := [key for key in YARN if rope.get(key) is not None]):
        yield f"{', '.join(more)} in its rope scaling"
    if rope.get("partial_rotary_factor", 1) != 1 and not known.partial:
        yield "heads that are rotated in part"
    if text.tie_word_embeddings not in known.tied:
        yield f"tie_word_embeddings {text.tie_word_embeddings}"
    if known.windows and window_period(shape) is None:
        yield "windows in another order"
    if getattr(text, "query_pre_attn_scalar", shape.head_dim) != _wanted_scalar(shape):
        yield f"query_pre_attn_scalar {text.query_pre_attn_scalar}"
    fourths = [int((layer + 1) % 4 != 0) for layer in range(shape.layers)]
    if getattr(text, "no_rope_layers", fourths) != fourths:
        yield "other layers without positions"


def rope_of(text: Any) -> dict[str, Any]:
    """Return how positions are rotated; where layers differ, in those that see everything."""
    parameters: dict[str, Any] = text.rope_parameters
    full: dict[str, Any] = parameters.get("full_attention", parameters)
    return full


def window_period(shape: ModelShape) -> int | None:
    """Return after how many layers one sees everything; None when they come in no such order."""
    period = next((number for number, window in enumerate(shape.windows, 1) if window is None), shape.layers + 1)
    regular = all((window is None) == (number % period == 0) for number, window in enumerate(shape.windows, 1))
    return period if regular and period > 1 else None


def _wanted_scalar(shape: ModelShape) -> float:
    """Return by whose root Gemma's queries are divided; readers know the largest models by their number of layers."""
    return shape.hidden // shape.heads if shape.layers in (46, 62) else shape.head_dim


def describe_model(writer: Any, known: Architecture, text: Any) -> None:
    """Write the numbers that a reader needs to compute what transformers computes."""
    shape = ModelShape.of(text)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(context_length(known, text))
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    for key in known.numbers:
        if (value := getattr(text, key)) is not None:
            getattr(writer, NUMBERS[key])(value)
    if known.windows:
        writer.add_sliding_window(shape.window)
        writer.add_sliding_window_pattern(window_period(shape))
    _describe_rope(writer, text, shape.head_dim)


def context_length(known: Architecture, text: Any) -> int:
    """Return for how many positions a reader computes what transformers computes.

    Without windows that is the smallest window. With longrope it is the first training's context: a reader that is given
    more uses the factors for long texts for short ones too.
    """
    shape, rope = ModelShape.of(text), rope_of(text)
    longest = int(
        rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else text.max_position_embeddings
    )
    return longest if known.windows else min(longest, shape.window or longest)


def _describe_rope(writer: Any, text: Any, head_dim: int) -> None:
    import torch
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, kind = rope_of(text), rope_of(text)["rope_type"]
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in text.rope_parameters:
        writer.add_rope_freq_base_swa(text.rope_parameters["sliding_attention"]["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        _, scale = ROPE_INIT_FUNCTIONS["longrope"](text, torch.device("cpu"))
        writer.add_rope_scaling_attn_factors(scale)


def rope_factors(text: Any) -> dict[str, Any]:
    """Return the tensors by which a file scales single frequencies, under their names there."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_of(text)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
        return {"rope_freqs.weight": plain / scaled}
    return {}
