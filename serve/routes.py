"""The server's own routes: generate, compare, score, votes, and what operators ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Message
from scripts.dataset.rendering import render_prompt
from serve.errors import ServingError
from serve.jobs import Job
from serve.schemas import (
    AdapterRequest,
    CompareAnswer,
    CompareRequest,
    GenerateAnswer,
    GenerateRequest,
    QueueAnswer,
    QueueVoteRequest,
    ScoreAnswer,
    ScoreRequest,
    ThumbRequest,
    VoteRequest,
)
from serve.service import Prompt, Service
from serve.streaming import EventStream, event, merged, usage_of

if TYPE_CHECKING:
    from serve.adapters import Served
    from serve.vote_queue import VoteQueue

router = APIRouter()


@router.post("/v1/generate", response_model=GenerateAnswer | CompareAnswer, tags=["generation"])
async def generate(request: Request, body: GenerateRequest) -> Any:
    """Answer one prompt with one model, up to four times; with `stream`, as server-sent events."""
    service: Service = request.app.state.service
    jobs = await begin_generation(service, request.state.client, body)
    if body.stream:
        return EventStream(request, jobs, _events(jobs[0]) if body.n == 1 else _events_of_several(jobs))
    texts = await service.texts(request, jobs)
    answers = [_answer(job, text) for job, text in zip(jobs, texts, strict=True)]
    return answers[0] if body.n == 1 else CompareAnswer(answers=answers)


async def begin_generation(service: Service, client: str, body: GenerateRequest) -> list[Job]:
    """Start the jobs of a request, one for each answer."""

    def render(chat: ChatFormat) -> list[int]:
        if body.raw:
            return list(chat.tokenizer.encode(body.prompt))
        return render_prompt(chat, chat.user_turn(body.prompt))

    prompt = Prompt(service.model(body.adapter, "adapter"), render, len(body.prompt))
    return await service.begin(client, [prompt], body, answers=body.n)


async def _events(job: Job) -> AsyncIterator[str]:
    async for piece in job.pieces():
        yield event({"text": piece})
    yield event({"finish_reason": job.finish_reason, "usage": usage_of([job]).model_dump()})


async def _events_of_several(jobs: list[Job]) -> AsyncIterator[str]:
    async for number, piece in merged(jobs):
        if piece is not None:
            yield event({"index": number, "text": piece})
            continue
        job = jobs[number]
        yield event({"index": number, "finish_reason": job.finish_reason, "usage": usage_of([job]).model_dump()})


def _answer(job: Job, text: str) -> GenerateAnswer:
    return GenerateAnswer(text=text, finish_reason=job.finish_reason, usage=usage_of([job]), adapter=job.model)


@router.post("/v1/compare", tags=["generation"])
async def compare(request: Request, body: CompareRequest) -> CompareAnswer:
    """Answer one prompt with several models in one batch."""
    service: Service = request.app.state.service
    jobs = await begin_comparison(service, request.state.client, body)
    texts = await service.texts(request, jobs)
    return CompareAnswer(answers=[_answer(job, text) for job, text in zip(jobs, texts, strict=True)])


async def begin_comparison(service: Service, client: str, body: CompareRequest) -> list[Job]:
    """Start a job for each model that a request compares."""
    models = [service.model(name, "adapters") for name in body.adapters or service.models.served]

    def render(chat: ChatFormat) -> list[int]:
        return render_prompt(chat, chat.user_turn(body.prompt))

    return await service.begin(client, [Prompt(model, render, len(body.prompt)) for model in models], body)


@router.post("/v1/score", tags=["generation"])
async def score(request: Request, body: ScoreRequest) -> ScoreAnswer:
    """Measure how likely a model finds a given answer, and its implicit reward against its reference."""
    service: Service = request.app.state.service
    model = service.model(body.adapter, "adapter")
    reference = service.reference_of(model)
    asked: list[Message] = [{"role": "user", "content": body.prompt}]
    jobs = await service.begin_scoring(request.state.client, [model, reference], asked, body.answer)
    await service.texts(request, jobs)
    logprob, reference_logprob = (job.logprob for job in jobs)
    return ScoreAnswer(
        adapter=model.name, logprob=logprob, tokens=jobs[0].scored, reference=reference.name,
        reference_logprob=reference_logprob, beta=model.beta, implicit_reward=model.beta * (logprob - reference_logprob),
    )  # fmt: skip


@router.post("/v1/votes", status_code=201, tags=["playground"])
async def vote(request: Request, body: VoteRequest) -> dict[str, str]:
    """Keep a person's choice as a preference record, which train_dpo reads."""
    service: Service = request.app.state.service
    if not service.votes:
        raise ServingError(404, "votes_off", "votes are not kept; set serve.votes_path")
    models = {
        "chosen": service.model(body.chosen_model, "chosen_model").name,
        "rejected": service.model(body.rejected_model, "rejected_model").name,
    }
    prompt = [message.model_dump() for message in body.prompt]
    record = {"prompt": prompt, "chosen": body.chosen, "rejected": body.rejected, "models": models, "seed": body.seed}
    await service.votes.append(record)
    return {"status": "kept"}


