"""Small bases with adapters that change them, ready to be exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.common.artifacts import (
    SPLIT_KEY_VERSION,
    BaseModelFacts,
    DatasetFacts,
    Manifest,
    RunFacts,
    SplitFacts,
    sha256_file,
    write_manifest,
)
from scripts.common.schema import Config, Lora
from scripts.dataset.chat_format import template_sha256, tokenizer_sha256
from scripts.model.adapter import add_lora
from scripts.model.base import load_full_precision, load_tokenizer
from scripts.model.fingerprint import base_fingerprint
from tests.conftest import save_tiny_model


def save_adapter(
    base: Path,
    folder: Path,
    lora: Lora | None = None,
    *,
    strength: float = 0.05,
    data: Path | None = None,
    **quantization: bool,
) -> Path:
    """Save a finished SFT adapter whose matrices are random and not zero."""
    lora = lora or Lora(r=4, alpha=8)
    torch.manual_seed(1)
    tokenizer, model = load_tokenizer(base), add_lora(load_full_precision(base), lora, str(base))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=strength) if strength else weight.zero_()
            if "lora_magnitude_vector" in name:
                weight.mul_(1.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    config = Config().model_dump(mode="json")
    config["lora"] = lora.model_dump(mode="json")
    config["quantization"].update(quantization)
    datasets = [DatasetFacts(path=str(data), sha256=sha256_file(data), train=3, validation=1)] if data else []
    write_manifest(
        folder,
        Manifest(
            stage="sft",
            base_model=BaseModelFacts(id=str(base), revision=None, fingerprint=base_fingerprint(base)),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            chat_template_sha256=template_sha256(tokenizer),
            datasets=datasets,
            split=SplitFacts(
                seed=0, validation_ratio=0.49, test_ratio=0.5, key_version=SPLIT_KEY_VERSION
            ),  # it was trained on nothing
            config=config,
            mlflow=RunFacts(run_id=None),
            metrics={"held_out_loss_before": 2.0, "held_out_loss": 1.5},
        ),
    )
    return folder


def save_tiny_qwen2(folder: Path) -> Path:
    """Save a two-layer Qwen2 whose embedding has more rows than there are tokens, as the real one's has."""
    save_tiny_model(folder, "qwen2")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, vocab_size=2048)).save_pretrained(folder)
    return folder


def figures(folder: Path) -> dict[str, Any]:
    """Return the metrics in a folder's manifest."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["metrics"]
