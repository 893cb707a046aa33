"""The door to what makes training faster without changing its numbers; each part is exact in fp32.

Nothing in this folder is imported while `performance.fast_path` and `performance.compile` are false, and nothing
outside it imports another file of it.
"""

from __future__ import annotations

import logging
from typing import Any

from scripts.speed.answer_head import score_answers_only
from scripts.speed.attention import attend_plainly_to_short_rows
from scripts.speed.compiling import choose_compilation, compile_layers
from scripts.speed.lean_decoder import Cache
from scripts.speed.lora_products import adapt_in_input_dtype
from scripts.speed.packing import Packed
from scripts.speed.shared_prompts import SharedPrompts
from scripts.speed.stand_in import lean_decoder_of, logits_of, stand_in, stand_in_of, stands_in_for

__all__ = [
    "Cache", "Packed", "SharedPrompts", "choose_compilation", "lean_decoder_of", "logits_of", "speed_up", "speed_up_training", "stand_in_of",
    "stands_in_for",
]  # fmt: skip

log = logging.getLogger(__name__)


def speed_up(model: Any, keep_weights: bool = True) -> None:
    """Choose the faster of equal computations for a model with adapters; call it before either adapter is first asked.

    Without `keep_weights`, layers that are compiled later keep no attention weights for the backward pass.
    """
    adapt_in_input_dtype(model)
    if stand_in(model) is None:
        attend_plainly_to_short_rows(model, keep_weights)


def speed_up_training(model: Any, device: str, compiled: bool) -> None:
    """Choose the faster of equal losses, and compile the decoder layers where that pays; call it before TRL's trainer is built."""
    score_answers_only(device, compiled)
    if compiled and stand_in_of(model) is None:
        compile_layers(model)
