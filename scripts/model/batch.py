"""Put rows of token ids of different lengths into one tensor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """Return (B, T) with every row at the right end, so that all of them end in the same column."""
    width = max(map(len, rows))
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)


def left_padded_batch(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids, padded on the left, and the attention mask, both (B, T)."""
    return left_pad(rows, pad_token_id), left_pad([[1] * len(row) for row in rows], 0)


def reads_padding(model: Any) -> bool:
    """Return whether padding before a row changes what a model says of it: it keeps a state, and nothing masks what enters it.

    So it is with RecurrentGemma, RWKV and xLSTM; other recurrent families take the library's function for that.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    masks = hasattr(sys.modules[type(base).__module__], "apply_mask_to_padding_states")
    return base._is_stateful and not masks
