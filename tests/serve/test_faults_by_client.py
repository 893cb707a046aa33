"""Overload, faults of the machine and clients that go away, as httpx, curl and urllib see them.

One server in this process answers them all, so that a test can make its engine fail. What a start refuses no client
sees; half-sent heads and pipelined requests no client sends (test_connections.py, test_bad_input.py).
"""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from serve import guard
from serve.service import Service
from tests.conftest import save_tiny_model
from tests.serve.test_engine import Failing, generate_with_peft
from tests.support.http_clients import CLIENTS, Client, Reply, start
from tests.support.serving import free_port, running_server, save_adapter, wait_for

KEY, OTHER_KEY = "first-key-1", "other-key-2"
LONG = {"prompt": "Tell me a long story.", "max_new_tokens": 3000}  # the tiny model then repeats itself for ever
SHORT = {"prompt": "Hello", "max_new_tokens": 4}
SLOTS, QUEUE, QUEUE_PER_CLIENT = 2, 12, 10


@dataclass
class Served:
    """A server in a thread."""

    url: str
    service: Service

    def count(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        samples = [sample for metric in self.service.metrics.registry.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name == name)

    @property
    def running(self) -> float:
        return self.count("serve_num_requests_running")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("long") / "long-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return two adapters that differ in rank and in their layers."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "sft": save_adapter(folder / "sft", base),
        "dpo": save_adapter(folder / "dpo", base, "dpo", seed=2, r=7, target_modules=["q_proj", "down_proj"]),
    }


