"""One run in several processes (torchrun, accelerate launch): ranks, collectives, and which rows a rank takes.

Everything here also works, without importing torch, in a process that runs alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from scripts.common.errors import EXIT_MISTAKE, Interrupted, UserError

T = TypeVar("T")
LONGEST_WAIT = timedelta(minutes=30)  # for rank 0 to write a checkpoint or to reach a slow MLflow store


def join_process_group(device: str) -> None:
    """Connect the processes that a launcher started; a process alone has nothing to connect."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)


def leave_process_group() -> None:
    """Wait for the other ranks, then leave."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Tell whether this is rank 0, which alone logs, tracks and saves; the launcher says so even before the group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def rank() -> int:
    """Return this process's rank in its group."""
    return _rank_and_world_size()[0]


def world_size() -> int:
    """Return the number of processes in the group."""
    return _rank_and_world_size()[1]


def _rank_and_world_size() -> tuple[int, int]:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    import torch.distributed as dist

    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def local_world_size() -> int:
    """Return the number of processes of this run on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sharding_engine() -> str | None:
    """Name the engine that shards the model over ranks (FSDP, DEEPSPEED), as accelerate's launcher says."""
    engines = ("FSDP", "DEEPSPEED")
    return next((name for name in engines if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"), None)


def shard_count() -> int:
    """Return over how many processes the weights are sharded; 1 where each rank holds them all."""
    return int(os.environ.get("WORLD_SIZE", "1")) if sharding_engine() else 1


def broadcast_from_rank_0(decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0 and broadcast what it returns, so that all ranks do the same; its UserError ends them all."""
    if world_size() == 1:
        return decide()
    import torch.distributed as dist

    outcome: list[Any] = [None, False]
    if is_main_process():
        try:
            outcome = [decide(), False]
        except UserError:
            dist.broadcast_object_list([None, True], src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise Interrupted(EXIT_MISTAKE)  # rank 0 says why
    return outcome[0]  # type: ignore[no-any-return]


def all_reduce_sum(numbers: Sequence[float]) -> list[float]:
    """Sum each number over all ranks."""
    return _all_reduce(numbers, "SUM")


def all_reduce_max(number: float) -> float:
    """Return the largest value of a number over all ranks."""
    return _all_reduce([number], "MAX")[0]


def _all_reduce(numbers: Sequence[float], operation: str) -> list[float]:
    if world_size() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    tensor = torch.tensor(list(numbers), dtype=torch.float64, device=PartialState().device)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return [float(number) for number in tensor.tolist()]


def all_gather(items: list[T]) -> list[T]:
    """Return the items of all ranks in one list."""
    if world_size() == 1:
        return items
    import torch.distributed as dist

    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def shard(rows: Sequence[T]) -> tuple[list[T], int]:
    """Return this rank's rows and how many of them count.

    Every rank gets equally many, as the ranks of a sharded model compute in step; rows that fill up do not count.
    Example: 5 rows on 2 ranks are [0, 2, 4], 3 on rank 0 and [1, 3, 0], 2 on rank 1.
    """
    own = list(rows[rank() :: world_size()])
    return own + list(rows[: math.ceil(len(rows) / world_size()) - len(own)]), len(own)


def equal_batches(order: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield this rank's part of each batch, and how many rows that batch has over all ranks.

    All ranks get equally many rows of a batch. Rows left at the end, too few for one each, are taken by every rank, so
    that a mean over ranks is one over rows.
    """
    start = 0
    while start < len(order):
        left = len(order) - start
        each = min(batch_size, left // world_size())
        first, own, total = (start + rank() * each, each, each * world_size()) if each else (start, left, left)
        yield list(order[first : first + own]), total
        start += total
