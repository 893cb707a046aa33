"""What clients send is done where it can be done, taken where it means nothing, and otherwise refused by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import torch
import yaml
from openai import OpenAI
from pydantic import BaseModel

from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from tests.support.serving import Running, running_server, save_adapter

MESSAGES: Any = [{"role": "user", "content": "Name three fruits."}]
GREEDY: Any = {"model": "sft", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "sft", tiny_llama)


@pytest.fixture(scope="module")
def server(tiny_llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = tmp_path_factory.mktemp("server") / "config.yaml"
    serve = {"adapter_path": str(adapter), "max_context_tokens": 256, "max_concurrent": 8}
    tree = {"base_model_id": str(tiny_llama), "performance": {"threads": 1, "dtype": "fp32"}, "serve": serve}
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with running_server(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def network(tiny_llama: Path, adapter: Path) -> Any:
    """Return base and adapter as the libraries load them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter).eval()


def logps_of(network: Any, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities behind each token, (T, V)."""
    with torch.inference_mode():
        return network(torch.tensor([ids])).logits[0].float().log_softmax(-1)


HARMLESS = [
    {"presence_penalty": 0}, {"frequency_penalty": 0}, {"user": "someone"}, {"logprobs": False}, {"logit_bias": {}},
    {"metadata": {"run": "1"}}, {"store": False}, {"response_format": {"type": "text"}}, {"tools": []},
    {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"functions": []},
    {"temperature": None}, {"top_p": None}, {"n": None}, {"stream": None}, {"stop": None}, {"stop": []},
    {"max_tokens": None, "max_completion_tokens": 8}, {"modalities": ["text"]}, {"audio": None}, {"service_tier": "auto"},
    {"seed": -1}, {"seed": None}, {"reasoning_effort": None}, {"prediction": None}, {"top_logprobs": None},
    {"stream_options": None}, {"some_field_of_next_year": None}, {"some_list_of_next_year": []}, {"top_k": -1}, {"top_k": 0},
    {"chat_template_kwargs": {}}, {"prompt_cache_retention": "24h"}, {"echo": False}, {"best_of": 1}, {"ignore_eos": False},
    {"use_beam_search": False}, {"length_penalty": 1.0}, {"logit_bias": None},
    {"presence_penalty": None}, {"repetition_penalty": 1.0}, {"min_p": 0}, {"verbosity": "medium"}, {"store": True},
]  # fmt: skip


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_chat_fields_that_mean_nothing_change_nothing(server, fields):
    body = {**GREEDY, "messages": MESSAGES}
    expected = server.post("/v1/chat/completions", body).json()["choices"]
    if fields.get("temperature", 0) is None:
        fields = {**fields, "top_k": 1}  # null is OpenAI's default, 1
    answer = server.post("/v1/chat/completions", {**body, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == expected


@pytest.mark.parametrize("fields", [{"echo": False}, {"suffix": None}, {"suffix": ""}, {"best_of": 1}, {"logprobs": None},
                                    {"logprobs": False}, {"user": "x"}, {"n": 1}, {"tools": []}, {"top_k": -1}, {"length_penalty": 1}], ids=str)  # fmt: skip
def test_completion_fields_that_mean_nothing_change_nothing(server, fields):
    body = {**GREEDY, "prompt": "Once upon"}
    expected = server.post("/v1/completions", body).json()["choices"]
    assert server.post("/v1/completions", {**body, **fields}).json()["choices"] == expected


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
UNSUPPORTED = [
    ({"tools": [TOOL]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"audio": {"voice": "a", "format": "wav"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, AUDIO]}]}, "input_audio"),
    ({"messages": [*MESSAGES, CALL, *MESSAGES]}, "tool_calls"),
    ({"messages": [*MESSAGES, {"role": "tool", "content": "1", "tool_call_id": "1"}]}, "tools"),
    ({"max_tokenz": 4}, "max_tokenz"),
    ({"max_tokenz": False}, "max_tokenz"),
    ({"top_k": -2}, "top_k"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"max_tokens": 250}, "messages"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"n": 9}, "n"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"stop": ["x"] * 5}, "stop"),
    ({"response_format": {"type": "xml"}}, "response_format"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "name"), UNSUPPORTED, ids=[name for _, name in UNSUPPORTED])
def test_what_would_change_the_answer_is_refused_by_the_clients_own_name(server, fields, name):
    answer = server.post("/v1/chat/completions", {"model": "sft", "messages": MESSAGES, "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert name in error["message"]
    assert "max_new_tokens" not in answer.text


@pytest.mark.parametrize(("fields", "name"), [({"suffix": "end"}, "suffix"), ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"), ({"prompt": [[10**6]]}, "prompt"), ({"prompt": []}, "prompt")])  # fmt: skip
def test_so_is_a_completion(server, fields, name):
    answer = server.post("/v1/completions", {"prompt": "Once", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == name


def test_generate_stays_strict(server):
    for field in ("user", "max_tokens", "best_of", "max_new_tokns"):
        answer = server.post("/v1/generate", {"prompt": "Hi", field: 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unknown_field")
        assert field in answer.json()["error"]["message"]


def test_logprobs_are_those_of_the_network(client, network, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    ids = render_prompt(ChatFormat(tokenizer), user_turn(MESSAGES[0]["content"]))
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=20, **GREEDY)
    [choice] = answer.choices
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        logps = logps_of(network, ids)[-1]
        ids.append(int(logps.argmax()))
        assert token.logprob == pytest.approx(float(logps.max()), abs=1e-4)
        expected = logps.topk(20).values.tolist()
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(expected, abs=1e-4)
        assert bytes(token.bytes).decode(errors="replace") == token.token
    chunks = list(client.chat.completions.create(messages=MESSAGES, logprobs=True, stream=True, **GREEDY))
    streamed = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content or []]
    assert [(t.token, t.logprob) for t in streamed] == [(t.token, t.logprob) for t in choice.logprobs.content]


def test_echo_measures_the_prompt_as_lm_eval_reads_it(client, network, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "There was one")]
    answer = client.completions.create(model="sft", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True)
    for choice, ids in zip(answer.choices, prompts, strict=True):
        found = choice.logprobs
        assert len(found.tokens) == len(ids) + 1, "lm-eval drops the last one"
        assert found.token_logprobs[0] is None
        logps = logps_of(network, ids)
        expected = [float(logps[at, token]) for at, token in enumerate(ids[1:])]
        assert found.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        best = [float(row.max()) for row in logps[:-1]]
        assert [max(top.values()) for top in found.top_logprobs[1:-1]] == pytest.approx(best, abs=1e-4)
        assert choice.text.startswith(tokenizer.decode(ids))
        assert "".join(found.tokens) == choice.text
        assert found.text_offset == [len("".join(found.tokens[:at])) for at in range(len(found.tokens))]
    silent = client.completions.create(model="sft", prompt="Once upon a time", max_tokens=0, echo=True)
    assert (silent.choices[0].text, silent.usage.completion_tokens) == ("Once upon a time", 0)


def test_several_answers_and_prompts_come_back_in_order(client):
    drawn = {"model": "sft", "temperature": 1.0, "max_tokens": 8, "seed": 3}
    answer = client.chat.completions.create(messages=MESSAGES, n=3, **drawn)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    later = client.chat.completions.create(messages=MESSAGES, **{**drawn, "seed": 4})
    assert later.choices[0].message.content == texts[1]
    assert answer.usage.prompt_tokens == later.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(messages=MESSAGES, n=3, stream=True, **drawn):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    pairs = client.completions.create(prompt=["Once", "There"], n=2, **drawn).choices
    alone = client.completions.create(prompt="There", n=2, **drawn).choices
    assert [choice.text for choice in pairs[2:]] == [choice.text for choice in alone]


def test_a_last_assistant_message_is_continued(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message.content
    first = client.chat.completions.create(messages=MESSAGES, **{**GREEDY, "max_tokens": 3}).choices[0].message.content
    rest = client.chat.completions.create(
        messages=[*MESSAGES, {"role": "assistant", "content": first}], **{**GREEDY, "max_tokens": 5}
    )
    assert first + rest.choices[0].message.content == whole


def test_a_history_is_taken_as_clients_keep_it(server, client):
    before = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message
    text = before.content
    plain = [*MESSAGES, {"role": "assistant", "content": text}, *MESSAGES]
    expected = server.post("/v1/chat/completions", {**GREEDY, "messages": plain}).json()["choices"]
    parts = {"role": "user", "content": [{"type": "text", "text": "Name three"}, {"type": "text", "text": " fruits."}]}
    kept = {**before.model_dump(), "tool_calls": None, "refusal": None, "function_call": None, "annotations": []}
    answer = server.post("/v1/chat/completions", {**GREEDY, "messages": [parts, kept, {**parts, "name": "me"}]})
    assert answer.json()["choices"] == expected, answer.text
    empty = {"role": "assistant", "content": None, "tool_calls": None}
    assert server.post("/v1/chat/completions", {**GREEDY, "messages": [parts, empty, parts]}).status_code == 200
    bare = {"role": "assistant", "content": None}
    assert server.post("/v1/chat/completions", {**GREEDY, "messages": [parts, bare, parts]}).status_code == 400
    roles = [{"role": role, "content": "Be brief."} for role in ("system", "developer")]
    told = [server.post("/v1/chat/completions", {**GREEDY, "messages": [role, *MESSAGES]}) for role in roles]
    assert told[0].json()["choices"] == told[1].json()["choices"]


def test_biases_and_penalties_reach_the_sampler(client, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    token = tokenizer.encode("apple", add_special_tokens=False)[0]
    forced = client.completions.create(prompt="Once", logit_bias={str(token): 100}, **GREEDY)
    assert forced.choices[0].text == tokenizer.decode([token] * 8)
    both = {"logit_bias": {str(token): 3}, "frequency_penalty": 2.0}
    penalised = client.completions.create(prompt="Once", **both, **GREEDY)
    assert penalised.choices[0].text != forced.choices[0].text
    certain = client.completions.create(
        prompt="Once", model="sft", max_tokens=8, temperature=1, extra_body={"min_p": 1}
    )
    assert certain.choices[0].text == client.completions.create(prompt="Once", **GREEDY).choices[0].text


class Verdict(BaseModel):
    kind: Literal["good", "bad"]
    stars: Literal[1, 2, 3]


def test_the_official_client_parses_structured_answers(client):
    answer = client.chat.completions.parse(messages=MESSAGES, response_format=Verdict, **{**GREEDY, "max_tokens": 64})
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    assert answer.choices[0].finish_reason == "stop"


def test_one_model_can_be_asked_for(client, server):
    assert client.models.retrieve("sft").id == "sft"
    answer = httpx.get(f"{server.url}/v1/models/none")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v1/models", "/v1/models/sft", "/docs", "/", "/metrics"])
def test_head_is_get_without_a_body(server, path):
    head, get = (httpx.request(method, server.url + path) for method in ("HEAD", "GET"))
    assert (head.status_code, head.headers["content-type"]) == (200, get.headers["content-type"])
    assert head.content == b""
    assert httpx.head(f"{server.url}/v1/generate").headers["allow"] == "POST"


def test_every_field_of_the_routes_is_in_the_api_page(server):
    page, document = httpx.get(f"{server.url}/docs").text, httpx.get(f"{server.url}/openapi.json").json()
    for name in ("GenerateRequest", "ChatRequest", "CompletionRequest", "AdapterRequest"):
        for field in document["components"]["schemas"][name]["properties"]:
            assert f"<code>{field}</code>" in page
    assert json.dumps(document)
