"""A server that keeps int8 weights only: what it answers, what it refuses, and what it says of the difference."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.common.machine import choose_machine
from scripts.model.adapter import load_adapter
from serve.adapters import Models
from serve.cache import choose_forward
from serve.int8 import answer_in_int8, check_settings
from serve.jobs import Job
from serve.service import Service
from serve.stacking import RowAdapters, StackedLinears
from tests.model.test_int8 import dequantised
from tests.serve.test_engine import models_of, new_engine, random_prompts, run_jobs, turns
from tests.support.architectures import save_family
from tests.support.models import load
from tests.support.serving import Running, running_server, save_adapter

ADMIN = {"x-api-key": "the-admin-key"}


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return two adapters with different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    few = {"target_modules": ["q_proj", "down_proj"]}
    return {
        "sft": save_adapter(folder / "sft", tiny_llama, "sft", seed=1),
        "dpo": save_adapter(folder / "dpo", tiny_llama, "dpo", seed=2, r=7, alpha=3, **few),
    }


def in_int8(models: Models, lean: bool = True) -> Models:
    """Round the weights of loaded models as a server does."""
    answer_in_int8(models, choose_forward(models, 3, 128, lean), 128)
    return models


@pytest.fixture
def models(tiny_llama: Path, adapters: dict[str, Path], write_config) -> Models:
    return in_int8(models_of(tiny_llama, adapters, write_config))


@pytest.fixture(params=[True, False], ids=["lean", "library"])
def lean(request: pytest.FixtureRequest) -> bool:
    return request.param


def rounded_peft(base: Path, adapter: Path | None) -> torch.nn.Module:
    """Return base and adapter as PEFT computes them, on weights that were rounded and widened again."""
    model = load(base)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = dequantised(parameter.data)
    return load_adapter(model, adapter).eval() if adapter else model


def test_every_row_of_a_mixed_batch_gets_its_own_adapter_in_full(models, tiny_llama, adapters):
    names = ["sft", "base", "dpo", "sft"]
    ids = torch.randint(5, 500, (len(names), 9), generator=torch.Generator().manual_seed(0))
    models.rows.set(names)
    with torch.inference_mode():
        mixed = models.network(ids).logits
        for row, name in enumerate(names):
            alone = rounded_peft(tiny_llama, adapters.get(name))(ids[row : row + 1]).logits[0]
            assert (mixed[row] - alone).norm() < 0.05 * alone.norm(), name


def test_a_mixed_batch_answers_as_each_row_alone(models, lean):
    names = ["sft", "base", "dpo", "sft", "dpo"]
    prompts = random_prompts(names, 500)

    def answers(slots: int) -> list[list[int]]:
        jobs = [Job(ids, name, 12) for ids, name in zip(prompts, names, strict=True)]
        asyncio.run(run_jobs(new_engine(models, slots=slots, lean=lean), jobs))
        return [job.out for job in jobs]

    assert answers(3) == answers(1)


def test_the_next_turn_of_a_chat_reads_only_what_is_new(models, lean):
    alone, _ = turns(models, "sft", kept_tokens=0, lean=lean)
    kept, read = turns(models, "sft", kept_tokens=1000, lean=lean)
    assert [job.out for job in kept] == [job.out for job in alone]
    assert all(new <= 8 + 5 for new in read[1:])


@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_rounded_layers_side_by_side_add_their_biases(tokens: int, published: torch.dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, width).to(published).float() for width in (40, 24)]
    stack = StackedLinears(layers, RowAdapters({}, "cpu", torch.float32))
    stack.keep_in_int8()
    x = torch.randn(tokens, 64)

    with torch.inference_mode():
        found = stack.side_by_side(x)

    expected = [torch.nn.functional.linear(x, dequantised(layer.weight), layer.bias) for layer in layers]
    assert (found - torch.cat(expected, 1)).norm() < 0.01 * found.norm()


def test_only_adapters_keep_full_matrices(models):
    network = models.network
    assert not [name for name, parameter in network.named_parameters() if parameter.ndim > 1]
    stacks = [module for module in network.modules() if isinstance(module, StackedLinears)]
    assert stacks
    assert all(stack.weight is None and stack.packed is None for stack in stacks)
    of_stacks = {id(buffer) for stack in stacks for buffer in (stack.A, stack.B)}
    others = [buffer for buffer in network.buffers() if buffer.ndim > 1 and id(buffer) not in of_stacks]
    assert others
    assert all(buffer.dtype == torch.int8 for buffer in others)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma 3", "Granite", "Phi-3", "OPT"])
def test_other_families_answer_nearly_as_with_full_weights(tmp_path, write_config, family, lean):
    """With biases, scaled embeddings, scaled logits, joined projections, and positions in a table."""
    base = save_family(tmp_path / "base", family)
    models = models_of(base, {}, write_config)
    effect = answer_in_int8(models, choose_forward(models, 3, 128, lean), 128)
    assert effect.tokens == 96
    assert effect.agreement > 0.8
    assert 0 <= effect.kl < 0.01


@pytest.mark.parametrize("context", [8, 20])
def test_a_short_context_is_measured_within_it(tiny_llama, write_config, context, lean):
    models = models_of(tiny_llama, {}, write_config)
    effect = answer_in_int8(models, choose_forward(models, 3, context, lean), context)
    assert effect.tokens == 6 * (context // 2)


def test_a_base_that_cannot_be_rounded_is_refused_by_name(tiny_gpt2, write_config):
    models = models_of(tiny_gpt2, {}, write_config)
    with pytest.raises(UserError, match=r"serve\.weights: int8: .*Conv1D"):
        in_int8(models)


def test_the_page_of_votes_needs_full_weights(write_config):
    config = load_config(write_config(serve={"weights": "int8", "queue_path": "questions.jsonl"})).values
    with pytest.raises(UserError, match=r"serve\.queue_path"):
        check_settings(config, choose_machine(config))


def test_full_weights_are_the_default(tiny_llama, write_config):
    serve = {"adapter_path": None}
    config = load_config(write_config(base_model_id=str(tiny_llama), performance={"device": "cpu"}, serve=serve)).values
    assert Service(config, choose_machine(config), []).int8 is None


@pytest.fixture(scope="module")
def server(tiny_llama: Path, adapters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    save_adapter(folder / "root" / "more", tiny_llama, "sft", seed=5, target_modules=["k_proj", "up_proj"])
    tree = {
        "base_model_id": str(tiny_llama), "offline": True, "performance": {"dtype": "fp32", "threads": 1},
        "serve": {
            "weights": "int8", "adapter_path": str(adapters["dpo"]), "max_context_tokens": 256,
            "adapters_root": str(folder / "root"),
        },
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with running_server(config, SERVE_ADMIN_KEYS=ADMIN["x-api-key"]) as running:
        yield running


def test_the_start_says_what_rounding_changes(server):
    found = httpx.get(f"{server.url}/health").json()["int8"]
    assert 0.8 < found["agreement"] <= 1
    assert 0 <= found["kl"] < 0.01
    assert server.metric("serve_int8_agreement") == pytest.approx(found["agreement"], abs=1e-4)
    assert server.metric("serve_int8_kl_nats") == pytest.approx(found["kl"], abs=1e-6)
    assert "serve.weights: int8: " in server.log_text()
    assert "of 96 answer tokens stay the likeliest" in server.log_text()


CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/score", {"prompt": "Hello", "answer": "Hi"}, 422),
        ("/v1/chat/completions", {**CHAT, "logprobs": True}, 400),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 2, "logprobs": 1}, 400),
    ],
)
def test_log_probabilities_are_refused_by_name(server, path, body, status):
    answer = server.post(path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, "int8_weights")
    assert "serve.weights: int8" in answer.json()["error"]["message"]


def test_answers_come_as_ever_and_an_adapter_may_join(server):
    assert server.post("/v1/chat/completions", CHAT).status_code == 200
    body = {"prompt": "Name three fruits.", "max_new_tokens": 12}
    base = server.post("/v1/generate", {**body, "adapter": "base"}).json()["text"]
    added = server.post("/v1/adapters", {"name": "more", "path": "more"}, headers=ADMIN)
    assert added.status_code == 201, added.text
    assert server.post("/v1/generate", {**body, "adapter": "more"}).json()["text"] != base
    assert server.post("/v1/generate", {**body, "adapter": "base"}).json()["text"] == base
