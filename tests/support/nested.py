"""A base whose configuration is nested: a language model with a vision tower beside it, as Gemma 3's."""

from __future__ import annotations

from pathlib import Path

from scripts.model.tiny import tiny_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 16,
}


def save_tiny_gemma3(folder: Path, seed: int = 0) -> Path:
    """Save a two-layer Gemma 3 with its vision tower and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TEXT, **ids, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        mm_tokens_per_image=4,
        **ids,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
