"""What is right at each stage: each function holds what the stage gives against the value found by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eval import compare
from scripts import export_lora, train_sft
from scripts.common.artifacts import read_manifest, sha256_file
from scripts.common.errors import Interrupted
from scripts.model.adapter import load_adapter
from scripts.model.base import load_full_precision
from serve import engine
from serve.fastapi_server import load_service
from serve.jobs import Job
from tests.matrix.by_hand import dpo_loss, gradients, greedy, logps_of, plain_model, routers_loss
from tests.matrix.chain import CONTEXT, NEW_TOKENS, Family, stopping_after
from tests.serve.test_engine import run_jobs
from tests.support.tolerance import ROUNDING, apart

FP32 = ROUNDING[torch.float32]


def sft_gradient(family: Family) -> None:
    """Hold the gradient of a step against that of our own cross-entropy."""
    trainer = family.sft_trainer
    randomise(trainer.model, "lora_B")  # B starts at 0, and so would every gradient of A
    without_dropout(trainer.model)  # it belongs to SFT and is random; without it the gradient has one right value
    batches, counted = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    ours = step_gradient(trainer, batches[0], counted)
    model = plain_copy(family, trainer, "sft_copy")
    rows = unpadded(batches[0], "labels")
    answer_tokens = sum(sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset)
    per_record = answer_tokens / len(trainer.train_dataset)
    losses = [-logps_of(model, ids, [label != -100 for label in labels]).sum() for ids, labels in rows]
    (sum(losses) / (len(rows) * per_record) + routers_loss(model, [ids for ids, _ in rows])).backward()
    same_gradients(ours, gradients(model))


def dpo_gradient(family: Family) -> None:
    """Hold the gradient of a step against that of equation 7, with the starting adapter as reference."""
    trainer = family.dpo_trainer
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    randomise(trainer.model, "lora_")  # at the start policy and reference agree
    ours = step_gradient(trainer, batch, None)
    policy = plain_copy(family, trainer, "dpo_copy")
    reference = plain_model(family.base, family.adapters["first"])
    sides = [(ids, [bool(mark) for mark in trained]) for ids, trained in unpadded(batch, "completion_mask")]
    pairs = len(sides) // 2
    losses = [
        dpo_loss(*([logps_of(model, *side) for side in pair] for model in (policy, reference)), beta=0.3)
        for pair in zip(sides[:pairs], sides[pairs:], strict=True)
    ]
    (sum(losses) / pairs + routers_loss(policy, [ids for ids, _ in sides])).backward()
    same_gradients(ours, gradients(policy))


def resume(family: Family) -> None:
    """Hold a run that was stopped and resumed against one without a break: the same bytes."""
    resumed = family.folder / "out/resumed"
    here = ("--set", f"sft.output_dir={resumed}")
    with stopping_after(2), pytest.raises(Interrupted):
        family.run(train_sft, *here)
    assert not resumed.exists()
    assert (family.folder / "out/resumed.run/checkpoints/checkpoint-2").is_dir()
    family.run(train_sft, *here, "--resume")
    ours, whole = (sha256_file(folder / "adapter_model.safetensors") for folder in (resumed, family.trained))
    assert ours == whole, "the resumed run ends in another adapter"


def decoding(family: Family) -> None:
    """Hold the comparison's answers and losses against the argmax and the cross-entropy of one sequence at a time."""
    adapters = {"base": None, "sft": family.trained}
    family.run(compare, "--side", "validation")  # whose rows the trainer holds
    folder = family.folder / "out/comparison"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (loss,) = (metric["models"] for metric in report["metrics"] if metric["name"] == "held_out_loss")
    assert len(samples) > 2
    for name, adapter in adapters.items():
        model = plain_model(family.base, adapter)
        expected = [answer_by_hand(family, model, sample["prompt"]) for sample in samples]
        wrong = sum(a != sample["answers"][name] for a, sample in zip(expected, samples, strict=True))
        assert not wrong, f"answers are not the argmax: {wrong} of {len(samples)} of {name}"
        expected_loss = pytest.approx(held_out_loss(family, model), rel=FP32)
        assert loss[name]["value"] == expected_loss, f"another held-out loss: of {name}"


