"""A linear layer over few tokens gives what torch's own gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from scripts.model.products import FEW_TOKENS, keep_ends_in_16_bits, linear, packed, packed_linear, quicken_head
from tests.support.architectures import save_family
from tests.support.models import load, logits


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


has_fbgemm = pytest.mark.skipif(torch.backends.quantized.engine != "x86", reason="torch has no such kernel here")


@has_fbgemm
@pytest.mark.parametrize("shape", [(1,), (16,), (3, 2), (200,), (0,)], ids=str)
@pytest.mark.parametrize("published", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_weights_published_in_16_bits_are_read_in_16_bits(shape, published: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 24), torch.randn(40, 24).to(published).float()
    bias = torch.randn(40) if biased else None

    found = packed_linear(x, packed(weight, bias))

    assert found.shape == (*shape, 40)
    assert torch.allclose(found, functional.linear(x, weight, bias), atol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(40, 24, generator=torch.Generator().manual_seed(0)),  # trained in 32 bits
        torch.full((40, 24), 1e6),  # larger than 16 bits hold
        torch.full((40, 24), 2.0**-30),  # smaller
        torch.zeros(40, 24).fill_(torch.nan),
        torch.ones(40, 24, dtype=torch.float64),
        torch.ones(40, 24, dtype=torch.bfloat16),
    ],
)
def test_other_weights_stay_as_they_are(weight: torch.Tensor) -> None:
    assert packed(weight) is None


def test_head_keeps_its_weights_and_its_logits(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before, weight = model(ids).logits, model.get_output_embeddings().weight
    for pack in (False, True):
        with torch.inference_mode():
            quicken_head(model, pack)
            assert model.get_output_embeddings().weight is weight
            assert torch.allclose(model(ids).logits, before, atol=1e-5)


def numbers_in_full(model: Any) -> int:
    """Count the numbers of embeddings and head that are kept in 32 bits."""
    matrices = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(matrix.numel() for matrix in matrices)


@has_fbgemm
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma 3", "Granite", "OPT"])
def test_embeddings_and_head_published_in_16_bits_are_kept_in_16_bits(family: str, tmp_path: Path) -> None:
    """Alone and as one matrix, and where what is looked up is scaled."""
    base = save_family(tmp_path / "base", family)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    model = load(base)
    before = logits(model)

    quicken_head(model, pack=True)
    keep_ends_in_16_bits(model)

    assert numbers_in_full(model) == 0
    assert torch.allclose(logits(model), before, atol=1e-5)


@pytest.mark.parametrize("pack", [True, False])
def test_embeddings_that_16_bits_would_change_or_that_a_head_needs_stay(
    tiny_llama: Path, tmp_path: Path, pack: bool
) -> None:
    trained = load(tiny_llama)
    quicken_head(trained, pack=pack)
    keep_ends_in_16_bits(trained)
    assert torch.equal(trained.get_input_embeddings().weight, load(tiny_llama).get_input_embeddings().weight)

    base = save_family(tmp_path / "base", "Qwen3")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    tied = load(base)
    keep_ends_in_16_bits(tied)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert numbers_in_full(tied)
