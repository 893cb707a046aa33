"""Mixtures of experts in training: the routers' loss is TRL's, and the whole chain holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl import DPOTrainer, SFTTrainer

from scripts import train_dpo, train_sft
from tests.support.chain import manifest, write_chain
from tests.support.experts import save_tiny_mixture
from tests.support.training import build_trainer

LOUD = 0.5  # a coefficient at which a wrong auxiliary loss cannot hide in rounding


def write_mixture(folder: Path, family: str, **changes: Any) -> Path:
    """Save a tiny mixture and a configuration of a chain on it."""
    save_tiny_mixture(folder / "model", family, **changes)
    return write_chain(folder)


def gradients(trainer: Any, compute_loss: Any, rows: list[Any], *more: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of one batch."""
    trainer.current_gradient_accumulation_steps = 1  # as the Trainer's loop sets it
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    compute_loss(trainer, trainer.model, batch, *more).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert any(value.abs().max() > 1e-3 for value in wanted.values())
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"])
def test_dpo_takes_the_gradient_of_plain_trl_with_the_routers_loss(tmp_path: Path, family: str) -> None:
    config = write_mixture(tmp_path, family)
    overrides = ["dpo.init_from=null", "dpo.reference=base", f"dpo.trainer.router_aux_loss_coef={LOUD}"]
    fast = build_trainer("dpo", config, tmp_path / "fast", overrides)
    plain = build_trainer("dpo", config, tmp_path / "plain", [*overrides, "performance.fast_path=false"])
    weights = {name: value for name, value in plain.model.named_parameters() if value.requires_grad}
    for trainer in (fast, plain):
        torch.manual_seed(1)
        for name, value in trainer.model.named_parameters():
            if name in weights:
                value.data.normal_(std=0.05)
    rows = [fast.train_dataset[index] for index in (0, 7, 20)]

    assert fast.aux_loss_enabled
    found = gradients(fast, type(fast).compute_loss, rows)
    assert_alike(found, gradients(plain, DPOTrainer.compute_loss, rows))
    assert fast._metrics["train"]["aux_loss"] == pytest.approx(plain._metrics["train"]["aux_loss"], rel=1e-5)


def test_sft_weights_answers_alone_and_leaves_the_routers_gradient_as_it_is(tmp_path: Path) -> None:
    """The routers' gradient is the difference that their loss makes, at any weight of the answers."""
    config = write_mixture(tmp_path, "mixtral")

    def share_of_routers(compute_loss: Any) -> dict[str, torch.Tensor]:
        found = []
        for coefficient in (LOUD, 0.0):
            run = tmp_path / f"{compute_loss.__qualname__}{coefficient}"
            trainer = build_trainer("sft", config, run, [f"sft.trainer.router_aux_loss_coef={coefficient}"])
            for name, value in trainer.model.named_parameters():
                if "lora_B" in name:
                    value.data.fill_(0.01)
            rows = [trainer.train_dataset[index] for index in range(3)]  # one row less than in a usual batch
            tokens = torch.tensor(sum(label != -100 for row in rows for label in row["labels"]))
            found.append(gradients(trainer, compute_loss, rows, False, tokens))
        return {name: value - found[1][name] for name, value in found[0].items()}

    from scripts.training.sft import AnswerLossTrainer

    assert_alike(share_of_routers(AnswerLossTrainer.compute_loss), share_of_routers(SFTTrainer.compute_loss))


def test_a_mixture_goes_through_both_stages(tmp_path: Path) -> None:
    config = str(write_mixture(tmp_path, "deepseek_v3"))

    assert train_sft.main(["--config", config]) == 0
    assert train_dpo.main(["--config", config]) == 0

    sft, dpo = (load_file(tmp_path / f"out/{stage}_adapter/adapter_model.safetensors") for stage in ("sft", "dpo"))
    assert sft.keys() == dpo.keys()
    assert all((dpo[name] != tensor).any() for name, tensor in sft.items())
    assert not [name for name in sft if "expert" in name or "gate" in name]
    for stage in ("sft", "dpo"):
        metrics = manifest(tmp_path / f"out/{stage}_adapter")["metrics"]
        assert metrics["held_out_loss"] < metrics["held_out_loss_before"]


def test_dry_run_says_what_is_adapted_and_what_stays_untouched(tmp_path: Path, capsys) -> None:
    config = str(write_mixture(tmp_path, "qwen3_moe"))

    assert train_sft.main(["--config", config, "--dry-run"]) == 0

    said = capsys.readouterr().err
    assert "adapter on k_proj, o_proj, q_proj, v_proj; experts stay untouched: 12,288 parameters" in said


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "down_proj"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_targets_that_would_be_lost_are_refused_at_start(tmp_path, capsys, name, dry) -> None:
    config = str(write_mixture(tmp_path, "qwen3_moe"))
    asked = ["--set", f"lora.target_modules=[q_proj,{name}]"]

    assert train_sft.main(["--config", config, *asked, *dry]) == 2
    said = capsys.readouterr().err
    assert f"error: lora.target_modules: {name}: " in said
    assert "gradient checkpointing" not in said, "the run must end before it plans its memory"
