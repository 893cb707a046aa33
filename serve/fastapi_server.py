"""Serve base, SFT and DPO side by side from one process.

Reads the section `serve` of the configuration that LLM_CONFIG names (default configs/config.yaml); an environment
variable SERVE_<KEY> wins over it. Importing this module loads nothing. Needs requirements.txt.

    uvicorn serve.fastapi_server:app --port 8000
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from jinja2 import Template
from starlette.exceptions import HTTPException

from scripts.common.config import DEFAULT_CONFIG, load_config
from scripts.common.errors import UserError
from scripts.common.rendering import render_prompt, user_turn
from scripts.common.runtime import choose_machine, prepare_environment, set_up_logging
from scripts.common.schema import Config, Serve
from serve import openai_api
from serve.edge import Edge, RequestLog, error_response, load_api_keys, request_log
from serve.jobs import Job, ServingError
from serve.schemas import (
    CompareAnswer,
    CompareRequest,
    GenerateAnswer,
    GenerateRequest,
    ScoreAnswer,
    ScoreRequest,
    VoteRequest,
)
from serve.service import EventStream, Service, event, usage_of, with_errors

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
router = APIRouter()


def create_app() -> FastAPI:
    """Build the routes; models are loaded when the server starts."""
    # FastAPI's own pages load their scripts from elsewhere; ours needs nothing but this server.
    app = FastAPI(title="llm-finetune-sft-dpo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(router)
    app.include_router(openai_api.router)
    app.add_middleware(Edge)
    app.add_exception_handler(RequestValidationError, refuse_invalid)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_exception_handler(ServingError, refuse)
    return app


# --- start and end ---


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load, prove and warm up; at the end stop the engine."""
    started = time.monotonic()
    set_up_logging()
    try:
        service = load_service()
    except UserError as error:
        app.state.failure = error
        raise
    app.state.service = service
    handler = RequestLog(service)
    request_log.addHandler(handler)
    request_log.propagate = False
    request_log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # our own line says more
    await service.start()
    log.info(
        "serving %s (default %s) after %.1f s%s",
        ", ".join(service.models.served),
        service.models.default,
        time.monotonic() - started,
        "" if service.api_keys else "; no API key is set, so only this machine is answered (SERVE_API_KEYS=… opens it)",
    )
    try:
        with draining_on_signals(service):
            yield
    finally:
        await service.stop()
        request_log.removeHandler(handler)


def load_service() -> Service:
    """Read the configuration and load everything it names.

    Raises: UserError with what to correct.
    """
    config = load_settings()
    prepare_environment(config)
    keys = load_api_keys(config.serve)
    machine = choose_machine(config)
    import torch

    # Threads only: the allocator settings of training would keep the memory of the longest prompt for good.
    torch.set_num_threads(machine.threads)
    for reason in machine.reasons:
        log.info(reason)
    return Service(config, machine, keys)


def load_settings() -> Config:
    """Load the configuration; SERVE_<KEY> in the environment wins over the file."""
    variables = {name: f"SERVE_{name.upper()}" for name in Serve.model_fields}
    overrides = [f"serve.{name}={os.environ[key]}" for name, key in variables.items() if key in os.environ]
    return load_config(os.environ.get("LLM_CONFIG", DEFAULT_CONFIG), overrides, origin="environment SERVE_*").values


@contextmanager
def draining_on_signals(service: Service) -> Iterator[None]:
    """Refuse new requests as soon as a signal comes: uvicorn ends the application only after its last connection."""
    if threading.current_thread() is not threading.main_thread():  # a test client runs us elsewhere
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(service.drain)
        previous = before[signal.Signals(number)]
        if callable(previous):
            previous(number, frame)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


# --- errors: one shape, and nothing of the input in it ---


