"""Put rows of token ids of different lengths into one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """Return (B, T) with every row at the right end, so that all of them end in the same column."""
    width = max(map(len, rows))
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)


def left_padded_batch(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids, padded on the left, and the attention mask, both (B, T)."""
    return left_pad(rows, pad_token_id), left_pad([[1] * len(row) for row in rows], 0)
