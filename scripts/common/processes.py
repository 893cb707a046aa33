"""One run in several processes (torchrun, accelerate launch): who decides, who takes which rows, how numbers are added."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from scripts.common.errors import EXIT_MISTAKE, Interrupted, UserError
from scripts.common.runtime import Machine, is_main_process

T = TypeVar("T")

LONGEST_WAIT = timedelta(minutes=30)  # for the first process to write a checkpoint or to reach a slow MLflow store


def join_processes(machine: Machine) -> None:
    """Connect the processes that a launcher started; a process alone has nothing to connect."""
    if machine.processes > 1:
        from accelerate import PartialState

        PartialState(cpu=machine.device == "cpu", timeout=LONGEST_WAIT)


def leave_processes() -> None:
    """Wait for the others and part in good order."""
    if place()[1] > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1  # without importing torch
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def decided_by_first(decide: Callable[[], T]) -> T:
    """Let the first process look and tell the others, so that all go the same way; its mistake ends them all."""
    if place()[1] == 1:
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
        raise Interrupted(EXIT_MISTAKE)  # the first process says why
    return outcome[0]  # type: ignore[no-any-return]


def added_up(numbers: Sequence[float]) -> list[float]:
    """Add numbers over all processes, each on its own."""
    return _reduced(numbers, "SUM")


def largest(number: float) -> float:
    """Return the largest of the numbers that the processes bring."""
    return _reduced([number], "MAX")[0]


def _reduced(numbers: Sequence[float], operation: str) -> list[float]:
    if place()[1] == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    tensor = torch.tensor(list(numbers), dtype=torch.float64, device=PartialState().device)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return [float(number) for number in tensor.tolist()]


def collected(items: list[T]) -> list[T]:
    """Return the items of all processes."""
    count = place()[1]
    if count == 1:
        return items
    import torch.distributed as dist

    lists: list[Any] = [None] * count
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def own_share(rows: Sequence[T]) -> tuple[list[T], int]:
    """Return the rows this process takes and how many of them count.

    Every process gets equally many, as a model that is split over processes computes in step; a filler does not count.
    """
    rank, count = place()
    own = list(rows[rank::count])
    return own + list(rows[: math.ceil(len(rows) / count) - len(own)]), len(own)


def even_rounds(order: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Deal rows out in an order so that all processes get equally many per round; yield the own ones and the round's count.

    What is left at the end and too little for one each is taken by all, so a mean over processes is one over the rows.
    """
    rank, count = place()
    start = 0
    while start < len(order):
        each = min(batch_size, (len(order) - start) // count)
        left = len(order) - start
        first, taken, mine = (start + rank * each, each * count, each) if each else (start, left, left)
        yield list(order[first : first + mine]), taken
        start += taken
