"""Turn SIGINT and SIGTERM, on Windows Ctrl-Break too, into an orderly end."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from scripts.common.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted

log = logging.getLogger(__name__)

# On Windows nobody can send SIGTERM, which ends a process there at once. Ctrl-Break is what reaches it instead.
BREAK = getattr(signal, "SIGBREAK", None)
STOPPING = tuple(number for number in (signal.SIGINT, signal.SIGTERM, BREAK) if number is not None)


class StopSignal:
    """Remember a request to stop until the training loop reaches a step where it can."""

    def __init__(self) -> None:
        self.exit_code = 0
        self.deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self.exit_code = self.exit_code, EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
        if again or not self.deferred:  # a second signal does not wait
            # Python swallows what is raised inside a finaliser; training then stops at its first step by the exit code.
            raise Interrupted(self.exit_code)
        log.warning("stopping after this step; a checkpoint will be written (send the signal again to stop now)")


@contextmanager
def trapped_signals() -> Iterator[StopSignal]:
    """Turn a request to stop into an orderly end for the length of the block."""
    stop = StopSignal()
    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let a request to stop wait for the end of a short block that must not be cut in two; a second one does not wait."""
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            signal.signal(number, previous[number])
            came.clear()
            signal.raise_signal(number)

    previous = {int(number): signal.signal(number, hold) for number in STOPPING}
    try:
        yield
    finally:
        for number in STOPPING:
            signal.signal(number, previous[number])
        for caught in came:
            signal.raise_signal(caught)
