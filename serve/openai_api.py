"""The two OpenAI routes: the same engine under the shapes that OpenAI's clients expect."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from scripts.dataset.chat_format import ChatFormat, stop_token_ids
from scripts.dataset.records import Message, with_system_prompt
from scripts.dataset.rendering import render_completion, render_prompt
from serve.jobs import Job
from serve.logprobs import chat_logprobs, completion_logprobs
from serve.openai_schemas import (
    ChatRequest,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    OpenAIFields,
    ResponseFormat,
)
from serve.service import Prompt, Service
from serve.streaming import EventStream, event, merged, usage_of
from serve.structured import Constraint

router = APIRouter(tags=["OpenAI-compatible"])
# On these paths every refusal of a request's content is a 400, as OpenAI's clients expect.
PATHS = {"/v1/chat/completions", "/v1/completions"}

Kind = Literal["chat.completion", "text_completion"]


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    jobs = await begin_chat(service, request.state.client, body)
    tokenizer = service.models.tokenizer
    choices = [Choice(tokenizer, "chat.completion", number, job) for number, job in enumerate(jobs)]
    return await _answer(service, request, body, choices)


async def begin_chat(service: Service, client: str, body: ChatRequest) -> list[Job]:
    """Start the jobs of a conversation, one for each answer to it."""
    messages = [message.as_plain() for message in body.messages]
    constraint = await _constraint(service, body.response_format)  # first: nothing may come between model and seat
    render = partial(render_conversation, messages=messages)
    prompt = Prompt(service.model(body.model, "model"), render, sum(len(message["content"]) for message in messages))
    return await service.begin(
        client, [prompt], body, answers=body.n, top_logprobs=body.logprobs_asked(), constraint=constraint
    )


def render_conversation(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """Return the ids to continue; a last message of the assistant is the beginning of the answer."""
    *before, last = messages
    if last["role"] != "assistant":
        return render_prompt(chat, with_system_prompt(messages, chat.system_prompt))
    before = with_system_prompt(before, chat.system_prompt)
    ids = render_prompt(chat, before)
    if not last["content"]:
        return ids
    answer = render_completion(chat, before, ids, last["content"])
    stops = stop_token_ids(chat.tokenizer)
    ending = chat.encode(chat.write_answer(before, last["content"]).ending)
    ends_at = next((index for index, token in enumerate(ending) if token in stops), 0)
    return ids + answer[: len(answer) - ends_at - 1]


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue a text; no chat template is applied."""
    service: Service = request.app.state.service
    constraint = await _constraint(service, body.response_format)
    model = service.model(body.model, "model")
    prompts = [Prompt(model, partial(_encode, text=text), len(text)) for text in body.prompts()]
    jobs = await service.begin(
        request.state.client, prompts, body, answers=body.n, echo=body.echo, top_logprobs=body.logprobs_asked(),
        constraint=constraint,
    )  # fmt: skip
    tokenizer = service.models.tokenizer
    echoed = [text if isinstance(text, str) else tokenizer.decode(text) for text in body.prompts()]
    choices = [
        Choice(tokenizer, "text_completion", number, job, echoed[number // body.n] if body.echo else None)
        for number, job in enumerate(jobs)
    ]
    return await _answer(service, request, body, choices)


def _encode(chat: ChatFormat, text: str | list[int]) -> list[int]:
    return list(chat.tokenizer.encode(text)) if isinstance(text, str) else list(text)


async def _constraint(service: Service, asked: ResponseFormat | None) -> Constraint | None:
    if isinstance(asked, JsonSchemaFormat):
        return await service.constraint(asked.json_schema.schema_)
    return await service.constraint(None) if isinstance(asked, JsonObjectFormat) else None


async def _answer(service: Service, request: Request, body: OpenAIFields, choices: Sequence[Choice]) -> Response:
    kind, jobs = choices[0].kind, [choice.job for choice in choices]
    prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": jobs[0].model}
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(request, jobs, _chunks(choices, head, body.n, include_usage))
    texts = await service.texts(request, jobs)
    answered = [choice.whole(text) for choice, text in zip(choices, texts, strict=True)]
    return JSONResponse({**head, "object": kind, "choices": answered, "usage": usage_of(jobs, body.n).model_dump()})


class Choice:
    """One of the answers to a request, in the shape of its route."""

    def __init__(self, tokenizer: Any, kind: Kind, number: int, job: Job, echoed: str | None = None) -> None:
        self.tokenizer, self.kind, self.number, self.job = tokenizer, kind, number, job
        self.echoes, self.echoed = echoed is not None, echoed  # the prompt's text, with which the answer begins
        self.sent = 0  # tokens whose log-probabilities went out
        self.offset = 0  # characters of the text before them

    def whole(self, text: str) -> dict[str, Any]:
        """Return the whole answer."""
        logprobs = self._logprobs(first=True)
        if self.kind == "chat.completion":
            content: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            content = {"text": (self.echoed or "") + text}
        return {"index": self.number, **content, "logprobs": logprobs, "finish_reason": self.job.finish_reason}

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        return [self._part({"delta": {"role": "assistant", "content": ""}})] if self.kind == "chat.completion" else []

    def piece(self, piece: str | None) -> dict[str, Any]:
        """Return the next part of a stream; None ends it."""
        first, echoed = self.echoed is not None, self.echoed or ""
        self.echoed = None
        logprobs = self._logprobs(first)
        if self.kind == "chat.completion":
            content: dict[str, Any] = {"delta": {} if piece is None else {"content": piece}}
        else:
            content = {"text": echoed + (piece or "")}
        return self._part(content, logprobs, self.job.finish_reason if piece is None else None)

    def _part(
        self, content: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": self.number, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, first: bool) -> dict[str, Any] | None:
        """Return what is known of tokens that no part has told yet."""
        if self.job.top_logprobs is None:
            return None
        tokens = self.job.logprobs[self.sent :]
        self.sent += len(tokens)
        if self.kind == "chat.completion":
            stops = stop_token_ids(self.tokenizer)
            tokens = [token for token in tokens if token.token not in stops]
            return chat_logprobs(self.tokenizer, tokens) if tokens or first else None
        prompt = (self.job.ids[0], self.job.measured) if first and self.echoes else None
        measured = completion_logprobs(self.tokenizer, prompt, tokens, self.job.top_logprobs, self.offset)
        self.offset += sum(map(len, measured["tokens"]))
        return measured


async def _chunks(
    choices: Sequence[Choice], head: dict[str, Any], answers: int, include_usage: bool
) -> AsyncIterator[str]:
    kind = choices[0].kind
    head = {**head, "object": "chat.completion.chunk" if kind == "chat.completion" else kind}
    usage = {"usage": None} if include_usage else {}
    for choice in choices:
        for part in choice.opening():
            yield event({**head, "choices": [part], **usage})
    async for number, piece in merged([choice.job for choice in choices]):
        yield event({**head, "choices": [choices[number].piece(piece)], **usage})
    if include_usage:
        yield event({**head, "choices": [], "usage": usage_of([c.job for c in choices], answers).model_dump()})
