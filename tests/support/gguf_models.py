"""Tiny models of every architecture that becomes a GGUF, with weights large enough to tell them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.model.tiny import tiny_tokenizer

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


def scaled(kind: str, **settings: Any) -> dict[str, Any]:
    """Return how positions are scaled."""
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **settings}}


LINEAR = scaled("linear", factor=2.0)
YARN = scaled("yarn", factor=2.0, original_max_position_embeddings=64)
LLAMA3 = scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LONGROPE = scaled(
    "longrope", partial_rotary_factor=0.75, original_max_position_embeddings=256, short_factor=[1, 1.1, 1.2, 1.3, 1.5, 1.6],
    long_factor=[1, 2, 3, 4, 5, 6],
)  # fmt: skip
GEMMA = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16}
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}

# By a name for the test: the model_type, and what differs from SHAPE.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 32}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3": ("llama", LLAMA3),
    "llama, linear": ("llama", LINEAR),
    "llama, yarn": ("llama", YARN),
    "mistral": ("mistral", {"sliding_window": 150}),
    "smollm3": ("smollm3", {"head_dim": 16}),
    "smollm3, yarn": ("smollm3", {"tie_word_embeddings": False, **YARN}),
    "granite": ("granite", SCALES),
    "granite, tied, linear": ("granite", {"tie_word_embeddings": True, **SCALES, **LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, yarn": ("qwen2", {"tie_word_embeddings": True, **YARN}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3, yarn": ("qwen3", {"head_dim": 32, **YARN}),
    "olmo2": ("olmo2", {}),
    "olmo2, yarn": ("olmo2", YARN),
    "phi3": ("phi3", {"sliding_window": 150}),
    "phi3, longrope": (
        "phi3",
        {
            "tie_word_embeddings": True, "max_position_embeddings": 1024, "original_max_position_embeddings": 256, **LONGROPE,
        },
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma2, narrow heads, yarn": ("gemma2", {**GEMMA, "head_dim": 32, "query_pre_attn_scalar": 32, **YARN}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, other pattern": (
        "gemma3_text",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2, "tie_word_embeddings": False},
    ),
    "gemma3, linear": (
        "gemma3_text",
        {
            **GEMMA,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
    ),
}  # fmt: skip


def make_config(name: str, tokenizer: Any, **changes: Any) -> Any:
    """Return the configuration of a tiny model that has more rows than the tokenizer tokens."""
    family, differs = BASES[name]
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(family, **{**SHAPE, "vocab_size": len(tokenizer) + 5, **ids, **differs, **changes})


def make_model(config: Any) -> Any:
    """Make a model whose attention, norms and biases all matter: freshly initialised ones hardly do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=(0.3 if "embed" in name else 1.5 / weight.shape[-1] ** 0.5))
            else:
                weight.add_(torch.randn_like(weight) * 0.3)
    return model


def save_base(folder: Path, name: str, tokenizer: Any = None, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer."""
    tokenizer = tokenizer or tiny_tokenizer()
    make_model(make_config(name, tokenizer, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
