"""The fast path is exact: the same loss and gradients as TRL's own head, in batches of similar length."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from scripts.common import fast_path
from scripts.common.fast_path import (
    AnswerLogProbs,
    SimilarLengthSampler,
    score_answers_only,
)
from scripts.common.modeling import add_lora, load_base
from scripts.common.runtime import Machine
from scripts.common.schema import Config, Lora
from tests.conftest import save_tiny_model

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def plain_trl(monkeypatch: pytest.MonkeyPatch):
    """Return TRL's module with its own head in place, whatever ran before; it is put back afterwards."""
    from trl import kernels
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", kernels.ChunkedLogProbFunction)
    return utils


def load(folder: Path, dtype: torch.dtype = torch.float32):
    """Load a tiny base."""
    return load_base(folder, Config(), Machine("cpu", dtype, 1, 1, ()))


def scored(utils, model, batch: dict[str, torch.Tensor]):
    """Run TRL's fused head and return its output with the gradients of all weights."""
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    output = model.eval()(**batch, fused_lm_head=True)  # no dropout, so that two runs can be compared
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "cohere"])
def test_loss_and_gradients_equal_those_of_plain_trl(plain_trl, tmp_path: Path, architecture: str) -> None:
    """gemma2 caps its logits and cohere scales them."""
    folder = save_tiny_model(tmp_path / "m", architecture)
    input_ids = torch.randint(5, 500, (3, 24), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :9] = -100
    labels[1, 12:] = -100
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}

    slow, slow_gradients = scored(plain_trl, load(folder), batch)
    assert score_answers_only("cpu")
    fast, fast_gradients = scored(plain_trl, load(folder), batch)

    assert torch.allclose(fast.loss, slow.loss, atol=1e-5, rtol=0)
    assert slow_gradients.keys() == fast_gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in slow_gradients.values())
    for name, gradient in slow_gradients.items():
        assert torch.allclose(fast_gradients[name], gradient, atol=1e-5, rtol=1e-4), name
    for name in OUTPUTS:
        assert torch.allclose(getattr(fast, name).float(), getattr(slow, name).float(), atol=1e-4), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2", "phi"])
@pytest.mark.parametrize("longest", [512, 8])
def test_attention_of_short_rows_gives_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str, longest: int
) -> None:
    """With padding on both sides, keys shared by heads (llama, qwen3), and rows on both sides of the limit."""
    monkeypatch.setattr(fast_path, "attends_plainly", lambda sequences, tokens: tokens <= longest)
    folder = save_tiny_model(tmp_path / "m", architecture)
    input_ids = torch.randint(5, 500, (3, 24), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5], attention_mask[1, 20:] = 0, 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, 5] = -100  # padding would predict it, and what attends to nothing is left open
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = add_lora(load(folder), Lora(r=4, alpha=8, dropout=0.0), "m").eval()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data + (0.1 if "lora_B" in name else 0)
        if fast:
            fast_path.attend_plainly_to_short_rows(model)
        loss = model(input_ids=input_ids, labels=labels, attention_mask=attention_mask).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))

    (slow_loss, slow), (fast_loss, quick) = results
    assert torch.allclose(slow_loss, fast_loss, atol=1e-6, rtol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in slow.values())
    assert all(torch.allclose(quick[name], gradient, atol=1e-5) for name, gradient in slow.items())


