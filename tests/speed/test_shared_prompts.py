"""A pair's prompt is computed once for both answers: the same log-probabilities and gradients as in two rows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora
from scripts.model.adapter import add_lora
from scripts.model.base import load_base
from scripts.speed.shared_prompts import SharedPrompts, lay_out
from scripts.speed.speed_up import speed_up
from tests.conftest import save_tiny_model
from tests.support.tolerance import ROUNDING, apart

CPU = Machine("cpu", torch.float32, 1, 1, ())


def pairs() -> dict[str, torch.Tensor]:
    """Return four pairs: of one rejected token, of equal answers, with an empty answer, and with two answers of three."""
    rows = [
        [5, 6, 7, 8, 20, 21, 22, 23], [9, 10, 30, 31], [11, 12, 13], [14, 15, 60, 61, 62],
        [5, 6, 7, 8, 20, 41], [9, 10, 30, 31], [11, 12, 13, 50, 51, 52, 53], [14, 15, 70, 71, 72],
    ]  # fmt: skip
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_a_row_holds_the_common_beginning_once_then_both_rests() -> None:
    batch = pairs()

    layout = lay_out(batch["input_ids"], batch["attention_mask"], torch.float32)

    flat = batch["input_ids"].flatten()[layout.source]
    assert flat[0].tolist() == [5, 6, 7, 8, 20, 21, 22, 23, 41]
    assert layout.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5]
    assert flat[1, :4].tolist() == [9, 10, 30, 31]
    assert flat[2, :7].tolist() == [11, 12, 13, 50, 51, 52, 53]
    assert torch.equal(flat.flatten()[layout.back][batch["attention_mask"] == 1], batch["input_ids"][batch["attention_mask"] == 1])  # fmt: skip
    seen = layout.mask[0, 0] == 0
    assert seen[8].tolist() == [True] * 5 + [False] * 3 + [True]  # the rejected token sees no chosen one
    assert seen[7].tolist() == [True] * 8 + [False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("architecture", ["gpt2", "phi"])
def test_log_probabilities_and_gradients_equal_those_of_two_rows(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = load_base(save_tiny_model(tmp_path / "m", architecture), Config(), CPU)
    model = add_lora(base, Lora(r=4), "m").to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    speed_up(model)
    shared = SharedPrompts(model, pairs())
    assert shared.possible
    widths: list[int] = []
    shared.decoder.register_forward_pre_hook(lambda _, args, given: widths.append(len([*args, given.get("input_ids")][0])), with_kwargs=True)  # fmt: skip
    batch = pairs()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def result(at_work: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        if at_work:
            with shared.at_work():
                logits = model(**batch).logits
        else:
            logits = model(**batch).logits
        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        logps = (logps * (labels[:, 1:] != -100)).sum(1)
        (logps * torch.arange(1, 9)).sum().backward()
        return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    two_rows, one_row = result(False), result(True)

    assert widths == [8, 4]
    assert apart([one_row[0]], [two_rows[0]]) < ROUNDING[dtype] / 10
    assert any(gradient.abs().max() > 1e-2 for gradient in two_rows[1].values())
    assert one_row[1].keys() == two_rows[1].keys()
    assert apart(list(one_row[1].values()), list(two_rows[1].values())) < ROUNDING[dtype]


@pytest.mark.parametrize(("window", "together"), [(8, False), (9, True)])
def test_rows_longer_than_a_sliding_window_stay_apart(tmp_path: Path, window: int, together: bool) -> None:
    """The first pair takes nine tokens."""
    model = add_lora(load_base(save_tiny_model(tmp_path / "m", "phi"), Config(), CPU), Lora(r=4), "m").eval()
    model.config.sliding_window = window
    speed_up(model)
    shared = SharedPrompts(model, pairs())

    with torch.no_grad(), shared.at_work():
        shared.decoder(**pairs())

    assert (shared.back is not None) == together


def test_a_model_that_computes_otherwise_is_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As one would whose layers pass on what came before without asking the mask."""
    model = add_lora(load_base(save_tiny_model(tmp_path / "m", "phi"), Config(), CPU), Lora(r=4), "m").eval()
    speed_up(model)
    layer = model.get_base_model().model.layers[0]
    original = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: original(hidden + hidden.cumsum(1), *args, **kwargs)

    with caplog.at_level(logging.WARNING):
        assert not SharedPrompts(model, pairs()).possible

    assert "does not compute a prompt once" in caplog.text


def test_without_the_fast_path_attention_pairs_keep_two_rows(tiny_llama: Path) -> None:
    model = add_lora(load_base(tiny_llama, Config(), CPU), Lora(r=4), "m").eval()

    assert not SharedPrompts(model, pairs()).possible
