"""The lean decoder computes what each family's own forward does: on real tokens, with what rows share computed once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl.trainer.utils import add_fused_lm_head

from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora
from scripts.dataset.rendering import Rendered
from scripts.model.adapter import add_lora, switched_to
from scripts.model.base import load_base, load_tokenizer
from scripts.model.generation import generate_and_score, generate_answers
from scripts.model.scoring import score_answers
from scripts.speed.lean_decoder import Attend, Gate, RMSNorm, _Norm, attend_padded
from scripts.speed.packing import pack
from scripts.speed.speed_up import speed_up, stand_in_of
from tests.support.architectures import save_family

TAKEN = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Gemma", "Gemma 3", "OLMo 2", "OLMo 3")
OTHERS = (
    "GPT-2", "OLMo", "Gemma 2", "Gemma 4", "Phi-3", "Mixtral", "GLM-4 MoE", "Cohere 2", "LFM2", "Qwen3.5", "Granite 4",
)  # fmt: skip
SYSTEM, PROMPT = list(range(10, 34)), list(range(40, 60))
ROWS = [  # two answers to one prompt, others behind the same system prompt, one of its own and one of a single answer token
    SYSTEM + PROMPT + [70, 71, 72, 73, 74, 75], SYSTEM + PROMPT + [80], [*SYSTEM, 90, 91, 92], SYSTEM + [93] * 30, [5, 6, 7, 8],
]  # fmt: skip


def batch(rows: list[list[int]] = ROWS, side: str = "right") -> dict[str, torch.Tensor]:
    """Pad rows; the last three tokens of each, or the last alone, are trained."""
    width = max(map(len, rows))

    def padded(row: list[int], pad: int) -> list[int]:
        gap = [pad] * (width - len(row))
        return gap + row if side == "left" else row + gap

    labels = [[-100] * max(len(row) - 3, 1) + row[max(len(row) - 3, 1) :] for row in rows]
    return {
        "input_ids": torch.tensor([padded(row, 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([padded(row, -100) for row in labels]),
    }


def adapted(folder: Path, lora: Lora, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Any:
    """Load a model with an adapter that says something, and with TRL's LM head, as TRL's trainers make it."""
    base = load_base(folder, Config(), Machine("cpu", torch.float32, 1, 1, ()))
    add_fused_lm_head(base)
    torch.manual_seed(0)
    model = add_lora(base, lora, "base").to(dtype).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_and_gradients(model: Any, rows: list[list[int]] = ROWS) -> tuple[float, dict[str, torch.Tensor]]:
    """Return what TRL's SFT computes of a batch."""
    model.zero_grad()
    loss = model(**batch(rows), use_cache=False, fused_lm_head=True).loss
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest relative L2 difference of a gradient."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def tokens_computed(model: Any, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]] = ROWS, norm: int = 0) -> int:
    """Return over how many tokens the first norm of a lean pass goes, or another; 0 where the library's forward is used."""
    seen: list[int] = []
    call = _Norm.__call__
    with monkeypatch.context() as changes:
        changes.setattr(_Norm, "__call__", lambda self, x, *room: (seen.append(len(x)), call(self, x, *room))[1])
        with torch.set_grad_enabled(model.training):
            model(**batch(rows), use_cache=False, fused_lm_head=True)
    return seen[norm] if seen else 0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", TAKEN)
def test_loss_and_every_gradient_equal_trls(tmp_path: Path, family: str, checkpointing: bool, monkeypatch: Any) -> None:
    """Windows of 16 tokens, scaled and left-out positions, norms of heads, biases and multipliers included."""
    model = adapted(save_family(tmp_path, family), Lora(r=4, init="gaussian"), torch.float64, checkpointing)
    plain = loss_and_gradients(model)

    speed_up(model)
    lean = loss_and_gradients(model)

    assert tokens_computed(model, monkeypatch) == 24 + 20 + 5 + 0 + 2 + 29 + 3, (
        "the last token of a row predicts nothing"
    )
    assert tokens_computed(model, monkeypatch, norm=-1) == 5 * 3, "the last layer ends with what predicts a label"
    assert abs(lean[0] - plain[0]) < 1e-6  # the families' own norms round to fp32
    assert furthest(lean[1], plain[1]) < 1e-5