def test_batch_without_any_answer_gives_no_gradient_and_no_nan(plain_trl, tiny_llama: Path) -> None:
    score_answers_only("cpu")
    input_ids = torch.arange(5, 25).reshape(1, 20)

    output, gradients = scored(plain_trl, load(tiny_llama), {"input_ids": input_ids, "labels": input_ids * 0 - 100})

    assert output.loss == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def direct(hidden, weight, bias, labels, temperature, softcap, scale) -> torch.Tensor:
    """Compute log-probabilities of the labels by the book."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, -1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("rows_per_tile", [1000, 7, 1])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 5.0, 0.25), (1.0, 2.0, 3.0)])
def test_log_probs_equal_a_direct_computation_in_one_piece_and_in_tiles(
    monkeypatch: pytest.MonkeyPatch, rows_per_tile: int, temperature: float, softcap: float | None, scale: float
) -> None:
    vocabulary = 97
    monkeypatch.setattr(fast_path, "TILE_BYTES", rows_per_tile * 4 * vocabulary)
    torch.manual_seed(0)
    start = torch.randn(50, 16), torch.randn(vocabulary, 16), torch.randn(vocabulary)
    labels = torch.randint(vocabulary, (50,))
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))

    got = AnswerLogProbs().apply(*ours, labels, temperature, 1, softcap, scale, OUTPUTS)
    wanted = direct(*theirs, labels, temperature, softcap, scale)
    got[0].sum().backward()
    wanted.sum().backward()

    assert torch.allclose(got[0], wanted, atol=1e-5)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, reference.grad, atol=1e-4)
    assert all(value is not None and len(value) == 50 for value in got)


def test_outputs_that_were_not_asked_for_are_not_computed() -> None:
    got = AnswerLogProbs().apply(torch.randn(4, 8), torch.randn(9, 8), None, torch.arange(4), 1.0, 1, None, 1.0, ("log_probs",))  # fmt: skip

    assert [value is None for value in got] == [False, True, True, True, True]


def test_a_trl_without_the_private_names_trains_with_its_own_head(plain_trl, monkeypatch, caplog) -> None:
    original = plain_trl._ChunkedLogProbFunction
    monkeypatch.delattr(plain_trl, "_use_triton")

    assert not score_answers_only("cpu")

    assert "this TRL has no _use_triton" in caplog.text
    assert plain_trl._ChunkedLogProbFunction is original


def test_gpu_keeps_trl_own_head(plain_trl) -> None:
    original = plain_trl._ChunkedLogProbFunction

    assert not score_answers_only("cuda")
    assert plain_trl._ChunkedLogProbFunction is original


# --- batches of similar length

LENGTHS = random.Random(0).choices(range(5, 500), k=83)


def batches(sampler: SimilarLengthSampler, size: int = 8) -> list[list[int]]:
    """Cut an epoch into batches."""
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize(("count", "size"), [(83, 8), (80, 8), (3, 8), (1, 1), (8, 8)])
def test_every_record_comes_once_per_epoch(count: int, size: int) -> None:
    sampler = SimilarLengthSampler(LENGTHS[:count], size, seed=0)

    assert sorted(sampler) == list(range(count))
    assert len(sampler) == count


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, again, other_seed = (SimilarLengthSampler(LENGTHS, 8, seed) for seed in (0, 0, 1))
    epoch_0 = list(first)
    first.set_epoch(1)
    list(again)
    again.set_epoch(1)

    assert list(first) == list(again) != epoch_0
    assert list(other_seed) != epoch_0


def test_batches_hold_similar_lengths_in_no_order_of_length() -> None:
    cut = batches(SimilarLengthSampler(LENGTHS, 8, seed=0))
    random_order = random.Random(1).sample(range(83), 83)

    def padding(parts: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in part) - LENGTHS[j] for part in parts for j in part)

    assert padding(cut) < padding([random_order[start : start + 8] for start in range(0, 83, 8)]) / 4
    means = [sum(LENGTHS[i] for i in part) / len(part) for part in cut]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
    assert [len(part) for part in cut] == [8] * 10 + [3]


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_begins_with_its_longest_batch(epoch: int) -> None:
    """So that too little memory shows at once."""
    sampler = SimilarLengthSampler(LENGTHS[:80], 8, seed=0)
    sampler.set_epoch(epoch)

    first, *others = (sum(LENGTHS[index] for index in part) for part in batches(sampler))

    assert first > max(others)
