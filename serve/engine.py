"""Batched generation: requests join and leave while others run, and rows of different adapters share a batch.

One thread owns the network. Each running request is a row in a slot, with keys and values of its own that grow by need;
a row may begin with a copy of what an earlier one of the same adapter read, so no adapter ever reads keys that another one
wrote. A step of the loop reads some waiting prompts together, or a piece of a long one, and then decodes one token for
every row.
This module is long because scheduling and failure handling decide about the same rows together.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from scripts.common.errors import is_out_of_memory
from scripts.common.machine import empty_heap
from scripts.dataset.chat_format import stop_token_ids
from serve.adapters import Models
from serve.cache import CachedForward
from serve.errors import ServingError
from serve.jobs import Job, Seat
from serve.metrics import Metrics
from serve.prefixes import Prefixes
from serve.sampling import Sampler, TextStream, choose_together, measure

log = logging.getLogger(__name__)

# At most this much of prompts is read at once, padding included; more while nobody waits for a next token.
PREFILL_TOKENS_PER_STEP = 256
IDLE_FACTOR = 4
# Between two tokens of a running request others' prompts are read for at most so many times a decoding step, which
# bounds the pause on any machine; never less than so many tokens, or a long prompt would take for ever.
PREFILL_DECODE_STEPS = 2.5
LEAST_PREFILL_TOKENS = 32
# How much a new measurement counts against those before.
SMOOTHING = 0.2
MAX_RETRIES = 2
IDLE_SECONDS = 1.0  # after which nobody waits for what comes next

Logits = TypeVar("Logits")


class Engine:
    """Run jobs on the models in a thread of its own; every public method may be called from any thread."""

    def __init__(
        self,
        models: Models,
        metrics: Metrics,
        forward: CachedForward,
        *,
        slots: int,
        context: int,
        memory_tokens: int,
        kept_tokens: int,
        queue: int,
        queue_per_client: int,
        deadline_seconds: float,
        queue_timeout_seconds: float,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.models, self.metrics, self.forward = models, metrics, forward
        self.slots, self.context, self.memory_tokens = slots, context, memory_tokens
        self.queue, self.queue_per_client = queue, queue_per_client
        self.deadline_seconds, self.queue_timeout_seconds = deadline_seconds, queue_timeout_seconds
        self.on_death = on_death
        self.device = next(models.network.parameters()).device
        self.prefixes = Prefixes(kept_tokens)
        self.stop_ids = stop_token_ids(models.tokenizer)
        self.rows: list[Job] = []  # decoding; row i stands in slot i
        self.prefilling: list[Job] = []  # stand in the slots after the last row; a prompt read in pieces is alone
        self.waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self.samplers: dict[Job, tuple[Sampler, TextStream]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.dead: BaseException | None = None
        self._inbox: SimpleQueue[Job | Callable[[], None] | None] = SimpleQueue()
        self._outbox: list[tuple[Job, str | ServingError | None]] = []
        self._decode_seconds = self._prefill_token_seconds = 0.0
        self._seats: Counter[str] = Counter()
        self._adapters: Counter[str] = Counter()  # requests that hold each adapter
        self._seats_lock = threading.Lock()
        self._stopping = False
        self._fail_all: ServingError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for the event loop ---

    def start(self) -> None:
        """Start the thread; events go to the loop that runs now."""
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step and fail what is left."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.ident:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.dead is None

    @property
    def seats_taken(self) -> int:
        return self._seats.total()

    def in_use(self, adapter: str) -> bool:
        """Return whether a request holds a seat for this adapter."""
        return self._adapters[adapter] > 0

    async def run(self, work: Callable[[], None]) -> None:
        """Do some work in the engine's thread between two of its steps.

        Raises: what the work raises.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def run() -> None:
            error: Exception | None = None
            try:
                work()
            except Exception as raised:
                error = raised
            loop.call_soon_threadsafe(_settle, done, error)

        self._inbox.put(run)
        while not done.done() and self.alive:
            await asyncio.wait([done], timeout=1)
        if not done.done():
            raise ServingError(503, "engine_stopped", "the engine has stopped")
        done.result()

    def reserve(self, client: str, count: int = 1, adapters: Sequence[str] = ()) -> list[Seat]:
        """Take seats for a request, all or none, and hold the adapters that its jobs will use.

        Raises: ServingError 429 when the queue is full.
        """
        if not self.alive:
            raise ServingError(503, "engine_stopped", "the engine has stopped; the server is about to restart")
        with self._seats_lock:
            full = self.seats_taken + count > self.slots + self.queue
            if full or self._seats[client] + count > self.queue_per_client + self.slots:
                whose = "the queue is full" if full else "too many of your requests are waiting"
                raise ServingError(429, "queue_full", f"{whose}; try again later", retry_after=1)
            self._seats[client] += count
            self._adapters.update(adapters)
        held = [*adapters, *[""] * (count - len(adapters))]
        return [Seat(partial(self._leave, client, adapter)) for adapter in held]

    def _leave(self, client: str, adapter: str) -> None:
        with self._seats_lock:
            for counter, key in ((self._seats, client), (self._adapters, adapter)):
                counter[key] -= 1
                if counter[key] <= 0:
                    del counter[key]

    def submit(self, job: Job, seat: Seat) -> None:
        """Hand a job over; its seat comes free when it ends."""
        if len(job.ids) + min(job.max_new_tokens, 1) > self.context:
            raise ValueError("the caller checks the context")
        job.seat = seat
        self._inbox.put(job)
        if not self.alive:  # it died in between: nobody will read the inbox
            seat.release()
            job.events.put_nowait(ServingError(503, "engine_stopped", "the engine has stopped"))

    def fail_all(self, error: ServingError) -> None:
        """End every job with an error, such as at the end of draining."""
        self._fail_all = error
        self._inbox.put(None)

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._step()
        except BaseException as error:  # nobody may wait for a thread that has ended
            self.dead = error
            log.critical("the engine has died", exc_info=error)
            self.on_death()
        finally:
            self._take_new(block=False)
            self._end_all(ServingError(503, "engine_stopped", "the engine has stopped"))
            self._deliver()

    def _step(self) -> None:
        idle = not (self.rows or self.prefilling or self.waiting)
        self._take_new(block=idle)
        started = time.monotonic()
        self._drop_ended()
        self._prefill()
        decoded = len(self.rows)
        if self.rows:
            self._decode()
        self._deliver()
        self.metrics.step(
            time.monotonic() - started,
            rows=decoded,
            running=len(self._running()),
            waiting=sum(map(len, self.waiting.values())),
            cached=sum(job.length for job in self._running()) / (self.slots * self.context),
        )

    def _running(self) -> list[Job]:
        return self.rows + self.prefilling

    def _take_new(self, block: bool) -> None:
        try:
            job = self._first_in_inbox() if block else self._inbox.get_nowait()
            while True:
                if callable(job):
                    job()
                elif job:
                    self.waiting.setdefault(job.client, deque()).append(job)
                job = self._inbox.get_nowait()
        except Empty:
            pass

    def _first_in_inbox(self) -> Job | Callable[[], None] | None:
        """Wait for something to do; meanwhile give back what the requests before have left in the heap."""
        try:
            return self._inbox.get(timeout=IDLE_SECONDS)
        except Empty:
            empty_heap()
            return self._inbox.get()

    def _admit(self) -> list[Job]:
        """Take waiting jobs whose prompts are read together; the oldest of each client, and clients take turns."""
        taken: list[Job] = []
        width = 0
        while self.waiting and len(self.rows) + len(taken) < self.slots:
            client, jobs = next(iter(self.waiting.items()))
            job = jobs[0]
            width = max(width, len(job.prompt))
            alone = job.retries or width * (len(taken) + 1) > self._prefill_tokens([*taken, job])
            if taken and (alone or taken[0].retries):
                break
            if (self.rows or taken) and not self._has_memory([*taken, job]):
                break
            states, known = self._known(job)
            if known and taken:
                break  # it begins at another position than those
            job.scheduled, job.length = job.scheduled or time.monotonic(), known
            if known:
                self.forward.load(len(self.rows), states, known)
            self.metrics.prefix(len(job.prompt), known)
            if job.unmeasured:
                job.measured.clear()
            taken.append(jobs.popleft())
            del self.waiting[client]
            if jobs:
                self.waiting[client] = jobs
            if known:
                break
        return taken

    def _has_memory(self, jobs: list[Job]) -> bool:
        """Return whether these jobs can run to their ends beside the rows."""
        most = sum(len(job.ids) + job.max_new_tokens for job in [*self.rows, *jobs])
        return most + self.prefixes.limit <= self.memory_tokens

    def _known(self, job: Job) -> tuple[Any, int]:
        """Return what was read before of a prompt, and how many tokens that is; what must be measured is read again."""
        first_needed = min([*job.unmeasured[:1], len(job.prompt) - 1])
        return (None, 0) if job.retries else self.prefixes.find(job.adapter, job.prompt, first_needed)

    def _prefill_tokens(self, jobs: list[Job]) -> int:
        """Return how much of these prompts may be read in one step; scored prompts need many logits, so little."""
        if not self.rows:
            return PREFILL_TOKENS_PER_STEP * (1 if any(job.scored for job in jobs) else IDLE_FACTOR)
        if not (self._decode_seconds and self._prefill_token_seconds):
            return PREFILL_TOKENS_PER_STEP
        affordable = int(PREFILL_DECODE_STEPS * self._decode_seconds / self._prefill_token_seconds)
        return max(LEAST_PREFILL_TOKENS, min(affordable, PREFILL_TOKENS_PER_STEP))

    def _drop_ended(self) -> None:
        """Let go of jobs that were cancelled or ran out of time."""
        if self._fail_all:
            self._end_all(self._fail_all)
            self._fail_all = None
        now = time.monotonic()
        for client, jobs in list(self.waiting.items()):
            for job in [job for job in jobs if job.cancelled or now - job.arrival > self.queue_timeout_seconds]:
                jobs.remove(job)
                if job.cancelled:
                    self._end(job, None, "cancelled")
                else:
                    late = ServingError(503, "queue_timeout", "waited too long for a free slot", retry_after=5)
                    self._end(job, late)
            if not jobs:
                del self.waiting[client]
        for job in list(self._running()):
            if job.cancelled:
                self._remove(job)
                self._end(job, None, "cancelled")
            elif now - job.arrival > self.deadline_seconds:
                self._remove(job)
                limit = f"the answer was not complete after {self.deadline_seconds:g} s"
                self._end(job, ServingError(504, "deadline_exceeded", limit))

    def _prefill(self) -> None:
        """Read some waiting prompts into the cache, or the next piece of a long one."""
        # Several prompts are read whole, from position 0; one that is longer than a step allows, or whose beginning is
        # known already, is read alone and in pieces: its tokens from `start` to `end`.
        self.prefilling = self.prefilling or self._admit()
        jobs = self.prefilling
        if not jobs:
            return
        start = jobs[0].length
        longest = max(len(job.prompt) for job in jobs)  # several are read whole: together they are short enough
        end = longest if len(jobs) > 1 else min(longest, start + self._prefill_tokens(jobs))
        tokens = [job.prompt[start:end] for job in jobs]
        # The logits at position p measure the token at p + 1; those at a prompt's end choose the first new token.
        needed = [
            sorted({*job.unmeasured, len(job.prompt) - 1} & set(range(start, start + len(row))))
            for job, row in zip(jobs, tokens, strict=True)
        ]
        places = [[p - start for p in positions] for positions in needed]
        names = [job.adapter for job in jobs]
        started = time.monotonic()
        logits = self._guarded(jobs, lambda: self.forward.read(len(self.rows), names, tokens, start, places))
        if logits is None:
            return
        per_token = (time.monotonic() - started) / sum(map(len, tokens))
        self._prefill_token_seconds = _smoothed(self._prefill_token_seconds, per_token)
        for job, row, positions in zip(jobs, logits, needed, strict=True):
            job.length = min(end, len(job.prompt))
            measured = [index for index, p in enumerate(positions) if p in job.unmeasured]
            if measured:
                following = [job.ids[positions[index] + 1] for index in measured]
                job.measured += measure(row[measured], following, job.top_logprobs or 0)
        if end < len(jobs[0].prompt):
            return
        self.rows, self.prefilling = self.rows + jobs, []
        generating = {job: row[-1] for job, row in zip(jobs, logits, strict=True) if job.max_new_tokens}
        for job in jobs:
            if not job.max_new_tokens:
                self._remove(job)
                self._end(job, None, "length")
        if generating:
            self._emit(list(generating), torch.stack(list(generating.values())))

    def _decode(self) -> None:
        """Produce one token for every row."""
        jobs = list(self.rows)
        names, tokens = [job.adapter for job in jobs], [job.out[-1] for job in jobs]
        started = time.monotonic()
        logits = self._guarded(jobs, lambda: self.forward.step(names, tokens, [job.length for job in jobs]))
        if logits is not None:
            self._decode_seconds = _smoothed(self._decode_seconds, time.monotonic() - started)
            for job in jobs:
                job.length += 1
            self._emit(jobs, logits)

    def _guarded(self, jobs: list[Job], forward: Callable[[], Logits]) -> Logits | None:
        """Run a forward pass; on failure end or put back the jobs concerned and return None."""
        try:
            return forward()
        except Exception as error:
            short_of_memory = is_out_of_memory(error)
            if short_of_memory and self.device.type == "cuda":
                torch.cuda.empty_cache()
            if jobs is self.prefilling and len(jobs) > 1:
                back = jobs  # each is read alone then, so that the culprit fails alone
            elif short_of_memory:
                back = [max(jobs, key=lambda job: job.scheduled)]
            else:
                log.error("a forward pass of %d rows failed", len(jobs), exc_info=error)
                for job in jobs:
                    self._remove(job)
                    self._end(job, _generation_failed())
                return None
            for job in reversed(back):
                self._remove(job)
                job.retries += 1
                # Alone it would run into the same wall again.
                if job.retries > MAX_RETRIES or not (self.rows or len(back) > 1):
                    message = "not enough memory for this request now; try again later or send a shorter one"
                    self._end(job, ServingError(503, "insufficient_memory", message, retry_after=5))
                else:
                    job.arrival = time.monotonic()
                    self.waiting.setdefault(job.client, deque()).appendleft(job)
            return None

    def _emit(self, jobs: list[Job], logits: torch.Tensor) -> None:
        """Choose each row's token, hand its text on, and end the rows that are complete."""
        best, tokens = logits.float().max(-1)  # several times faster than in bf16
        finite, greedy = torch.isfinite(best).tolist(), tokens.tolist()
        for job in jobs:
            if job not in self.samplers:
                self.samplers[job] = (Sampler(job.sampling), TextStream(self.models.tokenizer, job.stops))
        # Rows that only differ in temperature and the like are drawn from together.
        drawn = [
            index for index, job in enumerate(jobs)
            if finite[index] and not job.constraint and self.samplers[job][0].draws_plainly
        ]  # fmt: skip
        if drawn:
            together = choose_together(logits[drawn], [self.samplers[jobs[index]][0] for index in drawn])
            for index, token in zip(drawn, together, strict=True):
                greedy[index] = token
        plain = set(drawn)
        now = time.monotonic()
        for index, job in enumerate(jobs):
            try:
                if not finite[index]:
                    raise FloatingPointError("the logits are not finite")
                self._emit_one(job, logits[index], greedy[index], index in plain, now)
            except Exception as error:  # one row's trouble is not its neighbours'
                log.error("a row failed", exc_info=error)
                self.forward.clear(self.rows.index(job))
                self._remove(job)
                self._end(job, _generation_failed())

    def _emit_one(self, job: Job, logits: torch.Tensor, best: int, drawn: bool, now: float) -> None:
        """Take a row's token. `best` is that already where it was `drawn`, and for rows that want the likeliest one."""
        sampler, stream = self.samplers[job]
        allowed = job.constraint.allowed(len(logits), self.device) if job.constraint else None
        if drawn or (sampler.takes_argmax and allowed is None):
            token = best
        else:
            token = sampler.choose(logits, job.ids, job.out, allowed)
        if job.constraint:
            job.constraint.take(token)
        if job.top_logprobs is not None:
            job.logprobs += measure(logits[None], [token], job.top_logprobs)
        job.out.append(token)
        if job.first_token:
            self.metrics.inter_token(now - job.last_token)
        else:
            job.first_token = now
        job.last_token = now
        ended = token in self.stop_ids
        piece = "" if ended else stream.add(token)
        full = len(job.out) >= job.max_new_tokens
        if stream.stopped or ended or full:
            tail = "" if stream.stopped else stream.end()
            if piece + tail:
                self._outbox.append((job, piece + tail))
            self._keep(job)
            self._remove(job)
            self._end(job, None, "stop" if ended or stream.stopped else "length")
        elif piece:
            self._outbox.append((job, piece))

    def _keep(self, job: Job) -> None:
        """Keep what a row has read for those that continue it."""
        tokens = job.prompt[: job.length]
        if self.prefixes.worth_keeping(job.adapter, tokens):
            self.prefixes.keep(job.adapter, tokens, self.forward.save(self.rows.index(job), job.length))

    def _remove(self, job: Job) -> None:
        """Take a job out of its slot and close the gap, so that rows stay together at the front."""
        if job in self.prefilling:
            self.prefilling = [other for other in self.prefilling if other is not job]
            self.forward.release(len(self.rows) + len(self.prefilling))
            return
        index, last = self.rows.index(job), len(self.rows) - 1
        if index != last:
            self.forward.move(last, index, self.rows[last].length)
            self.rows[index] = self.rows[last]
        self.rows.pop()
        if self.prefilling:
            self.forward.move(last + 1, last, self.prefilling[0].length)
        self.forward.release(len(self.rows) + len(self.prefilling))

    def _end(self, job: Job, error: ServingError | None, reason: str | None = None) -> None:
        job.finish_reason = reason
        self.samplers.pop(job, None)
        if job.seat:
            job.seat.release()
        self.metrics.ended(job, error)
        self._outbox.append((job, error))

    def _end_all(self, error: ServingError) -> None:
        jobs = [*self._running(), *(job for queue in self.waiting.values() for job in queue)]
        self.rows, self.prefilling = [], []
        self.waiting.clear()
        for job in jobs:
            self._end(job, error)

    def _deliver(self) -> None:
        """Hand a step's events to the event loop in one call."""
        outbox, self._outbox = self._outbox, []
        if outbox and self.loop and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_put_events, outbox)


def _put_events(events: Iterable[tuple[Job, str | ServingError | None]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # nobody waits any longer
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)


def _smoothed(before: float, now: float) -> float:
    return before + SMOOTHING * (now - before) if before else now


def _generation_failed() -> ServingError:
    return ServingError(500, "generation_failed", "the model could not generate an answer to this request")
