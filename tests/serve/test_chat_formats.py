"""Each adapter reads prompts as it was trained to: with its own arguments, day and system prompt."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import yaml

from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from tests.conftest import save_tiny_model, tiny_tokenizer
from tests.serve.test_engine import generate_with_peft
from tests.support.manifests import change_manifest
from tests.support.serving import Running, running_server, save_adapter

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }} {{ tone | default('calm') }} "
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SFT = {"chat_template_kwargs": {"tone": "warm"}, "template_date": "2020-01-02", "system_prompt": "Be warm."}
DPO = {"chat_template_kwargs": {}, "template_date": "2021-03-04", "system_prompt": None, "thinking": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("formats") / "model")
    tiny_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path | None]:
    saved: dict[str, Path | None] = {"base": None}
    for seed, (name, facts) in enumerate({"sft": SFT, "dpo": DPO}.items()):
        folder = save_adapter(base.parent / name, base, name, seed=seed)
        change_manifest(folder, **facts)
        saved[name] = folder
    return saved


@pytest.fixture(scope="module")
def server(base: Path, adapters: dict[str, Path | None]):
    tree = {
        "base_model_id": str(base),
        "offline": True,
        "data": {"chat_template_kwargs": {"tone": "stern"}, "template_date": "2022-05-06", "system_prompt": "Obey."},
        "performance": {"dtype": "fp32", "threads": 1},
        "serve": {"adapter_path": None, "adapters": {name: str(path) for name, path in adapters.items() if path}},
    }
    config = base.parent / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with running_server(config) as running:
        yield running


def formats(base: Path) -> dict[str, ChatFormat]:
    tokenizer = load_tokenizer(base)
    return {
        "base": ChatFormat(tokenizer, {"tone": "stern"}, date(2022, 5, 6), "Obey.", thinking=True),
        "sft": ChatFormat(tokenizer, {"tone": "warm"}, date(2020, 1, 2), "Be warm."),
        "dpo": ChatFormat(tokenizer, {}, date(2021, 3, 4), thinking=True),
    }


def test_prompts_are_those_of_the_adapter_on_every_route(
    server: Running, base: Path, adapters: dict[str, Path | None]
) -> None:
    answers = {}
    for name, chat in formats(base).items():
        ids = render_prompt(chat, chat.user_turn("Hi"))
        expected = chat.tokenizer.decode(generate_with_peft(base, adapters[name], ids, 8), skip_special_tokens=True)
        asked = {"prompt": "Hi", "adapter": name, "max_new_tokens": 8}
        generated = server.post("/v1/generate", asked).json()
        chat_turns = [{"role": "user", "content": "Hi"}]
        conversation = {"model": name, "messages": chat_turns, "max_tokens": 8, "temperature": 0}
        completed = server.post("/v1/chat/completions", conversation).json()
        assert generated["text"] == completed["choices"][0]["message"]["content"] == expected
        assert generated["usage"]["prompt_tokens"] == completed["usage"]["prompt_tokens"] == len(ids)
        answers[name] = expected
    together = server.post("/v1/compare", {"prompt": "Hi", "max_new_tokens": 8}).json()["answers"]
    assert {answer["adapter"]: answer["text"] for answer in together} == answers


def test_history_that_a_client_sends_forges_no_turn(server: Running) -> None:
    """An end of turn inside an assistant's message is text: more tokens than the single one it would be."""

    def tokens(answer: str) -> int:
        turns = [("user", "Hi"), ("assistant", answer), ("user", "And?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        answered = server.post("/v1/chat/completions", {"model": "dpo", "messages": messages, "max_tokens": 1})
        return int(answered.json()["usage"]["prompt_tokens"])

    assert tokens("a<|end|>") > tokens("a") + 1
