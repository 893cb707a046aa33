"""The queue of the page of votes: prompts of a file with samples of one adapter, those it is least sure of first."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from scripts.common.artifacts import sha256_json
from scripts.common.errors import UserError
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import with_system_prompt
from scripts.dataset.rendering import render_prompt
from scripts.pairs import prompts as training_side
from scripts.pairs.choosing import near_identical, usable
from scripts.pairs.sampling import Sample
from scripts.pairs.votes import Vote, read_votes
from serve.errors import ServingError
from serve.schemas import QueueAnswer, QueueItem, QueueVoteRequest, SamplingFields
from serve.service import Prompt, Service
from serve.votes import VotesFile

if TYPE_CHECKING:
    from serve.adapters import Served

CLIENT = "queue"
AHEAD = 32  # prompts with samples that wait for a vote; more would choose better, and begin later
RETRY_SECONDS = 0.5


class SampleFields(SamplingFields):
    """How samples are drawn, within the bounds of the section `pairs`."""

    temperature: float = Field(gt=0)
    max_new_tokens: int


@dataclass
class Waiting:
    """A prompt of the queue, and its samples once they are drawn."""

    prompt: training_side.Prompt
    samples: list[str] | None = None
    margin: float = 0.0
    reason: str | None = None  # why it is skipped
    votes: dict[str, Vote] = field(default_factory=dict)  # the last one on each set of samples

    @property
    def voted(self) -> bool:
        """Return whether a vote stands that was not taken back."""
        return any(vote.outcome != "undone" for vote in self.votes.values())

    @property
    def ready(self) -> bool:
        """Return whether it can be offered."""
        return self.samples is not None and not self.reason and not self.voted


class VoteQueue:
    """Offer prompts and take votes. Samples are drawn in the background, so that nobody waits for them."""

    def __init__(self, service: Service) -> None:
        """Read the prompts of the training side, and the votes that are there.

        Raises: UserError naming the key and what to correct.
        """
        config = self.config = service.config
        self.service, serve = service, config.serve
        adapter = service.models.served[service.models.default]
        if adapter.sha256 is None:
            raise UserError("serve.queue_path: votes are on samples of an adapter. Set serve.adapter_path to one.")
        if config.pairs.samples_per_prompt < 2:
            raise UserError("pairs.samples_per_prompt: found 1, wanted at least 2 for serve.queue_path.")
        self.adapter: str = adapter.sha256
        files, prompts = training_side.read_prompts(config, serve.queue_path)
        asked = {sha256_json(record.prompt) for file in files for record in file.records}
        self.waiting = {sha256_json(prompt.messages): Waiting(prompt) for prompt in prompts}
        self.held_out = len(asked - self.waiting.keys())
        path = Path(serve.queue_votes_path)
        if path.exists() and (path.is_dir() or path.stat().st_size):
            for _, vote in read_votes(path, self.adapter, str(adapter.path), "serve.queue_votes_path:"):
                self._take(sha256_json(vote.messages), vote)
        self.file = VotesFile(path, service.metrics)
        self.open = False  # the first samples to choose among are drawn
        self._drawing: asyncio.Task[None] | None = None

    def next(self) -> QueueAnswer:
        """Return the prompt on which the policy is least sure of the better answer, and see that samples are drawn.

        Raises: ServingError 409 when another version of the adapter is served by now.
        """
        self._check_adapter(self.adapter)
        if not self.drawing and self._lacking():
            self._drawing = asyncio.create_task(self._draw_ahead())
        ready = [waiting for waiting in self.waiting.values() if waiting.ready]
        item = min(ready, key=lambda waiting: waiting.margin) if ready and self.open else None
        votes = [vote for waiting in self.waiting.values() for vote in waiting.votes.values()]
        most = self.config.pairs.max_per_prompt
        return QueueAnswer(
            adapter=self.adapter,
            item=item and QueueItem(
                key=sha256_json(item.prompt.messages), messages=list(item.prompt.messages), samples=item.samples or [],
                margin=item.margin,
            ),
            drawing=self.drawing,
            ready=len(ready),
            votes=sum(vote.outcome != "undone" for vote in votes),
            pairs=sum(min(most, len(vote.candidates())) for vote in votes),
            left=sum(not (waiting.voted or waiting.reason) for waiting in self.waiting.values()),
            held_out=self.held_out,
            skipped=Counter(waiting.reason for waiting in self.waiting.values() if waiting.reason),
        )  # fmt: skip

    async def vote(self, body: QueueVoteRequest) -> None:
        """Write a vote; it counts once it is on the disk.

        Raises: ServingError 404 for a prompt that is not in the queue, 409 for one on another adapter's samples.
        """
        self._check_adapter(body.adapter)
        waiting = self.waiting.get(body.key)
        if waiting is None:
            raise ServingError(404, "not_in_queue", "this prompt is not in the queue", "key")
        messages, facts = waiting.prompt.messages, body.model_dump(exclude={"key"})
        single = len(messages) == 1
        try:
            vote = Vote(
                prompt=messages[0]["content"] if single else list(messages), group=waiting.prompt.group, **facts
            )
        except ValidationError as error:
            raise ServingError(422, "invalid_value", error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        await self.file.append(vote.model_dump(exclude_none=True))
        self._take(body.key, vote)

    def _take(self, key: str, vote: Vote) -> None:
        if waiting := self.waiting.get(key):
            waiting.votes[vote.asked] = vote

    def _check_adapter(self, asked: str) -> None:
        served = self.service.model(None, "model").sha256
        if not asked == served == self.adapter:
            message = "another adapter is served than the one that was voted on; restart the server with another serve.queue_votes_path"
            raise ServingError(409, "adapter_changed", message)

    @property
    def drawing(self) -> bool:
        """Return whether samples are being drawn."""
        return self._drawing is not None and not self._drawing.done()

    def stop(self) -> None:
        """Draw no more."""
        if self._drawing:
            self._drawing.cancel()

    def _lacking(self) -> list[Waiting]:
        """Return the next prompts to draw samples for; none while enough of them wait for a vote."""
        if sum(waiting.ready for waiting in self.waiting.values()) >= AHEAD:
            return []
        without = [w for w in self.waiting.values() if w.samples is None and not (w.reason or w.voted)]
        # Half of the slots at most, so that others are answered meanwhile.
        return without[: max(1, self.service.engine.slots // (2 * self.config.pairs.samples_per_prompt))]

    async def _draw_ahead(self) -> None:
        while lacking := self._lacking():
            await asyncio.gather(*(self._draw(waiting) for waiting in lacking))
        self.open = True

    async def _draw(self, waiting: Waiting) -> None:
        """Sample a prompt, and measure how far apart the adapter's rewards of the samples are."""
        model = self.service.model(None, "model")
        counts: Counter[str] = Counter()
        while True:
            try:
                options = usable(await self._samples(model, waiting.prompt), counts)
                texts: list[str] = []
                for option in options:
                    if not any(near_identical(option.text, other) for other in texts):
                        texts.append(option.text)
                if len(texts) < 2:
                    cut = counts["samples cut at pairs.max_new_tokens"]
                    waiting.reason = "cut at pairs.max_new_tokens" if cut else "all samples alike"
                    return
                rewards = await asyncio.gather(*(self._reward(model, waiting.prompt, text) for text in texts))
                waiting.samples, waiting.margin = texts, max(rewards) - min(rewards)
                return
            except ServingError as error:
                if error.status not in (429, 503):
                    waiting.reason = error.message
                    return
                await asyncio.sleep(RETRY_SECONDS)  # others are served first

    async def _samples(self, model: Served, prompt: training_side.Prompt) -> list[Sample]:
        def render(chat: ChatFormat) -> list[int]:
            return render_prompt(chat, with_system_prompt(prompt.messages, chat.system_prompt))

        pairs = self.config.pairs
        fields = SampleFields(temperature=pairs.temperature, max_new_tokens=pairs.max_new_tokens, seed=prompt.seed)
        characters = sum(len(message["content"]) for message in prompt.messages)
        asked = [Prompt(model, render, characters)]
        jobs = await self.service.begin(CLIENT, asked, fields, answers=pairs.samples_per_prompt)
        return [Sample(await job.text(), job.finish_reason == "stop") for job in jobs]

    async def _reward(self, model: Served, prompt: training_side.Prompt, answer: str) -> float:
        """Return beta x (logprob - reference_logprob), as /v1/score does."""
        jobs = await self.service.begin_scoring(
            CLIENT, [model, self.service.reference_of(model)], prompt.messages, answer
        )
        for job in jobs:
            await job.text()
        policy, reference = (job.logprob for job in jobs)
        return model.beta * (policy - reference)
