"""One running server: its models and engine, and the way of a request from admission to its last token."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request

from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.rendering import render_completion, render_prompt
from serve.errors import ServingError
from serve.jobs import Job, Seat
from serve.metrics import Metrics
from serve.schemas import SamplingFields
from serve.streaming import facts_of
from serve.votes import VotesFile

if TYPE_CHECKING:
    from serve.adapters import Served

log = logging.getLogger(__name__)

# No text of more characters can fit, so it is refused before the tokenizer works on it.
MAX_CHARACTERS_PER_TOKEN = 8
LAG_SECONDS = 0.05


class Service:
    """What the routes work with. Made and used in the event loop's thread."""

    def __init__(self, config: Config, machine: Machine, api_keys: list[str]) -> None:
        from serve.adapters import load_models  # torch comes only after the configuration was found good
        from serve.cache import check_cache_fits, context_limit, prove_cache
        from serve.engine import Engine

        self.config, self.api_keys = config, api_keys
        self.metrics = Metrics()
        self.draining = False
        self.started = int(time.time())
        serve = config.serve
        self.votes = VotesFile(Path(serve.votes_path), self.metrics) if serve.votes_path else None
        self.models = load_models(config, machine)
        self.context = context_limit(self.models.shape, serve.max_context_tokens)
        if self.context < serve.max_context_tokens:
            log.warning(
                "serve.max_context_tokens: %d, but the context ends at %d, as this model's positions do",
                serve.max_context_tokens,
                self.context,
            )
        size = prove_cache(self.models, self.context)
        needed = check_cache_fits(size, serve.max_concurrent, self.context, machine.device)
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
            # The server's own orderly end; a supervisor then starts it again.
            on_death=lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
        # One thread: a tokenizer is not made to be used by several at once.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._lag: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine and answer one request to warm it up."""
        self.engine.start()
        self._lag = asyncio.create_task(self._watch_lag())
        ids = self.models.tokenizer.encode("Hello", add_special_tokens=False)
        jobs = [Job(ids, name, 2, client="warm-up") for name in self.models.served]
        self._submit(jobs, self.engine.reserve("warm-up", len(jobs)))
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
        model = self.models.served.get(self.models.default if name is None else name)
        if model is None:
            known = ", ".join(self.models.served)
            raise ServingError(404, "model_not_found", f"no such model; this server has: {known}", param)
        return model

    async def begin(
        self,
        request: Request,
        names: Sequence[str],
        render: Callable[[ChatFormat], list[int]],
        characters: int,
        fields: SamplingFields,
        max_new_tokens: int | None,
    ) -> list[Job]:
        """Admit a request, render its prompt as each model reads it, and start one job for each.

        Raises: ServingError when it is refused.
        """
        arrival, client = time.monotonic(), request.state.client
        self._refuse_while_draining()
        if max_new_tokens and max_new_tokens > self.context:
            message = f"an answer can have at most {self.context} tokens"
            raise ServingError(422, "max_new_tokens_too_large", message, "max_new_tokens")
        with self._seats(client, len(names)) as seats:
            prompts = [await self._tokens(partial(render, self.models.chats[name]), characters) for name in names]
            longest = max(map(len, prompts))
            room = self.context - longest
            if room < (max_new_tokens or 1):
                message = (
                    f"the prompt has {longest} tokens and {max_new_tokens or 1} more are asked for; "
                    f"the context is {self.context} tokens, which leaves room for {max(room, 0)}"
                )
                raise ServingError(422, "context_length_exceeded", message, "prompt")
            count = max_new_tokens or min(self.config.serve.default_max_new_tokens, room)
            jobs = [
                Job(ids, name, count, fields.sampling(), fields.stops(), client, arrival=arrival)
                for ids, name in zip(prompts, names, strict=True)
            ]
            self._submit(jobs, seats)
        return jobs

    async def begin_scoring(self, request: Request, names: Sequence[str], prompt: str, answer: str) -> list[Job]:
        """Start one job for each model that measures the answer's probability, all on the tokens of the first."""
        arrival, client = time.monotonic(), request.state.client
        self._refuse_while_draining()
        chat, scored = self.models.chats[names[0]], 0
        messages = chat.user_turn(prompt)

        def render() -> list[int]:
            nonlocal scored
            prompt_ids = render_prompt(chat, messages)
            answer_ids = render_completion(chat, messages, prompt_ids, answer)
            scored = len(answer_ids)
            return prompt_ids + answer_ids

        with self._seats(client, len(names)) as seats:
            ids = await self._tokens(render, len(prompt) + len(answer))
            if len(ids) > self.context:
                message = f"prompt and answer have {len(ids)} tokens; the context is {self.context} tokens"
                raise ServingError(422, "context_length_exceeded", message, "prompt")
            jobs = [Job(ids, name, 1, client=client, scored=scored, arrival=arrival) for name in names]
            self._submit(jobs, seats)
        return jobs

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise ServingError(503, "draining", "the server is stopping", retry_after=5)

    @contextmanager
    def _seats(self, client: str, count: int) -> Iterator[list[Seat]]:
        """Take seats for the jobs of a request, and give them back when it is refused after all."""
        seats = self.engine.reserve(client, count)
        try:
            yield seats
        except BaseException:
            for seat in seats:
                seat.release()
            raise

    def _submit(self, jobs: Sequence[Job], seats: Sequence[Seat]) -> None:
        for job, seat in zip(jobs, seats, strict=True):
            self.engine.submit(job, seat)

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

    async def _watch_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_SECONDS)
            self.metrics.lag.observe(max(0.0, time.monotonic() - before - LAG_SECONDS))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
