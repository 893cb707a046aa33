"""Adapters and servers for the serving tests: tiny, real, and with weights that change the answers."""

from __future__ import annotations

from pathlib import Path

from scripts.common.artifacts import write_manifest
from scripts.common.modeling import add_lora, base_fingerprint, load_tokenizer
from scripts.common.rendering import template_sha256, tokenizer_sha256
from scripts.common.schema import Lora


def save_adapter(
    folder: Path, base: Path, stage: str = "sft", seed: int = 1, scale: float = 0.4, parent: dict | None = None, **lora
) -> Path:
    """Save an adapter with random weights: a fresh LoRA has B = 0, which would hide every mix-up."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    wrapped = add_lora(AutoModelForCausalLM.from_pretrained(base), Lora(**{"r": 4, "alpha": 8, **lora}), str(base))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, scale)
    wrapped.save_pretrained(folder)
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(folder)
    write_manifest(
        folder, stage,
        base_model={"id": str(base), "revision": None, "fingerprint": base_fingerprint(base)},
        tokenizer_sha256=tokenizer_sha256(tokenizer), chat_template_sha256=template_sha256(tokenizer),
        parent=parent, datasets=[], split={"seed": 0, "ratio": 0.1}, config={"dpo": {"beta": 0.2}},
        mlflow={"run_id": None}, metrics={},
    )  # fmt: skip
    return folder
