"""The pages: the playground, the votes on samples, and /docs. They need nothing but this server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from jinja2 import Template

STATIC = Path(__file__).parent / "static"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Give a page that lists routes and fields."""
    page = Template((STATIC / "docs.html").read_text(encoding="utf-8"), autoescape=True)
    return _page(page.render(document=request.app.openapi()).encode(), "text/html")


@router.get("/docs.css")
async def docs_style() -> Response:
    """Give the style of that page."""
    return _static("docs.css", "text/css")


@router.get("/")
async def playground() -> Response:
    """Give the page on which a person compares the models."""
    return _static("playground.html", "text/html")


@router.get("/votes")
async def votes() -> Response:
    """Give the page of votes on samples: one file, whose own script and style are allowed by their hashes."""
    content = (STATIC / "votes.html").read_bytes()
    policy = PAGE_POLICY
    for name, directive in ((b"script", "script-src"), (b"style", "style-src")):
        [inline] = re.findall(rb"<" + name + rb"\b[^>]*>(.*?)</" + name + rb">", content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        policy = policy.replace(f"{directive} 'self'", f"{directive} 'sha256-{digest}'")
    return _page(content, "text/html", policy)


@router.get("/playground.js")
@router.get("/markdown.js")
@router.get("/differences.js")
async def script(request: Request) -> Response:
    """Give one of the page's scripts."""
    return _static(request.url.path[1:], "text/javascript")


@router.get("/playground.css")
async def playground_style() -> Response:
    """Give the page's style."""
    return _static("playground.css", "text/css")


def _static(name: str, media_type: str) -> Response:
    return _page((STATIC / name).read_bytes(), media_type)


def _page(content: bytes, media_type: str, policy: str = PAGE_POLICY) -> Response:
    headers = {"content-security-policy": policy, "cache-control": "no-cache"}
    return Response(content, media_type=media_type, headers=headers)
