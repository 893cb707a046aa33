"""Adapted layers that share a product give PEFT's numbers, whichever adapter is at work."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora
from scripts.model.adapter import add_lora, switched_to
from scripts.model.base import load_base
from scripts.speed import lora_linears
from scripts.speed.lora_linears import SharingLinear, _AdaptedProduct, share_products
from tests.conftest import save_tiny_model
from tests.support.architectures import save_family
from tests.support.tolerance import ROUNDING, apart

IDS = torch.arange(5, 25).reshape(1, 20)


def load(folder: Path, dtype: torch.dtype = torch.float32):
    """Load a tiny base."""
    return load_base(folder, Config(), Machine("cpu", dtype, 1, 1, ()))


def test_adapters_multiply_in_bf16_and_their_gradients_are_fp32(tiny_llama: Path) -> None:
    model = add_lora(load(tiny_llama, torch.bfloat16), Lora(r=4), "base")
    share_products(model)
    seen = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda _, given, made: seen.append((given[0].dtype, made.dtype)))
    ids = torch.arange(5, 25).reshape(1, 20)

    model(input_ids=ids, labels=ids).loss.backward()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in trainable} == {p.grad.dtype for p in trainable} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_on_an_fp32_base_give_the_same_numbers(
    tmp_path: Path, architecture: str, dropout: float, dtype: torch.dtype
) -> None:
    """With a bias (qwen2), with weights stored the other way round (gpt2), and with dropout drawn from the same seed."""
    folder = save_tiny_model(tmp_path / "m", architecture)
    ids = torch.arange(5, 25).reshape(1, 20)

    def loss_and_gradients(fast: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = add_lora(load(folder), Lora(r=4, init="gaussian", dropout=dropout), "base").to(dtype).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if fast:
            share_products(model)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    fast, slow = loss_and_gradients(True), loss_and_gradients(False)
    assert any(gradient.abs().max() > 1e-2 for gradient in slow[1:])
    assert apart(fast[:1], slow[:1]) < ROUNDING[dtype] / 10
    assert apart(fast[1:], slow[1:]) < ROUNDING[dtype]


def with_two_adapters(folder: Path, fast: bool):
    """Return a model with a trainable adapter and a frozen one of higher rank and other scale."""
    torch.manual_seed(0)
    model = add_lora(load(folder), Lora(r=4, init="gaussian"), "base")
    model.add_adapter("ref", LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
        if ".ref." in name:
            parameter.requires_grad_(False)
    model.set_adapter("default")
    if fast:
        share_products(model)
    return model


def test_layers_of_the_same_input_share_one_product(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four for each decoder layer: query with key and value, output, gate with up, down."""
    model = add_lora(load(tiny_llama), Lora(r=4), "base")
    share_products(model)
    calls: list[int] = []
    apply = _AdaptedProduct.apply
    monkeypatch.setattr(_AdaptedProduct, "apply", lambda *given: (calls.append(1), apply(*given))[1])

    model(input_ids=IDS)

    assert len(calls) == 4 * model.config.num_hidden_layers
    assert len([module for module in model.modules() if isinstance(module, SharingLinear)]) == 7 * model.config.num_hidden_layers  # fmt: skip


def test_every_adapter_and_the_bare_base_answer_as_in_peft(tiny_llama: Path) -> None:
    fast, slow = with_two_adapters(tiny_llama, True), with_two_adapters(tiny_llama, False)

    seen = []
    for adapter in ("default", "ref", None, "default"):
        with torch.no_grad(), switched_to(fast, adapter), switched_to(slow, adapter):
            seen.append(slow(input_ids=IDS).logits)
            assert apart([fast(input_ids=IDS).logits], [seen[-1]]) < ROUNDING[torch.float32] / 10, adapter

    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    assert not torch.allclose(seen[1], seen[2], atol=1e-2)


def test_a_reference_asked_within_a_step_leaves_its_gradients_alone(tiny_llama: Path) -> None:
    fast, slow = (with_two_adapters(tiny_llama, way).to(torch.float64).train() for way in (True, False))

    for model in (fast, slow):
        loss = model(input_ids=IDS, labels=IDS).loss
        with torch.no_grad(), switched_to(model, "ref"):
            model(input_ids=IDS)
        loss.backward()

    ours, theirs = ([p.grad for p in model.parameters() if p.requires_grad] for model in (fast, slow))
    assert any(gradient.abs().max() > 1e-2 for gradient in theirs)
    assert apart(ours, theirs) < ROUNDING[torch.float64]


@pytest.mark.parametrize("training", [True, False])
def test_what_the_optimizer_moved_counts_in_the_next_pass(tiny_llama: Path, training: bool) -> None:
    """Training or not, and also when it is moved behind autograd's back, as torch's fused optimizers do."""
    model = with_two_adapters(tiny_llama, True).train(training)
    with torch.set_grad_enabled(training):
        before = model(input_ids=IDS).logits

        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.data.mul_(2)

        assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-2)


def test_a_whole_model_that_goes_past_its_base_model_counts_what_moved_too(tmp_path: Path) -> None:
    """A training step asks OPT's base model; evaluating asks the whole one, which asks the decoder itself."""
    folder = save_family(tmp_path / "opt", "OPT")
    fast, slow = (with_two_adapters(folder, way).eval() for way in (True, False))
    fast.get_base_model().base_model(input_ids=IDS)

    for model in (fast, slow):
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.data.mul_(2)

    with torch.no_grad():
        assert apart([fast(input_ids=IDS).logits], [slow(input_ids=IDS).logits]) < ROUNDING[torch.float32] / 10


def test_what_inference_mode_made_can_be_trained_afterwards(tiny_llama: Path) -> None:
    model = with_two_adapters(tiny_llama, True)
    with torch.inference_mode():
        model.eval()(input_ids=IDS)

    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def one_more_argument(self, x, adapter_mask=None, *args, **kwargs):
    """Take what a later PEFT might."""


def doubled(self, x, *args, **kwargs):
    """Return twice what PEFT does."""
    return 2 * PEFT_FORWARD(self, x, *args, **kwargs)


PEFT_FORWARD = lora_linears.LoraLinear.forward


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (one_more_argument, "takes self, x, adapter_mask, args, kwargs instead of self, x, args, kwargs"),
        (doubled, "a LoRA layer of this PEFT gives other numbers"),
        (None, "a LoRA layer of this PEFT has no lora_rank_pattern"),
    ],
)
def test_a_peft_that_changed_keeps_its_own_layers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_llama: Path, changed, said: str
) -> None:
    model = add_lora(load(tiny_llama), Lora(r=4), "base")
    with monkeypatch.context() as changes, caplog.at_level(logging.WARNING):
        if changed:
            changes.setattr(lora_linears.LoraLinear, "forward", changed)
        else:
            changes.setattr(lora_linears, "LAYER_NAMES", (*lora_linears.LAYER_NAMES, "lora_rank_pattern"))
        share_products(model)

    assert said in caplog.text
    assert "training with PEFT's own, slower layers" in caplog.text
    assert not [module for module in model.modules() if isinstance(module, SharingLinear)]
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
