"""Why a request gets no answer, in the shape of OpenAI's errors, which serves all routes."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "server_error",
}  # fmt: skip


class ServingError(Exception):
    """Why a request gets no answer: HTTP status, a code for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after


def error_body(error: ServingError) -> dict[str, Any]:
    """Write an error as OpenAI does."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ServingError, **headers: str) -> JSONResponse:
    """Answer with an error."""
    if error.retry_after:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers=headers)
