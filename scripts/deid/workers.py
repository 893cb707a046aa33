"""Spread the scrubbing over processes; the output does not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from scripts.common.errors import UserError
from scripts.common.schema import Deid
from scripts.deid.detection import Detector
from scripts.deid.recognizers import describe, load_detector
from scripts.deid.replacement import Replacer
from scripts.deid.scrubbing import Outcome, scrub_chunk

Chunk = list[tuple[int, str, Any]]
# A chunk is what one call searches; its bounds depend on the file alone, so any number of workers finds the same.
CHUNK_RECORDS, CHUNK_CHARACTERS = 256, 100_000
MOST_ON_WINDOWS = 61  # processes that one call there can wait for

_detector: Detector | None = None
_replacer: Replacer | None = None


def chunks(rows: Iterable[tuple[str, Any]]) -> Iterator[Chunk]:
    """Group rows, numbering them from 1."""
    chunk: Chunk = []
    size = 0
    for number, (source, row) in enumerate(rows, 1):
        chunk.append((number, source, row))
        size += len(str(row))
        if len(chunk) == CHUNK_RECORDS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Workers:
    """Scrub chunks in this process or in several others."""

    def __init__(self, count: int, settings: Deid, seed: int, key: bytes | None, usual: str = "") -> None:
        self.count = min(count, MOST_ON_WINDOWS) if sys.platform == "win32" else count
        self.arguments = (settings, seed, key, usual)
        # More threads per process only get in each other's way; the libraries read this when they are imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count == 1:
            _start(*self.arguments)
            self.facts = _facts()
        else:
            self.pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), _remember, self.arguments)
            self.facts = self._result(self.pool.submit(_facts))
        return self

    def __exit__(self, *_: Any) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def scrub(self, rows: Iterable[tuple[str, Any]]) -> Iterator[Outcome]:
        """Yield what became of each row, in order; only a few chunks are in memory at any time."""
        if self.pool is None:
            for chunk in chunks(rows):
                yield from _scrub(chunk)
            return
        waiting: deque[Future[list[Outcome]]] = deque()
        for chunk in chunks(rows):
            waiting.append(self.pool.submit(_scrub, chunk))
            if len(waiting) > 2 * self.count:
                yield from self._result(waiting.popleft())
        while waiting:
            yield from self._result(waiting.popleft())

    @staticmethod
    def _result(future: Future[Any]) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, perhaps for lack of memory; no output was written. Try fewer: --workers 1"
            ) from None


_arguments: tuple[Deid, int, bytes | None, str] | None = None


def _remember(settings: Deid, seed: int, key: bytes | None, usual: str) -> None:
    """Keep the configuration for the first task; an error here would reach nobody."""
    global _arguments
    _arguments = (settings, seed, key, usual)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _start(settings: Deid, seed: int, key: bytes | None, usual: str) -> None:
    global _detector, _replacer
    _detector, _replacer = load_detector(settings), Replacer(settings, seed, key)
    _detector.usual = usual


def _loaded() -> tuple[Detector, Replacer]:
    if _detector is None or _replacer is None:
        assert _arguments is not None
        _start(*_arguments)
    assert _detector is not None
    assert _replacer is not None
    return _detector, _replacer


def _facts() -> dict[str, Any]:
    return describe(_loaded()[0])


def _scrub(chunk: Chunk) -> list[Outcome]:
    return scrub_chunk(chunk, *_loaded())
