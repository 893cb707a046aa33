"""Tiny models of families whose answers end at another token than their tokenizer's EOS, each with its real template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaConfig

from scripts.model.base import load_tokenizer
from tests.conftest import tiny_tokenizer


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer and generation_config.json say about the end of an answer."""

    template: str
    tokens: tuple[str, ...]  # added and not named by the tokenizer
    bos: str
    eos: str
    closing: str
    listed: tuple[str, ...]  # in generation_config.json
    after_closing: str = ""  # what the template writes after the closing token
    special: bool = True  # whether the added tokens are marked as special

    @property
    def stops(self) -> set[str]:
        return {self.eos, self.closing, *self.listed}


FAMILIES = {
    # Closing token and EOS are both written.
    "phi3": Family("phi3", ("<|endoftext|>",), "<s>", "<|endoftext|>", "<|end|>", ("<|endoftext|>",), "\n<|endoftext|>"),
    # The first Llama 3 named <|end_of_text|> alone, so nothing but its template says how a turn ends.
    "llama3": Family(
        "llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|begin_of_text|>", "<|end_of_text|>",
        "<|eot_id|>", ("<|end_of_text|>",),
    ),
    # Its tokenizer holds line breaks as added tokens.
    "gemma3": Family(
        "gemma3", ("<start_of_turn>", "<end_of_turn>", "\n", "<unused>"), "<bos>", "<eos>", "<end_of_turn>",
        ("<eos>", "<end_of_turn>", "<unused>"), "\n",
    ),
    # Whoever fine-tunes may add tokens without marking them as special.
    "unmarked": Family(
        "llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|begin_of_text|>", "<|end_of_text|>",
        "<|eot_id|>", ("<|end_of_text|>",), special=False,
    ),
}  # fmt: skip


def family_tokenizer(family: Family) -> Any:
    """Return the tiny tokenizer with a family's tokens and template."""
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = tiny_tokenizer((folder / f"{family.template}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_tokens(
        [AddedToken(token, special=family.special and not token.isspace(), normalized=False) for token in family.tokens]
    )
    tokenizer.add_special_tokens({"bos_token": family.bos, "eos_token": family.eos})
    return tokenizer


def save_family_model(folder: Path, family: Family, says: str | None = None) -> Path:
    """Save a tiny Llama that says one token at each step: the closing one unless another is named."""
    tokenizer = family_tokenizer(family)
    listed = tokenizer.convert_tokens_to_ids(list(family.listed))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(says or family.closing)] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change_generation_config(folder, eos_token_id=listed if len(listed) > 1 else listed[0])
    return folder


def change_generation_config(folder: Path, **changes: Any) -> None:
    """Change what a model's folder recommends for generating."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def stop_ids(folder: Path, family: Family) -> set[int]:
    """Return the ids at which an answer of the family has to end."""
    return set(load_tokenizer(folder).convert_tokens_to_ids(sorted(family.stops)))
