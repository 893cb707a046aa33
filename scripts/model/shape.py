"""What shape a model has: asked of its configuration in this one place, for families that name things differently."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Layers of one decoder layer that are given the same input, one after the other.
SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})

# Of learnt positions (gpt2, OPT) and of kept angles (GPT-J).
POSITION_TABLE = re.compile(r"\b(wpe|embed_positions|positions?_embed(dings?)?)(\.weight)?$")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, the largest where its layers differ.

    `windows` has an entry for each layer, None where it sees the whole context.
    `rope_switch`: how long a sequence may become before all its angles change (longrope); None where they never do.
    `ends_aligned`: windows are counted back from the end of the longest row, so rows of other lengths see wrong ones.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int | None
    windows: tuple[int | None, ...]
    rope_switch: int | None = None
    ends_aligned: bool = False

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read the shape from a configuration of transformers; of a nested one, that of its language model."""
        text = config.get_text_config(decoder=True)
        every = list(text.per_layer_config)  # Gemma 4's layers differ
        layers, hidden = text.num_hidden_layers, text.hidden_size
        heads = _largest(every, "num_attention_heads") or 0  # Mamba has none
        local = getattr(text, "attention_layers", None)  # gpt_neo's
        window = _largest(every, "sliding_window")
        kinds = (
            getattr(text, "layer_types", None)
            or local
            or ["sliding_attention" if window else "full_attention"] * layers
        )
        sizes = {
            "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size", "local": "window_size",
        }  # fmt: skip
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=_largest(every, "intermediate_size") or getattr(text, "n_inner", None) or 4 * hidden,
            heads=heads,
            kv_heads=_largest(every, "num_key_value_heads") or heads,
            head_dim=_largest(every, "head_dim") or hidden // max(heads, 1),
            vocab=text.vocab_size,
            positions=getattr(text, "max_position_embeddings", None),
            windows=tuple(getattr(layer, sizes.get(kind, ""), None) for layer, kind in zip(every, kinds, strict=True)),
            rope_switch=_rope_switch(text),
            ends_aligned=local is not None,
        )

    @classmethod
    def of_folder(cls, folder: Path) -> ModelShape:
        """Read the shape of the model in a folder, without its weights."""
        from transformers import AutoConfig

        return cls.of(AutoConfig.from_pretrained(folder, trust_remote_code=False))

    @property
    def window(self) -> int | None:
        """Return the smallest window of any layer; None where all see the whole context."""
        return min((window for window in self.windows if window), default=None)


def _largest(layers: Iterable[Any], name: str) -> int | None:
    """Return the largest value of a size among the configurations of layers, None where no layer has it."""
    found = [getattr(layer, name, None) for layer in layers]
    sizes = [size for entry in found for size in (entry if isinstance(entry, Iterable) else [entry])]
    return max(filter(None, sizes), default=None)


def _rope_switch(text: Any) -> int | None:
    """Return where longrope changes from its short factors to its long ones; kinds of layers may have their own rope."""
    ropes = getattr(text, "rope_parameters", None) or {}
    every = [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
    lengths = [rope["original_max_position_embeddings"] for rope in every if rope.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def position_table(folder: Path) -> int | None:
    """Return how many positions the model in a folder has a table for, as gpt2; None where it computes them.

    Beyond a table nothing can be computed. Rotary positions have no such end, and some hybrids have none at all.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):  # neither memory nor weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).get_decoder()  # without its eyes
    return positions_of(model)


def positions_of(model: Any) -> int | None:
    """Return how many positions a model has a table for; None where it computes them."""
    tables = (name for name, _ in (*model.named_parameters(), *model.named_buffers()) if POSITION_TABLE.search(name))
    return ModelShape.of(model.config).positions if any(tables) else None


def siblings(names: Iterable[str]) -> list[list[str]]:
    """Group the names of layers that are given the same input one after the other; others stay alone.

    Example: `0.self_attn.q_proj`, `0.self_attn.k_proj`, `0.mlp.up_proj` make two groups, the first of two.
    """
    groups: dict[tuple[str, int | str], list[str]] = {}
    for name in names:
        owner, _, child = name.rpartition(".")
        number = next((number for number, together in enumerate(SIBLINGS) if child in together), child)
        groups.setdefault((owner, number), []).append(name)
    return list(groups.values())
