"""Attacks on the server for minutes: it answers others meanwhile, and nothing of the attack stays behind.

DRILL_SECONDS sets the length (default 180).
"""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from tests.conftest import save_tiny_model
from tests.serve.test_engine import generate_with_peft
from tests.support.serving import Running, running_server, save_adapter

pytestmark = pytest.mark.drill

SECONDS = float(os.environ.get("DRILL_SECONDS", "180"))
DESCRIPTORS = 1024
HALF_HEADS, SLOW_BODIES, IDLE, VANISHING = 1100, 200, 500, 24


PROMPTS = ("Who are you?", "Name yourself, please.")
NEW = 12  # tokens of an answer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "base")


def answers_of(base: Path, adapter: Path) -> dict[str, str]:
    """Return what the libraries alone answer to each prompt, greedily."""
    tokenizer = load_tokenizer(base)
    texts = {}
    for prompt in PROMPTS:
        ids = render_prompt(ChatFormat(tokenizer), user_turn(prompt))
        texts[prompt] = tokenizer.decode(generate_with_peft(base, adapter, ids, NEW), skip_special_tokens=True)
    return texts


def write_config(folder: Path, base: Path, **serve: object) -> Path:
    config = folder / "config.yaml"
    tree = {"base_model_id": str(base), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


# Runs in a process of its own, so that its work does not count as the server's. What the server closes is opened again.
ATTACKER = """
import json, resource, socket, sys, time
port, count, data, trickle = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode(), sys.argv[4].encode()
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held, opened = [], 0
while True:
    kept = []
    for connection in held:
        try:
            connection.send(trickle)
            if connection.recv(4096) != b"":
                kept.append(connection)
        except BlockingIOError:
            kept.append(connection)
        except OSError:
            pass
    held = kept
    for _ in range(min(count - len(held), 300)):
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=2)
            connection.sendall(data)
            connection.setblocking(False)
            held.append(connection)
            opened += 1
        except OSError:
            break
    print(opened, flush=True)
    time.sleep(1)
"""


def start_attack(port: int, count: int, data: str = "", trickle: str = "") -> subprocess.Popen[str]:
    """Keep connections of one kind open."""
    command = [sys.executable, "-S", "-c", ATTACKER, str(port), str(count), data, trickle]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_attacks_on_connections_stop_nobody(tmp_path: Path, base: Path) -> None:
    folders = {name: save_adapter(tmp_path / name, base, name, seed=n) for n, name in enumerate(("sft", "dpo"), 1)}
    expected = {name: answers_of(base, folder) for name, folder in folders.items()}
    assert expected["sft"] != expected["dpo"]
    config = write_config(
        tmp_path, base, adapter_path=str(folders["dpo"]), adapters={"sft": str(folders["sft"])},
        max_context_tokens=512, max_concurrent=16,
    )  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))  # the server's alone
    stop, wrong, health = threading.Event(), [], []
    counts = {"answered": 0, "refused": 0, "cut off": 0, "vanished": 0}

    def vanish(server: Running, number: int) -> None:
        draw = random.Random(number)
        body = json.dumps({"prompt": draw.choice(PROMPTS), "adapter": "base", "max_new_tokens": 400}).encode()
        head = f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        while not stop.is_set():
            with suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
                connection.sendall(head.encode() + body)
                stop.wait(draw.random())
                connection.close()
                counts["vanished"] += 1

    def ask(server: Running, number: int) -> None:
        draw = random.Random(number)
        while not stop.is_set():
            name, prompt = draw.choice(list(expected)), draw.choice(PROMPTS)
            try:
                answer = server.post("/v1/generate", {"prompt": prompt, "adapter": name, "max_new_tokens": NEW})
            except httpx.HTTPError:
                counts["cut off"] += 1
                continue
            if answer.status_code == 200:
                counts["answered"] += 1
                if answer.json()["text"] != expected[name][prompt]:
                    wrong.append(f"{name}: {answer.json()['text']}")
            elif answer.status_code == 429:
                counts["refused"] += 1
            else:
                wrong.append(f"{answer.status_code}: {answer.text}")

    def watch(server: Running) -> None:
        while not stop.is_set():
            begin = time.monotonic()
            with suppress(httpx.HTTPError):
                httpx.get(f"{server.url}/health", timeout=10)
            health.append(time.monotonic() - begin)
            stop.wait(0.25)

    try:
        with running_server(config) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n"
            body = "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"
            attacks = [
                start_attack(server.port, HALF_HEADS, head[:-9], "a"),
                start_attack(server.port, SLOW_BODIES, head + body, " "),
                start_attack(server.port, IDLE),
            ]
            process = psutil.Process(server.process.pid)
            threads = [threading.Thread(target=watch, args=(server,))]
            threads += [threading.Thread(target=vanish, args=(server, number)) for number in range(VANISHING)]
            threads += [threading.Thread(target=ask, args=(server, number)) for number in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(SECONDS / 3)
            begin = process.memory_info().rss
            most = 0
            end_at = time.monotonic() + SECONDS * 2 / 3
            while time.monotonic() < end_at:
                most = max(most, process.num_fds())
                time.sleep(0.2)
            end = process.memory_info().rss
            stop.set()
            for thread in threads:
                thread.join()
            for one in attacks:
                one.kill()
            opened = sum(int(one.communicate()[0].split()[-1]) for one in attacks)
            time.sleep(2)
            after = process.num_fds()
            log = server.log_text()
            assert server.post("/v1/generate", {"prompt": PROMPTS[0], "max_new_tokens": 4}).status_code == 200
            assert server.metric("serve_num_requests_running") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(counts, f"{opened} connections of attackers, /health at most {max(health):.2f} s in {len(health)} calls, "  # noqa: T201
          f"RSS {begin / 1e6:.0f} -> {end / 1e6:.0f} MB, descriptors at most {most}, {after} afterwards")  # fmt: skip
    assert wrong == []
    assert "Traceback" not in log
    assert counts["answered"]
    assert counts["vanished"]
    assert max(health) < 1
    assert end - begin < 30e6
    assert most < DESCRIPTORS
    assert after < 100


def test_a_hundred_swaps_under_load_mix_no_answer_up(tmp_path: Path, base: Path) -> None:
    """Adapters are replaced on the disk, added and removed while clients ask for them by name."""
    root = tmp_path / "root"
    for number in range(3):
        save_adapter(root / f"version_{number}", base, seed=10 + number, r=3 + number)
    stays = save_adapter(tmp_path / "stays", base, "dpo", seed=2)
    expected = {f"slot_{n}": answers_of(base, root / f"version_{n}") for n in range(3)} | {
        "dpo": answers_of(base, stays)
    }
    assert len({str(texts) for texts in expected.values()}) == 4
    config = write_config(
        tmp_path, base, adapter_path=str(stays), adapters_root=str(root), max_context_tokens=512, max_concurrent=16
    )
    admin = {"x-api-key": "the-admin-key"}
    stop, wrong, counts = threading.Event(), [], {"answered": 0, "absent": 0, "swaps": 0}

    with running_server(config, SERVE_ADMIN_KEYS="the-admin-key") as server:

        def ask(number: int) -> None:
            draw = random.Random(number)
            while not stop.is_set():
                name, prompt = draw.choice(list(expected)), draw.choice(PROMPTS)
                answer = server.post("/v1/generate", {"prompt": prompt, "adapter": name, "max_new_tokens": NEW})
                if answer.status_code == 404:
                    counts["absent"] += 1
                elif answer.status_code != 200 or answer.json()["text"] != expected[name][prompt]:
                    wrong.append(f"{name}: {answer.text}")
                else:
                    counts["answered"] += 1

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        seconds = []
        for swap in range(100):
            name = f"slot_{swap % 3}"
            if swap >= 3:
                assert httpx.delete(f"{server.url}/v1/adapters/{name}", headers=admin, timeout=60).status_code == 200
            begin = time.monotonic()
            body = {"name": name, "path": f"version_{swap % 3}"}
            added = server.post("/v1/adapters", body, headers=admin)
            seconds.append(time.monotonic() - begin)
            assert added.status_code == 201, added.text
            counts["swaps"] += 1
        stop.set()
        for thread in threads:
            thread.join()
        log = server.log_text()
    print(counts, f"an adapter answers after {sorted(seconds)[50]:.2f} s (median), {max(seconds):.2f} s at most")  # noqa: T201
    assert wrong == []
    assert "Traceback" not in log
    assert counts["answered"] > 100
