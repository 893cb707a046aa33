"""Clients of others against the server, each called as its own documents say; `make clients` fetches them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, save_tiny_model
from tests.support.serving import Running, running_server, save_adapter

pytestmark = pytest.mark.drill

SCRATCH = ROOT / ".clients"
CALLS = {
    "langchain_openai, chat": """
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="sft", base_url=URL, api_key="none", temperature=0, max_tokens=6, max_retries=0)
whole = chat.invoke("Hello")
assert whole.content == EXPECTED, whole
assert whole.usage_metadata["output_tokens"] <= 6
assert "".join(chunk.content for chunk in chat.stream("Hello")) == EXPECTED
assert [one.content for one in chat.batch(["Hello", "Hello"])] == [EXPECTED] * 2
history = [("system", "Be brief."), ("human", "Hello"), whole, ("human", "Hello")]
assert chat.invoke(history).content
measured = chat.bind(logprobs=True, top_logprobs=3).invoke("Hello")
assert measured.response_metadata["logprobs"]["content"]
assert chat.bind(stop=["zzz"], seed=1, n=2).invoke("Hello").content == EXPECTED
""",
    "langchain_openai, completions": """
from langchain_openai import OpenAI
llm = OpenAI(model="sft", base_url=URL, api_key="none", temperature=0, max_tokens=6, max_retries=0)
whole = llm.invoke("Once upon")
assert whole and "".join(llm.stream("Once upon")) == whole
assert llm.generate(["Once upon", "There"]).generations[0][0].text == whole
""",
    "langchain_openai, structured output": """
from typing import Literal
from pydantic import BaseModel
from langchain_openai import ChatOpenAI
class Verdict(BaseModel):
    kind: Literal["good", "bad"]
    stars: Literal[1, 2, 3]
chat = ChatOpenAI(model="sft", base_url=URL, api_key="none", temperature=0, max_tokens=64, max_retries=0)
assert isinstance(chat.with_structured_output(Verdict, method="json_schema").invoke("Hello"), Verdict)
""",
    "litellm": """
import litellm
settings = {"model": "openai/sft", "api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": 6}
messages = [{"role": "user", "content": "Hello"}]
whole = litellm.completion(messages=messages, **settings)
assert whole.choices[0].message.content == EXPECTED, whole
chunks = litellm.completion(messages=messages, stream=True, **settings)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == EXPECTED
history = [*messages, whole.choices[0].message.model_dump(), *messages]
assert litellm.completion(messages=history, user="me", logprobs=True, **settings).choices[0].logprobs
schema = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"enum": ["a", "b"]}}}
assert litellm.completion(messages=messages, response_format=schema, **settings).choices[0].message.content in ('"a"', '"b"')
text = litellm.text_completion(prompt="Once", model="text-completion-openai/sft", api_base=URL, api_key="none", max_tokens=3)
assert text.choices[0].text
""",
    "llm": """
import llm
fields = {"model_id": "ours", "model_name": "sft", "api_base": URL, "can_stream": True}
(llm.user_dir() / "extra-openai-models.yaml").write_text("- " + "\\n  ".join(f"{k}: {v}" for k, v in fields.items()))
model = llm.get_model("ours")
model.key = "none"
assert model.prompt("Hello", temperature=0, max_tokens=6, stream=False).text() == EXPECTED
assert model.prompt("Hello", temperature=0, max_tokens=6, stream=True).text() == EXPECTED
conversation = model.conversation()
first = conversation.prompt("Hello", temperature=0, max_tokens=6).text()
assert conversation.prompt("Again", temperature=0, max_tokens=6).text() is not None and first == EXPECTED
""",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    serve = {"adapter_path": str(save_adapter(folder / "sft", base)), "max_context_tokens": 512}
    tree = {"base_model_id": str(base), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with running_server(config) as running:
        yield running


@pytest.mark.parametrize("name", CALLS)
def test_client_gets_every_call_right(server: Running, name: str, tmp_path: Path) -> None:
    python = SCRATCH / "bin/python"
    module = name.partition(",")[0]
    found = python.exists() and subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    if not found or found.returncode:
        pytest.skip(f"{module} is not installed in {SCRATCH.name}; `make clients` fetches it")
    plain = server.post("/v1/generate", {"prompt": "Hello", "adapter": "sft", "max_new_tokens": 6}).json()["text"]
    code = f"URL = {server.url + '/v1'!r}\nEXPECTED = {plain!r}\n{CALLS[name]}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "LLM_USER_PATH": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_lm_eval_measures_over_the_api_what_it_measures_on_the_weights(
    server: Running, base: Path, tmp_path: Path
) -> None:
    """Log-likelihoods and generations of local-completions are those of lm-eval's own Hugging Face model."""
    extra = next(iter(SCRATCH.glob("lib/python*/site-packages")), tmp_path)
    code = f"""
import json, sys
sys.path.append({str(extra)!r})
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
common = dict(model="base", base_url={server.url + "/v1/completions"!r}, tokenizer={str(base)!r}, max_length=256,
              tokenizer_backend="huggingface", num_concurrent=2, batch_size=4)
pairs = [("Once upon", " a time"), ("The sky is", " blue"), ("Hello", " there you are"), ("One two", " three")]
asked = [Instance("loglikelihood", {{}}, pair, n) for n, pair in enumerate(pairs)]
api = LocalCompletionsAPI(**common).loglikelihood(asked)
own = HFLM(pretrained={str(base)!r}, device="cpu", dtype="float32", batch_size=1).loglikelihood(asked)
until = [Instance("generate_until", {{}}, (p, {{"until": ["zzz"], "max_gen_toks": 5}}), n) for n, (p, _) in enumerate(pairs)]
said = LocalCompletionsAPI(**{{**common, "num_concurrent": 1, "batch_size": 1}}).generate_until(until)
print(json.dumps([api, own, said]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    if "tenacity" in done.stderr and "No module" in done.stderr:
        pytest.skip("lm-eval's API models need tenacity; `make clients` fetches it")
    assert done.returncode == 0, done.stderr[-3000:]
    api, own, said = json.loads(done.stdout.splitlines()[-1])
    for (logprob, greedy), (expected, expected_greedy) in zip(api, own, strict=True):
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    for text, prompt in zip(said, ("Once upon", "The sky is", "Hello", "One two"), strict=True):
        body = {"prompt": prompt, "adapter": "base", "max_new_tokens": 5, "raw": True}
        assert text == server.post("/v1/generate", body).json()["text"]


def test_curl(server: Running) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    body = json.dumps(
        {"model": "sft", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "stream": True}
    )
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.endswith("data: [DONE]\n\n")
    head = subprocess.run(["curl", "-sI", f"{server.url}/v1/models"], capture_output=True, text=True, check=True).stdout
    assert "200 OK" in head
