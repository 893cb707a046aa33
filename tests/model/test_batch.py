"""Rows of different lengths in one tensor."""

from __future__ import annotations

import torch

from scripts.model.batch import left_pad, left_padded_batch


def test_rows_end_in_the_same_column() -> None:
    ids, mask = left_padded_batch([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.long


def test_labels_are_padded_with_what_carries_no_loss() -> None:
    assert left_pad([[1], [2, 3]], -100).tolist() == [[-100, 1], [2, 3]]