@pytest.mark.parametrize("family", TAKEN)
def test_loss_and_every_gradient_equal_trls_in_fp32(tmp_path: Path, family: str) -> None:
    model = adapted(save_family(tmp_path, family), Lora(r=4))
    plain = loss_and_gradients(model)

    speed_up(model)
    lean = loss_and_gradients(model)

    assert abs(lean[0] - plain[0]) < 1e-5 * max(1, plain[0])
    assert furthest(lean[1], plain[1]) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_come_back_where_they_belong(tiny_llama: Path, side: str) -> None:
    model = adapted(tiny_llama, Lora(r=4)).eval()
    given = {key: value for key, value in batch(side=side).items() if key != "labels"}
    real = given["attention_mask"] == 1
    with torch.no_grad():
        plain = model(**given).logits[real]
        speed_up(model)
        assert torch.allclose(model(**given).logits[real], plain, atol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], "auto"])
def test_every_adapter_and_the_bare_base_answer_as_in_peft(tmp_path: Path, targets: Any) -> None:
    """Some layers of a product adapted and some not, biases, and adapters of other rank and scale."""
    models = []
    for fast in (False, True):
        model = adapted(save_family(tmp_path, "Qwen2"), Lora(r=4, target_modules=targets)).eval()
        model.add_adapter("ref", LoraConfig(r=6, lora_alpha=3, target_modules=["k_proj", "down_proj"]))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B.ref" in name:
                torch.nn.init.normal_(parameter)
        if fast:
            speed_up(model)
        models.append(model)
    seen = []
    for adapter in ("default", "ref", None, "default"):
        logits = []
        for model in models:
            with torch.no_grad(), switched_to(model, adapter):
                logits.append(model(input_ids=torch.tensor([SYSTEM])).logits)
        seen.append(logits[0])
        assert torch.allclose(*logits, atol=1e-3), adapter
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    assert not torch.allclose(seen[1], seen[2], atol=1e-2)


