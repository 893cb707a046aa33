"""Batches of similar length: less padding, the same batches after a resumption."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler


class SimilarLengthSampler(Sampler[int]):
    """Yield indices so that consecutive batches hold records of similar length, in an order that differs by epoch.

    A batch here is what one optimizer step sees: its parts are equally long on every process, and it is the same
    however it is split over processes and accumulated gradients. Lengths are jittered by 3 %, so that batches differ
    between epochs too; the batch order is random, so no trend in length runs through an epoch. Only the first
    batch is the longest: a run that needs too much memory fails at once, and what follows fits into what it took.
    The order depends on seed and epoch alone: a resumed run sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(self.seed * 1_000_003 + self.epoch)
        jittered = [length * generator.uniform(0.97, 1.03) for length in self.lengths]
        order = sorted(range(len(self.lengths)), key=jittered.__getitem__)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a short batch must come last
        longest = [batches.pop()] if batches else []
        generator.shuffle(batches)
        for batch in longest + batches + short:
            yield from batch


class GroupedByLength:
    """Give a TRL trainer batches of similar length; `row_length` says what a row costs."""

    group_by_length: bool

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens a row takes."""
        raise NotImplementedError

    def floating_point_ops(self, inputs: Any) -> int:
        """Count none: transformers would go through all modules at every step, for a figure that is not reported here."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        args: Any = self.args  # type: ignore[attr-defined]
        lengths = [self.row_length(row) for row in dataset]
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return SimilarLengthSampler(lengths, batch_size, args.seed)
