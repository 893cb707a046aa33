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

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.common.network import is_loopback
from serve import connections
from serve.errors import ServingError, error_response
from serve.metrics import Metrics
from serve.service import Service

log = logging.getLogger(__name__)
request_log = logging.getLogger("serve.requests")

MAX_BODY_BYTES = 2 * 2**20
MAX_HEADER_BYTES = 32 * 2**10
BODY_SECONDS = 10.0
WRITE_SECONDS = 60.0
# Of a body that is refused, so much is read and dropped: many clients look for an answer only once they have sent all.
MAX_DROPPED_BYTES = 256 * 2**20
DROP_SECONDS = 10.0
# Answered without a key: what probes ask, and the pages' own files, which hold nothing secret.
OPEN_PATHS = {
    "/", "/votes", "/playground.js", "/markdown.js", "/differences.js", "/playground.css", "/docs", "/docs.css", "/openapi.json", "/health", "/health/ready",
}  # fmt: skip
ADMIN_PATHS = ("/v1/adapters",)
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
        self.method = scope["method"]
        self.headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        request_id = self.headers.get("x-request-id", "")
        self.request_id = request_id if re.fullmatch(r"[\w.-]{1,64}", request_id, re.ASCII) else uuid.uuid4().hex
        self.status, self.started, self.body_sent = 0, time.monotonic(), False
        self.body = b""
        self.unread = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"
        self.connection = connections.current.get()
        # Handlers add what the log line should say beside the status.
        self.notes: dict[str, Any] = {}
        scope.setdefault("state", {}).update(notes=self.notes, request_id=self.request_id)

    async def run(self) -> None:
        """Check, read the body, pass on, and log."""
        if self.connection:
            self.connection.reading()
        answer: ASGIApp = self._answer
        if origins := self.service.config.serve.allowed_origins:
            answer = CORSMiddleware(
                answer, origins, ("GET", "POST", "DELETE"), ("*",), expose_headers=("x-request-id", "retry-after")
            )
        try:
            await answer(self.scope, self._receive, self._send_watched)
        except TimeoutError:
            self.notes["note"] = "the client did not read its answer"
        except Exception as error:
            log.error("request %s failed", self.request_id, exc_info=error)
            if not self.status:
                failed = ServingError(500, "internal_error", "the server failed; the request id finds it in the log")
                await error_response(failed)(self.scope, self._receive, self._send_watched)
        finally:
            if self.connection:
                self.connection.done()
            self._finish()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            scope["state"]["client"] = self._check_client()
            await self._read_body()
        except ServingError as error:
            self.service.metrics.refused(error)
            self.notes["error"] = error.code
            if not self.unread:
                await error_response(error)(scope, receive, send)
            else:
                await self._refuse_unread(error, send)
            return
        if self.connection:
            self.connection.working()
        if scope["method"] == "HEAD":  # what GET would answer, of which the server sends the head alone
            self.scope = scope = {**scope, "method": "GET"}
        await self.app(scope, self._receive_again, send)

    async def _refuse_unread(self, error: ServingError, send: Send) -> None:
        """Answer while the body is still on its way, and close the connection only when it has come or was too long."""
        response = error_response(error, connection="close")
        await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        dropped = 0
        try:
            async with asyncio.timeout(DROP_SECONDS):
                while self.unread and dropped < MAX_DROPPED_BYTES:
                    dropped += len(await self._next_part())
        except (TimeoutError, ServingError):
            pass  # there is nobody left to wait for
        await send({"type": "http.response.body"})

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
        path = self.scope["path"]
        if path in OPEN_PATHS:
            return str(peer)
        if not self.service.api_keys and not is_loopback(peer):
            message = "without an API key only this machine is answered; start the server with SERVE_API_KEYS"
            raise ServingError(403, "not_local", message)
        is_admin_path = path.startswith(ADMIN_PATHS)
        if is_admin_path and self._matching_key(self.service.admin_keys) is not None:
            return "admin"
        keys = self.service.api_keys
        number = self._matching_key(keys)
        if number is None and (keys or (is_admin_path and self.service.admin_keys)):
            raise ServingError(401, "invalid_api_key", "wanted `Authorization: Bearer <key>` or `x-api-key: <key>`")
        if is_admin_path:
            raise ServingError(403, "admin_key_needed", "adapters come and go only with a key of SERVE_ADMIN_KEYS")
        return str(peer) if number is None else f"key {number}"

    def _matching_key(self, keys: list[str]) -> int | None:
        """Return which of the keys the request brings, in `Authorization: Bearer` or in `x-api-key`."""
        scheme, *rest = self.headers.get("authorization", "").split() or [""]
        brought = [self.headers.get("x-api-key", "").strip()]
        if scheme.lower() == "bearer" and len(rest) == 1:
            brought += rest
        matches = [any(hmac.compare_digest(token.encode(), key.encode()) for token in brought) for key in keys]
        return matches.index(True) if any(matches) else None

    async def _read_body(self) -> None:
        """Read the body within its limits before anybody works on it."""
        if self.scope["method"] not in ("POST", "PUT", "PATCH"):
            self.unread = False  # nobody looks at it, and the server skips it
            return
        declared = self.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            raise _too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    parts.append(await self._next_part())
                    size += len(parts[-1])
                    if size > MAX_BODY_BYTES:
                        raise _too_large()
                    if not self.unread:
                        break
        except TimeoutError:
            raise ServingError(408, "body_timeout", f"the body was not complete after {BODY_SECONDS:g} s") from None
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ServingError(415, "unsupported_media_type", "wanted the header `Content-Type: application/json`")
        self.body = b"".join(parts)

    async def _next_part(self) -> bytes:
        """Return what has come of the body, and note when that is all.

        Raises: ServingError when the client has gone.
        """
        message = await self._receive()
        self.unread = bool(message.get("more_body"))
        if message["type"] == "http.disconnect":
            raise ServingError(499, "client_closed_request", "the client has gone")
        return bytes(message.get("body", b""))

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
        if status == 499:
            self.service.metrics.disconnects.inc()
        self.service.metrics.requests.labels(route, status).inc()
        line = {
            "id": self.request_id, "method": self.method, "route": route, "status": status,
            "ms": round(1e3 * (time.monotonic() - self.started)), **self.notes,
        }  # fmt: skip
        request_log.info(json.dumps(line))


def _too_large() -> ServingError:
    return ServingError(413, "body_too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