async def refuse(request: Request, error: Exception) -> Response:
    """Answer a refusal with its status, which on OpenAI's routes is 400 for bad content."""
    assert isinstance(error, ServingError)
    if error.status == 422 and request.url.path in openai_api.PATHS:
        error.status = 400
    service: Service = request.app.state.service
    service.metrics.rejected.labels(error.code).inc()
    request.state.notes["error"] = error.code
    return error_response(error)


async def refuse_invalid(request: Request, error: Exception) -> Response:
    """Explain the first thing that is wrong with a body."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    kind, place = first["type"], [str(part) for part in first["loc"][1:]]
    param = ".".join(part for part in place if re.fullmatch(r"\w{1,40}", part, re.ASCII)) or None
    message = first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        code, param, message = "invalid_json", None, "the body is not valid JSON"
    elif not place:
        code, message = (
            ("invalid_value", message) if kind == "value_error" else ("invalid_request", "wanted a JSON object")
        )
    elif kind == "extra_forbidden":
        code, message = "unknown_field", "there is no such field; /docs lists them"
    elif kind == "missing":
        code, message = "missing", f"the field {place[-1]} is missing"
    elif kind == "string_too_short" and place[-1] == "prompt":
        code, message = "empty_prompt", "the prompt is empty"
    else:
        code = {"string_unicode": "invalid_unicode", "finite_number": "non_finite"}.get(kind, "invalid_value")
    return await refuse(request, ServingError(422, code, message, param))


async def refuse_http(request: Request, error: Exception) -> Response:
    """Give FastAPI's own errors our shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # the body could not be decoded: not UTF-8, too deep, or a number without end
        return await refuse(request, ServingError(422, "invalid_json", "the body is not valid JSON"))
    codes = {404: "not_found", 405: "method_not_allowed"}
    answer = ServingError(error.status_code, codes.get(error.status_code, "http_error"), str(error.detail))
    return error_response(answer, **(error.headers or {}))


# --- routes ---


@router.post("/v1/generate", response_model=GenerateAnswer, tags=["generation"])
async def generate(request: Request, body: GenerateRequest) -> Any:
    """Answer one prompt with one model; with `stream`, as server-sent events."""
    service: Service = request.app.state.service
    model = service.model(body.adapter, "adapter").name
    tokenizer, system_prompt = service.models.tokenizer, service.config.data.system_prompt

    def render() -> list[int]:
        if body.raw:
            return list(tokenizer.encode(body.prompt))
        return render_prompt(tokenizer, user_turn(body.prompt, system_prompt))

    jobs = await service.begin(request, [model], render, len(body.prompt), body, body.max_new_tokens)
    if body.stream:
        return EventStream(request, jobs[0], with_errors(_events(jobs[0])))
    [text] = await service.texts(request, jobs)
    return _answer(jobs[0], text)


async def _events(job: Job) -> AsyncIterator[str]:
    async for piece in job.pieces():
        yield event({"text": piece})
    yield event({"finish_reason": job.finish_reason, "usage": usage_of(job).model_dump()})


def _answer(job: Job, text: str) -> GenerateAnswer:
    return GenerateAnswer(text=text, finish_reason=job.finish_reason, usage=usage_of(job), adapter=job.model)


@router.post("/v1/compare", tags=["generation"])
async def compare(request: Request, body: CompareRequest) -> CompareAnswer:
    """Answer one prompt with several models in one batch."""
    service: Service = request.app.state.service
    names = [service.model(name, "adapters").name for name in body.adapters or service.models.served]
    messages = user_turn(body.prompt, service.config.data.system_prompt)
    tokenizer = service.models.tokenizer
    jobs = await service.begin(
        request, names, lambda: render_prompt(tokenizer, messages), len(body.prompt), body, body.max_new_tokens
    )
    texts = await service.texts(request, jobs)
    return CompareAnswer(answers=[_answer(job, text) for job, text in zip(jobs, texts, strict=True)])


