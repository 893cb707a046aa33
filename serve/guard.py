"""What every request passes first: host, key, content type, size and time of its body; and one log line at its end.

Written against ASGI itself, because it must act before anything is parsed and see every byte that is sent.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.common.network import is_loopback
from serve.errors import ServingError, error_response
from serve.metrics import Metrics
from serve.service import Service

log = logging.getLogger(__name__)
request_log = logging.getLogger("serve.requests")

MAX_BODY_BYTES = 2 * 2**20
MAX_HEADER_BYTES = 32 * 2**10
BODY_SECONDS = 10.0
WRITE_SECONDS = 60.0
# Answered without a key: what probes ask, and the page's own files, which hold nothing secret.
OPEN_PATHS = {"/", "/playground.js", "/playground.css", "/health", "/health/ready"}
SECURITY_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class RequestLog(logging.StreamHandler):  # type: ignore[type-arg]
    """Write log lines; a full disk is counted and harms no request."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics

    def handleError(self, record: logging.LogRecord) -> None:
        self.metrics.log_errors.inc()


@contextmanager
def logging_requests(metrics: Metrics) -> Iterator[None]:
    """Write one line per request in place of uvicorn's, which says less."""
    handler = RequestLog(metrics)
    request_log.addHandler(handler)
    request_log.propagate = False
    request_log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
    try:
        yield
    finally:
        request_log.removeHandler(handler)


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await Exchange(self.app, scope, receive, send).run()
        else:  # no route takes websockets
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass start-up on, but report a user's mistake in one message instead of a traceback."""

        async def send_plainly(message: Message) -> None:
            failure = getattr(scope["app"].state, "failure", None)
            if message["type"] == "lifespan.startup.failed" and failure:
                message = {**message, "message": f"error: {failure}"}
            await send(message)

        await self.app(scope, receive, send_plainly)


class Exchange:
    """One request and its response."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self.app, self.scope, self._receive, self._send = app, scope, receive, send
        self.service: Service = scope["app"].state.service
        self.headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        request_id = self.headers.get("x-request-id", "")
        self.request_id = request_id if re.fullmatch(r"[\w.-]{1,64}", request_id, re.ASCII) else uuid.uuid4().hex
        self.status, self.started, self.body_sent = 0, time.monotonic(), False
        self.body = b""
        # Handlers add what the log line should say beside the status.
        self.notes: dict[str, Any] = {}
        scope.setdefault("state", {}).update(notes=self.notes, request_id=self.request_id)

    async def run(self) -> None:
        """Check, read the body, pass on, and log."""
        try:
            try:
                self.scope["state"]["client"] = self._check_client()
                await self._read_body()
            except ServingError as error:
                self.service.metrics.rejected.labels(error.code).inc()
                # The rest of the body was not read, so the connection cannot serve another request.
                closing = {"connection": "close"} if self.scope["method"] not in ("GET", "HEAD") else {}
                await error_response(error, **closing)(self.scope, self._receive, self._send_watched)
            else:
                await self.app(self.scope, self._receive_again, self._send_watched)
        except TimeoutError:
            self.notes["note"] = "the client did not read its answer"
        except Exception as error:
            log.error("request %s failed", self.request_id, exc_info=error)
            if not self.status:
                failed = ServingError(500, "internal_error", "the server failed; the request id finds it in the log")
                await error_response(failed)(self.scope, self._receive, self._send_watched)
        finally:
            self._finish()

    def _check_client(self) -> str:
        """Return who asks, for fair turns.

        Raises: ServingError when host, key or address do not let it in.
        """
        if sum(len(key) + len(value) for key, value in self.scope["headers"]) > MAX_HEADER_BYTES:
            raise ServingError(431, "headers_too_large", f"the headers are larger than {MAX_HEADER_BYTES} bytes")
        host = re.sub(r":\d+$", "", self.headers.get("host", "")).lower()
        if host not in self.service.config.serve.allowed_hosts:
            message = "this host name is not served; add it to serve.allowed_hosts"
            raise ServingError(400, "invalid_host", message)
        if "transfer-encoding" in self.headers and "content-length" in self.headers:
            raise ServingError(400, "invalid_headers", "found both Content-Length and Transfer-Encoding")
        peer = (self.scope.get("client") or ("127.0.0.1", 0))[0]
        if self.scope["path"] in OPEN_PATHS:
            return str(peer)
        if self.service.api_keys:
            scheme, _, token = self.headers.get("authorization", "").partition(" ")
            matches = [hmac.compare_digest(token.encode(), key.encode()) for key in self.service.api_keys]
            if scheme.lower() != "bearer" or not any(matches):
                raise ServingError(401, "invalid_api_key", "wanted the header `Authorization: Bearer <key>`")
            return f"key {matches.index(True)}"
        if not is_loopback(peer):
            message = "without an API key only this machine is answered; start the server with SERVE_API_KEYS"
            raise ServingError(403, "not_local", message)
        return str(peer)

    async def _read_body(self) -> None:
        """Read the body within its limits before anybody works on it."""
        if self.scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        declared = self.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            raise _too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > MAX_BODY_BYTES:
                        raise _too_large()
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ServingError(408, "body_timeout", f"the body was not complete after {BODY_SECONDS:g} s") from None
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ServingError(415, "unsupported_media_type", "wanted the header `Content-Type: application/json`")
        self.body = b"".join(parts)

    async def _receive_again(self) -> Message:
        if not self.body_sent:
            self.body_sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        return await self._receive()

    async def _send_watched(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = {"x-request-id": self.request_id, **SECURITY_HEADERS}
            message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
        # A client that does not read would otherwise keep its connection for ever.
        async with asyncio.timeout(WRITE_SECONDS):  # wait_for would start a task for each token
            await self._send(message)

    def _finish(self) -> None:
        route = getattr(self.scope.get("route"), "path", "other")
        status = self.status or 499
        if self.notes.get("finish_reason") == "cancelled":
            status = 499
        self.service.metrics.requests.labels(route, status).inc()
        line = {
            "id": self.request_id, "method": self.scope["method"], "route": route, "status": status,
            "ms": round(1e3 * (time.monotonic() - self.started)), **self.notes,
        }  # fmt: skip
        request_log.info(json.dumps(line))


def _too_large() -> ServingError:
    return ServingError(413, "body_too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
