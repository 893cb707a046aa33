"""What passes between the event loop and the engine: jobs and their seats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from serve.errors import ServingError
from serve.sampling import Sampling


@dataclass(eq=False)
class Job:
    """One request inside the engine. Times are monotonic seconds."""

    ids: list[int]
    model: str
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    client: str = ""
    # The last `scored` ids are not generated but measured: their log-probability is the answer.
    scored: int = 0
    arrival: float = field(default_factory=time.monotonic)

    out: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprob: float = 0.0
    cancelled: bool = False
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    length: int = 0  # tokens of this job that stand in the cache
    retries: int = 0
    seat: Seat | None = None
    events: asyncio.Queue[str | ServingError | None] = field(default_factory=asyncio.Queue)

    @property
    def prompt(self) -> list[int]:
        """All that is read before the next token; a job that was put back has begun its answer already."""
        return self.ids + self.out

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
