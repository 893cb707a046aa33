"""Three HTTP clients that each write requests and read answers in their own way: httpx, curl and urllib."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

Body = str | bytes | Iterable[bytes] | None
MARK = b"\x1e"  # separates what curl reports from the body


@dataclass(frozen=True)
class Reply:
    """What a client saw; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:
        """Parse the body."""
        return json.loads(self.text)


Client = Callable[..., Reply]


def ask_with_httpx(method: str, url: str, body: Body = None, headers: Mapping[str, str] | None = None) -> Reply:
    """Send with httpx."""
    answer = httpx.request(method, url, content=body, headers=headers, timeout=60, verify=False, trust_env=False)
    return Reply(answer.status_code, dict(answer.headers), answer.text)


def ask_with_curl(method: str, url: str, body: Body = None, headers: Mapping[str, str] | None = None) -> Reply:
    """Send with curl; a body in parts is uploaded from a pipe, as it comes."""
    command = ["curl", "-sS", "-N", "--max-time", "60", "-X", method, "-w", "\x1e%{http_code}\x1e%{header_json}"]
    command += [part for name, value in (headers or {}).items() for part in ("-H", f"{name}: {value}")]
    if body is not None:
        command += ["--data-binary", "@-"] if isinstance(body, str | bytes) else ["-T", "-"]
    process = subprocess.Popen([*command, url], stdin=-1, stdout=-1, stderr=-1)
    assert process.stdin
    if isinstance(body, str | bytes) or body is None:
        said, errors = process.communicate(body.encode() if isinstance(body, str) else body)
    else:
        with suppress(BrokenPipeError):  # curl has its answer and reads no more
            for part in body:
                process.stdin.write(part)
                process.stdin.flush()
        said, errors = process.communicate()
    text, status, fields = said.split(MARK)
    assert int(status), errors
    return Reply(int(status), {name: ", ".join(values) for name, values in json.loads(fields).items()}, text.decode())


def ask_with_urllib(method: str, url: str, body: Body = None, headers: Mapping[str, str] | None = None) -> Reply:
    """Send with the standard library."""
    data = body.encode() if isinstance(body, str) else body
    request = urllib.request.Request(url, data, dict(headers or {}), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        answer = opener.open(request, timeout=60)
    except urllib.error.HTTPError as refused:
        answer = refused
    with answer:
        return Reply(
            answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read().decode()
        )


CLIENTS: dict[str, Client] = {"httpx": ask_with_httpx, "curl": ask_with_curl, "urllib": ask_with_urllib}

# The same as processes of their own, which can be killed. They show an answer as it comes, after a pause.
_HTTPX = """
import sys, time, httpx
url, body, key, pause = sys.argv[1:]
headers = {"content-type": "application/json", "x-api-key": key}
with httpx.stream("POST", url, content=body, headers=headers, timeout=None, verify=False, trust_env=False) as answer:
    time.sleep(float(pause))
    for text in answer.iter_text():
        print(text, end="", flush=True)
"""
_URLLIB = """
import sys, time, urllib.request
url, body, key, pause = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json", "X-Api-Key": key})
with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
    time.sleep(float(pause))
    while part := answer.read1():
        print(part.decode(), end="", flush=True)
"""


def start(name: str, url: str, body: Mapping[str, Any], key: str = "none", pause: float = 0) -> subprocess.Popen[str]:
    """Send a request from a process of its own; a pause lets it read nothing at first (curl: little at a time)."""
    sent = json.dumps(body)
    if name == "curl":
        slowly = ["--limit-rate", "4k"] if pause else []
        command = [
            "curl",
            "-sSN",
            *slowly,
            "-H",
            "Content-Type: application/json",
            "-H",
            f"X-Api-Key: {key}",
            "-d",
            sent,
            url,
        ]
    else:
        command = [sys.executable, "-c", _HTTPX if name == "httpx" else _URLLIB, url, sent, key, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
