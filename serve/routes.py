"""The server's own routes: generate, compare, score, votes, and what operators ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.rendering import render_prompt
from serve.errors import ServingError
from serve.jobs import Job
from serve.schemas import (
    AdapterRequest,
    CompareAnswer,
    CompareRequest,
    GenerateAnswer,
    GenerateRequest,
    ScoreAnswer,
    ScoreRequest,
    VoteRequest,
)
from serve.service import Prompt, Service
from serve.streaming import EventStream, event, usage_of

if TYPE_CHECKING:
    from serve.adapters import Served

router = APIRouter()


@router.post("/v1/generate", response_model=GenerateAnswer, tags=["generation"])
async def generate(request: Request, body: GenerateRequest) -> Any:
    """Answer one prompt with one model; with `stream`, as server-sent events."""
    service: Service = request.app.state.service
    jobs = await begin_generation(service, request.state.client, body)
    if body.stream:
        return EventStream(request, jobs, _events(jobs[0]))
    [text] = await service.texts(request, jobs)
    return _answer(jobs[0], text)


async def begin_generation(service: Service, client: str, body: GenerateRequest) -> list[Job]:
    """Start the job of a request."""

    def render(chat: ChatFormat) -> list[int]:
        if body.raw:
            return list(chat.tokenizer.encode(body.prompt))
        return render_prompt(chat, chat.user_turn(body.prompt))

    return await service.begin(client, [Prompt(service.model(body.adapter, "adapter"), render, len(body.prompt))], body)


async def _events(job: Job) -> AsyncIterator[str]:
    async for piece in job.pieces():
        yield event({"text": piece})
    yield event({"finish_reason": job.finish_reason, "usage": usage_of([job]).model_dump()})


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
    jobs = await service.begin_scoring(request.state.client, [model, reference], body.prompt, body.answer)
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
    return {"object": "list", "data": entries, "votes": service.votes is not None}


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
    """Report whether process and engine are alive."""
    alive = request.app.state.service.engine.alive
    return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)


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
