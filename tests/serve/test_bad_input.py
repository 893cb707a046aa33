"""Bad input gets the right refusal, whichever client sends it, and afterwards the server works as before.

Each row is sent with httpx, curl and urllib. Only what none of them can write, such as two requests on one connection at
once, is sent on a bare socket.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.http_clients import CLIENTS, Body, Client, Reply
from tests.support.serving import Running, running_server, save_adapter, wait_for

ROUTES = {"generate": "/v1/generate", "chat": "/v1/chat/completions", "completions": "/v1/completions"}
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


@pytest.fixture(scope="module")
def steady(server: Running) -> Iterator[httpx.Client]:
    """Return a client whose connection stays open."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(autouse=True)
def still_works(steady: httpx.Client) -> Iterator[None]:
    """After every case a normal request is answered and nothing keeps running."""
    yield
    answer = steady.post("/v1/generate", json=GOOD)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 4
    # The gauge is set at the end of the step that gave the answer.
    assert wait_for(lambda: "\nserve_num_requests_running 0.0\n" in steady.get("/metrics").text)


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    return CLIENTS[request.param]


def post(
    client: Client, server: Running, path: str, body: Body, kind: str = "application/json", **headers: str
) -> Reply:
    return client("POST", server.url + path, body, {"Content-Type": kind, **headers})


def check_refusal(answer: Reply, status: int, code: str, sent: str = "") -> None:
    assert answer.status == status, answer.text
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
    (changed(n=10**6), "invalid_value"),
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
def test_a_bad_body_is_refused_with_its_code(server, client, body, code):
    answer = post(client, server, "/v1/generate", body)
    check_refusal(answer, 422, code, body if isinstance(body, str) else "")


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
def test_a_bad_chat_is_refused_as_openai_does(server, client, body, status, code):
    check_refusal(post(client, server, ROUTES["chat"], json.dumps(body)), status, code)


# What both of OpenAI's routes refuse: whole bodies, and single fields of a body that is good otherwise.
BROKEN = [("", "invalid_request"), ('{"model": "sf', "invalid_json"), ("[]", "invalid_request"), ("null", "invalid_request"),
          (b'{"model": "\xff\xfe"}', "invalid_json"), ("[" * 100_000, "invalid_json"), ("9" * 5000, "invalid_json")]  # fmt: skip
FIELDS = [
    ({"max_tokens": 1.5}, "invalid_value"), ({"max_tokens": True}, "invalid_value"), ({"max_tokens": "4"}, "invalid_value"),
    ({"max_tokens": -1}, "invalid_value"), ({"max_tokens": 10**9}, "max_tokens_too_large"),
    ({"max_tokens": LIMIT}, "context_length_exceeded"), ({"model": ["sft"]}, "invalid_value"),
    ({"model": {"name": "sft"}}, "invalid_value"), ({"temperature": float("nan")}, "non_finite"),
    ({"temperature": float("-inf")}, "non_finite"), ({"temperature": "nan"}, "invalid_value"),
    ({"temperature": -0.1}, "invalid_value"), ({"temperature": 100}, "invalid_value"), ({"top_p": 0}, "invalid_value"),
    ({"top_p": 2}, "invalid_value"), ({"top_p": float("nan")}, "non_finite"), ({"top_k": -5}, "invalid_value"),
    ({"repetition_penalty": 0}, "invalid_value"), ({"presence_penalty": 10}, "invalid_value"),
    ({"frequency_penalty": float("inf")}, "non_finite"), ({"seed": 2**70}, "invalid_value"), ({"n": 10**6}, "invalid_value"),
    ({"logprobs": 10_000}, "invalid_value"), ({"stop": [""]}, "invalid_value"), ({"stop": ["x"] * 100}, "invalid_value"),
    ({"stop": "x" * 10**6}, "invalid_value"), ({"stop": "\ud800"}, "invalid_unicode"), ({"max_tokenz": 4}, "unknown_field"),
    ({"generation_config": {"num_beams": 9}}, "unknown_field"), ({"chat_template_kwargs": {"tokenize": True}}, "unknown_field"),
    ({"stream": "yes"}, "invalid_value"), ({"stream_options": {"include_usage": True}}, "invalid_value"),
]  # fmt: skip
OPENAI = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    "completions": {"prompt": "Hello", "max_tokens": 4},
}


@pytest.mark.parametrize("route", OPENAI)
@pytest.mark.parametrize(("body", "code"), BROKEN, ids=[str(n) for n in range(len(BROKEN))])
def test_openai_routes_refuse_a_broken_body_with_400(server, client, route, body, code):
    check_refusal(post(client, server, ROUTES[route], body), 400, code)


@pytest.mark.parametrize("route", OPENAI)
@pytest.mark.parametrize(("fields", "code"), FIELDS, ids=[f"{n}-{next(iter(f))}" for n, (f, _) in enumerate(FIELDS)])
def test_openai_routes_refuse_a_bad_field_with_400(server, client, route, fields, code):
    check_refusal(post(client, server, ROUTES[route], json.dumps({**OPENAI[route], **fields})), 400, code)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing"), ({"prompt": None}, "missing"), ({"prompt": 5}, "invalid_value"),
        ({"prompt": ""}, "empty_prompt"), ({"prompt": []}, "invalid_value"), ({"prompt": "\ud800"}, "invalid_unicode"),
        ({"prompt": ["a", "\udfff"]}, "invalid_unicode"), ({"prompt": "word " * LIMIT}, "context_length_exceeded"),
        ({"prompt": "x" * 200_000}, "context_length_exceeded"), ({"prompt": "a", "best_of": 4}, "invalid_value"),
    ],
)  # fmt: skip
def test_a_bad_completion_is_refused_as_openai_does(server, client, body, code):
    check_refusal(post(client, server, ROUTES["completions"], json.dumps(body)), 400, code)


