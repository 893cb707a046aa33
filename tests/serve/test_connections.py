"""What clients do to connections: half-sent heads, slow and large bodies, keys in every form, and going away."""

from __future__ import annotations

import asyncio
import http.client
import json
import resource
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from serve.connections import bounded_connections
from tests.support.http_clients import CLIENTS
from tests.support.serving import Running, running_server

LIMIT = 256  # descriptors of the server; the defaults of systems are 256 to 1,024
HALF_HEAD = b"POST /v1/generate HTTP/1.1\r\nHost: local"


@pytest.fixture(scope="module", params=[(), ("--reload",)], ids=["plain", "reload"])
def server(request, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Start the server with few descriptors, as the owner does, without and with --reload."""
    config = tmp_path_factory.mktemp("server") / "config.yaml"
    serve = {"adapter_path": None, "max_context_tokens": 512, "allowed_origins": ["https://page.example"]}
    tree = {"base_model_id": str(tiny_llama), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, hard))
    try:
        running = running_server(config, *request.param, SERVE_API_KEYS="a-key-to-ask,b-key-to-ask")
        with running as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield server
            server.process.terminate()  # with --reload, it ends the server below it, which a kill would leave behind
            server.process.wait(60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def serving_process(server: Running) -> psutil.Process:
    """Return the process that listens, which with --reload is a child."""
    top = psutil.Process(server.process.pid)
    return max([top, *top.children(recursive=True)], key=lambda process: process.memory_info().rss)


def connect(server: Running, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Return whether the server closes the connection in time."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def all_received(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes.

    Raises: ConnectionError when the connection breaks instead.
    """
    return b"".join(iter(partial(connection.recv, 65536), b""))


@pytest.mark.parametrize("data", [b"", HALF_HEAD], ids=["idle", "half a head"])
def test_more_connections_than_descriptors_stop_nobody(server, data):
    written = len(server.log_text())
    held = []
    for _ in range(LIMIT + 100):
        held.append(connect(server, data))
    for client in CLIENTS.values():
        for _ in range(2):
            started = time.monotonic()
            assert client("GET", f"{server.url}/health").status == 200
            assert time.monotonic() - started < 2
    assert serving_process(server).num_fds() < LIMIT
    assert is_closed(held[0], 5), "the oldest idle one makes room"
    for connection in held:
        connection.close()
    time.sleep(1.2)  # the log says it once a second
    said = server.log_text()[written:]
    assert "would have been more than" in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if "/health" not in line]) < 10


def test_a_head_has_a_limit_of_time_and_a_working_connection_has_none(server):
    half, idle = connect(server, HALF_HEAD), connect(server)
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for _ in range(2):
        kept.request("GET", "/health")
        assert kept.getresponse().read()
    slowly = connect(server)
    for byte in b"GET /hea":  # a byte a second does not extend it
        slowly.sendall(bytes([byte]))
        time.sleep(1)
    assert is_closed(half, 8)
    assert is_closed(idle, 8)
    assert is_closed(slowly, 8)


def test_broken_requests_do_not_flood_the_log(server):
    written = len(server.log_text())
    for _ in range(100):
        with connect(server, b"NONSENSE\r\n\r\n") as connection:
            connection.recv(100)
    assert server.log_text()[written:].count("Invalid HTTP request") <= 10


