"""Answers as server-sent events, and what an answer and its log line say about the tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.errors import ServingError, error_body
from serve.jobs import Job
from serve.schemas import Usage


class EventStream(StreamingResponse):
    """Server-sent events of one job. However the response ends, the job ends with it."""

    def __init__(self, request: Request, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(
            _closed_properly(events), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
        self.job, self.notes = job, request.state.notes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.job.finish_reason:
                self.notes["finish_reason"] = "cancelled"
            self.job.cancel()
            self.notes.update(facts_of(self.job))


def event(value: dict[str, Any] | str) -> str:
    """Write one server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


async def _closed_properly(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """End a stream with [DONE] in any case, and with the error before it where there is one."""
    try:
        async for line in events:
            yield line
    except ServingError as error:
        yield event(error_body(error))
    yield event("[DONE]")


def usage_of(job: Job) -> Usage:
    """Count a job's tokens."""
    prompt, answer = len(job.ids), len(job.out)
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


def facts_of(job: Job) -> dict[str, Any]:
    """Return what the log line says about a job. Its text is never part of it."""
    facts: dict[str, Any] = {"model": job.model, "prompt_tokens": len(job.ids), "completion_tokens": len(job.out)}
    if job.first_token:
        facts["ttft_ms"] = round(1e3 * (job.first_token - job.arrival))
    if job.finish_reason:
        facts["finish_reason"] = job.finish_reason
    return facts
