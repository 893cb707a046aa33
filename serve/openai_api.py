"""The two OpenAI routes: the same engine under the shapes that OpenAI's clients expect."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import with_system_prompt
from scripts.dataset.rendering import render_prompt
from serve.jobs import Job
from serve.schemas import ChatRequest, CompletionRequest, OpenAIFields
from serve.service import Service
from serve.streaming import EventStream, event, usage_of

router = APIRouter(tags=["OpenAI-compatible"])
# On these paths every refusal of a request's content is a 400, as OpenAI's clients expect.
PATHS = {"/v1/chat/completions", "/v1/completions"}

Kind = Literal["chat.completion", "text_completion"]


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    messages = [message.model_dump() for message in body.messages]

    def render(chat: ChatFormat) -> list[int]:
        return render_prompt(chat, with_system_prompt(messages, chat.system_prompt))

    return await _answer(
        service, request, body, "chat.completion", render,
        sum(len(message["content"]) for message in messages), body.max_completion_tokens or body.max_tokens,
    )  # fmt: skip


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue a text; no chat template is applied."""
    service: Service = request.app.state.service
    return await _answer(
        service, request, body, "text_completion", lambda chat: list(chat.tokenizer.encode(body.prompt)),
        len(body.prompt), body.max_tokens,
    )  # fmt: skip


async def _answer(
    service: Service,
    request: Request,
    body: OpenAIFields,
    kind: Kind,
    render: Callable[[ChatFormat], list[int]],
    characters: int,
    max_tokens: int | None,
) -> Response:
    model = service.model(body.model, "model").name
    jobs = await service.begin(request, [model], render, characters, body, max_tokens)
    prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(request, jobs[0], _chunks(jobs[0], kind, head, include_usage))
    [text] = await service.texts(request, jobs)
    content = {"message": {"role": "assistant", "content": text}} if kind == "chat.completion" else {"text": text}
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": jobs[0].finish_reason}
    return JSONResponse({**head, "object": kind, "choices": [choice], "usage": usage_of(jobs[0]).model_dump()})


async def _chunks(job: Job, kind: Kind, head: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    chat = kind == "chat.completion"
    head = {**head, "object": "chat.completion.chunk" if chat else kind}

    def chunk(content: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return event({**head, "choices": [choice]})

    if chat:
        yield chunk({"delta": {"role": "assistant", "content": ""}})
    async for piece in job.pieces():
        yield chunk({"delta": {"content": piece}} if chat else {"text": piece})
    yield chunk({"delta": {}} if chat else {"text": ""}, job.finish_reason)
    if include_usage:
        yield event({**head, "choices": [], "usage": usage_of(job).model_dump()})
