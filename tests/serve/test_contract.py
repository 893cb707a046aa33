"""What others rely on: the OpenAPI document, the client suite against any server, and vLLM's demands on adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_python
from tests.support.serving import assert_vllm_loads, running_server, save_adapter


@pytest.fixture(scope="module")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of our server, or that of SERVE_TEST_URL: any server of the same contract."""
    if "SERVE_TEST_URL" in os.environ:
        yield os.environ["SERVE_TEST_URL"].rstrip("/")
        return
    folder = tmp_path_factory.mktemp("server")
    adapter = save_adapter(folder / "sft", tiny_llama)
    config = folder / "config.yaml"
    serve = {
        "adapter_path": str(adapter), "adapters": {"liked": str(save_adapter(folder / "kto", tiny_llama, "kto", seed=2))}, "max_context_tokens": 256, "default_max_new_tokens": 8,
        "votes_path": str(folder / "votes.jsonl"), "deadline_seconds": 20,
    }  # fmt: skip
    tree = {"base_model_id": str(tiny_llama), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    config.write_text(yaml.safe_dump(tree))
    with running_server(config) as running:
        yield running.url


@pytest.mark.slow
def test_no_request_of_a_fuzzer_gets_a_server_error(url, tmp_path):
    """Positive and negative cases, null bytes included, against every operation of the OpenAPI document."""
    if "SERVE_TEST_URL" in os.environ:
        pytest.skip("for our own server")
    done = run_python(
        "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--mode", "all",
        "--max-examples", "30", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--request-timeout", "30",
        "--suppress-health-check", "all", "--exclude-path", "/metrics", cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_openai_clients_work_with_any_server_of_the_contract(url):
    """Run with SERVE_TEST_URL=http://host:port against `vllm serve`, too."""
    from openai import NotFoundError, OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SERVE_TEST_KEY", "none"), max_retries=0)
    names = [model.id for model in client.models.list()]
    for name in names:
        settings = {
            "model": name,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 6,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**settings)
        assert whole.usage.completion_tokens <= 6
        pieces = client.chat.completions.create(**settings, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
        assert text == whole.choices[0].message.content
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "Hello"}])


def test_adapters_are_what_vllm_loads(tiny_llama, tmp_path):
    """vllm serve BASE --enable-lora --lora-modules sft=DIR --max-lora-rank R wants plain LoRA in safetensors."""
    adapter = save_adapter(tmp_path / "sft", tiny_llama, r=16)
    assert_vllm_loads(adapter, tiny_llama)
