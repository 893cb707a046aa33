"""Answers as server-sent events, and what an answer and its log line say about the tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.errors import ServingError, error_body
from serve.jobs import Job
from serve.schemas import Usage


class EventStream(StreamingResponse):
    """Server-sent events of the jobs of one request. However the response ends, the jobs end with it."""

    def __init__(self, request: Request, jobs: Sequence[Job], events: AsyncIterator[str]) -> None:
        super().__init__(
            self._closed_properly(events), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
        self.jobs, self.notes = jobs, request.state.notes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if "error" not in self.notes and not all(job.ended for job in self.jobs):
                self.notes["finish_reason"] = "cancelled"
            for job in self.jobs:
                job.cancel()
            self.notes.update(facts_of(self.jobs))

    async def _closed_properly(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """End a stream with [DONE] in any case, and with the error before it where there is one."""
        try:
            async for line in events:
                yield line
        except ServingError as error:
            self.notes["error"] = error.code
            yield event(error_body(error))
        yield event("[DONE]")


async def merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, str | None]]:
    """Yield the pieces of several jobs as they come, each with its job's number; None ends a job.

    Raises: ServingError when the engine gives one of them up.
    """
    queue: asyncio.Queue[tuple[int, str | ServingError | None]] = asyncio.Queue()

    async def follow(number: int, job: Job) -> None:
        try:
            async for piece in job.pieces():
                queue.put_nowait((number, piece))
            queue.put_nowait((number, None))
        except ServingError as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(follow(number, job)) for number, job in enumerate(jobs)]
    try:
        running = len(jobs)
        while running:
            number, piece = await queue.get()
            if isinstance(piece, ServingError):
                raise piece
            running -= piece is None
            yield number, piece
    finally:
        for task in tasks:
            task.cancel()


def event(value: dict[str, Any] | str) -> str:
    """Write one server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


def usage_of(jobs: Sequence[Job], answers: int = 1) -> Usage:
    """Count the tokens of the jobs of one request; a prompt with several answers counts once."""
    prompt, answer = sum(len(job.ids) for job in jobs[::answers]), sum(len(job.out) for job in jobs)
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


def facts_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what the log line says about a request's jobs. Their text is never part of it."""
    facts: dict[str, Any] = {
        "model": ",".join(dict.fromkeys(job.model for job in jobs)),
        "prompt_tokens": sum(len(job.ids) for job in jobs),
        "completion_tokens": sum(len(job.out) for job in jobs),
    }
    if jobs[0].first_token:
        facts["ttft_ms"] = round(1e3 * (jobs[0].first_token - jobs[0].arrival))
    if jobs[0].finish_reason:
        facts["finish_reason"] = jobs[0].finish_reason
    return facts
