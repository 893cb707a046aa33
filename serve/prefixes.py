"""What was read stays for a while: a request that begins like an earlier one of the same adapter does not read it again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

# A shorter beginning is read faster than it is looked up and copied.
LEAST_TOKENS = 32


class Kept(NamedTuple):
    """The keys and values of some tokens, as one adapter made them."""

    adapter: str
    tokens: list[int]
    states: Any


class Prefixes:
    """The rows that ended last, up to so many tokens together; what was not used for longest goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: list[Kept] = []  # the one used last stands last

    def find(self, adapter: str, tokens: Sequence[int], most: int) -> tuple[Any, int]:
        """Return the keys and values with the longest beginning in common, and how many tokens of it, up to `most`."""
        best, length = None, LEAST_TOKENS - 1
        for each in self.kept:
            if each.adapter == adapter:
                common = min(_common(each.tokens, tokens), most)
                if common > length:
                    best, length = each, common
        if best is None:
            return None, 0
        self.kept = [*(each for each in self.kept if each is not best), best]
        return best.states, length

    def worth_keeping(self, adapter: str, tokens: Sequence[int]) -> bool:
        """Return whether a row fits and says more than what is kept."""
        return LEAST_TOKENS <= len(tokens) <= self.limit and not any(
            each.adapter == adapter and _common(each.tokens, tokens) == len(tokens) for each in self.kept
        )

    def keep(self, adapter: str, tokens: list[int], states: Any) -> None:
        """Keep a row, in the place of those that it continues."""
        self.kept = [
            each for each in self.kept if each.adapter != adapter or _common(each.tokens, tokens) < len(each.tokens)
        ]
        self.kept.append(Kept(adapter, tokens, states))
        while self.size > self.limit:
            self.kept.pop(0)

    def forget(self, adapter: str) -> None:
        """Drop all that an adapter made."""
        self.kept = [each for each in self.kept if each.adapter != adapter]

    @property
    def size(self) -> int:
        """Return how many tokens are kept."""
        return sum(len(each.tokens) for each in self.kept)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens with which two rows begin alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
