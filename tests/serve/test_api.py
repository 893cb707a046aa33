"""The routes, through a real server process and real clients."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from scripts.common.schema import Data
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.records import parse_preference
from scripts.dataset.rendering import render_completion, render_prompt
from scripts.model.base import load_tokenizer
from tests.support.serving import Running, running_server, save_adapter, wait_for

PROMPT = "Name three fruits."


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an SFT adapter and a DPO adapter that names it as its parent; their ranks and targets differ."""
    from scripts.common.artifacts import read_manifest

    folder = tmp_path_factory.mktemp("adapters")
    sft = save_adapter(folder / "sft", tiny_llama, "sft", seed=1)
    return {
        "sft": sft,
        "dpo": save_adapter(
            folder / "dpo",
            tiny_llama,
            "dpo",
            seed=2,
            parent=read_manifest(sft).as_parent(sft),
            r=7,
            alpha=3,
            target_modules=["q_proj", "down_proj"],
        ),
    }


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
    from tests.serve.test_engine import generate_with_peft

    return load_tokenizer(base).decode(generate_with_peft(base, adapter, ids, new), skip_special_tokens=True)


def events(response: httpx.Response) -> list:
    """Return the events of a stream; the last one is the text [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_generate_answers_as_peft_does(server, tiny_llama, adapters):
    tokenizer = load_tokenizer(tiny_llama)
    ids = render_prompt(ChatFormat(tokenizer), user_turn(PROMPT))
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


def test_a_stream_says_the_same_as_the_whole_answer(server):
    body = {"prompt": PROMPT, "adapter": "sft", "max_new_tokens": 12}
    whole = server.post("/v1/generate", body).json()
    *pieces, last, done = events(server.post("/v1/generate", {**body, "stream": True}))
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert last == {"finish_reason": whole["finish_reason"], "usage": whole["usage"]}
    assert done == "[DONE]"


def test_raw_leaves_the_prompt_alone(server, tiny_llama, adapters):
    tokenizer = load_tokenizer(tiny_llama)
    rendered = tokenizer.apply_chat_template(user_turn(PROMPT), add_generation_prompt=True, tokenize=False)
    body = {"adapter": "sft", "max_new_tokens": 8}
    raw = server.post("/v1/generate", {**body, "prompt": rendered, "raw": True}).json()
    assert raw == server.post("/v1/generate", {**body, "prompt": PROMPT}).json()
    typed = server.post("/v1/generate", {**body, "prompt": rendered}).json()
    assert typed["usage"]["prompt_tokens"] > raw["usage"]["prompt_tokens"], "typed control tokens are text"


def test_the_official_client_is_content(server):
    from openai import BadRequestError, NotFoundError, OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "sft", "dpo"]
    messages = [{"role": "user", "content": PROMPT}]
    settings = {"model": "sft", "temperature": 0, "max_tokens": 10}
    chat = client.chat.completions.create(messages=messages, **settings)
    plain = server.post("/v1/generate", {"prompt": PROMPT, "adapter": "sft", "max_new_tokens": 10}).json()
    assert chat.choices[0].message.content == plain["text"]
    assert chat.usage.completion_tokens == plain["usage"]["completion_tokens"]
    chunks = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **settings
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain["text"]
    assert chunks[-1].usage == chat.usage
    text = client.completions.create(prompt="Once upon", **settings)
    raw = {"prompt": "Once upon", "adapter": "sft", "max_new_tokens": 10, "raw": True}
    assert text.choices[0].text == server.post("/v1/generate", raw).json()["text"]
    with pytest.raises(NotFoundError, match="base, sft, dpo"):
        client.chat.completions.create(messages=messages, model="gpt-5")
    with pytest.raises(BadRequestError, match="last message"):
        client.chat.completions.create(messages=[{"role": "assistant", "content": "I"}], model="sft")


def test_compare_answers_with_all_models(server):
    answers = server.post("/v1/compare", {"prompt": PROMPT, "max_new_tokens": 8}).json()["answers"]
    alone = [
        server.post("/v1/generate", {"prompt": PROMPT, "adapter": name, "max_new_tokens": 8}).json()
        for name in ("base", "sft", "dpo")
    ]
    assert answers == alone


def test_score_is_the_log_probability_of_the_answer(server, tiny_llama, adapters):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answer = "Apples, pears and plums."
    tokenizer = load_tokenizer(tiny_llama)
    prompt_ids = render_prompt(ChatFormat(tokenizer), user_turn(PROMPT))
    ids = prompt_ids + render_completion(ChatFormat(tokenizer), user_turn(PROMPT), prompt_ids, answer)
    logprobs = {}
    for name, path in adapters.items():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        with torch.inference_mode():
            logits = PeftModel.from_pretrained(model, path).eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        logprobs[name] = sum(float(logits[at - 1, ids[at]]) for at in range(len(prompt_ids), len(ids)))
    measured = server.post("/v1/score", {"prompt": PROMPT, "answer": answer, "adapter": "dpo"}).json()
    assert measured["logprob"] == pytest.approx(logprobs["dpo"], abs=1e-3)
    assert measured["reference"] == "sft", "DPO's reference is the adapter it started from"
    assert measured["implicit_reward"] == pytest.approx(0.2 * (logprobs["dpo"] - logprobs["sft"]), abs=1e-3)
    assert measured["tokens"] == len(ids) - len(prompt_ids)


def test_the_seed_decides_no_matter_what_else_runs(server):
    body = {"prompt": PROMPT, "adapter": "sft", "max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9}

    def ask(seed: int) -> str:
        return server.post("/v1/generate", {**body, "seed": seed}).json()["text"]

    alone = ask(7)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, [7, 1, 7, 2]))
    assert together[0] == together[2] == alone
    assert len(set(together)) == 3


def test_stop_strings_end_the_answer_and_never_show(server):
    body = {"prompt": PROMPT, "adapter": "sft", "max_new_tokens": 16}
    text = server.post("/v1/generate", body).json()["text"]
    stop = text[5:9]
    stopped = server.post("/v1/generate", {**body, "stop": stop}).json()
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"
    pieces = events(server.post("/v1/generate", {**body, "stop": [stop, "(a+)+$"], "stream": True}))[:-2]
    assert "".join(piece["text"] for piece in pieces) == stopped["text"]


def test_metrics_agree_with_the_answers(server):
    before = [server.metric(f"serve_{kind}_tokens_total") for kind in ("prompt", "generation")]
    usages = [
        server.post("/v1/generate", {"prompt": PROMPT * n, "max_new_tokens": n}).json()["usage"] for n in (1, 2, 5)
    ]
    after = [server.metric(f"serve_{kind}_tokens_total") for kind in ("prompt", "generation")]
    assert after[0] - before[0] == sum(usage["prompt_tokens"] for usage in usages)
    assert after[1] - before[1] == sum(usage["completion_tokens"] for usage in usages)


def test_votes_become_preference_records(server, config):
    record = {
        "prompt": [{"role": "user", "content": PROMPT}], "chosen": "Apples.", "rejected": "No.",
        "chosen_model": "dpo", "rejected_model": "base", "seed": 1,
    }  # fmt: skip
    assert server.post("/v1/votes", record).status_code == 201
    path = Path(yaml.safe_load(config.read_text())["serve"]["votes_path"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    [line] = [json.loads(line) for line in path.read_text().splitlines()]
    assert {key: line[key] for key in ("prompt", "chosen", "rejected")} == {
        key: record[key] for key in ("prompt", "chosen", "rejected")
    }
    assert line["models"] == {"chosen": "dpo", "rejected": "base"}
    pair = parse_preference(line, "votes.jsonl:1", Data())  # what train_dpo reads
    assert (list(pair.prompt), pair.chosen, pair.rejected) == (record["prompt"], "Apples.", "No.")
    assert server.post("/v1/votes", {**record, "rejected": "Apples."}).json()["error"]["code"] == "invalid_value"


def test_one_log_line_per_request_without_its_text(server):
    answer = server.post("/v1/generate", {"prompt": "a secret phrase", "max_new_tokens": 3})
    assert wait_for(lambda: answer.headers["x-request-id"] in server.log_text()), "it is written after the answer"
    text = server.log_text()
    [line] = [json.loads(line) for line in text.splitlines() if answer.headers["x-request-id"] in line]
    assert line["route"] == "/v1/generate"
    assert line["status"] == 200
    assert line["completion_tokens"] == 3
    assert line["model"] == "dpo"
    assert "secret" not in text


def test_models_state_their_origin_and_no_path(server):
    answer = httpx.get(f"{server.url}/v1/models")
    entries = {entry["id"]: entry for entry in answer.json()["data"]}
    assert entries["dpo"]["default"]
    assert entries["sft"]["parent"] == "base"
    assert len(entries["sft"]["adapter_sha256"]) == 64
    assert entries["base"]["max_model_len"] == 256
    assert "/" not in answer.text.replace("\\/", "")
