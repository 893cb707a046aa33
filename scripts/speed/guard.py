"""Guard what replaces a library's internals: the same arguments and the same numbers, or the library keeps its own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)

TOLERANCE = 1e-5  # relative distance in fp32; rounding alone makes about 1e-7


def may_replace(difference: Callable[[], str | None], otherwise: str) -> bool:
    """Return whether a faster computation equals the library's own; if not, warn of the difference and what follows.

    `difference` compares both on a tiny example and returns what differs. The random numbers of the run are left alone.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too
            reason = difference()
    except Exception as error:  # another release may raise anything here, and training works without the fast path
        reason = f"{type(error).__name__}: {error}"
    if reason:
        log.warning("performance.fast_path: %s; %s", reason, otherwise)
    return not reason


def missing_names(what: str, owner: Any, names: Iterable[str]) -> str | None:
    """Return which names a library no longer has."""
    missing = [name for name in names if not hasattr(owner, name)]
    return f"{what} has no {', '.join(missing)}" if missing else None


def other_arguments(theirs: Callable[..., Any], ours: Callable[..., Any], *ignored: str) -> str | None:
    """Return how the arguments of a library's function differ in name or order from those of what stands in for it."""
    expected, actual = (
        [name for name in inspect.signature(function).parameters if name not in ignored] for function in (ours, theirs)
    )
    if actual == expected:
        return None
    return f"{getattr(theirs, '__qualname__', theirs)} takes {', '.join(actual)} instead of {', '.join(expected)}"


def other_numbers(what: str, theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> str | None:
    """Return by how much two computations differ, where that is more than rounding."""
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in ours]:
        return f"{what} gives tensors of other shapes"
    largest = max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True))
    return None if largest <= TOLERANCE else f"{what} gives other numbers ({largest:.1g} apart)"


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the L2 norm of the difference, relative to that of `theirs`."""
    norm = theirs.double().norm()
    return float((ours.double() - theirs.double()).norm() / norm if norm else ours.double().norm())
