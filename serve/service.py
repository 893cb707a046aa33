"""One running server: its models and engine, and the way of a request from admission to its last token."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from scripts.common.artifacts import private
from scripts.common.errors import UserError
from scripts.common.rendering import render_completion, render_prompt
from scripts.common.runtime import Machine
from scripts.common.schema import Config
from serve.edge import error_body
from serve.jobs import Job, ServingError
from serve.metrics import Metrics
from serve.schemas import SamplingFields, Usage

if TYPE_CHECKING:
    from serve.adapters import Served

log = logging.getLogger(__name__)

# No text of more characters can fit, so it is refused before the tokenizer works on it.
MAX_CHARACTERS_PER_TOKEN = 8
MAX_VOTES_BYTES = 64 * 2**20
LAG_SECONDS = 0.05


class Service:
    """What the routes work with. Made and used in the event loop's thread."""

    def __init__(self, config: Config, machine: Machine, api_keys: list[str]) -> None:
        from serve.adapters import load_models  # torch comes only after the configuration was found good
        from serve.engine import Engine, check_cache_fits, context_limit

        self.config, self.api_keys = config, api_keys
        self.metrics = Metrics()
        self.draining = False
        self.started = int(time.time())
        self.models = load_models(config, machine)
        serve = config.serve
        self.context = context_limit(self.models, serve.max_context_tokens)
        needed = check_cache_fits(
            self.models, serve.max_concurrent, self.context, self.models.rows.table.dtype, machine.device
        )
        log.info(
            "keys and values of %d requests x %d tokens: %.0f MB", serve.max_concurrent, self.context, needed / 1e6
        )
        self.engine = Engine(
            self.models,
            self.metrics,
            slots=serve.max_concurrent,
            context=self.context,
            queue=serve.max_queue,
            queue_per_client=serve.max_queue_per_client,
            deadline_seconds=serve.deadline_seconds,
            queue_timeout_seconds=serve.queue_timeout_seconds,
            # The server's own orderly end; a supervisor then starts it anew.
            on_death=lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
        # One thread: a tokenizer is not made to be used by several at once.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._writing = ThreadPoolExecutor(1, "votes")
        self._lag: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine and answer one request to warm it up."""
        self.engine.start()
        self._lag = asyncio.create_task(self._watch_lag())
        ids = self.models.tokenizer.encode("Hello", add_special_tokens=False)
        jobs = [Job(ids, name, 2, client="warm-up") for name in self.models.served]
        for job, seat in zip(jobs, self.engine.reserve("warm-up", len(jobs)), strict=True):
            self.engine.submit(job, seat)
        await asyncio.gather(*(job.text() for job in jobs))

    async def stop(self) -> None:
        """End the engine's thread."""
        if self._lag:
            self._lag.cancel()
        await asyncio.to_thread(self.engine.stop)

    def drain(self) -> None:
        """Take no more requests; what runs may finish within the limit. A second call ends it at once."""
        over = ServingError(503, "draining", "the server is stopping")
        if self.draining:
            self.engine.fail_all(over)
            return
        self.draining = True
        asyncio.get_running_loop().call_later(self.config.serve.drain_seconds, self.engine.fail_all, over)

    def model(self, name: str | None, param: str) -> Served:
        """Find a model by the name a request gives.

        Raises: ServingError 404 with the known names.
        """
        found = self.models.served.get(self.models.default if name is None else name)
        if found is None:
            known = ", ".join(self.models.served)
            raise ServingError(404, "model_not_found", f"no such model; this server has: {known}", param)
        return found

    async def begin(
        self,
        request: Request,
        names: Sequence[str],
        render: Callable[[], list[int]],
        characters: int,
        fields: SamplingFields,
        max_new_tokens: int | None,
    ) -> list[Job]:
        """Admit a request, render its prompt, and start one job for each model.

        Raises: ServingError when it is refused.
        """
        arrival = time.monotonic()
        client = request.state.client
        if self.draining:
            raise ServingError(503, "draining", "the server is stopping", retry_after=5)
        if max_new_tokens and max_new_tokens > self.context:
            message = f"an answer can have at most {self.context} tokens"
            raise ServingError(422, "max_new_tokens_too_large", message, "max_new_tokens")
        seats = self.engine.reserve(client, len(names))
        try:
            ids = await self._tokens(render, characters)
            room = self.context - len(ids)
            if room < (max_new_tokens or 1):
                message = (
                    f"the prompt has {len(ids)} tokens and {max_new_tokens or 1} more are asked for; "
                    f"the context is {self.context} tokens, which leaves room for {max(room, 0)}"
                )
                raise ServingError(422, "context_length_exceeded", message, "prompt")
            count = max_new_tokens or min(self.config.serve.default_max_new_tokens, room)
            jobs = [Job(ids, name, count, fields.sampling(), fields.stops(), client, arrival=arrival) for name in names]
        except BaseException:
            for seat in seats:
                seat.release()
            raise
        for job, seat in zip(jobs, seats, strict=True):
            self.engine.submit(job, seat)
        return jobs

    async def begin_scoring(self, request: Request, names: Sequence[str], prompt: list[Any], answer: str) -> list[Job]:
        """Start one job for each model that measures the answer's probability."""
        arrival = time.monotonic()
        if self.draining:
            raise ServingError(503, "draining", "the server is stopping", retry_after=5)
        seats = self.engine.reserve(request.state.client, len(names))
        tokenizer, scored = self.models.tokenizer, 0

        def render() -> list[int]:
            nonlocal scored
            prompt_ids = render_prompt(tokenizer, prompt)
            answer_ids = render_completion(tokenizer, prompt, prompt_ids, answer)
            scored = len(answer_ids)
            return prompt_ids + answer_ids

        try:
            ids = await self._tokens(render, sum(len(message["content"]) for message in prompt) + len(answer))
            if len(ids) > self.context:
                message = f"prompt and answer have {len(ids)} tokens; the context is {self.context} tokens"
                raise ServingError(422, "context_length_exceeded", message, "prompt")
        except BaseException:
            for seat in seats:
                seat.release()
            raise
        client = request.state.client
        jobs = [Job(ids, name, 1, client=client, scored=scored, arrival=arrival) for name in names]
        for job, seat in zip(jobs, seats, strict=True):
            self.engine.submit(job, seat)
        return jobs

    async def _tokens(self, render: Callable[[], list[int]], characters: int) -> list[int]:
        limit = MAX_CHARACTERS_PER_TOKEN * self.context
        if characters > limit:
            message = f"the prompt has {characters} characters; more than {limit} cannot fit {self.context} tokens"
            raise ServingError(422, "context_length_exceeded", message, "prompt")
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._tokenizing, render)
        except UserError as error:
            raise ServingError(422, "invalid_messages", str(error), "messages") from None
        if not ids:
            raise ServingError(422, "empty_prompt", "the prompt has no token", "prompt")
        return ids

    async def texts(self, request: Request, jobs: Sequence[Job]) -> list[str]:
        """Wait for all answers; when the client goes away first, its jobs are dropped."""
        gone = asyncio.create_task(_disconnected(request))
        answers = asyncio.gather(*(job.text() for job in jobs))
        try:
            waiting: set[asyncio.Future[Any]] = {gone, answers}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise ServingError(499, "client_closed_request", "the client has gone")
            return answers.result()
        finally:
            gone.cancel()
            answers.cancel()
            for job in jobs:
                job.cancel()
            request.state.notes.update(facts_of(jobs[0]))

    def record_vote(self, record: dict[str, Any]) -> None:
        """Append one preference record; it is on the disk when this returns."""
        path = Path(str(self.config.serve.votes_path))
        line = json.dumps({**record, "created": datetime.now(UTC).isoformat(timespec="seconds")}, ensure_ascii=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8", opener=private) as file:
                if file.tell() > MAX_VOTES_BYTES:
                    raise ServingError(503, "votes_full", "the file of votes is full; the operator must move it away")
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.metrics.log_errors.inc()
            log.error("a vote could not be written: %s", error.strerror)
            raise ServingError(503, "vote_not_written", "the vote could not be written") from None

    async def vote(self, record: dict[str, Any]) -> None:
        """Write a vote without holding up the event loop."""
        await asyncio.get_running_loop().run_in_executor(self._writing, self.record_vote, record)

    async def _watch_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_SECONDS)
            self.metrics.lag.observe(max(0.0, time.monotonic() - before - LAG_SECONDS))


class EventStream(StreamingResponse):
    """Server-sent events of one job. However the response ends, the job ends with it."""

    def __init__(self, request: Request, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.job, self.notes = job, request.state.notes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.job.finish_reason:
                self.notes["finish_reason"] = "cancelled"
            self.job.cancel()
            self.notes.update(facts_of(self.job))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(value: dict[str, Any] | str) -> str:
    """Write one server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


async def with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Close a stream properly in any case: with the error, where there is one, and [DONE]."""
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
    """Say what the log line tells about a job; never its text."""
    facts: dict[str, Any] = {"model": job.model, "prompt_tokens": len(job.ids), "completion_tokens": len(job.out)}
    if job.first_token:
        facts["ttft_ms"] = round(1e3 * (job.first_token - job.arrival))
    if job.finish_reason:
        facts["finish_reason"] = job.finish_reason
    return facts