def served(family: Family) -> None:
    """Hold a server's mixed batches against plain PEFT, one sequence at a time; long prompts are read in pieces."""
    assert family.adapters
    names = ["first", "base", "second", "third", "first", "second", "third"]
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 60, (len(names),), generator=draw).tolist()
    prompts = [torch.randint(5, len(family.tokenizer), (length,), generator=draw).tolist() for length in lengths]
    jobs = [Job(ids, name, NEW_TOKENS) for ids, name in zip(prompts, names, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_CONFIG", str(family.config))
        patch.setattr(engine, "PREFILL_TOKENS_PER_STEP", 8)
        service = load_service()
        assert service.context == CONTEXT, f"the context is cut: to {service.context} of {CONTEXT} tokens"
        texts = asyncio.run(run_jobs(service.engine, jobs))
    failed = [text for text in texts if not isinstance(text, str)]
    assert not failed, f"requests fail: {len(failed)} of {len(jobs)}, the first with {failed[0]}"
    models = {name: plain_model(family.base, family.adapters.get(name)) for name in set(names)}
    expected = [greedy(models[job.model], job.ids, NEW_TOKENS, family.stops) for job in jobs]
    wrong = sum(without_stop(job.out, family.stops) != answer for job, answer in zip(jobs, expected, strict=True))
    assert not wrong, f"answers are not those of plain PEFT: {wrong} of {len(jobs)}"
    first = [greedy(model, jobs[0].ids, NEW_TOKENS, family.stops) for model in models.values()]
    assert len(set(map(tuple, first))) == len(models), "models that agree would hide a mix-up"


def merged(family: Family) -> None:
    """Hold the merged model, loaded by transformers, against base and adapter."""
    family.run(export_lora, "--adapter", str(family.trained))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        base, wanted, found = (
            plain_model(folder, adapter)(input_ids=ids).logits[0]
            for folder, adapter in (
                (family.base, None), (family.base, family.trained), (family.folder / "out/merged", None),
            )
        )  # fmt: skip
    assert apart([base], [wanted]) > 10 * FP32, "the adapter does nothing"
    assert apart([found], [wanted]) < FP32, "the merged model gives other logits"


def reloaded(family: Family) -> None:
    """Hold the loss that a run reports against that of its saved adapter, loaded by PEFT and by this project."""
    metrics = read_manifest(family.trained).metrics
    loss = held_out_loss(family, plain_model(family.base, family.trained))
    assert abs(metrics["held_out_loss_before"] - loss) > 10 * FP32, "training did nothing"
    assert metrics["held_out_loss"] == pytest.approx(loss, rel=FP32), "the saved adapter has another loss"
    ours = load_adapter(load_full_precision(family.base), family.trained)
    assert held_out_loss(family, ours) == pytest.approx(loss, rel=FP32), "read again, the adapter has another loss"


STAGES: dict[str, Callable[[Family], None]] = {
    "SFT gradient": sft_gradient,
    "DPO gradient": dpo_gradient,
    "resume": resume,
    "comparison": decoding,
    "server": served,
    "merge": merged,
    "adapter read again": reloaded,
}


def step_gradient(trainer: Any, batch: Any, counted: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of a training step as the trainer computes it."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1  # which its loop sets
    trainer.training_step(trainer.model, batch, counted)
    return gradients(trainer.model)


def plain_copy(family: Family, trainer: Any, name: str) -> Any:
    """Return the trainer's policy as PEFT loads it from a file."""
    trainer.model.save_pretrained(family.folder / name, selected_adapters=["default"], save_embedding_layers=False)
    return plain_model(family.base, family.folder / name, trainable=True)


def unpadded(batch: Any, marks: str) -> list[tuple[list[int], list[int]]]:
    """Return each row's ids without padding, and what the batch says about each of them."""
    columns = batch["input_ids"], batch[marks], batch["attention_mask"].bool()
    return [(ids[kept].tolist(), marked[kept].tolist()) for ids, marked, kept in zip(*columns, strict=True)]


def randomise(model: Any, which: str) -> None:
    """Move the weights that train, so that no product in them is zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and which in name:
                weight.add_(torch.randn_like(weight), alpha=0.1)


def without_dropout(model: Any) -> None:
    """Take away what a base drops out by itself, as a layer or as a number that its layers hand on."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Compare gradients by the names of their weights."""
    assert ours.keys() == theirs.keys(), "other weights train"
    difference = apart(list(ours.values()), [theirs[name] for name in ours])
    assert difference < FP32, f"another gradient: {difference:.1%} away"


def answer_by_hand(family: Family, model: Any, prompt: str) -> str:
    """Return the text of the likeliest tokens for a question."""
    question = [{"role": "user", "content": prompt}]
    ids = family.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    return family.tokenizer.decode(greedy(model, ids, NEW_TOKENS, family.stops), skip_special_tokens=True).strip()


def held_out_loss(family: Family, model: Any) -> float:
    """Return the mean loss per answer token of the held-out records."""
    held_out = family.sft_trainer.held_out
    with torch.no_grad():
        rows = [logps_of(model, row.input_ids, [label != -100 for label in row.labels]) for row in held_out]
    return -float(torch.cat(rows).double().mean())


def without_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Return an answer up to its stop."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
