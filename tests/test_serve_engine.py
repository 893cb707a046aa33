"""The engine gives the tokens that plain PEFT gives, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from scripts.common.config import load_config
from scripts.common.modeling import load_tokenizer
from scripts.common.runtime import choose_machine
from serve import engine as engine_module
from serve.adapters import Models, load_models
from serve.engine import Engine
from serve.jobs import Job, ServingError
from serve.metrics import Metrics
from tests.serving import save_adapter

NEW = 24


def generate_with_peft(base: Path, adapter: Path | None, ids: list[int], new: int) -> list[int]:
    """Return the greedy continuation by the libraries alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    x = torch.tensor([ids])
    with torch.inference_mode():
        out = model.eval().generate(
            input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=new, do_sample=False, num_beams=1,
            repetition_penalty=1.0, eos_token_id=load_tokenizer(base).eos_token_id,
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def models_of(base: Path, adapters: dict[str, Path], write_config) -> Models:
    config = load_config(
        write_config(
            base_model_id=str(base),
            performance={"dtype": "fp32", "device": "cpu"},
            serve={"adapter_path": None, "adapters": {name: str(path) for name, path in adapters.items()}},
        )
    ).values
    return load_models(config, choose_machine(config))


def new_engine(models: Models, **changes) -> Engine:
    settings = {
        "slots": 3, "context": 128, "queue": 50, "queue_per_client": 50, "deadline_seconds": 60.0,
        "queue_timeout_seconds": 60.0,
    }  # fmt: skip
    return Engine(models, Metrics(), **{**settings, **changes})


async def run_jobs(engine: Engine, jobs: list[Job]) -> list[str | ServingError]:
    """Run jobs to their end and return their texts or errors."""
    engine.start()
    try:
        for job in jobs:
            engine.submit(job, engine.reserve(job.client)[0])
        return await asyncio.gather(*(job.text() for job in jobs), return_exceptions=True)
    finally:
        await asyncio.to_thread(engine.stop)


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return two adapters with different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "sft": save_adapter(folder / "sft", tiny_llama, "sft", seed=1),
        "dpo": save_adapter(
            folder / "dpo", tiny_llama, "dpo", seed=2, r=7, alpha=3, target_modules=["q_proj", "down_proj"]
        ),
    }


@pytest.fixture
def models(tiny_llama: Path, adapters: dict[str, Path], write_config) -> Models:
    return models_of(tiny_llama, adapters, write_config)


@pytest.fixture
def short_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut prompts into pieces of 8 tokens, so that short prompts are chunked, too."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS_PER_STEP", 8)


def random_prompts(names: list[str], vocabulary: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(5, vocabulary) for _ in range(draw.randrange(1, 40))] for _ in names]


def test_mixed_batches_give_the_tokens_of_plain_peft(tiny_llama, adapters, models, short_prefill):
    names = ["base", "sft", "dpo", "sft", "dpo", "base", "sft", "dpo", "dpo"]
    prompts = random_prompts(names, len(models.tokenizer))
    jobs = [
        Job(ids, name, NEW - 3 * (n % 3)) for n, (ids, name) in enumerate(zip(prompts, names, strict=True))
    ]  # different lengths make rows leave and move while others run
    asyncio.run(run_jobs(new_engine(models), jobs))
    wanted = [generate_with_peft(tiny_llama, adapters.get(job.model), job.ids, job.max_new_tokens) for job in jobs]
    assert [job.out for job in jobs] == wanted
    same_prompt = [
        generate_with_peft(tiny_llama, adapters.get(name), prompts[0], NEW) for name in ("base", "sft", "dpo")
    ]
    assert len({tuple(out) for out in same_prompt}) == 3, "adapters that agree would hide a mix-up"


def test_gpt2_is_served_too(tiny_gpt2, tmp_path, write_config, short_prefill):
    adapter = save_adapter(tmp_path / "sft", tiny_gpt2)
    models = models_of(tiny_gpt2, {"sft": adapter}, write_config)
    names = ["sft", "base", "sft", "base"]
    jobs = [Job(ids, name, 12) for ids, name in zip(random_prompts(names, len(models.tokenizer)), names, strict=True)]
    asyncio.run(run_jobs(new_engine(models), jobs))
    assert [job.out for job in jobs] == [
        generate_with_peft(tiny_gpt2, adapter if job.model == "sft" else None, job.ids, 12) for job in jobs
    ]
