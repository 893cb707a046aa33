"""Families that mask, place or keep their tokens in another way: served as PEFT answers, or refused before the start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig

from scripts.common.errors import UserError
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from scripts.model.shape import ModelShape
from serve import engine as engine_module
from serve.adapters import Models
from serve.cache import LibraryForward, choose_forward, context_limit
from serve.cache import prove_cache as prove
from serve.jobs import Job
from serve.lean_forward import LeanForward
from tests.conftest import run_python, save_tiny_model
from tests.serve.test_engine import generate_with_peft, models_of, new_engine, random_prompts, run_jobs
from tests.support.serving import running_server, save_adapter, save_nested_model

WINDOW = 8
SLIDING = {"sliding_window": WINDOW}
HYBRID = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
FEW_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT_HEADS = {  # keys are larger than values
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "head_dim": 4,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip

# The configuration's type, and what it says beside the sizes of every tiny model.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2, whose attention adds the mask": ("gemma2", HYBRID),
    "gpt_oss": ("gpt_oss", {**HYBRID, **FEW_EXPERTS}),
    "llama4 in chunks": (
        "llama4_text",
        {
            "attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "qwen2 with a window in some layers": ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "mistral with a window in all layers": ("mistral", SLIDING),
    "gpt_neo, which masks by itself": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "window_size": WINDOW, "attention_types": [[["global", "local"], 1]]},
    ),
    "bloom, which knows positions by ALiBi": ("bloom", {"n_head": 4, "n_layer": 2, "initializer_range": 0.2}),
    "deepseek_v3": ("deepseek_v3", LATENT_HEADS),
}  # fmt: skip
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": ("gemma3_text", HYBRID),
    "cohere2": ("cohere2", HYBRID),
    "exaone4": ("exaone4", HYBRID),
    "olmo3": ("olmo3", HYBRID),
    "phi3": ("phi3", SLIDING),
    "starcoder2": ("starcoder2", SLIDING),
    "mixtral": ("mixtral", {**SLIDING, **FEW_EXPERTS}),
    "smollm3, one layer without positions": ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", {}),
    "glm4": ("glm4", {}),
    "stablelm": ("stablelm", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
}
# Their experts and routers are another matter.
ATTENTION = {
    "llama4 in chunks": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"],
}
# By them a family says how long its windows are.
WINDOWS = ("sliding_window", "attention_chunk_size")


def save_family(folder: Path, family: str) -> Path:
    kind, changes = {**FAMILIES, **MORE_FAMILIES}[family]
    return save_tiny_model(folder, kind, **changes)


class PlainPeft:
    """The libraries alone: one sequence at a time, without padding or cache."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.text = model.config.get_text_config()
        for name, path in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(path, name)
            else:
                model = PeftModel.from_pretrained(model, path, name)
        self.model = model.eval()

    @torch.inference_mode()
    def next_tokens(self, job: Job) -> list[int]:
        """Return the likeliest token after each beginning of a job's answer."""
        input_ids = torch.tensor([job.ids + job.out[:-1]])
        if job.model == "base":
            with self.model.disable_adapter():
                logits = self.model(input_ids=input_ids, use_cache=False).logits
        else:
            self.model.set_adapter(job.model)
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        return logits[0, len(job.ids) - 1 :].argmax(-1).tolist()


def prove_cache(models: Models, context: int) -> None:
    prove(models, LibraryForward(models, 2, context), context)


def served_as_peft_answers(base: Path, folder: Path, write_config, monkeypatch, target_modules: Any = "auto") -> None:
    """Hold mixed batches, in which rows join and leave, against plain PEFT; prompts are read together and in pieces."""
    adapters = {
        "sft": save_adapter(folder / "sft", base, target_modules=target_modules),
        "dpo": save_adapter(folder / "dpo", base, "dpo", seed=2, r=7, target_modules=target_modules),
        "other": save_adapter(folder / "other", base, seed=3, r=2, target_modules=target_modules),
    }
    models = models_of(base, adapters, write_config)
    prove_cache(models, 128)
    names = list(islice(cycle(("sft", "base", "dpo", "other")), 8))
    prompts = random_prompts(names, len(models.tokenizer))
    plain = PlainPeft(base, adapters)
    for tokens_per_step in (WINDOW, 100):
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS_PER_STEP", tokens_per_step)
        jobs = [Job(ids, name, 12 - 3 * (n % 3)) for n, (ids, name) in enumerate(zip(prompts, names, strict=True))]
        asyncio.run(run_jobs(new_engine(models), jobs))
        assert all(job.out for job in jobs)
        assert [job.out for job in jobs] == [plain.next_tokens(job) for job in jobs]
    windows = [key for key in WINDOWS if getattr(plain.text, key, None)]
    for key in windows:
        setattr(plain.text, key, 128)
    if windows:
        assert [job.out for job in jobs] != [plain.next_tokens(job) for job in jobs], "a lost window would not show"
    same_prompt = [Job(prompts[0], name, 8) for name in models.served]
    asyncio.run(run_jobs(new_engine(models), same_prompt))
    assert len({tuple(job.out) for job in same_prompt}) == 4, "adapters that agree would hide a mix-up"


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_give_the_tokens_of_plain_peft(family, tmp_path, write_config, monkeypatch):
    targets = ATTENTION.get(family, "auto")
    served_as_peft_answers(save_family(tmp_path / "base", family), tmp_path, write_config, monkeypatch, targets)