def test_a_reference_asked_within_a_step_leaves_its_gradients_alone(tiny_llama: Path) -> None:
    found = []
    for fast in (False, True):
        model = adapted(tiny_llama, Lora(r=4), torch.float64)
        if fast:
            speed_up(model)
        loss = model(**batch(), use_cache=False, fused_lm_head=True).loss
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=torch.tensor([SYSTEM]))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})

    assert furthest(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_what_the_optimizer_moved_counts_in_the_next_pass(tiny_llama: Path, training: bool) -> None:
    """Also when it is moved behind autograd's back, as torch's fused optimizers do."""
    model = adapted(tiny_llama, Lora(r=4)).train(training)
    speed_up(model)
    with torch.set_grad_enabled(training):
        before = model(**batch(), use_cache=False, fused_lm_head=True).loss
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(5)
        assert abs(float(model(**batch(), use_cache=False, fused_lm_head=True).loss - before)) > 1e-3


def test_what_inference_mode_made_can_be_trained_afterwards(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, Lora(r=4))
    speed_up(model)
    with torch.inference_mode():
        model.eval()(input_ids=torch.tensor([SYSTEM]))

    assert loss_and_gradients(model.train())[1]


def test_rows_share_nothing_that_dropout_draws(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama, Lora(r=4, dropout=0.5))
    speed_up(model)
    loss_and_gradients(model)

    assert tokens_computed(model, monkeypatch) == sum(len(row) - 1 for row in ROWS)
    assert tokens_computed(model.eval(), monkeypatch) < sum(map(len, ROWS))


def test_dropout_of_the_base_is_left_to_the_library(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama, Lora(r=4))
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.1
    speed_up(model)

    assert tokens_computed(model, monkeypatch) == 0
    assert tokens_computed(model.eval(), monkeypatch) > 0


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_keep_their_own_forward(tmp_path: Path, family: str, caplog: Any) -> None:
    base = load_base(save_family(tmp_path, family), Config(), Machine("cpu", torch.float32, 1, 1, ()))
    model = add_lora(base, Lora(r=4), "base")
    with caplog.at_level(logging.INFO):
        speed_up(model)

    assert stand_in_of(model) is None
    assert "so the model's own forward pass is used" in caplog.text


def test_a_model_that_computes_otherwise_is_found_out(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    """EXAONE 4 has the parts of the family and leaves positions out in its global layers."""
    model = adapted(save_family(tmp_path, "EXAONE 4"), Lora(r=4))
    plain = loss_and_gradients(model)
    with caplog.at_level(logging.INFO):
        speed_up(model)
        lean = loss_and_gradients(model)

    assert "computes otherwise than its family" in caplog.text
    assert lean[0] == pytest.approx(plain[0], abs=1e-5)
    assert tokens_computed(model, monkeypatch) == 0


def test_a_wrong_gradient_is_found_out(tiny_llama: Path, monkeypatch: Any, caplog: Any) -> None:
    model = adapted(tiny_llama, Lora(r=4))
    speed_up(model)
    backward = RMSNorm.backward
    monkeypatch.setattr(RMSNorm, "backward", lambda ctx, grad: (backward(ctx, grad)[0] * 1.01, None, None, None, None))
    with caplog.at_level(logging.WARNING):
        loss_and_gradients(model)

    assert "computes otherwise than its family" in caplog.text
    assert tokens_computed(model, monkeypatch) == 0


def test_adapters_multiply_in_bf16_and_their_gradients_are_fp32(tiny_llama: Path) -> None:
    base = load_base(tiny_llama, Config(), Machine("cpu", torch.bfloat16, 1, 1, ()))
    model = add_lora(base, Lora(r=4), "base")
    speed_up(model)
    ids = torch.tensor([SYSTEM])

    model(input_ids=ids, labels=ids).loss.backward()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {p.dtype for p in trainable} == {p.grad.dtype for p in trainable} == {torch.float32}


def test_packed_rows_hold_what_they_share_once() -> None:
    packed = pack(ROWS)

    assert len(packed.ids) == 88
    for row, places in zip(ROWS, packed.places, strict=True):
        assert packed.ids[places].tolist() == row
        assert packed.positions[places].tolist() == list(range(len(row)))
    for piece in packed.pieces:  # each looks back on the rest of its rows, and on nothing else
        before = [place for start, end in piece.past for place in range(start, end)]
        rows = [places.tolist() for places in packed.places if piece.end - 1 in places]
        assert all(row[: len(before)] == before for row in rows)


def test_rows_that_end_where_others_continue_and_equal_rows_are_packed() -> None:
    rows = [SYSTEM, SYSTEM, [*SYSTEM, 1], SYSTEM[:20], [3]]
    packed = pack(rows)

    assert [packed.ids[places].tolist() for places in packed.places] == rows
    assert len(packed.ids) < 20 + 3 * 5 + 1  # what saves a few tokens only is not shared


def test_pieces_side_by_side_see_their_own_tokens_behind_what_stands_before_them() -> None:
    packed = pack([*ROWS, SYSTEM[:20] + [94] * 9])

    for alike in packed.alike:
        for piece, seen, own in zip(alike.pieces, alike.seen.tolist(), alike.own.tolist(), strict=True):
            before = [place for start, end in piece.past for place in range(start, end)]
            tokens = [*before, *range(piece.start, piece.end)]
            gap = alike.past_tokens - len(before)
            assert seen[gap : gap + len(tokens)] == tokens
            assert own[: len(piece)] == tokens[len(before) :]
    assert sorted(piece.start for alike in packed.alike for piece in alike.pieces) == [p.start for p in packed.pieces]


@pytest.mark.parametrize("family", TAKEN)
def test_logits_at_places_and_greedy_answers_equal_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Windows are crossed while answers grow, rows leave at different tokens, and places grow beyond their first size.

    What lay in memory before is no number.
    """
    folder = save_family(tmp_path, family)
    tokenizer = load_tokenizer(folder)
    model = adapted(folder, Lora(r=4), torch.float64).eval()
    prompts = [[*SYSTEM, *range(40, 40 + count)] for count in (1, 5, 30, 9)] + [[7, 8, 9]] * 2
    rows = [Rendered([*row], [-100] * (len(row) - 3) + row[-3:]) for row in ROWS if len(row) > 4]
    rows += [Rendered.of(prompt, [5, 6, 7]) for prompt in prompts]  # read along with their prompts
    plain = generate_answers(model, tokenizer, prompts, 70, batch_size=1), score_answers(model, rows, 0)

    speed_up(model)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: new_empty(self, *size).fill_(torch.nan))

    answers, scores = generate_and_score(model, tokenizer, prompts, rows, 70, batch_size=3)

    assert answers == plain[0]
    assert [each.logps for each in scores] == pytest.approx([each.logps for each in plain[1]], abs=1e-4)
    assert stand_in_of(model).proven == {False: True}


def test_what_follows_prompts_keeps_no_logits_of_rows_beside_them(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, Lora(r=4))
    speed_up(model)
    with torch.inference_mode():
        decoding = stand_in_of(model).decoding([[5, 6, 7]])
        following, beside = decoding.add([[5, 6, 7]], [[5, 6, 7, 8, 9, 10]], [[2, 3, 4]])

    assert len(beside) == 3
    assert following.untyped_storage().nbytes() == following.nbytes


def test_gate_of_the_library_has_its_gradient_without_a_graph_of_its_own(tiny_llama: Path) -> None:
    act = load_base(tiny_llama, Config(), Machine("cpu", torch.float32, 1, 1, ())).model.layers[0].mlp.act_fn
    recorded: list[bool] = []
    act.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    both = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda both: Gate.apply(both, act, 0, 0), both)
    assert recorded
    assert not any(recorded)


def test_long_rows_are_computed_in_blocks(tiny_llama: Path) -> None:
    """Of which only the first weights are kept; two share a beginning that is a block and a part of one."""
    shared = [number % 400 + 5 for number in range(300)]
    rows = [shared + [number % 300 + 7 for number in range(280)], [*shared, 8, 9, 10, 11], [5, 6, 7]]
    model = adapted(tiny_llama, Lora(r=4), torch.float64)
    plain = loss_and_gradients(model, rows)

    speed_up(model)
    lean = loss_and_gradients(model, rows)

    assert abs(lean[0] - plain[0]) < 1e-6
    assert furthest(lean[1], plain[1]) < 1e-5


@pytest.mark.parametrize("window", [None, 16])
def test_the_gpus_attention_is_that_of_the_cpu(window: int | None) -> None:
    packed = pack([*ROWS, [95] * 28, [96] * 25])
    assert any(len(alike.padding) for alike in packed.alike)  # of the last two the shorter one is padded
    torch.manual_seed(0)
    count = len(packed.ids)
    given = [torch.randn(2, count, *size, dtype=torch.float64, requires_grad=True) for size in ((3, 8), (8,), (8,))]
    toward = torch.randn(count, 2 * 3 * 8, dtype=torch.float64)

    found = [Attend.apply(*given, packed, window, 0), attend_padded(packed.pieces, window, *given)]

    assert torch.allclose(*found)
    for ours, theirs in zip(*(torch.autograd.grad((each * toward).sum(), given) for each in found), strict=True):
        assert torch.allclose(ours, theirs)
