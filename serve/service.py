"""One running server: its models and engine, and the way of a request from admission to its last token."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request

from scripts.common.errors import UserError
from scripts.common.machine import Machine, empty_heap
from scripts.common.schema import Config
from scripts.common.stages import BASE
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Message, with_system_prompt
from scripts.dataset.rendering import render_completion, render_prompt
from serve.errors import ServingError
from serve.examples import held_out_prompts
from serve.jobs import Job, Seat
from serve.metrics import Metrics
from serve.schemas import SamplingFields
from serve.streaming import facts_of
from serve.votes import VotesFile

if TYPE_CHECKING:
    from serve.adapters import Served
    from serve.structured import Constraint

log = logging.getLogger(__name__)

# No text of more characters can fit, so it is refused before the tokenizer works on it.
MAX_CHARACTERS_PER_TOKEN = 8
LAG_SECONDS = 0.05


@dataclass(frozen=True)
class Prompt:
    """What one model is asked, and how it becomes tokens; `characters` bound the work of that."""

    model: Served
    render: Callable[[ChatFormat], list[int]]
    characters: int


class Service:
    """What the routes work with. Made and used in the event loop's thread."""

    def __init__(self, config: Config, machine: Machine, api_keys: list[str], admin_keys: Sequence[str] = ()) -> None:
        # Torch comes only after the configuration was found good.
        from scripts.model.products import keep_ends_in_16_bits
        from serve.adapters import load_models
        from serve.cache import LibraryForward, check_cache_fits, choose_forward, context_limit
        from serve.engine import Engine
        from serve.int8 import answer_in_int8, check_settings
        from serve.live import LiveAdapters
        from serve.structured import SchemaCompiler

        self.config, self.api_keys, self.admin_keys = config, api_keys, list(admin_keys)
        self.metrics = Metrics()
        self.metrics.build.info({name: version(name) for name in ("torch", "transformers", "peft", "fastapi")})
        self.draining = False
        self.examples: list[str] = []
        self.started = int(time.time())
        serve = config.serve
        self.votes = VotesFile(Path(serve.votes_path), self.metrics) if serve.votes_path else None
        self.thumbs = VotesFile(Path(serve.thumbs_path), self.metrics) if serve.thumbs_path else None
        if serve.weights == "int8":
            check_settings(config, machine)
        self.models = load_models(config, machine)
        self.context = context_limit(self.models.shape, serve.max_context_tokens)
        if self.context < serve.max_context_tokens:
            log.warning(
                "serve.max_context_tokens: %d, but the context ends at %d, as this model's positions do",
                serve.max_context_tokens,
                self.context,
            )
        forward = choose_forward(self.models, serve.max_concurrent, self.context, config.performance.fast_path)
        self.int8 = answer_in_int8(self.models, forward, self.context) if serve.weights == "int8" else None
        if self.int8:
            self.metrics.int8_agreement.set(self.int8.agreement)
            self.metrics.int8_kl.set(self.int8.kl)
        else:
            keep_ends_in_16_bits(self.models.network)
            forward.renew()
        empty_heap()  # of the weights as they were read, of the adapters before they were stacked, and of full weights
        # Rows of the library's cache are all as long as the longest.
        rows = serve.max_concurrent if isinstance(forward, LibraryForward) else 1
        memory_tokens = check_cache_fits(forward.bytes_per_token, rows, self.context, machine.device)
        log.info("keys and values: %.0f kB for a token, as much as is needed", forward.bytes_per_token / 1e3)
        self.engine = Engine(
            self.models,
            self.metrics,
            forward,
            slots=serve.max_concurrent,
            context=self.context,
            memory_tokens=memory_tokens,
            kept_tokens=serve.prefix_cache_tokens,
            queue=serve.max_queue,
            queue_per_client=serve.max_queue_per_client,
            deadline_seconds=serve.deadline_seconds,
            queue_timeout_seconds=serve.queue_timeout_seconds,
            # The server's own orderly end; a supervisor then starts it again.
            on_death=lambda: signal.raise_signal(signal.SIGTERM),  # os.kill would be a kill on Windows
        )
        self.adapters = LiveAdapters(self.models, self.engine, self.metrics, serve.adapters_root)
        self.vocabulary = self.models.network.config.get_text_config(decoder=True).vocab_size
        self._schemas = SchemaCompiler(self.models.tokenizer, self.engine.stop_ids)
        # One thread: a tokenizer is not made to be used by several at once.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the engine and answer one request to warm it up."""
        self.engine.start()
        self._tasks.append(asyncio.create_task(self._watch_lag()))
        self._tasks.append(asyncio.create_task(self._read_examples()))
        if self.config.serve.watch:
            self._tasks.append(asyncio.create_task(self.adapters.watch()))
        ids = self.models.tokenizer.encode("Hello", add_special_tokens=False)
        jobs = [Job(ids, name, 2, client="warm-up") for name in self.models.served]  # names are adapters at first
        self._submit(jobs, self.engine.reserve("warm-up", len(jobs)))
        await asyncio.gather(*(job.text() for job in jobs))

    async def stop(self) -> None:
        """End the engine's thread."""
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.engine.stop)

    def drain(self) -> None:
        """Take no more requests; what runs may finish within the limit. A second call ends it at once."""
        over = ServingError(503, "draining", "the server is stopping")
        if self.draining:
            self.engine.fail_all(over)
            return
        self.draining = True
        asyncio.get_running_loop().call_later(self.config.serve.drain_seconds, self.engine.fail_all, over)

    def reason_not_ready(self) -> str:
        """Return why a new request would not be taken, or nothing."""
        if not self.engine.alive:
            return "engine stopped"
        if self.draining:
            return "draining"
        return "queue full" if self.engine.seats_taken >= self.engine.slots + self.engine.queue else ""

    def metrics_text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self.metrics.ready.set(not self.reason_not_ready())
        self.metrics.draining.set(self.draining)
        self.metrics.engine_up.set(self.engine.alive)
        return self.metrics.text()

    def model(self, name: str | None, param: str) -> Served:
        """Find a model by the name a request gives.

        Raises: ServingError 404 with the known names.
        """
        model = self.models.served.get(self.models.default if name is None else name)
        if model is None:
            known = ", ".join(self.models.served)
            raise ServingError(404, "model_not_found", f"no such model; this server has: {known}", param)
        return model

    def reference_of(self, model: Served) -> Served:
        """Return the model that a preference loss measured this one against: the base where that is not served."""
        served = self.models.served.values()
        if model.path is None:
            return model
        return next((o for o in served if o.sha256 == model.trained_from), self.models.served[BASE])

    async def begin(
        self,
        client: str,
        prompts: Sequence[Prompt],
        fields: SamplingFields,
        *,
        answers: int = 1,
        echo: bool = False,
        top_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> list[Job]:
        """Admit a request, render its prompts as each model reads them, and start the jobs for each, `answers` of them.

        echo: measure the prompts' own tokens, too; top_logprobs: measure those of the answers.
        Raises: ServingError when it is refused.
        """
        arrival = time.monotonic()
        self._refuse_while_draining()
        if top_logprobs is not None:
            self._refuse_to_measure("logprobs", "logprobs")
        limit_field, max_new_tokens = fields.limit()
        if max_new_tokens and max_new_tokens > self.context:
            message = f"{limit_field}: an answer can have at most {self.context} tokens"
            raise ServingError(422, f"{limit_field}_too_large", message, limit_field)
        biased = [token for token, _ in fields.biases() if token >= self.vocabulary]
        if biased:
            raise ServingError(422, "invalid_value", f"logit_bias: there is no token {biased[0]}", "logit_bias")
        adapters = [prompt.model.adapter for prompt in prompts for _ in range(answers)]
        with self._seats(client, adapters) as seats:
            jobs = []
            for prompt in prompts:
                ids = await self._tokens(prompt, fields.prompt_field)
                room = self.context - len(ids)
                wanted = 1 if max_new_tokens is None else max_new_tokens
                if room < wanted:
                    message = (
                        f"{fields.prompt_field}: the prompt has {len(ids)} tokens and {wanted} more are asked for; "
                        f"the context is {self.context} tokens, which leaves room for {max(room, 0)}"
                    )
                    raise ServingError(422, "context_length_exceeded", message, fields.prompt_field)
                count = (
                    min(self.config.serve.default_max_new_tokens, room) if max_new_tokens is None else max_new_tokens
                )
                jobs += [
                    Job(
                        ids, prompt.model.name, count, fields.sampling(number), fields.stops(), client,
                        prompt.model.adapter, scored=len(ids) - 1 if echo and top_logprobs is not None else 0,
                        top_logprobs=top_logprobs, constraint=constraint and constraint.copy(), arrival=arrival,
                    )
                    for number in range(answers)
                ]  # fmt: skip
            self._submit(jobs, seats)
        return jobs

    async def begin_scoring(
        self, client: str, models: Sequence[Served], asked: Sequence[Message], answer: str
    ) -> list[Job]:
        """Start one job for each model that measures the answer's probability, all on the tokens of the first."""
        arrival, scored = time.monotonic(), 0
        self._refuse_while_draining()
        self._refuse_to_measure("/v1/score")

        def render(chat: ChatFormat) -> list[int]:
            nonlocal scored
            messages = with_system_prompt(asked, chat.system_prompt)
            prompt_ids = render_prompt(chat, messages)
            answer_ids = render_completion(chat, messages, prompt_ids, answer)
            scored = len(answer_ids)
            return prompt_ids + answer_ids

        with self._seats(client, [model.adapter for model in models]) as seats:
            characters = sum(len(message["content"]) for message in asked) + len(answer)
            ids = await self._tokens(Prompt(models[0], render, characters), "prompt")
            if len(ids) > self.context:
                message = f"prompt and answer have {len(ids)} tokens; the context is {self.context} tokens"
                raise ServingError(422, "context_length_exceeded", message, "prompt")
            jobs = [
                Job(ids, model.name, 0, client=client, adapter=model.adapter, scored=scored, arrival=arrival)
                for model in models
            ]
            self._submit(jobs, seats)
        return jobs

    async def constraint(self, schema: dict[str, Any] | None) -> Constraint:
        """Prepare an answer in JSON, of a schema or any.

        Raises: ServingError naming what is not supported.
        """
        return await self._schemas.compile(schema, "response_format")

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise ServingError(503, "draining", "the server is stopping", retry_after=5)

    def _refuse_to_measure(self, what: str, param: str | None = None) -> None:
        """Refuse log-probabilities where the weights that they are asked of are no longer there."""
        if self.int8:
            message = f"{what}: log-probabilities come from full weights, and this server keeps int8 only (serve.weights: int8)"
            raise ServingError(422, "int8_weights", message, param)

    @contextmanager
    def _seats(self, client: str, adapters: Sequence[str]) -> Iterator[list[Seat]]:
        """Take seats for the jobs of a request, and give them back when it is refused after all."""
        most = min(self.engine.slots + self.engine.queue, self.engine.slots + self.engine.queue_per_client)
        if len(adapters) > most:
            message = f"the request asks for {len(adapters)} answers; this server takes at most {most} at once"
            raise ServingError(422, "too_many_answers", message)
        seats = self.engine.reserve(client, len(adapters), adapters)
        try:
            yield seats
        except BaseException:
            for seat in seats:
                seat.release()
            raise

    def _submit(self, jobs: Sequence[Job], seats: Sequence[Seat]) -> None:
        for job, seat in zip(jobs, seats, strict=True):
            self.engine.submit(job, seat)

    async def _tokens(self, prompt: Prompt, field: str) -> list[int]:
        limit = MAX_CHARACTERS_PER_TOKEN * self.context
        if prompt.characters > limit:
            message = f"{field}: {prompt.characters} characters; more than {limit} cannot fit {self.context} tokens"
            raise ServingError(422, "context_length_exceeded", message, field)
        chat = self.models.chats[prompt.model.adapter]
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._tokenizing, prompt.render, chat)
        except UserError as error:
            raise ServingError(422, "invalid_messages", f"{field}: {error}", field) from None
        if not ids:
            raise ServingError(422, "empty_prompt", f"{field}: the prompt has no token", field)
        if max(ids) >= self.vocabulary:
            raise ServingError(422, "invalid_value", f"{field}: there is no token {max(ids)}", field)
        return ids

    async def texts(self, request: Request, jobs: Sequence[Job]) -> list[str]:
        """Wait for all answers; when the client goes away first, its jobs are dropped.

        Raises: ServingError when the engine gives one up, or with status 499 when the client has gone.
        """
        gone = asyncio.create_task(_disconnected(request))
        answers = asyncio.create_task(_all_texts(jobs))
        waiting: set[asyncio.Task[Any]] = {gone, answers}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                request.state.notes["finish_reason"] = "cancelled"
                raise ServingError(499, "client_closed_request", "the client has gone")
            return answers.result()
        finally:
            for job in jobs:
                job.cancel()
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            request.state.notes.update(facts_of(jobs))

    async def _read_examples(self) -> None:
        self.examples = await asyncio.to_thread(held_out_prompts, self.config)

    async def _watch_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_SECONDS)
            self.metrics.lag.observe(max(0.0, time.monotonic() - before - LAG_SECONDS))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all_texts(jobs: Sequence[Job]) -> list[str]:
    return [await job.text() for job in jobs]