@router.post("/v1/score", tags=["generation"])
async def score(request: Request, body: ScoreRequest) -> ScoreAnswer:
    """Measure how likely a model finds a given answer, and its implicit reward against its reference."""
    service: Service = request.app.state.service
    model = service.model(body.adapter, "adapter")
    reference = model.reference or model.name
    messages = user_turn(body.prompt, service.config.data.system_prompt)
    jobs = await service.begin_scoring(request, [model.name, reference], messages, body.answer)
    await service.texts(request, jobs)
    logprob, reference_logprob = (job.logprob for job in jobs)
    return ScoreAnswer(
        adapter=model.name, logprob=logprob, tokens=jobs[0].scored, reference=reference,
        reference_logprob=reference_logprob, beta=model.beta, implicit_reward=model.beta * (logprob - reference_logprob),
    )  # fmt: skip


@router.post("/v1/votes", status_code=201, tags=["playground"])
async def vote(request: Request, body: VoteRequest) -> dict[str, str]:
    """Keep a person's choice as a preference record, which train_dpo reads."""
    service: Service = request.app.state.service
    if not service.config.serve.votes_path:
        raise ServingError(404, "votes_off", "votes are not kept; set serve.votes_path")
    models = {
        "chosen": service.model(body.chosen_model, "chosen_model").name,
        "rejected": service.model(body.rejected_model, "rejected_model").name,
    }
    prompt = [message.model_dump() for message in body.prompt]
    record = {"prompt": prompt, "chosen": body.chosen, "rejected": body.rejected, "models": models, "seed": body.seed}
    await service.vote(record)
    return {"status": "kept"}


@router.get("/v1/models", tags=["OpenAI-compatible"])
async def models(request: Request) -> dict[str, Any]:
    """List what is served, in OpenAI's shape with a few facts more."""
    service: Service = request.app.state.service
    entries = [
        {
            "id": model.name, "object": "model", "created": service.started, "owned_by": "llm-finetune-sft-dpo",
            "parent": model.parent, "adapter_sha256": model.sha256, "max_model_len": service.context,
            "default": model.name == service.models.default,
        }
        for model in service.models.served.values()
    ]  # fmt: skip
    return {"object": "list", "data": entries, "votes": service.config.serve.votes_path is not None}


@router.get("/health", tags=["operation"])
async def health(request: Request) -> Response:
    """Say whether process and engine are alive."""
    alive = request.app.state.service.engine.alive
    return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)


@router.get("/health/ready", tags=["operation"])
async def ready(request: Request) -> Response:
    """Say whether a new request would be taken."""
    service: Service = request.app.state.service
    full = service.engine.seats_taken >= service.engine.slots + service.engine.queue
    reason = (
        "draining" if service.draining else "queue full" if full else "" if service.engine.alive else "engine stopped"
    )
    return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)


@router.get("/metrics", tags=["operation"])
async def metrics(request: Request) -> Response:
    """Give Prometheus its text."""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Give a page that lists routes and fields."""
    page = Template((STATIC / "docs.html").read_text(encoding="utf-8"), autoescape=True)
    return _page(page.render(document=request.app.openapi()).encode(), "text/html")


@router.get("/docs.css", include_in_schema=False)
async def docs_style() -> Response:
    """Give the style of that page."""
    return _static("docs.css", "text/css")


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    """Give the page on which a person compares the models."""
    return _static("playground.html", "text/html")


@router.get("/playground.js", include_in_schema=False)
async def playground_script() -> Response:
    """Give the page's script."""
    return _static("playground.js", "text/javascript")


@router.get("/playground.css", include_in_schema=False)
async def playground_style() -> Response:
    """Give the page's style."""
    return _static("playground.css", "text/css")


def _static(name: str, media_type: str) -> Response:
    return _page((STATIC / name).read_bytes(), media_type)


def _page(content: bytes, media_type: str) -> Response:
    headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
    return Response(content, media_type=media_type, headers=headers)


app = create_app()
