"""The files of what people say: votes, thumbs, and votes on samples, one record a line."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.common.artifacts import private
from serve.errors import ServingError
from serve.metrics import Metrics

log = logging.getLogger(__name__)

MAX_VOTES_BYTES = 64 * 2**20


class VotesFile:
    """Append records to a JSONL file that only its owner may read."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self.path, self.metrics = path, metrics
        self._writing = ThreadPoolExecutor(1, "votes")

    async def append(self, record: dict[str, Any]) -> None:
        """Write one record without holding up the event loop; it is on the disk when this returns.

        Raises: ServingError 503 when the file is full or cannot be written.
        """
        await asyncio.get_running_loop().run_in_executor(self._writing, self._append, record)

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps({**record, "created": datetime.now(UTC).isoformat(timespec="seconds")}, ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", newline="\n", opener=private) as file:
                if file.tell() > MAX_VOTES_BYTES:
                    raise ServingError(503, "votes_full", "the file of votes is full; the operator must move it away")
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.metrics.log_errors.inc()
            log.error("a vote could not be written: %s", error.strerror)
            raise ServingError(503, "vote_not_written", "the vote could not be written") from None