@pytest.mark.parametrize("family", ["mistral with a window in all layers", "qwen2 with a window in some layers"])
def test_a_window_keeps_no_family_from_the_lean_decoder(family, tmp_path, write_config):
    """The proof gives both sides short windows; afterwards the layers have their own again."""
    models = models_of(save_family(tmp_path / "base", family), {}, write_config)
    forward = choose_forward(models, 2, 128, lean=True)
    assert isinstance(forward, LeanForward)
    assert [layer.window for layer in forward.lean.layers] == list(models.shape.windows)


@pytest.mark.drill
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_mixed_batches_of_more_families_give_the_tokens_of_plain_peft(family, tmp_path, write_config, monkeypatch):
    served_as_peft_answers(save_family(tmp_path / "base", family), tmp_path, write_config, monkeypatch)


def test_mixed_batches_on_a_nested_base_give_the_tokens_of_plain_peft(nested, tmp_path, write_config, monkeypatch):
    served_as_peft_answers(nested, tmp_path, write_config, monkeypatch)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nested_model(tmp_path_factory.mktemp("nested") / "gemma3", sliding_window=WINDOW)


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


def test_a_window_does_not_bound_the_context(nested):
    shape = ModelShape.of(AutoConfig.from_pretrained(nested))
    assert shape.window == WINDOW
    assert [context_limit(shape, tokens) for tokens in (100, 1000)] == [100, 512], "the positions end"
    assert context_limit(replace(shape, rope_switch=256), 1000) == 256, "longer, all cached keys would be wrong"


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"]},
            "its layers of the kind conv keep more than keys and values",
        ),
        ("recurrent_gemma", {}, "its layers of the kind linear_attention keep more than keys and values"),
    ],
)
def test_a_base_that_keeps_a_state_is_refused_with_the_reason(architecture, changes, reason, tmp_path, write_config):
    base = save_tiny_model(tmp_path / "base", architecture, **changes)
    models = models_of(base, {}, write_config)
    with pytest.raises(UserError, match=f"base_model_id: .*: this server cannot run it: {reason} "):
        prove_cache(models, 128)


def test_a_base_that_the_engine_cannot_run_is_one_message_and_an_exit_code(tmp_path, server_config):
    base = save_tiny_model(tmp_path / "base", "lfm2", layer_types=["conv", "full_attention"])
    config = server_config(base)
    done = run_python("-m", "uvicorn", "serve.fastapi_server:app", "--port", "0", LLM_CONFIG=str(config))
    assert done.returncode != 0
    assert f"error: base_model_id: {base}: this server cannot run it: its layers of the kind conv" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_base_without_attention_is_refused(tmp_path, write_config):
    base = save_tiny_model(tmp_path / "base", "mamba")
    shape = json.loads((base / "config.json").read_text())
    del shape["num_attention_heads"]  # every tiny model is given one
    (base / "config.json").write_text(json.dumps(shape))
    reason = r"its layers of the kind linear_attention keep more than keys and values \(it has no attention\)"
    with pytest.raises(UserError, match=f"base_model_id: .*: this server cannot run it: {reason}"):
        models_of(base, {}, write_config)


def change_arguments(module: torch.nn.Module, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change what a module is given, in passes of several rows: those of the engine, and not the plain ones."""

    def change(_module: Any, args: Any, given: dict[str, Any]) -> Any:
        rows = next(value for value in (*args, *given.values()) if isinstance(value, torch.Tensor))
        changed = {key: of(given[key]) for key, of in changes.items()} if len(rows) > 1 else {}
        return args, {**given, **changed}

    module.register_forward_pre_hook(change, with_kwargs=True)


def attention_layers(models: Models) -> list[Any]:
    return [module for name, module in models.network.named_modules() if name.endswith(".self_attn")]


def without_window(mask: torch.Tensor) -> torch.Tensor:
    """Let each token see all keys before the last one that it sees."""
    return mask.int().flip(-1).cummax(-1).values.flip(-1).bool()


def refused(models: Models) -> None:
    with pytest.raises(UserError, match=r"base_model_id: .*: this server cannot run it: .* differ by \d+"):
        prove_cache(models, 128)


def test_a_base_that_ignores_the_mask_is_refused(tiny_llama, write_config):
    models = models_of(tiny_llama, {}, write_config)
    prove_cache(models, 128)
    change_arguments(attention_layers(models)[0], attention_mask=lambda mask: mask | True)
    refused(models)


def test_a_base_that_ignores_the_positions_is_refused(tiny_llama, write_config):
    models = models_of(tiny_llama, {}, write_config)
    change_arguments(models.network, position_ids=lambda positions: positions[:1].expand_as(positions))
    refused(models)


def test_a_base_that_ignores_its_windows_is_refused_though_the_prompt_is_shorter_than_one(tmp_path, write_config):
    base = save_nested_model(tmp_path / "base", sliding_window=256)
    models = models_of(base, {}, write_config)
    prove_cache(models, 128)
    assert models.network.config.text_config.sliding_window == 256, "the proof's own windows are gone after it"
    sliding = next(layer for layer in attention_layers(models) if getattr(layer, "is_sliding", False))
    change_arguments(sliding, attention_mask=without_window)
    refused(models)


def test_adapters_that_are_mixed_up_are_refused(tiny_llama, tmp_path, write_config, monkeypatch):
    adapters = {
        "sft": save_adapter(tmp_path / "sft", tiny_llama),
        "dpo": save_adapter(tmp_path / "dpo", tiny_llama, seed=2),
    }
    models = models_of(tiny_llama, adapters, write_config)
    choose = models.rows.set
    prove_cache(models, 128)
    monkeypatch.setattr(models.rows, "set", lambda names: choose(names[::-1]))
    refused(models)
