"""Loading a base and its tokenizer, quantised ones too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora, Quantization
from scripts.model.adapter import (
    add_lora,
)
from scripts.model.base import load_base, load_tokenizer
from tests.support.architectures import save_family
from tests.support.models import IDS, load, logits


def test_tokenizer_without_eos_is_refused(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))

    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(folder)


def test_a_dense_model_of_a_family_of_mixtures_has_no_loss_of_routers(tmp_path: Path) -> None:
    """Granite 4's small models: TRL would ask them for router logits, which no layer gives."""
    machine = Machine("cpu", torch.float32, 1, 1, ())
    dense, mixture = (
        load_base(save_family(tmp_path / name, name), Config(), machine) for name in ("Granite 4", "Granite 3 MoE")
    )

    assert dense.config.router_aux_loss_coef == 0
    assert mixture.config.router_aux_loss_coef > 0


def load_4bit(folder: Path):
    """Load a tiny base in NF4 with an adapter."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = Config(quantization=Quantization(load_in_4bit=True))
    return add_lora(load_base(folder, config, Machine("cpu", torch.bfloat16, 1, 1, ())), Lora(r=4), "base")


def test_scoring_some_positions_does_not_copy_the_head_for_every_row(tiny_llama: Path) -> None:
    """What torch multiplies in batches (bmm) it first spreads out, as it does under a frozen base."""
    model = load(tiny_llama).requires_grad_(False)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        some = model(IDS, logits_to_keep=3).logits
    products = [shape for event in profile.events() if event.name == "aten::bmm" for shape in event.input_shapes]
    assert not [shape for shape in products if model.config.vocab_size in shape]
    assert torch.allclose(some, logits(model)[:, -3:], atol=1e-6)


def test_4bit_gradients_survive_an_evaluation(tiny_llama: Path) -> None:
    """On CPUs with AVX512-BF16 an evaluation repacks the weights in place, after which gradients vanish in silence."""

    def gradients(model) -> torch.Tensor:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])

    model = load_4bit(tiny_llama)
    before = gradients(model)
    first_look = logits(model)
    after = gradients(model)

    assert before.abs().sum() > 0
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-6)
    assert torch.allclose(logits(model), first_look)
