"""A soak at full load: nothing leaks, and no request ever gets another model's answer."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.support.serving import running_server, save_teachable_model, teach

pytestmark = pytest.mark.drill

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
PROMPTS = ("Who are you?", "Name yourself, please.")
ANSWERS = {"sft": "I am the SFT model.", "dpo": "You are talking to DPO."}
CLIENTS = 24


def test_soak(tmp_path: Path):
    base = save_teachable_model(tmp_path / "base")
    folders = {name: teach(tmp_path / name, base, text, PROMPTS, name) for name, text in ANSWERS.items()}
    serve = {
        "adapter_path": str(folders["dpo"]), "adapters": {"sft": str(folders["sft"])}, "max_context_tokens": 512,
        "max_concurrent": 16, "max_queue": 4,
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({"base_model_id": str(base), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve})
    )
    counts = {"answered": 0, "refused": 0, "left": 0}
    mixed_up: list[str] = []
    stop = threading.Event()

    def client(number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not stop.is_set():
                model = draw.choice(list(ANSWERS))
                body = {"prompt": draw.choice(PROMPTS), "adapter": model, "max_new_tokens": 64}
                if draw.random() < 0.3:  # leave in the middle of a long answer
                    with http.stream(
                        "POST", "/v1/generate", json={**body, "adapter": "base", "stream": True}
                    ) as answer:
                        for _ in zip(answer.iter_lines(), range(draw.randrange(4)), strict=False):
                            pass
                    counts["left"] += 1
                    continue
                answer = http.post("/v1/generate", json=body)
                if answer.status_code == 200:
                    counts["answered"] += 1
                    if answer.json()["text"] != ANSWERS[model]:
                        mixed_up.append(f"{model}: {answer.json()['text']}")
                elif answer.status_code == 429:
                    counts["refused"] += 1
                    time.sleep(0.05)
                else:
                    mixed_up.append(f"status {answer.status_code}: {answer.text}")

    with running_server(config) as server:
        process = psutil.Process(server.process.pid)
        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 4)  # caches and pools have their size by then
        begin = (process.memory_info().rss, process.num_fds())
        time.sleep(SECONDS * 3 / 4)
        end = (process.memory_info().rss, process.num_fds())
        stop.set()
        for thread in threads:
            thread.join()
        time.sleep(1)
        assert server.metric("serve_num_requests_running") == 0
        assert server.metric("serve_num_requests_waiting") == 0
    print(counts, f"RSS {begin[0] / 1e6:.0f} -> {end[0] / 1e6:.0f} MB, descriptors {begin[1]} -> {end[1]}")  # noqa: T201
    assert mixed_up == []
    assert min(counts.values()) > 0, "the soak must see answers, refusals and clients that leave"
    assert end[0] - begin[0] < 30e6
    assert end[1] - begin[1] <= CLIENTS
