"""The routes, through a real server process and real clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from scripts.common.modeling import load_tokenizer
from scripts.common.rendering import render_prompt, user_turn
from tests.serving import Running, running_server, save_adapter

PROMPT = "Name three fruits."


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an SFT adapter and a DPO adapter that grew out of it."""
    from scripts.common.artifacts import artifact_sha256, read_manifest

    folder = tmp_path_factory.mktemp("adapters")
    sft = save_adapter(folder / "sft", tiny_llama, "sft", seed=1)
    parent = {"path": "sft", "sha256": artifact_sha256(read_manifest(sft))}
    return {"sft": sft, "dpo": save_adapter(folder / "dpo", tiny_llama, "dpo", seed=2, parent=parent)}


@pytest.fixture(scope="module")
def config(tiny_llama: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    tree = {
        "base_model_id": str(tiny_llama),
        "offline": True,
        "performance": {"dtype": "fp32", "threads": 1},
        "serve": {
            "adapter_path": str(adapters["dpo"]), "adapters": {"sft": str(adapters["sft"])}, "max_context_tokens": 256,
            "max_concurrent": 4, "max_queue": 8, "votes_path": str(folder / "votes.jsonl"),
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def server(config: Path) -> Iterator[Running]:
    with running_server(config) as running:
        yield running


def peft_answer(base: Path, adapter: Path | None, ids: list[int], new: int) -> str:
    """Return the greedy answer of the libraries alone."""
    from tests.test_serve_engine import generate_with_peft

    return load_tokenizer(base).decode(generate_with_peft(base, adapter, ids, new), skip_special_tokens=True)


def events(response: httpx.Response) -> list:
    """Return the events of a stream; the last one is the text [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_generate_answers_as_peft_does(server, tiny_llama, adapters):
    tokenizer = load_tokenizer(tiny_llama)
    ids = render_prompt(tokenizer, user_turn(PROMPT))
    texts = {}
    for name in ("base", "sft", "dpo"):
        answer = server.post("/v1/generate", {"prompt": PROMPT, "adapter": name, "max_new_tokens": 12}).json()
        assert answer["text"] == peft_answer(tiny_llama, adapters.get(name), ids, 12)
        assert answer["adapter"] == name
        assert answer["usage"]["prompt_tokens"] == len(ids)
        texts[name] = answer["text"]
    assert len(set(texts.values())) == 3
    default = server.post("/v1/generate", {"prompt": PROMPT, "max_new_tokens": 12})
    assert default.json()["text"] == texts["dpo"]
    assert default.headers["x-request-id"]
