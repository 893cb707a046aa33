"""Plain attention gives the numbers of torch's fused kernel, or transformers keeps its own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers.integrations import sdpa_attention

from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora
from scripts.model.adapter import add_lora
from scripts.model.base import load_base
from scripts.speed import attention
from scripts.speed.attention import PLAIN_ATTENTION, attend_plainly_to_short_rows
from tests.conftest import save_tiny_model
from tests.support.tolerance import ROUNDING, apart

CPU = Machine("cpu", torch.float32, 1, 1, ())


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((name, dtype) for name in ("llama", "gpt2", "qwen3", "phi") for dtype in (torch.float64, torch.float32)),
        ("doge", torch.float32),  # has a mask for each head
        ("gemma2", torch.float32),  # keeps its own attention, whose softmax is always fp32
    ],
)
@pytest.mark.parametrize("longest", [512, 8])
def test_attention_of_short_rows_gives_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str, longest: int, dtype: torch.dtype
) -> None:
    """With padding on both sides, keys shared by heads (llama, qwen3), and rows on both sides of the limit."""
    monkeypatch.setattr(attention, "attends_plainly", lambda sequences, tokens: tokens <= longest)
    folder = save_tiny_model(tmp_path / "m", architecture)
    input_ids = torch.randint(5, 500, (3, 24), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5], attention_mask[1, 20:] = 0, 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, 5] = -100  # padding would predict it, and what attends to nothing is left open
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = add_lora(load_base(folder, Config(), CPU), Lora(r=4, alpha=8, dropout=0.0), "m").to(dtype).eval()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data + (0.1 if "lora_B" in name else 0)
        if fast:
            attend_plainly_to_short_rows(model)
            assert (model.get_base_model().config._attn_implementation == PLAIN_ATTENTION) == (architecture != "gemma2")
        loss = model(input_ids=input_ids, labels=labels, attention_mask=attention_mask).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])

    slow, quick = results
    assert any(gradient.abs().max() > 1e-3 for gradient in slow[1:])
    assert apart(quick[:1], slow[:1]) < ROUNDING[dtype] / 10
    assert apart(quick[1:], slow[1:]) < ROUNDING[dtype]


def unknown_argument(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sink=None, **kwargs):
    """Attend as a later transformers might, with an argument of which this project knows nothing."""


def other_result(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None, **kwargs
):  # fmt: skip
    """Attend with another scale."""
    key, value = (sdpa_attention.repeat_kv(tensor, 2) for tensor in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=0.3)
    return output.transpose(1, 2), None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            unknown_argument,
            "takes module, query, key, value, attention_mask, dropout, scaling, sink, kwargs instead of",
        ),
        (other_result, "attention of this transformers gives other numbers"),
        (None, "cannot import name 'sdpa_attention_forward'"),
    ],
)
def test_attention_that_changed_stays_as_transformers_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_llama: Path, changed, said: str
) -> None:
    model = add_lora(load_base(tiny_llama, Config(), CPU), Lora(r=4), "m")
    with monkeypatch.context() as changes, caplog.at_level(logging.WARNING):
        if changed:
            changes.setattr(sdpa_attention, "sdpa_attention_forward", changed)
        else:
            changes.delattr(sdpa_attention, "sdpa_attention_forward")
        attend_plainly_to_short_rows(model)

    assert said in caplog.text
    assert "training with the slower attention of transformers" in caplog.text
    assert model.get_base_model().config._attn_implementation == "sdpa"
    ids = torch.arange(5, 25)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
