"""The head that scores answers only gives the loss and gradients of TRL's own head, or TRL keeps its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.model.base import load_base
from scripts.speed import answer_head
from scripts.speed.answer_head import AnswerLogProbs, score_answers_only
from tests.conftest import save_tiny_model
from tests.support.tolerance import ROUNDING, apart

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def plain_trl(monkeypatch: pytest.MonkeyPatch):
    """Return TRL's module with its own head in place, no matter what ran before; it is put back afterwards."""
    from trl import kernels
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", kernels.ChunkedLogProbFunction)
    return utils


def load(folder: Path):
    """Load a tiny base."""
    return load_base(folder, Config(), Machine("cpu", torch.float32, 1, 1, ()))


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
    assert apart(list(fast_gradients.values()), list(slow_gradients.values())) < ROUNDING[torch.float32]
    for name in OUTPUTS:
        assert torch.allclose(getattr(fast, name).float(), getattr(slow, name).float(), atol=1e-4), name


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
    monkeypatch.setattr(answer_head, "TILE_BYTES", rows_per_tile * 4 * vocabulary)
    torch.manual_seed(0)
    start = torch.randn(50, 16), torch.randn(vocabulary, 16), torch.randn(vocabulary)
    labels = torch.randint(vocabulary, (50,))
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))

    got = AnswerLogProbs().apply(*ours, labels, temperature, 1, softcap, scale, OUTPUTS)
    expected = direct(*theirs, labels, temperature, softcap, scale)
    got[0].sum().backward()
    expected.sum().backward()

    assert torch.allclose(got[0], expected, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-4)
    assert all(value is not None and len(value) == 50 for value in got)


@pytest.mark.parametrize(("rows", "sizes"), [(49, [25, 25]), (20, [17, 17, 16]), (50, [50])])
def test_answers_are_scored_in_tiles_of_equal_size(
    monkeypatch: pytest.MonkeyPatch, rows: int, sizes: list[int]
) -> None:
    """A few left over would be a small product, for which torch copies the whole weight."""
    monkeypatch.setattr(answer_head, "TILE_BYTES", rows * 4 * 97)
    scored: list[int] = []
    apply = answer_head._TargetStatistics.apply
    monkeypatch.setattr(
        answer_head._TargetStatistics, "apply", lambda logits, *more: scored.append(len(logits)) or apply(logits, *more)
    )

    AnswerLogProbs().apply(torch.randn(50, 8), torch.randn(97, 8), None, torch.arange(50), 1.0, 1, None, 1.0, OUTPUTS)

    assert scored == sizes


def test_outputs_that_were_not_asked_for_are_not_computed() -> None:
    got = AnswerLogProbs().apply(torch.randn(4, 8), torch.randn(9, 8), None, torch.arange(4), 1.0, 1, None, 1.0, ("log_probs",))  # fmt: skip

    assert [value is None for value in got] == [False, True, True, True, True]


def test_a_trl_without_the_private_names_trains_with_its_own_head(plain_trl, monkeypatch, caplog) -> None:
    original = plain_trl._ChunkedLogProbFunction
    monkeypatch.delattr(plain_trl, "_use_triton")

    assert not score_answers_only("cpu")

    assert "this TRL has no _use_triton" in caplog.text
    assert "training with TRL's own, slower head" in caplog.text
    assert plain_trl._ChunkedLogProbFunction is original


def test_a_trl_whose_head_takes_other_arguments_trains_with_it(
    plain_trl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_llama: Path
) -> None:
    """The same arguments in another order would pass a check of the names alone."""
    theirs = plain_trl._ChunkedLogProbFunction

    class Reordered(theirs):
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, chunk_size, temperature, final_logit_softcapping, logit_scale, outputs):  # fmt: skip
            return theirs.forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)  # fmt: skip

    monkeypatch.setattr(plain_trl, "_ChunkedLogProbFunction", Reordered)

    assert not score_answers_only("cpu")

    assert "targets, chunk_size, temperature, final_logit_softcapping" in caplog.text
    assert plain_trl._ChunkedLogProbFunction is Reordered


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_trl_whose_head_computes_something_else_trains_with_it(
    plain_trl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_llama: Path, part: str
) -> None:
    theirs = plain_trl._ChunkedLogProbFunction

    class Changed(theirs):
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs):  # fmt: skip
            log_probs, *others = theirs.forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)  # fmt: skip
            return log_probs * (1.001 if part == "loss" else 1), *others

        @staticmethod
        def backward(ctx, *gradients):
            grad_hidden, *others = theirs.backward(ctx, *gradients)
            return grad_hidden * (1.001 if part == "gradient" else 1), *others

    monkeypatch.setattr(plain_trl, "_ChunkedLogProbFunction", Changed)

    assert not score_answers_only("cpu")

    assert "TRL's LM head gives other numbers (0.001 apart)" in caplog.text
    assert plain_trl._ChunkedLogProbFunction is Changed
    assert not plain_trl._use_triton(torch.device("cpu"))
    ids = torch.arange(5, 25).reshape(1, 20)
    assert scored(plain_trl, load(tiny_llama), {"input_ids": ids, "labels": ids})[0].loss > 0


def test_gpu_keeps_trl_own_head(plain_trl) -> None:
    original = plain_trl._ChunkedLogProbFunction

    assert not score_answers_only("cuda")
    assert plain_trl._ChunkedLogProbFunction is original
