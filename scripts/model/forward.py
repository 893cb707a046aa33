"""The forward pass that scoring and generation call: the library's on padded rows, unless a leaner one stands in for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from scripts.model.batch import left_padded_batch, reads_padding


class Decoding(Protocol):
    """Rows that are continued together, one token at a time."""

    def reserve(self, prompts: Sequence[Sequence[int]]) -> None:
        """Make room for prompts that are added next, all at once or some at a time."""

    def add(
        self, prompts: Sequence[Sequence[int]], beside: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read prompts into new rows at the end, and beside them rows that are not continued.

        Return the logits of what follows each prompt, (new rows, V), and those at some places of the rows beside, (n, V).
        """

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to every row; return the logits of the next, (rows, V)."""

    def drop(self, row: int) -> None:
        """Let a row leave; the last one takes its place."""


class Forward(Protocol):
    """What can be asked of a model."""

    def similarity(self, row: Sequence[int]) -> Any:
        """Return a key by which rows are sorted so that a batch of neighbours takes little work."""

    def logits(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits at some places of each row, one row after the other, (n, V)."""

    def decoding(self, sample: Sequence[Sequence[int]]) -> Decoding | None:
        """Return rows to be continued; None where the library's `generate` must do that. `sample`: some prompts, for a proof."""


class PaddedForward:
    """The library's forward pass on rows padded on the left, so that all of them end in the same column."""

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id

    def similarity(self, row: Sequence[int]) -> int:
        """Return the length: rows of similar length pad each other little."""
        return len(row)

    def logits(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits at some places of each row, (n, V)."""
        if len(rows) > 1 and reads_padding(self.model):
            return torch.cat([self.logits([row], [wanted]) for row, wanted in zip(rows, places, strict=True)])
        input_ids, attention_mask = left_padded_batch(rows, self.pad_token_id)
        device = next(self.model.parameters()).device
        width = input_ids.shape[1]
        columns = [torch.tensor(wanted) + width - len(row) for row, wanted in zip(rows, places, strict=True)]
        first = int(min(column.min() for column in columns))
        logits = self.model(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0).to(device),
            logits_to_keep=width - first,
            use_cache=False,
        ).logits
        return torch.cat([row[column.to(device) - first] for row, column in zip(logits, columns, strict=True)])

    def decoding(self, sample: Sequence[Sequence[int]]) -> None:
        """Leave generation to the library."""


def forward_of(model: Any, pad_token_id: int) -> Forward:
    """Return what stands in for a model's forward pass (speed/stand_in.py), or the library's own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    lean: Forward | None = getattr(base, "lean_forward", None)
    return lean or PaddedForward(model, pad_token_id)
