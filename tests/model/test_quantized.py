"""Training on a 4- or 8-bit base: evaluations change nothing, the adapter keeps its precision, mistakes are reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from scripts import train_dpo, train_sft
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config, Quantization
from scripts.model.base import load_base
from tests.support.chain import manifest, write_chain

CPU = Machine("cpu", torch.bfloat16, 1, 1, ())


def points(folder: Path, stage: str, metric: str) -> list[float]:
    """Return a metric of the last run of a stage, step by step."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("llm-finetune-sft-dpo")
    run = client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'")[0]
    return [point.value for point in client.get_metric_history(run.info.run_id, metric)]


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_chain_trains_on_a_quantised_base_and_evaluations_change_nothing(tmp_path: Path, key: str) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs; gradients then vanish in silence (trap 1)."""
    pytest.importorskip("bitsandbytes")
    steps = {"max_steps": 4, "logging_steps": 1, "warmup_steps": 0}
    config = str(
        write_chain(
            tmp_path,
            quantization={key: True},
            performance={"dtype": "bf16"},
            sft={"trainer": {**steps, "eval_steps": 1, "save_steps": 1}},
            dpo={"trainer": {**steps, "precompute_ref_log_probs": True}, "learning_rate": 5e-3},
        )
    )
    with_evaluations, losses = ["--config", config], []
    without = json.dumps({**steps, "eval_strategy": "no", "save_strategy": "no"})

    for more in (["--set", f"sft.trainer={without}"], []):
        assert train_sft.main([*with_evaluations, *more]) == 0
        losses.append(points(tmp_path, "sft", "train/loss"))
    assert train_dpo.main(with_evaluations) == 0

    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[1][-1] < losses[1][0] - 0.02
    assert min(points(tmp_path, "dpo", "train/grad_norm")) > 1e-3
    dpo = manifest(tmp_path / "out/dpo_adapter")["metrics"]
    assert dpo["held_out_loss"] < dpo["held_out_loss_before"] - 0.002
    weights = load_file(tmp_path / "out/dpo_adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # Weights that pass through bf16 end in sixteen zero bits.
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_starting_adapter_of_a_quantised_run_is_not_rounded(tmp_path: Path, key: str) -> None:
    """TRL rounds it to bf16; DPO's policy would then differ from its reference, a copy of the same adapter."""
    pytest.importorskip("bitsandbytes")
    from tests.training.test_train_dpo import build

    config = write_chain(tmp_path, quantization={key: True})
    assert train_sft.main(["--config", str(config)]) == 0

    trainer = build(tmp_path, tmp_path / "run")
    saved = load_file(tmp_path / "out/sft_adapter/adapter_model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if ".default." in name or ".ref." in name:
            stored = name.replace(".default.", ".").replace(".ref.", ".")
            assert torch.equal(parameter.cpu(), saved[stored]), name


def test_4bit_constants_are_quantised_too_and_the_head_is_not(tiny_llama: Path) -> None:
    """Double quantisation; embeddings, norms and head stay in the base's dtype, as without quantisation."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    model = load_base(tiny_llama, Config(quantization=Quantization(load_in_4bit=True)), CPU)
    quantised = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]

    assert len(quantised) == 14
    assert all(module.weight.quant_state.nested for module in quantised)
    assert all(module.weight.quant_state.quant_type == "nf4" for module in quantised)
    assert not any(module.support_avx512bf16_for_cpu for module in quantised)
    rest = {parameter.dtype for parameter in model.parameters() if type(parameter) is torch.nn.Parameter}
    assert rest == {torch.bfloat16}


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_missing_bitsandbytes_names_the_key_and_the_requirements_file(tiny_llama: Path, monkeypatch, key: str) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    with pytest.raises(UserError, match=rf"quantization.{key}: bitsandbytes is not installed.*requirements.gpu.txt"):
        load_base(tiny_llama, Config(quantization=Quantization(**{key: True})), CPU)
