"""What refusals look like: one shape for all routes, and nothing of the input in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve import openai_api
from serve.errors import ServingError, error_response
from serve.service import Service

# What pydantic adds to the place of an error where a field takes several types.
TRIED_TYPES = {"str", "int", "float", "bool", "dict", "Part"}


async def refuse(request: Request, error: Exception) -> Response:
    """Answer a refusal with its status, which on OpenAI's routes is 400 for bad content."""
    assert isinstance(error, ServingError)
    if error.status == 422 and request.url.path in openai_api.PATHS:
        error.status = 400
    service: Service = request.app.state.service
    service.metrics.refused(error)
    request.state.notes["error"] = error.code
    return error_response(error)


async def refuse_invalid(request: Request, error: Exception) -> Response:
    """Explain the first thing that is wrong with a body."""
    assert isinstance(error, RequestValidationError)
    first = _most_telling(error.errors())
    kind, location, names = first["type"], first["loc"][1:], _names(first)
    param = ".".join(names) or None
    message = first["msg"].removeprefix("Value error, ")
    if not location and (named := re.match(r"(\w+): (.*)", message)):  # fields that contradict each other
        param, message = named.groups()
    if kind == "json_invalid":
        code, param, message = "invalid_json", None, "the body is not valid JSON"
    elif not location and not param:
        code, message = (
            ("invalid_value", message) if kind == "value_error" else ("invalid_request", "wanted a JSON object")
        )
    elif kind == "extra_forbidden":
        code, message = "unknown_field", "there is no such field; /docs lists them"
    elif kind == "missing":
        code, message = "missing", "the field is missing"
    elif kind == "string_too_short" and names[:1] == ["prompt"]:
        code, message = "empty_prompt", "the prompt is empty"
    else:
        code = {"string_unicode": "invalid_unicode", "finite_number": "non_finite"}.get(kind, "invalid_value")
    return await refuse(request, ServingError(422, code, f"{param}: {message}" if param else message, param))


async def refuse_http(request: Request, error: Exception) -> Response:
    """Give FastAPI's own errors our shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # the body could not be decoded: not UTF-8, too deep, or a number without end
        return await refuse(request, ServingError(422, "invalid_json", "the body is not valid JSON"))
    codes = {404: "not_found", 405: "method_not_allowed"}
    answer = ServingError(error.status_code, codes.get(error.status_code, "http_error"), str(error.detail))
    return error_response(answer, **(error.headers or {}))


def _names(error: dict[str, Any]) -> list[str]:
    """Return where an error is, in the client's own names."""
    parts = map(str, error["loc"][1:])
    return [part for part in parts if re.fullmatch(r"\w{1,40}", part, re.ASCII) and part not in TRIED_TYPES]


def _most_telling(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first error. Of a field with several types, each has one: the deepest knows what was meant."""
    place = _names(errors[0])
    same = [error for error in errors if place and _names(error)[: len(place)] == place] or errors[:1]
    return max(same, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
