"""Adapters that come and go while others answer, each with the proofs of a start."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from scripts.common.artifacts import publish
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from serve.live import LiveAdapters
from serve.metrics import Metrics
from tests.conftest import save_tiny_model
from tests.serve.test_engine import generate_with_peft, models_of, new_engine
from tests.serve.test_faults import break_adapter, wait_for
from tests.support.serving import Running, running_server, save_adapter

ADMIN = {"authorization": "Bearer the-admin-key"}
PROMPT, NEW = "Name three fruits.", 10


@pytest.fixture(scope="module")
def root(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of adapters of all sorts."""
    root = tmp_path_factory.mktemp("adapters")
    other = save_tiny_model(tmp_path_factory.mktemp("other") / "base", seed=5)
    save_adapter(root / "narrow", tiny_llama, seed=3, r=3, target_modules=["q_proj", "down_proj"])
    save_adapter(root / "wide", tiny_llama, seed=4, r=12)
    save_adapter(root / "of_another_base", other)
    save_adapter(root / "dora", tiny_llama, use_dora=True)
    broken = save_adapter(root / "broken", tiny_llama)
    break_adapter(broken, lambda tensors: {key: torch.full_like(v, float("nan")) for key, v in tensors.items()})
    dull = save_adapter(root / "dull", tiny_llama)
    break_adapter(dull, lambda tensors: {key: torch.zeros_like(v) for key, v in tensors.items()})
    changed = save_adapter(root / "changed", tiny_llama)
    (changed / "adapter_config.json").write_text("{}")
    outside = save_adapter(tmp_path_factory.mktemp("elsewhere") / "sft", tiny_llama)
    (root / "link_out").symlink_to(outside)
    return root


