"""What every request passes first: host, key, content type, size and time of its body; and one log line at its end.

Written against ASGI itself, because it must act before anything is parsed and see every byte that is sent.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import re
import stat
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.common.errors import UserError
from scripts.common.schema import Serve
from serve.jobs import ServingError

if TYPE_CHECKING:
    from serve.service import Service

log = logging.getLogger(__name__)
request_log = logging.getLogger("serve.requests")

MAX_BODY_BYTES = 2 * 2**20
MAX_HEADER_BYTES = 32 * 2**10
BODY_SECONDS = 10.0
WRITE_SECONDS = 60.0
# Answered without a key: what probes ask, and the page's own files, which hold nothing secret.
OPEN_PATHS = {"/", "/playground.js", "/playground.css", "/health", "/health/ready"}
ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "server_error",
}  # fmt: skip
SECURITY_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def error_body(error: ServingError) -> dict[str, Any]:
    """Write an error as OpenAI does; the same shape serves all routes."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ServingError, **headers: str) -> JSONResponse:
    """Answer with an error."""
    if error.retry_after:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers=headers)


def load_api_keys(serve: Serve) -> list[str]:
    """Collect the keys from the environment and from the key file.

    Raises: UserError when a key is too short to be one, or when others can read the file.
    """
    keys = os.environ["SERVE_API_KEYS"].split(",") if "SERVE_API_KEYS" in os.environ else []
    if serve.api_keys_file:
        path = Path(serve.api_keys_file)
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            keys += path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"serve.api_keys_file: {path}: {error.strerror}. Correct the path.") from None
        if mode & 0o077:
            raise UserError(f"serve.api_keys_file: {path}: others can read it (mode {mode:o}). Run `chmod 600 {path}`.")
    given = bool(keys)
    keys = [key.strip() for key in keys if key.strip()]
    if given and not keys:
        raise UserError("SERVE_API_KEYS / serve.api_keys_file: found no key in it. Remove it, or put a key into it.")
    if short := [key for key in keys if len(key) < 8 or not key.isascii()]:
        raise UserError(
            f"SERVE_API_KEYS / serve.api_keys_file: {len(short)} keys are not ASCII or shorter than 8 characters."
        )
    return keys


class RequestLog(logging.StreamHandler):  # type: ignore[type-arg]
    """Write log lines; a full disk is counted and harms no request."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service

    def handleError(self, record: logging.LogRecord) -> None:
        self.service.metrics.log_errors.inc()


class Edge:
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
        """Pass start-up on, but tell a user's mistake in one message instead of a traceback."""

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
        given = self.headers.get("x-request-id", "")
        self.request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
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
            scheme, _, given = self.headers.get("authorization", "").partition(" ")
            matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self.service.api_keys]
            if scheme.lower() != "bearer" or not any(matches):
                raise ServingError(401, "invalid_api_key", "wanted the header `Authorization: Bearer <key>`")
            return f"key {matches.index(True)}"
        if not _is_loopback(peer):
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


def _is_loopback(peer: str) -> bool:
    try:
        return ipaddress.ip_address(peer).is_loopback
    except ValueError:  # no address, such as a test client's name
        return False
