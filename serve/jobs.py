"""What passes between the event loop and the engine: jobs and their seats."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.errors import ServingError
from serve.sampling import Sampling, TokenLogprob

if TYPE_CHECKING:
    from serve.structured import Constraint


@dataclass(eq=False)
class Job:
    """One request inside the engine. Times are monotonic seconds."""

    ids: list[int]
    model: str
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    client: str = ""
    # The adapter's place in the stack, which changes when another version takes the model's name.
    adapter: str = ""
    # The last `scored` ids of the prompt are measured. A job without new tokens ends with that.
    scored: int = 0
    top_logprobs: int | None = None  # None measures no token of the answer
    constraint: Constraint | None = None
    arrival: float = field(default_factory=time.monotonic)

    out: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    measured: list[TokenLogprob] = field(default_factory=list)  # of the prompt's scored ids
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the answer
    cancelled: bool = False
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    length: int = 0  # tokens of this job that stand in the cache
    retries: int = 0
    seat: Seat | None = None
    events: asyncio.Queue[str | ServingError | None] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.adapter = self.adapter or self.model

    @property
    def logprob(self) -> float:
        """Sum the log-probabilities of the scored ids, in nats."""
        return math.fsum(token.logprob for token in self.measured)

    @property
    def unmeasured(self) -> range:
        """Return the positions whose logits measure the scored ids; none once an answer has begun."""
        return range(0) if self.out else range(len(self.ids) - 1 - self.scored, len(self.ids) - 1)

    @property
    def prompt(self) -> list[int]:
        """All that is read before the next token; a job that was put back has begun its answer already."""
        return self.ids + self.out

    @property
    def ended(self) -> bool:
        """Return whether the answer is complete."""
        return self.finish_reason in ("stop", "length")

    def cancel(self) -> None:
        """Ask the engine to drop the job at its next step; harmless when it has ended."""
        self.cancelled = True

    async def pieces(self) -> AsyncIterator[str]:
        """Yield text as it becomes certain.

        Raises: ServingError when the engine gives the job up.
        """
        while (event := await self.events.get()) is not None:
            if isinstance(event, ServingError):
                raise event
            yield event

    async def text(self) -> str:
        """Wait for the whole text."""
        return "".join([piece async for piece in self.pieces()])


class Seat:
    """The right of one request to wait and run, taken before any work is done for it."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the seat back; a second call does nothing."""
        release, self._release = self._release, None
        if release:
            release()
