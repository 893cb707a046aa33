"""Make a model of a real architecture that is small enough to train in seconds: for smoke runs and tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.common.paths import ROOT

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Train a byte-level BPE tokenizer on the repository's own sample data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train([str(ROOT / "data/sft/sample_sft.jsonl")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def save_tiny_model(folder: Path, architecture: str = "llama", seed: int = 0, **shape_changes: int) -> Path:
    """Save a randomly initialised two-layer model of an architecture with its tokenizer; `shape_changes` make it larger."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer(None if architecture == "gpt2" else CHAT_TEMPLATE)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "gpt2":
        shape |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    else:
        shape |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "head_dim": 8,
        }
    shape |= shape_changes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_talker(
    folder: Path, words: Sequence[str], ends: float = 0.2, variety: float = 1.0, seed: int = 0
) -> Path:
    """Save a tiny Llama that says these words in any order and ends after each with about this probability.

    Each word must be one token behind a space. What is alike in all hidden states leads to the words, and what differs
    in them makes some likelier than others: `variety` times as much as in the model it starts from.
    """
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_model(folder, seed=seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
    if any(len(of_word) > 1 for of_word in ids):
        raise ValueError(f"each of {words} must be one token")
    shared = 1.0  # in the first place of every hidden state, beside entries of about 0.02
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = shared
        model.lm_head.weight *= variety
        model.lm_head.weight[:, 0] = 0
        likely = 12 / math.sqrt(model.config.hidden_size)  # the final norm makes the first place sqrt(hidden_size)
        model.lm_head.weight[[of_word[0] for of_word in ids], 0] = likely
        more = math.log(ends / (1 - ends) * len(words)) / math.sqrt(model.config.hidden_size)
        model.lm_head.weight[tokenizer.eos_token_id, 0] = likely + more
    model.save_pretrained(folder)
    return folder
