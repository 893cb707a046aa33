"""Batches of similar length: every record once per epoch, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import random

import pytest

from scripts.training.batching import SimilarLengthSampler

LENGTHS = random.Random(0).choices(range(5, 500), k=83)


def batches(sampler: SimilarLengthSampler, size: int = 8) -> list[list[int]]:
    """Cut an epoch into batches."""
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize(("count", "size"), [(83, 8), (80, 8), (3, 8), (1, 1), (8, 8)])
def test_every_record_comes_once_per_epoch(count: int, size: int) -> None:
    sampler = SimilarLengthSampler(LENGTHS[:count], size, seed=0)

    assert sorted(sampler) == list(range(count))
    assert len(sampler) == count


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, again, other_seed = (SimilarLengthSampler(LENGTHS, 8, seed) for seed in (0, 0, 1))
    epoch_0 = list(first)
    first.set_epoch(1)
    list(again)
    again.set_epoch(1)

    assert list(first) == list(again) != epoch_0
    assert list(other_seed) != epoch_0


def test_batches_hold_similar_lengths_in_no_order_of_length() -> None:
    cut = batches(SimilarLengthSampler(LENGTHS, 8, seed=0))
    random_order = random.Random(1).sample(range(83), 83)

    def padding(parts: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in part) - LENGTHS[j] for part in parts for j in part)

    assert padding(cut) < padding([random_order[start : start + 8] for start in range(0, 83, 8)]) / 4
    means = [sum(LENGTHS[i] for i in part) / len(part) for part in cut]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
    assert [len(part) for part in cut] == [8] * 10 + [3]


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_begins_with_its_longest_batch(epoch: int) -> None:
    """So that too little memory shows at once."""
    sampler = SimilarLengthSampler(LENGTHS[:80], 8, seed=0)
    sampler.set_epoch(epoch)

    first, *others = (sum(LENGTHS[index] for index in part) for part in batches(sampler))

    assert first > max(others)


@pytest.mark.parametrize(("count", "accumulated"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_an_optimizer_step_sees_the_same_records_however_it_is_split(count: int, accumulated: int) -> None:
    """Through accelerate's own sharding; an incomplete last batch is filled up by it, so only whole ones are compared."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    step, size = 16, 16 // (count * accumulated)
    order = list(SimilarLengthSampler(LENGTHS, step, seed=0))
    sampler = SimilarLengthSampler(LENGTHS, step, seed=0)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, size, False), count, rank)) for rank in range(count)]

    for number in range(len(LENGTHS) // step):
        seen = [
            index
            for shard in shards
            for batch in shard[number * accumulated : (number + 1) * accumulated]
            for index in batch
        ]
        assert sorted(seen) == sorted(order[number * step : (number + 1) * step])


def test_every_epoch_has_another_order_in_a_shard() -> None:
    """The Trainer's epoch has to reach our sampler through accelerate's wrapping."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    loader = DataLoader(range(83), batch_size=4, sampler=SimilarLengthSampler(LENGTHS, 8, seed=0))
    prepared = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    epochs = []
    for epoch in (0, 1, 0):
        prepared.set_epoch(epoch)
        epochs.append([int(index) for batch in prepared for index in batch])

    assert epochs[0] == epochs[2] != epochs[1]
