"""Serve base, SFT and DPO side by side from one process.

Reads the section `serve` of the configuration that LLM_CONFIG names (default configs/config.yaml); an environment
variable SERVE_<KEY> wins over it. Importing this module loads nothing. Needs requirements.txt.

    uvicorn serve.fastapi_server:app --port 8000
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from scripts.common.errors import UserError
from scripts.common.run import set_up_logging
from scripts.common.signals import STOPPING
from serve import openai_api, pages, routes
from serve.connections import bounded_connections
from serve.errors import ServingError
from serve.exception_handlers import refuse, refuse_http, refuse_invalid
from serve.guard import Guard, logging_requests
from serve.service import Service
from serve.settings import load_admin_keys, load_api_keys, load_settings, settle_machine

if TYPE_CHECKING:
    from serve.vote_queue import VoteQueue

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005


def create_app() -> FastAPI:
    """Put the application together; models are loaded when the server starts."""
    # FastAPI's own pages load their scripts from elsewhere; ours needs nothing but this server.
    app = FastAPI(title="llm-finetune-sft-dpo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard)
    app.include_router(routes.router)
    app.include_router(pages.router)
    app.include_router(openai_api.router)
    app.add_exception_handler(RequestValidationError, refuse_invalid)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_exception_handler(ServingError, refuse)
    return app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load, prove and warm up; at the end stop the engine."""
    started = time.monotonic()
    set_up_logging()
    # The event loop lets go of Python's lock at every system call. By default the engine's thread would keep it for 5 ms
    # each time, and a few hundred connections would make /health wait for seconds.
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        service = load_service()
        app.state.queue = load_queue(service)
    except UserError as error:
        app.state.failure = error  # the guard reports it in one message instead of a traceback
        raise
    app.state.service = service
    with bounded_connections(), logging_requests(service.metrics):
        await service.start()
        log.info(
            "serving %s (default %s) after %.1f s%s",
            ", ".join(service.models.served),
            service.models.default,
            time.monotonic() - started,
            ""
            if service.api_keys
            else "; no API key is set, so only this machine is answered (SERVE_API_KEYS=… opens it)",
        )
        try:
            with draining_on_signals(service):
                yield
        finally:
            if app.state.queue:
                app.state.queue.stop()
            await service.stop()


def load_service() -> Service:
    """Read the configuration and load everything it names.

    Raises: UserError with what to correct.
    """
    config = load_settings()
    keys, admin_keys = load_api_keys(config.serve), load_admin_keys()
    machine = settle_machine(config)
    for reason in machine.reasons:
        log.info(reason)
    return Service(config, machine, keys, admin_keys)


def load_queue(service: Service) -> VoteQueue | None:
    """Read the queue of prompts to vote on, where the configuration has one.

    Raises: UserError with what to correct.
    """
    if service.config.serve.queue_path is None:
        return None
    from serve.vote_queue import VoteQueue

    return VoteQueue(service)


@contextmanager
def draining_on_signals(service: Service) -> Iterator[None]:
    """Refuse new requests as soon as a signal comes: uvicorn ends the application only after its last connection."""
    if threading.current_thread() is not threading.main_thread():  # a test client runs us elsewhere
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in STOPPING}

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


app = create_app()