def test_a_client_in_the_middle_of_a_head_that_is_too_long_reads_the_answer(server):
    """Closed at once, its system would throw the answer away and report a reset."""
    for size in (100_000, 1_000_000):
        for _ in range(10):
            with connect(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ") as connection:
                for _ in range(10):
                    connection.sendall(b"a" * (size // 10))
                assert all_received(connection).startswith(b"HTTP/1.1 400")


def test_a_refused_client_that_does_not_close_is_left(server):
    before = serving_process(server).num_fds()
    held = [connect(server, b"NONSENSE\r\n\r\n") for _ in range(50)]
    for connection in held:
        connection.settimeout(10)
        assert all_received(connection).startswith(b"HTTP/1.1 400")
    deadline = time.monotonic() + 20
    while serving_process(server).num_fds() > before + 10 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert serving_process(server).num_fds() <= before + 10
    for connection in held:
        connection.close()


@pytest.mark.parametrize("megabytes", [3, 40])
@pytest.mark.parametrize("headers", [{"authorization": "Bearer a-key-to-ask"}, {}], ids=["with a key", "without"])
def test_every_client_sees_why_its_large_body_is_refused(server, megabytes, headers):
    """Many send the whole body before they look for an answer."""
    body = b"x" * (megabytes << 20)
    wanted = (413, "body_too_large") if headers else (401, "invalid_api_key")
    headers = {**headers, "Content-Type": "application/json"}
    for _ in range(3):
        request = urllib.request.Request(f"{server.url}/v1/generate", body, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        answer = refused.value
        assert (answer.code, json.load(answer)["error"]["code"]) == wanted
        assert answer.headers["connection"] == "close"
    answer = httpx.post(f"{server.url}/v1/generate", content=body, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == wanted
    options = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    done = subprocess.run(
        ["curl", "-s", "-w", "%{http_code}", "--data-binary", "@-", *options, f"{server.url}/v1/generate"],
        input=body, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.endswith(str(wanted[0]).encode())


def test_an_endless_body_is_refused_and_ended(server):
    connection = connect(
        server,
        b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a-key-to-ask\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
    )
    connection.settimeout(30)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    started = time.monotonic()

    def send_for_ever() -> None:
        while time.monotonic() - started < 40:
            connection.sendall(chunk)

    with pytest.raises((ConnectionError, TimeoutError)):
        send_for_ever()
    assert time.monotonic() - started < 30


def test_a_body_that_never_comes_is_refused_once_its_time_is_up(server):
    connection = connect(
        server,
        b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a-key-to-ask\r\n"
        b'Content-Type: application/json\r\nContent-Length: 40\r\n\r\n{"prompt":',
    )
    connection.settimeout(20)
    assert b"408" in connection.recv(100)


AUTHORISED = [
    {"x-api-key": "a-key-to-ask"},
    {"authorization": "Bearer  a-key-to-ask"},
    {"authorization": "bearer\tb-key-to-ask"},
    {"authorization": "BEARER \t a-key-to-ask"},
    {"authorization": "Basic nonsense", "x-api-key": "b-key-to-ask"},
]
REFUSED = [
    {},
    {"x-api-key": "A-key-to-ask"},
    {"authorization": "a-key-to-ask"},
    {"authorization": "Basic a-key-to-ask"},
    {"authorization": "Bearer"},
    {"authorization": "Bearer a-key-to-ask more"},
    {"x-api-key": ""},
]


@pytest.mark.parametrize(("headers", "status"), [*((h, 200) for h in AUTHORISED), *((h, 401) for h in REFUSED)])
def test_a_key_comes_in_either_header(server, headers, status):
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status


def test_only_pages_of_allowed_origins_may_ask(server):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin, allowed in (("https://page.example", "https://page.example"), ("https://other.example", None)):
        preflight = httpx.options(f"{server.url}/v1/chat/completions", headers={"origin": origin, **asked})
        assert preflight.headers.get("access-control-allow-origin") == allowed
        refused = httpx.get(f"{server.url}/v1/models", headers={"origin": origin})
        assert refused.status_code == 401
        assert refused.headers.get("access-control-allow-origin") == allowed, "a page must be able to read the refusal"


def test_without_origins_no_page_elsewhere_may_ask(tiny_llama):
    from serve.fastapi_server import app

    assert not any("CORS" in str(middleware) for middleware in app.user_middleware)


def test_an_answer_to_a_client_that_has_gone_is_dropped_in_silence(caplog):
    """Write many pieces in one turn of the event loop, before it can tell that nobody reads them."""

    async def write_to_nobody() -> None:
        opened = asyncio.get_running_loop().create_future()
        lost = asyncio.get_running_loop().create_future()

        class Server(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                opened.set_result(transport)

            def connection_lost(self, exc: Exception | None) -> None:
                lost.set_result(exc)

        with bounded_connections():
            server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
            client = socket.create_connection(server.sockets[0].getsockname())
            transport = await opened
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
            client.close()
            for _ in range(20):
                transport.write(b"data: a piece\n\n")
            assert isinstance(await lost, ConnectionError)
            server.close()

    asyncio.run(write_to_nobody())
    assert caplog.messages == []
