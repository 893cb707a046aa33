"""Faults from outside: overload, clients that go away, signals, keys, and a start that cannot succeed."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from scripts.common.errors import UserError
from tests.conftest import ROOT, run_python, save_tiny_model
from tests.support.serving import Running, free_port, running_server, save_adapter, save_merged_model, wait_for

LONG = {
    "prompt": "Tell me a long story.",
    "max_new_tokens": 3500,
}  # greedy: the tiny model then repeats itself for ever


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that can talk for many seconds and never ends by itself."""
    folder = save_tiny_model(tmp_path_factory.mktemp("long") / "long-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="module")
def write_server_config(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a config for a server whose answers take long."""
    folder = tmp_path_factory.mktemp("config")
    adapter = save_adapter(folder / "sft", long_llama)

    def write(name: str = "config", base: Path = long_llama, fast_path: bool = True, **serve: object) -> Path:
        path = folder / f"{name}.yaml"
        settings = {
            "adapter_path": str(adapter),
            "max_context_tokens": 4096,
            "max_concurrent": 2,
            "max_queue": 4,
            **serve,
        }
        tree = {
            "base_model_id": str(base),
            "performance": {"threads": 1, "dtype": "fp32", "fast_path": fast_path},
            "serve": settings,
        }
        path.write_text(json.dumps(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def server(write_server_config: Callable[..., Path]) -> Iterator[Running]:
    with running_server(write_server_config()) as running:
        yield running


def running(server: Running) -> float:
    return server.metric("serve_num_requests_running")


def start_request(server: Running, body: dict) -> socket.socket:
    """Send a request on a raw connection and do not read the answer."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server, stream):
    cancelled, gone, refused = (
        server.metric(f"serve_{name}_total") for name in ("request_success", "client_disconnects", "requests_rejected")
    )
    written = len(server.log_text())
    connection = start_request(server, {**LONG, "stream": stream})
    assert wait_for(lambda: running(server) == 1)
    connection.close()
    assert wait_for(lambda: running(server) == 0, seconds=2), "it continues for nobody"
    assert server.metric("serve_request_success_total") == cancelled + 1
    assert wait_for(lambda: server.metric("serve_client_disconnects_total") == gone + 1)
    assert server.metric("serve_requests_rejected_total") == refused
    lines = server.log_text()[written:].splitlines()
    said = [line for line in lines if "/metrics" not in line]
    assert len(said) == 1, "one line for each request, and no traceback"
    assert json.loads(said[0])["status"] == 499


def test_a_client_that_goes_away_while_waiting_is_never_read(server):
    occupied = [start_request(server, LONG) for _ in range(2)]
    assert wait_for(lambda: running(server) == 2)
    waiting = start_request(server, LONG)
    assert wait_for(lambda: server.metric("serve_num_requests_waiting") == 1)
    prompt_tokens = server.metric("serve_prompt_tokens_total")
    waiting.close()
    assert wait_for(lambda: server.metric("serve_num_requests_waiting") == 0)
    assert server.metric("serve_prompt_tokens_total") == prompt_tokens
    for connection in occupied:
        connection.close()
    assert wait_for(lambda: running(server) == 0)


def test_overload_is_refused_at_once_and_costs_nothing(server):
    def ask(_: int) -> tuple[int, float, str | None]:
        started = time.monotonic()
        answer = client.post(f"{server.url}/v1/generate", json={"prompt": "Hi", "max_new_tokens": 64}, timeout=60)
        return answer.status_code, time.monotonic() - started, answer.headers.get("retry-after")

    with httpx.Client(limits=httpx.Limits(max_connections=200)) as client, ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    assert {status for status, _, _ in answers} == {200, 429}
    assert all(retry for status, _, retry in answers if status == 429)
    assert wait_for(lambda: running(server) == 0)
    assert server.post("/v1/generate", {"prompt": "Hi", "max_new_tokens": 2}).status_code == 200


def test_half_open_connections_do_not_stop_others(server):
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in connections:
        connection.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: local")
    started = time.monotonic()
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert time.monotonic() - started < 0.5
    for connection in connections:
        connection.close()


def test_a_slow_reader_keeps_no_slot(server):
    connection = start_request(server, {**LONG, "stream": True, "max_new_tokens": 300})
    assert wait_for(lambda: running(server) == 1)
    assert wait_for(lambda: running(server) == 0, seconds=30), "generation waits for the reader"
    connection.close()


def test_deadline_and_queue_timeout(write_server_config):
    config = write_server_config("limits", deadline_seconds=1.5, queue_timeout_seconds=0.5, max_concurrent=1)
    with running_server(config) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.post, "/v1/generate", LONG)
        assert wait_for(lambda: running(server) == 1)
        second = server.post("/v1/generate", LONG)
        assert (second.status_code, second.json()["error"]["code"]) == (503, "queue_timeout")
        assert second.headers["retry-after"]
        assert (first.result().status_code, first.result().json()["error"]["code"]) == (504, "deadline_exceeded")
        stream = server.post("/v1/generate", {**LONG, "stream": True}).text.split("\n\n")
        assert "deadline_exceeded" in stream[-3]
        assert server.metric("serve_client_disconnects_total") == 0, "that the time is up is not the client's doing"
        assert stream[-2] == "data: [DONE]"


def read_streams(server: Running, count: int, **fields: object) -> tuple[list[threading.Thread], list[str]]:
    """Start streams in threads; their whole text is in the list once the threads have ended."""
    texts: list[str] = []

    def read() -> None:
        texts.append(server.post("/v1/generate", {**LONG, "stream": True, **fields}).text)

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, texts


def test_sigterm_lets_streams_finish(write_server_config):
    with running_server(write_server_config("drain", max_concurrent=16, drain_seconds=60)) as server:
        # Long enough that the first stream still runs when the last has begun, also on a busy machine.
        threads, texts = read_streams(server, 16, max_new_tokens=500)
        assert wait_for(lambda: running(server) == 16)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(30) in (0, -signal.SIGTERM)
    assert len(texts) == 16
    assert all('"finish_reason"' in text and text.endswith("data: [DONE]\n\n") for text in texts)


def test_sigterm_ends_long_streams_at_the_limit_with_a_reason(write_server_config):
    with running_server(write_server_config("cut", drain_seconds=1)) as server:
        threads, texts = read_streams(server, 2)
        assert wait_for(lambda: running(server) == 2)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(30) in (0, -signal.SIGTERM)
        assert time.monotonic() - started < 5
    assert all('"code": "draining"' in text and text.endswith("data: [DONE]\n\n") for text in texts)


def test_a_second_sigterm_does_not_wait_and_a_kill_leaves_nothing_to_repair(write_server_config):
    with running_server(write_server_config("twice", drain_seconds=60)) as server:
        threads, _ = read_streams(server, 1)
        assert wait_for(lambda: running(server) == 1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) in (0, -signal.SIGTERM)
        threads[0].join()
    with running_server(write_server_config("twice")) as server:
        server.process.kill()
        server.process.wait(10)
    with running_server(write_server_config("twice")) as server:
        assert server.post("/v1/generate", {"prompt": "Hi", "max_new_tokens": 2}).status_code == 200


def test_health_answers_while_an_engine_step_is_held_up(write_server_config, monkeypatch):
    import uvicorn

    from serve.engine import Engine
    from serve.fastapi_server import create_app

    held, released = threading.Event(), threading.Event()
    decode = Engine._decode

    def hold(engine: Engine) -> None:
        held.set()
        released.wait(60)
        decode(engine)

    monkeypatch.setenv("LLM_CONFIG", str(write_server_config("held")))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(), port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    assert wait_for(lambda: server.started, seconds=120)
    monkeypatch.setattr(Engine, "_decode", hold)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/generate", json={"prompt": "Hi", "max_new_tokens": 2}, timeout=60)
        assert held.wait(60)
        for path in ("/health", "/health/ready", "/metrics", "/"):
            assert httpx.get(url + path, timeout=5).status_code == 200
        assert not answer.done()
        released.set()
        assert answer.result().status_code == 200
    server.should_exit = True
    thread.join()


def test_an_adapter_that_changes_on_disk_changes_no_answer(write_server_config, long_llama, tmp_path):
    adapters = {name: str(save_adapter(tmp_path / name, long_llama, seed=seed)) for name, seed in (("a", 1), ("b", 9))}
    with running_server(write_server_config("replaced", adapter_path=None, adapters=adapters)) as server:
        a, b = ({"prompt": "Hi", "max_new_tokens": 12, "adapter": name} for name in adapters)
        before = server.post("/v1/generate", a).json()["text"]
        assert before != server.post("/v1/generate", b).json()["text"]
        for file in (tmp_path / "b").iterdir():
            (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
        assert server.post("/v1/generate", a).json()["text"] == before


def test_a_merged_model_is_served_in_both_places(server, write_server_config, long_llama, tmp_path):
    same_adapter = save_adapter(tmp_path / "sft", long_llama)
    merged = save_merged_model(tmp_path / "merged", long_llama, same_adapter)
    question = {"prompt": "Hi", "max_new_tokens": 12}
    expected = server.post("/v1/generate", question).json()
    with running_server(write_server_config("merged", adapter_path=str(merged))) as other:
        assert other.post("/v1/generate", question).json() == {**expected, "adapter": "merged"}
    with running_server(write_server_config("as-base", base=merged, adapter_path=None)) as other:
        assert other.post("/v1/generate", question).json() == {**expected, "adapter": "base"}


def test_reload_sees_code_and_nothing_else(write_server_config, tmp_path):
    """`--reload` of the README waits for events of the system; it does not go through all files again and again."""
    for name in ("configs", "scripts", "serve"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".venv/lib", "outputs", "mlruns"):
        (tmp_path / name).mkdir(parents=True)
    with running_server(write_server_config("reload"), "--reload", cwd=tmp_path) as server:
        try:
            assert "using WatchFiles" in server.log_text(), "StatReload polls"
            for name in (".venv/lib/data.json", "outputs/manifest.json", "mlruns/meta.yaml", "mlflow.db"):
                (tmp_path / name).write_text("changed")
            time.sleep(2)
            assert "Reloading" not in server.log_text()
            (tmp_path / "serve/guard.py").touch()
            assert wait_for(lambda: "Reloading" in server.log_text(), seconds=30)
            server.wait_until_ready()
        finally:
            server.process.terminate()  # it ends the server below it, which a kill would leave behind
            server.process.wait(60)


def test_keys_guard_every_route_but_health_and_the_page(write_server_config):
    from serve.fastapi_server import app
    from serve.guard import OPEN_PATHS

    with running_server(write_server_config(), SERVE_API_KEYS="first-key-1,second-key-2") as server:
        for route, methods in app.openapi()["paths"].items():
            for method in methods:
                answer = httpx.request(method, server.url + route, json={} if method == "post" else None)
                if route in OPEN_PATHS:
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 401, route
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/docs", "/docs.css", "/openapi.json"):
            assert httpx.get(server.url + path).status_code == 200, "a browser brings no key"
        assert httpx.get(f"{server.url}/redoc").status_code == 401
        good = {"prompt": "Hi", "max_new_tokens": 2}
        for key, status in (("first-key-1", 200), ("second-key-2", 200), ("First-key-1", 401), ("x", 401)):
            answer = server.post("/v1/generate", good, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status


def own_address() -> str:
    """Return an address of this machine other than loopback, or skip."""
    import psutil

    own = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    others = [address for address in own if not address.startswith("127.")]
    if not others:
        pytest.skip("this machine has no address but loopback")
    return others[0]


def test_without_keys_only_this_machine_is_answered(write_server_config, monkeypatch):
    address = own_address()
    config = write_server_config("open", allowed_hosts=["127.0.0.1", address])
    with running_server(config, "--host", "0.0.0.0") as server:
        from_outside = run_python("-S", "-c", OUTSIDE_REQUEST, address, str(server.port), PYTHONPATH="")
        assert from_outside.stdout.split() == ["403", "not_local"], from_outside.stderr
        assert "SERVE_API_KEYS" in server.log_text()


OUTSIDE_REQUEST = """
import json, sys, urllib.request, urllib.error
request = urllib.request.Request(f"http://{sys.argv[1]}:{sys.argv[2]}/v1/models")
try:
    urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    print(error.code, json.load(error)["error"]["code"])
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_the_log_and_not_the_answers(write_server_config):
    with open("/dev/full", "w") as full, running_server(write_server_config(), stderr=full) as server:
        assert server.post("/v1/generate", {"prompt": "Hi", "max_new_tokens": 2}).status_code == 200
        assert server.metric("serve_log_errors_total") > 0


def test_votes_that_cannot_be_written_are_an_error(write_server_config):
    config = write_server_config("votes", votes_path="/dev/full")
    record = {
        "prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b",
        "chosen_model": "sft", "rejected_model": "base",
    }  # fmt: skip
    with running_server(config) as server:
        answer = server.post("/v1/votes", record)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "vote_not_written")
        assert server.metric("serve_log_errors_total") == 1


# --- a start that cannot succeed ---


@pytest.fixture
def failed_start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that loads a server in vain, with the given environment, and gives its message."""
    from serve.fastapi_server import load_service

    def load(config: Path, **environment: str) -> str:
        for name, value in {"LLM_CONFIG": str(config), **environment}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError) as raised:
            load_service()
        for name in environment:
            monkeypatch.delenv(name)
        return str(raised.value)

    return load


def test_a_failed_start_is_one_message_and_an_exit_code(write_server_config):
    config = write_server_config("missing", adapter_path="outputs/none_dpo_adapter")
    done = run_python("-m", "uvicorn", "serve.fastapi_server:app", "--port", "0", LLM_CONFIG=str(config))
    assert done.returncode != 0
    assert "error: serve.adapter_path: " in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_server_and_refusing_a_config_loads_no_model_library(write_server_config):
    code = (
        "import sys\nfrom scripts.common.errors import UserError\nfrom serve.fastapi_server import load_service\n"
        "try:\n    load_service()\nexcept UserError as error:\n    print(error)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    config = write_server_config("typo", max_context_token=4)
    done = run_python("-c", code, LLM_CONFIG=str(config))
    assert "did you mean `serve.max_context_tokens`?" in done.stdout
    assert done.stdout.split()[-2:] == ["False", "False"], done.stderr


def test_a_missing_adapter_names_the_stage_to_run(write_server_config, failed_start):
    text = failed_start(write_server_config("missing", adapter_path="outputs/none_dpo_adapter"))
    assert "python -m scripts.train_dpo" in text
    assert "serve.adapter_path: null" in text


def test_null_serves_the_base_alone(write_server_config):
    with running_server(write_server_config("base", adapter_path=None)) as server:
        answer = server.post("/v1/generate", {"prompt": "Hi", "max_new_tokens": 2})
        assert answer.json()["adapter"] == "base"


def test_the_environment_wins_and_is_named_in_errors(write_server_config, failed_start):
    text = failed_start(write_server_config(), SERVE_MAX_CONCURRENT="-1")
    assert "environment SERVE_*: serve.max_concurrent: found -1" in text
    with running_server(write_server_config(), SERVE_MAX_CONTEXT_TOKENS="77") as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 77


def test_a_key_file_that_others_can_read_is_refused(write_server_config, tmp_path, failed_start):
    keys = tmp_path / "keys"
    keys.write_text("a-long-enough-key\n")
    keys.chmod(0o644)
    assert "chmod 600" in failed_start(write_server_config("keys", api_keys_file=str(keys)))
    assert "found no key" in failed_start(write_server_config(), SERVE_API_KEYS="")


def test_an_unfinished_or_changed_adapter_is_refused(write_server_config, long_llama, tmp_path, failed_start):
    adapter = save_adapter(tmp_path / "sft", long_llama)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "adapter_model.safetensors: changed" in failed_start(
        write_server_config("changed", adapter_path=str(adapter))
    )
    (adapter / "manifest.json").unlink()
    assert "no valid manifest" in failed_start(write_server_config("half", adapter_path=str(adapter)))


def break_adapter(adapter: Path, change: Callable[[dict], dict]) -> None:
    """Change an adapter's tensors and its manifest with them, as a faulty tool would."""
    from safetensors.torch import load_file, save_file

    from scripts.common.artifacts import read_manifest, write_manifest

    weights = adapter / "adapter_model.safetensors"
    manifest = read_manifest(adapter)
    save_file(change(load_file(weights)), weights)
    write_manifest(adapter, manifest)


def without_one(tensors: dict) -> dict:
    return dict(sorted(tensors.items())[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {key: torch.full_like(value, float("nan")) for key, value in tensors.items()}, "NaN"),
        (lambda tensors: {key: torch.zeros_like(value) for key, value in tensors.items()}, "all zero"),
        (lambda tensors: {key.replace("layers.", "blocks."): value for key, value in tensors.items()}, "does not fit"),
        (without_one, "is missing from the file"),
        (lambda tensors: {key: value[..., :-1].contiguous() for key, value in tensors.items()}, "does not fit"),
    ],
    ids=["nan", "zero", "renamed", "missing", "shapes"],
)
def test_an_adapter_with_wrong_weights_is_refused(
    write_server_config, long_llama, tmp_path, change, message, failed_start
):
    adapter = save_adapter(tmp_path / "sft", long_llama)
    break_adapter(adapter, change)
    text = failed_start(write_server_config("wrong", adapter_path=str(adapter)))
    assert message in text
    assert str(adapter) in text


def test_an_adapter_of_another_base_is_refused(write_server_config, tmp_path, failed_start):
    other = save_tiny_model(tmp_path / "other", seed=5)
    adapter = save_adapter(tmp_path / "sft", other)
    assert "trained on another base model" in failed_start(write_server_config("other", adapter_path=str(adapter)))


def test_an_adapter_of_a_merged_model_is_refused_on_the_plain_base(
    write_server_config, long_llama, tmp_path, failed_start
):
    merged = save_merged_model(tmp_path / "merged", long_llama, save_adapter(tmp_path / "sft", long_llama))
    adapter = save_adapter(tmp_path / "dpo", merged, "dpo")
    text = failed_start(write_server_config("plain", adapter_path=str(adapter)))
    assert "trained on another base model" in text
    assert f"It was made on {merged}; set base_model_id to it" in text


def test_pickled_weights_are_never_read(write_server_config, long_llama, tmp_path, failed_start):
    adapter = save_adapter(tmp_path / "sft", long_llama)
    shutil.move(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    manifest = json.loads((adapter / "manifest.json").read_text())
    manifest["files"]["adapter_model.bin"] = manifest["files"].pop("adapter_model.safetensors")
    (adapter / "manifest.json").write_text(json.dumps(manifest))
    assert "no adapter_model.safetensors" in failed_start(write_server_config("bin", adapter_path=str(adapter)))


def test_a_cache_that_does_not_fit_is_refused(write_server_config, failed_start):
    """Rows of the library's cache are all as long as the longest; each of the lean decoder's takes what it needs."""
    text = failed_start(write_server_config("huge", fast_path=False, max_concurrent=50_000_000))
    assert "serve.max_concurrent" in text
    assert "GiB are free" in text


def test_a_taken_port_is_one_line(server, write_server_config):
    done = run_python(
        "-m", "uvicorn", "serve.fastapi_server:app", "--port", str(server.port), LLM_CONFIG=str(write_server_config())
    )
    assert done.returncode != 0
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