@pytest.fixture(scope="module")
def server(tiny_llama: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    serve = {
        "adapter_path": str(save_adapter(folder / "sft", tiny_llama)), "max_context_tokens": 256,
        "adapters_root": str(root), "max_concurrent": 4,
    }  # fmt: skip
    tree = {"base_model_id": str(tiny_llama), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with running_server(config, SERVE_ADMIN_KEYS="the-admin-key") as running:
        yield running


def add(server: Running, name: str, path: str) -> httpx.Response:
    return server.post("/v1/adapters", {"name": name, "path": path}, headers=ADMIN)


def remove(server: Running, name: str) -> httpx.Response:
    return httpx.delete(f"{server.url}/v1/adapters/{name}", headers=ADMIN, timeout=60)


def said(server: Running, adapter: str) -> str:
    body = {"prompt": PROMPT, "max_new_tokens": NEW, "adapter": adapter}
    answer = server.post("/v1/generate", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["text"]


def expected(base: Path, adapter: Path | None) -> str:
    tokenizer = load_tokenizer(base)
    ids = render_prompt(ChatFormat(tokenizer), user_turn(PROMPT))
    return tokenizer.decode(generate_with_peft(base, adapter, ids, NEW), skip_special_tokens=True)


def test_adapters_come_and_go_and_each_answers_as_peft_does(server, tiny_llama, root):
    before = {name: said(server, name) for name in ("base", "sft")}
    for name in ("narrow", "wide"):
        answer = add(server, name, name)
        assert answer.status_code == 201, answer.text
        assert said(server, name) == expected(tiny_llama, root / name)
    assert {name: said(server, name) for name in before} == before
    assert [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["base", "sft", "narrow", "wide"]
    assert server.metric("serve_lora_info") == 3
    assert remove(server, "narrow").status_code == 200
    gone = server.post("/v1/generate", {"prompt": PROMPT, "adapter": "narrow"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert add(server, "again", "narrow").status_code == 201, "it takes the free columns"
    assert said(server, "again") == expected(tiny_llama, root / "narrow")
    assert said(server, "wide") == expected(tiny_llama, root / "wide")
    for name in ("wide", "again"):
        assert remove(server, name).status_code == 200
    assert {name: said(server, name) for name in before} == before
    assert server.metric("serve_lora_info") == 1
    assert 'model="wide"' not in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize(
    ("name", "path", "status", "reason"),
    [
        ("sft", "wide", 409, "served already"),
        ("base", "wide", 422, "base"),
        ("a/b", "wide", 422, "letters"),
        ("x", "of_another_base", 422, "another base model"),
        ("x", "broken", 422, "NaN"),
        ("x", "dull", 422, "zero"),
        ("x", "dora", 422, "DoRA"),
        ("x", "changed", 422, "changed"),
        ("x", "nothing", 404, "no such folder"),
        ("x", "../sft", 403, "leads out"),
        ("x", "link_out", 403, "leads out"),
        ("x", "/etc", 403, "leads out"),
        ("x", ".", 403, "leads out"),
        ("x", "wide/../../..", 403, "leads out"),
        ("x", "\x00", 404, "no such folder"),
        ("x", "w" * 1000, 404, "no such folder"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(server, root, name, path, status, reason):
    before = said(server, "sft")
    answer = add(server, name, path)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]["message"]
    assert str(root) not in answer.text
    assert said(server, "sft") == before
    assert [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["base", "sft"]


@pytest.mark.parametrize(("name", "status"), [("base", 409), ("sft", 409), ("unknown", 404)])
def test_base_and_default_stay(server, name, status):
    assert remove(server, name).status_code == status
    assert said(server, "sft")


def test_only_the_admin_may_change_what_is_served(server):
    for headers in ({}, {"authorization": "Bearer the-Admin-key"}, {"x-api-key": "the-admin"}):
        answer = server.post("/v1/adapters", {"name": "x", "path": "wide"}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.delete(f"{server.url}/v1/adapters/sft", headers=headers).status_code == 401


def test_removal_waits_for_those_who_use_it(server):
    assert add(server, "used", "wide").status_code == 201
    body = {"prompt": PROMPT, "max_new_tokens": 200, "adapter": "used", "stream": True}
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.append(server.post("/v1/generate", body).text))
    reader.start()
    assert wait_for(lambda: server.metric("serve_num_requests_running") == 1)
    assert remove(server, "used").status_code == 200
    reader.join(30)
    assert '"finish_reason"' in texts[0]
    assert "error" not in texts[0]


def test_without_an_admin_key_nothing_changes(tiny_llama, write_config, tmp_path):
    from starlette.testclient import TestClient

    from serve.fastapi_server import create_app

    path = write_config(base_model_id=str(tiny_llama), performance={"threads": 1}, serve={"adapter_path": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_CONFIG", str(path))
        with TestClient(create_app(), base_url="http://localhost", client=("127.0.0.1", 1)) as client:
            answer = client.post("/v1/adapters", json={"name": "x", "path": "y"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_needed")


def watching(tiny_llama: Path, folder: Path, **serve: Any) -> Path:
    settings = {"max_context_tokens": 256, "watch": True, **serve}
    tree = {"base_model_id": str(tiny_llama), "performance": {"threads": 1, "dtype": "fp32"}, "serve": settings}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def test_a_finished_training_is_served_without_a_restart(tiny_llama, tmp_path):
    """The folder that is served is replaced as a stage does it, and new ones appear in adapters_root."""
    served, root = save_adapter(tmp_path / "outputs/sft_adapter", tiny_llama), tmp_path / "more"
    root.mkdir()
    config = watching(tiny_llama, tmp_path, adapter_path=str(served), adapters_root=str(root))
    with running_server(config) as server:
        old = said(server, "sft")
        part = save_adapter(tmp_path / "part", tiny_llama, seed=7, r=9)
        publish(part, served)
        new = expected(tiny_llama, served)
        assert new != old
        assert wait_for(lambda: said(server, "sft") == new, seconds=20)
        publish(save_adapter(tmp_path / "part", tiny_llama, seed=8), root / "tuned")
        assert wait_for(lambda: "tuned" in httpx.get(f"{server.url}/v1/models").text, seconds=20)
        assert said(server, "tuned") == expected(tiny_llama, root / "tuned")
        bad = save_adapter(tmp_path / "part", tiny_llama, seed=9)
        break_adapter(bad, lambda tensors: {key: torch.zeros_like(value) for key, value in tensors.items()})
        publish(bad, served)
        assert wait_for(lambda: "is not served" in server.log_text(), seconds=20)
        assert said(server, "sft") == new, "the old one stays"
        assert "Traceback" not in server.log_text()


def test_swaps_under_load_never_mix_answers_up(tiny_llama, tmp_path, write_config):
    """Every answer is that of one whole version of the adapter it names."""
    versions = [save_adapter(tmp_path / f"v{n}", tiny_llama, seed=30 + n, r=3 + n) for n in range(3)]
    models = models_of(tiny_llama, {"sft": versions[0]}, write_config)
    ids = render_prompt(ChatFormat(models.tokenizer), user_turn(PROMPT))
    right = {n: generate_with_peft(tiny_llama, path, ids, NEW) for n, path in enumerate(versions)}
    base = generate_with_peft(tiny_llama, None, ids, NEW)

    async def scenario() -> tuple[list[tuple[set[int], list[int]]], int]:
        from serve.jobs import Job

        engine = new_engine(models, slots=4)
        live = LiveAdapters(models, engine, Metrics(), str(tmp_path))
        engine.start()
        current, answers, stop = 0, [], asyncio.Event()

        async def ask(name: str) -> None:
            while not stop.is_set():
                model = models.served[name]
                job = Job(ids, name, NEW, client=name, adapter=model.adapter)
                possible = {current}
                engine.submit(job, engine.reserve(name, 1, [model.adapter])[0])
                await job.text()
                answers.append((possible if name == "sft" else {-1}, job.out))

        asking = [asyncio.create_task(ask(name)) for name in ("sft", "sft", "base", "sft")]
        for number in range(1, 13):
            async with live._one_at_a_time:
                await live._serve("sft", versions[number % 3])
                current = number % 3
            await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*asking)
        await asyncio.gather(*live._dropping)
        width = models.rows.width
        await asyncio.to_thread(engine.stop)
        return answers, width

    answers, width = asyncio.run(scenario())
    assert len(answers) > 30
    for possible, out in answers:
        assert out in [base if n < 0 else right[n] for n in possible]
    assert width <= 4 + 5 + 6, "columns are used again"
