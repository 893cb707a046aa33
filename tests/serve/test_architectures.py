"""Families that keep their configuration, their attention or their memory in another form: served as PEFT answers, or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoConfig

from scripts.common.errors import UserError
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from scripts.model.shape import ModelShape
from serve.cache import context_limit, prove_cache
from serve.jobs import Job
from tests.conftest import run_python, save_tiny_model
from tests.serve.test_engine import generate_with_peft, models_of, new_engine, random_prompts, run_jobs
from tests.support.serving import running_server, save_adapter, save_nested_model

SAVED: dict[str, Callable[[Path], Path]] = {
    "gemma3 with a nested configuration": save_nested_model,
    "gemma2, whose attention adds the mask": lambda folder: save_tiny_model(folder, "gemma2"),
}


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nested_model(tmp_path_factory.mktemp("nested") / "gemma3")


@pytest.fixture
def server_config(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the configuration of a server for a base."""

    def write(base: Path, **serve: object) -> Path:
        path = tmp_path / "config.yaml"
        settings = {"adapter_path": None, "max_context_tokens": 128, "max_concurrent": 2, **serve}
        tree = {"base_model_id": str(base), "performance": {"threads": 1, "dtype": "fp32"}, "serve": settings}
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("architecture", SAVED)
def test_mixed_batches_give_the_tokens_of_plain_peft(architecture, tmp_path, write_config):
    base = SAVED[architecture](tmp_path / "base")
    adapters = {
        "sft": save_adapter(tmp_path / "sft", base),
        "dpo": save_adapter(tmp_path / "dpo", base, "dpo", seed=2, r=7, target_modules=["q_proj", "down_proj"]),
    }
    models = models_of(base, adapters, write_config)
    prove_cache(models, 128)
    names = ["sft", "base", "dpo", "sft", "dpo"]
    jobs = [Job(ids, name, 12) for ids, name in zip(random_prompts(names, len(models.tokenizer)), names, strict=True)]
    asyncio.run(run_jobs(new_engine(models), jobs))
    expected = [generate_with_peft(base, adapters.get(job.model), job.ids, 12) for job in jobs]
    assert [job.out for job in jobs] == expected
    same_prompt = [generate_with_peft(base, adapters.get(name), jobs[0].ids, 12) for name in ("base", "sft", "dpo")]
    assert len({tuple(out) for out in same_prompt}) == 3, "adapters that agree would hide a mix-up"


def test_a_server_on_a_nested_base_answers_as_peft_does(nested, tmp_path, server_config):
    adapter = save_adapter(tmp_path / "sft", nested)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        assert all(".language_model." in key for key in tensors.keys()), "the vision tower has q_proj, too"  # noqa: SIM118
    tokenizer = load_tokenizer(nested)
    ids = render_prompt(ChatFormat(tokenizer), user_turn("Name three fruits."))
    with running_server(server_config(nested, adapter_path=str(adapter))) as server:
        for name, path in (("base", None), ("sft", adapter)):
            answer = server.post(
                "/v1/generate", {"prompt": "Name three fruits.", "adapter": name, "max_new_tokens": 12}
            )
            expected = tokenizer.decode(generate_with_peft(nested, path, ids, 12), skip_special_tokens=True)
            assert answer.json()["text"] == expected


def test_the_smallest_window_of_a_nested_base_bounds_the_context(nested):
    shape = ModelShape.of(AutoConfig.from_pretrained(nested))
    assert [context_limit(shape, tokens) for tokens in (100, 1000)] == [100, 256]
    assert context_limit(replace(shape, windows=(None,) * 3), 1000) == 512, "without a window the positions end"


def test_a_base_that_the_engine_cannot_run_is_one_message_and_an_exit_code(tmp_path, server_config):
    base = save_tiny_model(tmp_path / "base", "bloom")  # it derives positions from a mask of another form
    config = server_config(base)
    done = run_python("-m", "uvicorn", "serve.fastapi_server:app", "--port", "0", LLM_CONFIG=str(config))
    assert done.returncode != 0
    assert f"error: base_model_id: {base}: this server cannot run it: it does not work with the" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_base_without_attention_is_refused(tmp_path, write_config):
    base = save_tiny_model(tmp_path / "base", "mamba")
    shape = json.loads((base / "config.json").read_text())
    del shape["num_attention_heads"]  # every tiny model is given one
    (base / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match=r"base_model_id: .*: this server cannot run it: .*num_attention_heads"):
        models_of(base, {}, write_config)


def test_a_base_that_ignores_the_mask_is_refused(tiny_llama, write_config):
    models = models_of(tiny_llama, {}, write_config)

    def ignoring_the_mask(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        return args, kwargs if mask is None else {**kwargs, "attention_mask": mask | True}

    models.network.register_forward_pre_hook(ignoring_the_mask, with_kwargs=True)
    with pytest.raises(UserError, match=r"base_model_id: .*tiny-llama: this server cannot run it: .* differ by \d+"):
        prove_cache(models, 128)
