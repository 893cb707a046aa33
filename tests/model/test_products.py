"""A linear layer over few tokens gives what torch's own gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from scripts.model.products import FEW_TOKENS, linear, quicken_head


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (3, 2), (FEW_TOKENS,), (FEW_TOKENS + 1,), (0,)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_product_is_torchs_own(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 24).to(dtype), torch.randn(40, 24).to(dtype)
    bias = torch.randn(40).to(dtype) if biased else None

    found = linear(x, weight, bias)

    assert found.is_contiguous()
    assert torch.allclose(found, functional.linear(x, weight, bias), atol=1e-5)


def test_gradients_pass() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(5, 8)
    (ours,) = torch.autograd.grad(linear(x, weight).square().sum(), x)
    (theirs,) = torch.autograd.grad(functional.linear(x, weight).square().sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_head_keeps_its_weights_and_its_logits(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before, weight = model(ids).logits, model.get_output_embeddings().weight
        quicken_head(model)
        assert model.get_output_embeddings().weight is weight
        assert torch.allclose(model(ids).logits, before, atol=1e-5)