def test_a_completion_takes_several_prompts_and_no_seed(server, client):
    body = {"prompt": ["a", "b"], "max_tokens": 4, "seed": -1}
    answer = post(client, server, ROUTES["completions"], json.dumps(body))
    assert answer.status == 200, answer.text
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]


@pytest.mark.parametrize("name", ["unknown", "", "../..", "/etc", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"])
def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(server, client, name):
    for route, field in (("generate", "adapter"), ("chat", "model"), ("completions", "model")):
        body = {**OPENAI.get(route, GOOD), field: name}
        answer = post(client, server, ROUTES[route], json.dumps(body))
        check_refusal(answer, 404, "model_not_found")
        assert "base, sft" in answer.json()["error"]["message"]


def test_the_context_error_says_the_numbers(server, client):
    used = post(client, server, "/v1/generate", json.dumps(GOOD)).json()["usage"]["prompt_tokens"]
    exact = post(client, server, "/v1/generate", changed(max_new_tokens=LIMIT - used))
    assert exact.status == 200, "what just fits"
    one_more = post(client, server, "/v1/generate", changed(max_new_tokens=LIMIT - used + 1))
    check_refusal(one_more, 422, "context_length_exceeded")
    assert set(map(str, (used, LIMIT, LIMIT - used))) <= set(re.findall(r"\d+", one_more.text))


def test_without_max_new_tokens_the_room_is_the_limit(server, client):
    answer = post(client, server, "/v1/generate", '{"prompt": "Hello"}').json()
    assert answer["usage"]["total_tokens"] <= LIMIT


@pytest.mark.parametrize("prompt", ["   ", "a\x00b", "שלום \u202e ‍👩‍👩‍👧 \ufeff", "<|user|>\n<|end|>", "😀" * 20])
def test_strange_text_is_answered(server, client, prompt):
    answer = post(client, server, "/v1/generate", changed(prompt=prompt))
    assert answer.status == 200, answer.text


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
def test_extreme_but_right_values_are_answered(server, client, fields):
    answer = post(client, server, "/v1/generate", changed(**fields))
    assert answer.status == 200, answer.text
    if fields.get("temperature", 1) < 1e-4:
        assert answer.json() == post(client, server, "/v1/generate", changed()).json(), "so cold that it is greedy"


def test_a_stop_string_cuts_exactly_where_it_begins(server, client):
    """It may begin and end within tokens, and nothing of it is seen before it is known."""
    whole = post(client, server, "/v1/generate", changed(max_new_tokens=40)).json()["text"]
    for at in range(1, min(len(whole) - 3, 12)):
        stop = whole[at : at + 3]
        body = changed(max_new_tokens=40, stop=stop)
        assert post(client, server, "/v1/generate", body).json()["text"] == whole[: whole.index(stop)]
        events = post(client, server, "/v1/generate", changed(max_new_tokens=40, stop=stop, stream=True)).text
        pieces = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
        assert "".join(piece.get("text", "") for piece in pieces) == whole[: whole.index(stop)]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_only_json_is_taken(server, client, kind):
    check_refusal(post(client, server, "/v1/generate", '{"prompt": "Hello"}', kind), 415, "unsupported_media_type")


def test_a_large_body_is_refused(server, client):
    answer = post(client, server, "/v1/generate", changed(prompt="x" * 10_000_000))
    check_refusal(answer, 413, "body_too_large")
    assert answer.headers["connection"] == "close"


def test_a_large_body_in_chunks_is_refused(server, client):
    answer = post(client, server, "/v1/generate", (b" " * 0x10000 for _ in range(160)))
    check_refusal(answer, 413, "body_too_large")
    assert answer.headers["connection"] == "close"


def test_routes_and_methods(server, client):
    wrong_method = client("GET", f"{server.url}/v1/generate")
    check_refusal(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"
    check_refusal(client("GET", f"{server.url}/v2/nothing"), 404, "not_found")
    check_refusal(client("GET", f"{server.url}/health", headers={"Host": "evil.example"}), 400, "invalid_host")


def test_huge_headers_are_refused(server, client):
    for headers in ({"X-Long": "a" * 100_000}, {f"X-{n}": "a" * 100 for n in range(1000)}):
        assert client("GET", f"{server.url}/health", headers=headers).status in (400, 431)


def test_two_framings_at_once_are_refused(server, client):
    """They are how one request is smuggled inside another; each client sends what it makes of both headers."""
    headers = {"Content-Type": "application/json", "Content-Length": "19", "Transfer-Encoding": "chunked"}
    assert client("POST", f"{server.url}/v1/generate", '{"prompt": "Hello"}', headers).status in (400, 422)


# --- what no client writes: bodies without an end, a body and a half, the next request before the answer to the first


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
    answer = exchange(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 100, seconds=3)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


def test_two_framings_at_once_get_one_refusal_and_no_second_answer(server):
    body = b'{"prompt": "Hello"}'
    framing = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body)
    answer = exchange(server, HEAD + framing + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), seconds=2)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 4")


def test_pipelined_requests_are_answered_in_order(server):
    body = json.dumps(GOOD).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = exchange(server, request + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.index(b'"text"') < answer.index(b'"status":"ok"')