@pytest.fixture(scope="module")
def config(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    serve = {
        "adapter_path": str(adapters["sft"]), "adapters": {"dpo": str(adapters["dpo"])}, "max_context_tokens": 4096,
        "max_concurrent": SLOTS, "max_queue": QUEUE, "max_queue_per_client": QUEUE_PER_CLIENT,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    tree = {"base_model_id": str(base), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


@contextmanager
def serving(config: Path) -> Iterator[Served]:
    """Run the server in a thread of this process."""
    from serve.fastapi_server import create_app

    app, port = create_app(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_CONFIG", str(config))
        patch.setenv("SERVE_API_KEYS", f"{KEY},{OTHER_KEY}")
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert wait_for(lambda: server.started, seconds=120)
            yield Served(f"http://127.0.0.1:{port}", app.state.service)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def shared(config: Path) -> Iterator[Served]:
    with serving(config) as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """Return the server; after every case it answers a normal request, and nothing keeps running."""
    yield shared
    assert wait_for(lambda: shared.running == 0)
    answer = httpx.post(f"{shared.url}/v1/generate", json=SHORT, headers={"x-api-key": KEY}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert wait_for(lambda: shared.running == 0)


@pytest.fixture(params=CLIENTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def client(name: str) -> Client:
    return CLIENTS[name]


def post(client: Client, served: Served, body: object, key: str = KEY) -> Reply:
    sent = json.dumps(body) if isinstance(body, dict) else body
    return client("POST", f"{served.url}/v1/generate", sent, {"Content-Type": "application/json", "X-Api-Key": key})


def check_refusal(answer: Reply, status: int, code: str) -> None:
    assert (answer.status, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.headers["x-request-id"]
    assert "Traceback" not in answer.text


@pytest.fixture
def begin(name: str, served: Served) -> Iterator[Callable[..., Popen[str]]]:
    """Return a function that sends a request from a process of its own; what is left is killed at the end."""
    with ExitStack() as stack:

        def send(body: dict[str, Any], key: str = KEY, pause: float = 0) -> Popen[str]:
            process = start(name, f"{served.url}/v1/generate", body, key, pause)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield send


@pytest.fixture
def fail(shared: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Return a function that puts a fault into the forward passes, for the rest of the test."""

    def put(fault: Callable[..., Any]) -> None:
        monkeypatch.setattr(shared.service.engine, "forward", Failing(shared.service.engine.forward, fault))

    return put


def greedy(base: Path, adapter: Path | None, prompt: str, new: int) -> str:
    """Return what the libraries alone answer."""
    tokenizer = load_tokenizer(base)
    ids = render_prompt(ChatFormat(tokenizer), user_turn(prompt))
    return tokenizer.decode(generate_with_peft(base, adapter, ids, new), skip_special_tokens=True)


def test_adapters_of_different_ranks_answer_as_peft_does_also_once_their_folder_changes(served, client, base, adapters):
    expected = {name: greedy(base, path, "Hi", 12) for name, path in adapters.items()}
    assert expected["sft"] != expected["dpo"]
    for name, text in expected.items():
        assert post(client, served, {"prompt": "Hi", "max_new_tokens": 12, "adapter": name}).json()["text"] == text
    weights = adapters["sft"] / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes((adapters["dpo"] / weights.name).read_bytes())
    again = post(client, served, {"prompt": "Hi", "max_new_tokens": 12, "adapter": "sft"})
    weights.write_bytes(kept)
    assert again.json()["text"] == expected["sft"]


@pytest.mark.parametrize("key", ["", "wrong-key-0", KEY.upper()])
def test_only_a_right_key_opens(served, client, key):
    check_refusal(post(client, served, SHORT, key), 401, "invalid_api_key")


def test_a_burst_gets_answers_and_refusals_and_nothing_else(served, client, name):
    body = {"prompt": "Hello", "max_new_tokens": 40}
    many = 200 if name != "curl" else 60  # each is a process
    with ThreadPoolExecutor(many) as pool:
        answers = list(pool.map(lambda _: post(client, served, body), range(many)))
    assert {answer.status for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status == 429:
            check_refusal(answer, 429, "queue_full")
            assert answer.headers["retry-after"]


def test_one_key_cannot_take_all_places(served, client, begin):
    for _ in range(SLOTS + QUEUE_PER_CLIENT):
        begin(LONG)
    assert wait_for(lambda: served.service.engine.seats_taken == SLOTS + QUEUE_PER_CLIENT, seconds=60)
    check_refusal(post(client, served, SHORT), 429, "queue_full")
    other = start("curl", f"{served.url}/v1/generate", LONG, OTHER_KEY)
    assert wait_for(lambda: served.service.engine.seats_taken == SLOTS + QUEUE_PER_CLIENT + 1)
    other.kill()
    other.wait()


def test_waiting_too_long_is_refused(served, client, begin, monkeypatch):
    for _ in range(SLOTS):
        begin(LONG)
    assert wait_for(lambda: served.running == SLOTS, seconds=30)
    monkeypatch.setattr(served.service.engine, "queue_timeout_seconds", 0.3)
    answer = post(client, served, SHORT)
    check_refusal(answer, 503, "queue_timeout")
    assert answer.headers["retry-after"]


def test_a_deadline_ends_an_answer_and_a_stream(served, client, monkeypatch):
    monkeypatch.setattr(served.service.engine, "deadline_seconds", 0.5)
    check_refusal(post(client, served, LONG), 504, "deadline_exceeded")
    events = post(client, served, {**LONG, "stream": True}).text.split("\n\n")
    assert "deadline_exceeded" in events[-3]
    assert events[-2] == "data: [DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_dies_frees_its_slot(served, begin, stream):
    gone = served.count("serve_client_disconnects_total")
    process = begin({**LONG, "stream": stream})
    assert wait_for(lambda: served.running == 1, seconds=30)
    if stream:
        assert process.stdout.readline().startswith("data: ")
    process.kill()
    assert wait_for(lambda: served.running == 0, seconds=2), "it continues for nobody"
    assert wait_for(lambda: served.count("serve_client_disconnects_total") == gone + 1)


def test_a_client_that_dies_while_waiting_is_never_read(served, begin):
    for _ in range(SLOTS):
        begin(LONG)
    assert wait_for(lambda: served.running == SLOTS, seconds=30)
    read = served.count("serve_prompt_tokens_total")
    waiting = begin(LONG)
    assert wait_for(lambda: served.count("serve_num_requests_waiting") == 1, seconds=30)
    waiting.kill()
    assert wait_for(lambda: served.count("serve_num_requests_waiting") == 0)
    assert served.count("serve_prompt_tokens_total") == read


def test_a_client_that_dies_while_its_prompt_is_read_is_dropped_at_the_next_piece(served, begin, fail, base):
    word = "word "
    words = 3900 // len(load_tokenizer(base).encode(word * 10)) * 10
    pieces = []

    def slowly(tokens: Any, logits: Any, forward: Any) -> Any:
        pieces.append(len(tokens[0]))
        time.sleep(0.3)
        return logits

    fail(slowly)
    process = begin({**SHORT, "prompt": word * words, "raw": True})
    assert wait_for(lambda: pieces, seconds=30)
    process.kill()
    assert wait_for(lambda: served.service.engine.seats_taken == 0)
    assert len(pieces) <= 3, "a prompt of four pieces"


def test_a_slow_reader_keeps_no_slot_and_gets_everything(served, begin):
    process = begin({**LONG, "stream": True, "max_new_tokens": 300}, pause=3)
    assert wait_for(lambda: served.running == 1, seconds=30)
    assert wait_for(lambda: served.running == 0, seconds=30), "generation waits for the reader"
    assert process.communicate(timeout=60)[0].endswith("data: [DONE]\n\n")


def test_a_slow_body_times_out(served, client, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)

    def trickle() -> Iterator[bytes]:
        yield b'{"prompt": '
        time.sleep(1.5)
        yield b'"Hello"}'

    check_refusal(post(client, served, trickle()), 408, "body_timeout")


def test_a_lack_of_memory_is_said_and_passes(served, client, fail):
    def fault(tokens: Any, logits: Any, forward: Any) -> Any:
        if len(tokens[0]) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    fail(fault)
    answer = post(client, served, {**SHORT, "prompt": "word " * 100})
    check_refusal(answer, 503, "insufficient_memory")
    assert answer.headers["retry-after"]
    assert post(client, served, SHORT).status == 200, "a shorter one fits"


def test_a_lack_of_memory_while_decoding_costs_nothing_when_it_passes(served, client, fail):
    """Of two rows the newer is put back, and continues where it stopped."""
    expected = post(client, served, {**SHORT, "max_new_tokens": 60}).json()["text"]
    failed: list[int] = []

    def fault(tokens: Any, logits: Any, forward: Any) -> Any:
        if list(map(len, tokens)) == [1, 1] and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    fail(fault)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: post(client, served, {**SHORT, "max_new_tokens": 60}), range(2)))
    assert [answer.json()["text"] for answer in answers] == [expected] * 2


@pytest.mark.parametrize("error", [None, RuntimeError("a kernel failed")], ids=["nan", "exception"])
def test_a_failed_row_says_so(served, client, fail, error):
    def fault(tokens: Any, logits: Any, forward: Any) -> Any:
        if len(tokens[0]) > 40:
            if error:
                raise error
            logits[-1][:] = float("nan")
        return logits

    fail(fault)
    check_refusal(post(client, served, {**SHORT, "prompt": "word " * 100}), 500, "generation_failed")
    assert post(client, served, SHORT).status == 200


class FullDisk(io.TextIOBase):
    """A file without a buffer, in which refused lines would stay."""

    def write(self, text: str) -> int:
        with open("/dev/full", "wb", buffering=0) as file:
            return file.write(text.encode()) or 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_the_log_and_no_answer(served, client):
    [handler] = [one for one in guard.request_log.handlers if isinstance(one, guard.RequestLog)]
    lost = served.count("serve_log_errors_total")
    before = handler.setStream(FullDisk())
    answer = post(client, served, SHORT)
    assert wait_for(lambda: served.count("serve_log_errors_total") > lost)
    handler.setStream(before or io.StringIO())
    assert answer.status == 200


def test_a_dead_engine_fails_everybody_and_health_says_so(config, monkeypatch):
    with serving(config) as served:
        engine, ended = served.service.engine, threading.Event()
        monkeypatch.setattr(engine, "on_death", ended.set)  # otherwise the process ends
        held = [start(name, f"{served.url}/v1/generate", LONG, KEY) for name in CLIENTS]
        assert wait_for(lambda: served.running == SLOTS, seconds=60)
        assert wait_for(lambda: engine.seats_taken == len(CLIENTS), seconds=30)
        monkeypatch.setattr(engine, "_decode", lambda: (_ for _ in ()).throw(SystemError("no way on")))
        assert ended.wait(10)
        for process in held:
            assert "engine_stopped" in "".join(process.communicate(timeout=30)) or process.returncode
        for client in CLIENTS.values():
            check_refusal(post(client, served, SHORT), 503, "engine_stopped")
            assert client("GET", f"{served.url}/health").status == 503


def test_a_signal_refuses_new_requests_and_lets_every_client_finish(config):
    with running_server(config, SERVE_API_KEYS=KEY, SERVE_MAX_CONCURRENT="8") as server:
        body = {**LONG, "max_new_tokens": 1500, "stream": True}
        held = [start(name, f"{server.url}/v1/generate", body, KEY) for name in CLIENTS]
        for process in held:
            assert process.stdout.readline().startswith("data: ")
        with httpx.Client(base_url=server.url, headers={"x-api-key": KEY}, timeout=30) as kept:
            assert kept.get("/health/ready").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            for process in held:
                said, errors = process.communicate(timeout=120)
                assert said.endswith("data: [DONE]\n\n"), errors
                assert '"finish_reason"' in said
        assert server.process.wait(30) in (0, -signal.SIGTERM)
