"""A tiny random model of each family of decoders: what is special about its layout is in its configuration."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from scripts.model.tiny import tiny_tokenizer
from tests.support.nested import VISION

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
VOCABULARY = 2048  # as often, more rows than there are tokens
# Shorter than the prompts of the tests, so that a window that is left out shows.
SLIDING = {"sliding_window": 16}
HYBRID = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
# Properties, or what a family computes from other sizes.
LACKING = {"Falcon": ("head_dim",), "DeepSeek-V3": ("head_dim",)}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_expand": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.2}

SENSES = {
    "Gemma 3 (nested)": {"mm_tokens_per_image": 4},
    "Gemma 4 (nested)": {
        "vision_config": {**VISION, "num_key_value_heads": 3, "head_dim": 8},
        "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
}

# The name of a family, the type of its configuration, and what it says beside or other than SHAPE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    }),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "Qwen3-MoE": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "moe_intermediate_size": 32}),
    "Mistral": ("mistral", SLIDING),
    "Mixtral": ("mixtral", EXPERTS),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {**HYBRID, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Gemma 3": ("gemma3_text", {**HYBRID, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Gemma 3 (nested)": ("gemma3", {**HYBRID, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Phi": ("phi", {"partial_rotary_factor": 0.5}),
    "Phi-3": ("phi3", SLIDING),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.25}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", HYBRID),
    "Granite": ("granite", {
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.125,
    }),
    "Cohere 2": ("cohere2", {**HYBRID, "logit_scale": 0.25}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "gpt-oss": ("gpt_oss", {**HYBRID, **EXPERTS}),
    "DeepSeek-V3": ("deepseek_v3", {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4,
    }),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BLOOM": ("bloom", {}),
    "StableLM": ("stablelm", {"partial_rotary_factor": 0.5}),
    "Falcon": ("falcon", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "GPT-Neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 16}),
    "StarCoder2": ("starcoder2", SLIDING),
    "GLM-4": ("glm4", {"partial_rotary_factor": 0.5}),
    "EXAONE 4": ("exaone4", HYBRID),
    "OLMo": ("olmo", {}),
    "Gemma 3n": ("gemma3n_text", {
        **HYBRID, **PER_LAYER, "altup_num_inputs": 2, "laurel_rank": 4, "num_kv_shared_layers": 0,
        "intermediate_size": [64, 64], "activation_sparsity_pattern": [0.0, 0.0],
    }),
    "Gemma 4": ("gemma4_text", {**HYBRID, **PER_LAYER, "per_layer_config": {1: {"head_dim": 16}}}),
    "Gemma 4 (nested)": ("gemma4", {**HYBRID, **PER_LAYER, "per_layer_config": {1: {"head_dim": 16}}}),
    "Qwen3.5": ("qwen3_5_text", {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
    "Granite 3 MoE": ("granitemoe", EXPERTS),
    "Granite 4": ("granitemoehybrid", {
        **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 64, "position_embedding_type": "rope",
    }),
    "Falcon-H1": ("falcon_h1", MAMBA),
    "RecurrentGemma": ("recurrent_gemma", {
        "num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 16,
        "lru_width": 32, "logits_soft_cap": 3.0,
    }),
    "RWKV": ("rwkv", {}),
    "Laguna": ("laguna", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    "GLM-4 MoE": ("glm4_moe", {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_intermediate_size": 32, "partial_rotary_factor": 0.5,
    }),
}  # fmt: skip


def family_config(name: str) -> Any:
    """Return the configuration of a family's tiny model, whose own dropout is what its makers chose."""
    from transformers import AutoConfig

    kind, changes = FAMILIES[name]
    tokenizer = tokenizer_of_all()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    known = AutoConfig.for_model(kind).get_text_config()
    known.allow_global_per_layer_attribute_access = True  # of Gemma 4, whose layers differ
    # A key that a family does not have would make it another one: no Falcon says num_key_value_heads.
    shape = {key: value for key, value in SHAPE.items() if hasattr(known, key) and key not in LACKING.get(name, ())}
    shape |= {**changes, **ids, "vocab_size": VOCABULARY}
    if name.endswith("(nested)"):
        senses = {"vision_config": VISION, **SENSES.get(name, {})}
        return AutoConfig.for_model(kind, text_config=shape, **senses, **ids)
    return AutoConfig.for_model(kind, **shape)


@cache
def tokenizer_of_all() -> Any:
    """Train the tiny tokenizer once; every family has it."""
    return tiny_tokenizer()


def save_family(folder: Path, name: str, seed: int = 0) -> Path:
    """Save a tiny model of a family, with weights so large that every part of its layout shows in the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(name))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
            elif key.endswith(("bias", "sinks")):
                weight.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer_of_all().save_pretrained(folder)
    return folder
