"""Bad input gets the right refusal, and afterwards the server works as before."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.serving import Running, running_server, save_adapter

LIMIT = 128
GOOD = {"prompt": "Hello", "max_new_tokens": 4}
HUGE = '{"prompt": "Hello", "max_new_tokens": ' + "9" * 5000 + "}"


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    adapter = save_adapter(folder / "sft", tiny_llama)
    config = folder / "config.yaml"
    serve = {"adapter_path": str(adapter), "max_context_tokens": LIMIT, "max_concurrent": 2, "max_queue": 8}
    tree = {"base_model_id": str(tiny_llama), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    config.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    with running_server(config) as running:
        yield running


@pytest.fixture(autouse=True)
def still_works(server: Running) -> Iterator[None]:
    """After every case a normal request is answered and nothing keeps running."""
    yield
    answer = server.post("/v1/generate", GOOD)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 4
    assert server.metric("serve_num_requests_running") == 0


def check_refusal(answer: httpx.Response, status: int, code: str, sent: str = "") -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["type"]
    assert answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert "/work" not in answer.text
    assert "site-packages" not in answer.text
    if len(sent) > 20:
        assert sent not in answer.text


def seen_by_others(url: str, body: str | bytes) -> list[tuple[int, str]]:
    """Return status and code as urllib and curl see them: each sends and reads in its own way."""
    data = body.encode() if isinstance(body, str) else body
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=30)
    command = ["curl", "-s", "-w", "\n%{http_code}", "-H", "Content-Type: application/json", "--data-binary", "@-", url]
    said, _, status = subprocess.run(command, input=data, capture_output=True, check=True).stdout.rpartition(b"\n")
    return [
        (refused.value.code, json.load(refused.value)["error"]["code"]),
        (int(status), json.loads(said)["error"]["code"]),
    ]


def changed(**fields: object) -> str:
    return json.dumps({**GOOD, **fields})


BODIES = [
    ("", "invalid_request"),
    ('{"prompt": "Hel', "invalid_json"),
    ("[]", "invalid_request"),
    ("null", "invalid_request"),
    (b'{"prompt": "\xff\xfe"}', "invalid_json"),
    ("[" * 100_000, "invalid_json"),
    (HUGE, "invalid_json"),
    ("{}", "missing"),
    (changed(prompt=None), "invalid_value"),
    (changed(prompt=5), "invalid_value"),
    (changed(prompt=["a", "b"]), "invalid_value"),
    (changed(prompt=""), "empty_prompt"),
    (changed(prompt="\ud800"), "invalid_unicode"),
    (changed(stop="\ud800"), "invalid_unicode"),
    (changed(prompt="word " * LIMIT), "context_length_exceeded"),
    (changed(prompt="x" * 200_000), "context_length_exceeded"),
    (changed(max_new_tokens=LIMIT - 1), "context_length_exceeded"),
    (changed(max_new_tokens=10**9), "max_new_tokens_too_large"),
    (changed(max_new_tokens=0), "invalid_value"),
    (changed(max_new_tokens=-1), "invalid_value"),
    (changed(max_new_tokens=1.5), "invalid_value"),
    (changed(max_new_tokens=True), "invalid_value"),
    (changed(max_new_tokens="4"), "invalid_value"),
    (changed(max_new_tokens=1e30), "invalid_value"),
    (changed(adapter=["sft"]), "invalid_value"),
    (changed(adapter={"name": "sft"}), "invalid_value"),
    (changed(temperature=float("nan")), "non_finite"),
    (changed(temperature=float("inf")), "non_finite"),
    ('{"prompt": "Hello", "temperature": 1e400}', "non_finite"),
    (changed(temperature="nan"), "invalid_value"),
    (changed(temperature=-0.1), "invalid_value"),
    (changed(temperature=100), "invalid_value"),
    (changed(top_p=0), "invalid_value"),
    (changed(top_p=2), "invalid_value"),
    (changed(top_p=float("nan")), "non_finite"),
    (changed(top_k=-5), "invalid_value"),
    (changed(top_k=0.01), "invalid_value"),
    (changed(repetition_penalty=0), "invalid_value"),
    (changed(presence_penalty=10), "invalid_value"),
    (changed(seed=-1), "invalid_value"),
    (changed(seed=2**70), "invalid_value"),
    (changed(n=10**6), "unknown_field"),
    (changed(best_of=4), "unknown_field"),
    (changed(logprobs=10_000), "unknown_field"),
    (changed(stop=[""]), "invalid_value"),
    (changed(stop=["x"] * 100), "invalid_value"),
    (changed(stop="x" * 10**6), "invalid_value"),
    (changed(max_tokenz=4), "unknown_field"),
    (changed(generation_config={"num_beams": 9}), "unknown_field"),
    (changed(chat_template_kwargs={"tokenize": True}), "unknown_field"),
    (changed(stream="yes"), "invalid_value"),
]


@pytest.mark.parametrize(("body", "code"), BODIES, ids=[f"{n}-{code}" for n, (_, code) in enumerate(BODIES)])
def test_a_bad_body_is_refused_with_its_code(server, body, code):
    answer = httpx.post(
        f"{server.url}/v1/generate", content=body, headers={"content-type": "application/json"}, timeout=30
    )
    check_refusal(answer, 422, code, body if isinstance(body, str) else "")
    assert seen_by_others(f"{server.url}/v1/generate", body) == [(422, code)] * 2


CHATS = [
    ({"messages": []}, 400, "invalid_value"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "invalid_value"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "invalid_value"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "invalid_value"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "invalid_value"),
    ({"messages": [{"role": "user", "content": "a"}], "stream_options": {"include_usage": True}}, 400, "invalid_value"),
    ({"messages": [{"role": "user", "content": "a"}], "n": 10**6}, 400, "invalid_value"),
    ({"messages": [{"role": "user", "content": "a"}], "temperature": float("nan")}, 400, "non_finite"),
    ({"messages": [{"role": "user", "content": "word " * LIMIT}]}, 400, "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "a"}], "model": "../.."}, 404, "model_not_found"),
    ({}, 400, "missing"),
]


@pytest.mark.parametrize(("body", "status", "code"), CHATS)
def test_a_bad_chat_is_refused_as_openai_does(server, body, status, code):
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    check_refusal(answer, status, code)
    assert seen_by_others(f"{server.url}/v1/chat/completions", json.dumps(body)) == [(status, code)] * 2


@pytest.mark.parametrize("name", ["unknown", "", "../..", "/etc", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"])
def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(server, name):
    answer = server.post("/v1/generate", {**GOOD, "adapter": name})
    check_refusal(answer, 404, "model_not_found")
    assert "base, sft" in answer.json()["error"]["message"]


def test_the_context_error_says_the_numbers(server):
    message = server.post("/v1/generate", {**GOOD, "max_new_tokens": LIMIT}).json()["error"]["message"]
    used = server.post("/v1/generate", GOOD).json()["usage"]["prompt_tokens"]
    assert str(used) in message
    assert str(LIMIT) in message
    assert str(LIMIT - used) in message


def test_without_max_new_tokens_the_room_is_the_limit(server):
    answer = server.post("/v1/generate", {"prompt": "Hello"}).json()
    assert answer["usage"]["total_tokens"] <= LIMIT


@pytest.mark.parametrize("prompt", ["   ", "a\x00b", "שלום \u202e ‍👩‍👩‍👧 \ufeff", "<|user|>\n<|end|>", "😀" * 20])
def test_strange_text_is_answered(server, prompt):
    answer = server.post("/v1/generate", {**GOOD, "prompt": prompt})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-320},
        {"temperature": 2, "top_k": 10**9},
        {"stop": "(a+)+$"},
        {"adapter": None},
    ],
)
def test_extreme_but_right_values_are_answered(server, fields):
    answer = server.post("/v1/generate", {**GOOD, **fields})
    assert answer.status_code == 200, answer.text
    if fields.get("temperature", 1) < 1e-4:
        assert answer.json() == server.post("/v1/generate", GOOD).json(), "so cold that it is greedy"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_only_json_is_taken(server, kind):
    answer = httpx.post(f"{server.url}/v1/generate", content='{"prompt": "Hello"}', headers={"content-type": kind})
    check_refusal(answer, 415, "unsupported_media_type")


def test_a_large_body_is_refused(server):
    check_refusal(server.post("/v1/generate", {"prompt": "x" * 10_000_000}), 413, "body_too_large")


def test_routes_and_methods(server):
    wrong_method = httpx.get(f"{server.url}/v1/generate")
    check_refusal(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"
    check_refusal(httpx.get(f"{server.url}/v2/nothing"), 404, "not_found")
    check_refusal(httpx.get(f"{server.url}/health", headers={"host": "evil.example"}), 400, "invalid_host")


def exchange(server: Running, *parts: bytes, seconds: float = 20) -> bytes:
    """Send raw bytes and return all that comes until the server closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:
            pass  # it may close before it has read everything; what it said still counts
        connection.settimeout(seconds)
        try:
            while received := connection.recv(65536):
                answer += received
        except OSError:
            pass
    return answer


HEAD = b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_an_endless_chunked_body_is_cut_off(server):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = exchange(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 100)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


def test_two_framings_at_once_get_one_refusal(server):
    body = b'{"prompt": "Hello"}'
    framing = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body)
    answer = exchange(server, HEAD + framing + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), seconds=2)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 4")


def test_huge_headers_are_refused(server):
    answer = exchange(server, HEAD + b"X-Long: " + b"a" * 100_000 + b"\r\n\r\n", seconds=3)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    many = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 100) for n in range(1000))
    assert exchange(server, HEAD + many + b"\r\n", seconds=3).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


def test_a_slow_body_times_out(server):
    answer = exchange(server, HEAD + b'Content-Length: 30\r\n\r\n{"pro', seconds=20)
    assert answer.startswith(b"HTTP/1.1 408")


def test_pipelined_requests_are_answered_in_order(server):
    body = json.dumps(GOOD).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = exchange(server, request + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.index(b'"text"') < answer.index(b'"status":"ok"')