@router.post("/v1/thumbs", status_code=201, tags=["playground"])
async def thumb(request: Request, body: ThumbRequest) -> dict[str, str]:
    """Keep a thumb up or down on an answer as a record, which train_kto reads."""
    service: Service = request.app.state.service
    if not service.thumbs:
        raise ServingError(404, "thumbs_off", "thumbs are not kept; set serve.thumbs_path")
    model = service.model(body.model, "model")
    await service.thumbs.append({**body.model_dump(), "model": model.name, "adapter_sha256": model.sha256})
    return {"status": "kept"}


@router.get("/v1/queue", tags=["votes"])
async def next_in_queue(request: Request) -> QueueAnswer:
    """Give the next prompt to vote on, with samples of the default adapter."""
    return _queue(request).next()


@router.post("/v1/queue/votes", status_code=201, tags=["votes"])
async def vote_in_queue(request: Request, body: QueueVoteRequest) -> dict[str, str]:
    """Keep what a person says of the samples of a prompt, for scripts.make_pairs --by votes."""
    await _queue(request).vote(body)
    return {"status": "kept"}


def _queue(request: Request) -> VoteQueue:
    queue: VoteQueue | None = request.app.state.queue
    if queue is None:
        raise ServingError(404, "queue_off", "there is no queue of prompts to vote on; set serve.queue_path")
    return queue


@router.get("/v1/examples", tags=["playground"])
async def examples(request: Request) -> dict[str, list[str]]:
    """List prompts of the held-out data to try; none where keys are set, as the data are not every key's."""
    service: Service = request.app.state.service
    return {"prompts": [] if service.api_keys else service.examples}


@router.get("/v1/models", tags=["OpenAI-compatible"])
async def models(request: Request) -> dict[str, Any]:
    """List what is served, in OpenAI's shape with a few facts more."""
    service: Service = request.app.state.service
    entries = [_model_entry(service, model) for model in service.models.served.values()]
    kept = {"votes": service.votes, "thumbs": service.thumbs, "queue": request.app.state.queue}
    return {"object": "list", "data": entries} | {name: what is not None for name, what in kept.items()}


@router.get("/v1/models/{name}", tags=["OpenAI-compatible"])
async def one_model(request: Request, name: str) -> dict[str, Any]:
    """Describe one of the models."""
    service: Service = request.app.state.service
    return _model_entry(service, service.model(name, "model"))


def _model_entry(service: Service, model: Served) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": service.started, "owned_by": "llm-finetune-sft-dpo",
        "parent": model.parent, "adapter_sha256": model.sha256, "max_model_len": service.context,
        "default": model.name == service.models.default,
        "instead_of": service.models.instead_of if model.name == service.models.default else None,
    }  # fmt: skip


@router.post("/v1/adapters", status_code=201, tags=["admin"])
async def add_adapter(request: Request, body: AdapterRequest) -> dict[str, Any]:
    """Serve one more adapter from now on; needs a key of SERVE_ADMIN_KEYS."""
    service: Service = request.app.state.service
    return _model_entry(service, await service.adapters.add(body.name, body.path))


@router.delete("/v1/adapters/{name}", tags=["admin"])
async def remove_adapter(request: Request, name: str) -> dict[str, Any]:
    """Serve an adapter no more; requests that run with it end first. Needs a key of SERVE_ADMIN_KEYS."""
    await request.app.state.service.adapters.remove(name)
    return {"id": name, "object": "model", "deleted": True}


@router.get("/health", tags=["operation"])
async def health(request: Request) -> Response:
    """Report whether process and engine are alive, and what int8 weights change where they answer."""
    service: Service = request.app.state.service
    alive = service.engine.alive
    body: dict[str, Any] = {"status": "ok" if alive else "engine stopped"}
    if service.int8:
        body["int8"] = {"agreement": round(service.int8.agreement, 4), "kl": round(service.int8.kl, 6)}
    return JSONResponse(body, 200 if alive else 503)


@router.get("/health/ready", tags=["operation"])
async def ready(request: Request) -> Response:
    """Report whether a new request would be taken."""
    reason = request.app.state.service.reason_not_ready()
    return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)


@router.get("/metrics", tags=["operation"])
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format."""
    text = request.app.state.service.metrics_text()
    return Response(text, media_type="text/plain; version=0.0.4")
