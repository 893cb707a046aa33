"""Matrices rounded to 8 bits: what they give, what is kept of them, and what cannot be rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.common.schema import Config, Lora, Quantization
from scripts.model.adapter import add_lora
from scripts.model.int8 import FEW_TOKENS, check_int8, is_in_int8, keep_in_int8, product, rounded
from tests.support.architectures import save_family
from tests.support.models import CPU, load, logits


def dequantised(weight: torch.Tensor) -> torch.Tensor:
    """Return what a matrix is once each row is whole numbers from -127 to 127 times a scale in bf16."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    return (weight / scales).round().clamp(-127, 127) * scales


@pytest.mark.parametrize("tokens", [1, 5, FEW_TOKENS, FEW_TOKENS + 1, 100])
@pytest.mark.parametrize("inputs", [64, 24, 17], ids=lambda inputs: f"{inputs} inputs")
def test_a_product_is_that_of_the_rounded_matrix(tokens: int, inputs: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, tokens, inputs), torch.randn(40, inputs)

    found = product(x, *rounded(weight))

    expected = nn.functional.linear(x, dequantised(weight))
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_few_and_many_tokens_give_the_same() -> None:
    """A prompt that is read in pieces must not become another prompt."""
    torch.manual_seed(0)
    weight, x = rounded(torch.randn(40, 64)), torch.randn(200, 64)

    together, alone = product(x, *weight), torch.cat([product(row, *weight) for row in x.split(1)])

    assert (together - alone).norm() < 0.001 * together.norm()


def test_only_the_rounded_matrices_are_kept(tiny_llama: Path) -> None:
    full = load(tiny_llama)
    matrices = {p for p in full.parameters() if p.ndim > 1}
    count, before = sum(p.numel() for p in matrices), logits(full)

    keep_in_int8(full, "serve.weights: int8")

    assert is_in_int8(full)
    assert not [name for name, p in full.named_parameters() if p.ndim > 1]
    kept = {id(buffer): buffer for buffer in full.buffers()}.values()
    assert sum(buffer.numel() for buffer in kept if buffer.dtype == torch.int8) == count
    assert not [buffer for buffer in kept if buffer.ndim > 1 and buffer.dtype != torch.int8]
    assert (logits(full) - before).norm() < 0.03 * before.norm()


def test_rounded_layers_add_their_biases(tmp_path: Path) -> None:
    model = load(save_family(tmp_path / "base", "Qwen2"))
    before = logits(model)
    keep_in_int8(model, "key")
    assert (logits(model) - before).norm() < 0.1 * before.norm()  # 0.03; without biases 0.4


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_share_a_matrix_as_before(tmp_path: Path, tied: bool) -> None:
    from scripts.model.tiny import save_tiny_model

    model = load(save_tiny_model(tmp_path / "base", tie_word_embeddings=tied))
    keep_in_int8(model, "key")
    assert (model.lm_head.rows is model.model.embed_tokens.rows) is tied


def test_an_adapter_of_peft_stays_in_full(tiny_llama: Path) -> None:
    model = add_lora(load(tiny_llama), Lora(r=4), str(tiny_llama))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    before, adapter = logits(model), [p.clone() for n, p in model.named_parameters() if "lora_" in n]

    keep_in_int8(model.get_base_model(), "key")

    assert (logits(model) - before).norm() < 0.03 * before.norm()
    after = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(torch.equal(one, other) for one, other in zip(adapter, after, strict=True))


def test_a_matrix_of_another_kind_is_named_and_nothing_changes(tiny_gpt2: Path) -> None:
    model = load(tiny_gpt2)
    before = logits(model)
    with pytest.raises(UserError, match=r"eval\.int8: .*transformer\.h\.0\.attn\.c_attn\.weight of Conv1D"):
        keep_in_int8(model, "eval.int8")
    assert torch.equal(logits(model), before)


def test_a_dora_adapter_is_refused(tiny_llama: Path) -> None:
    model = add_lora(load(tiny_llama), Lora(r=4, use_dora=True), str(tiny_llama))
    with pytest.raises(UserError, match=r"eval\.int8: a DoRA adapter needs the full weights"):
        keep_in_int8(model.get_base_model(), "eval.int8")


def test_a_gpu_and_a_quantised_base_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"serve\.weights: int8: .*on a CPU only, and the device is cuda"):
        check_int8(Config(), replace(CPU, device="cuda"), "serve.weights: int8")
    quantised = Config(quantization=Quantization(load_in_8bit=True))
    with pytest.raises(UserError, match=r"quantised already \(quantization\.load_in_8bit\)"):
        check_int8(quantised, CPU, "serve.weights: int8")
