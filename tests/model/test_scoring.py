"""Scores of given answers do not depend on how they fall into batches, and equal a computation by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.dataset.rendering import IGNORED, Rendered
from scripts.model.base import load_base, load_tokenizer
from scripts.model.generation import generate_answers
from scripts.model.scoring import AnswerScore, mean_loss, score_answers
from tests.support.architectures import save_family


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest):
    """Return a tiny model with relative and one with absolute positions."""
    folder: Path = request.getfixturevalue(request.param)
    return load_base(folder, Config(), Machine("cpu", torch.float32, 1, 1, ())).train()


def make_rows() -> list[Rendered]:
    """Make rows of unequal length; every third has two answers."""
    generator = random.Random(0)
    rows = []
    for number in range(11):
        ids = [generator.randrange(5, 500) for _ in range(generator.randrange(8, 60))]
        labels = [IGNORED] * 5 + ids[5:]
        if number % 3 == 0:
            labels[6] = IGNORED
        rows.append(Rendered(ids, labels))
    return rows


ROWS = make_rows()


def by_hand(model, row: Rendered) -> AnswerScore:
    """Score one row alone, token by token."""
    model.eval()
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([row.input_ids])).logits[0].double(), -1)
    wanted = [(place, label) for place, label in enumerate(row.labels) if label != IGNORED]
    return AnswerScore(sum(float(log_probs[place - 1, label]) for place, label in wanted), len(wanted))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_scores_equal_a_hand_loop_at_any_batch_size(model, batch_size: int) -> None:
    scores = score_answers(model, ROWS, pad_token_id=0, batch_size=batch_size)

    wanted = [by_hand(model, row) for row in ROWS]
    assert [score.tokens for score in scores] == [score.tokens for score in wanted]
    assert [score.logps for score in scores] == pytest.approx([score.logps for score in wanted], abs=2e-4)


@pytest.mark.parametrize("family", ["Qwen3.5", "Falcon-H1", "LFM2", "RecurrentGemma", "RWKV"])
def test_padding_leaves_no_trace_in_a_model_that_keeps_a_state(tmp_path: Path, family: str) -> None:
    """The first three mask what enters the state; the others read padding as any token, and so get none."""
    folder = save_family(tmp_path / "model", family)
    model, tokenizer = load_base(folder, Config(), Machine("cpu", torch.float32, 1, 1, ())), load_tokenizer(folder)

    scores = score_answers(model, ROWS, pad_token_id=0, batch_size=4)
    together = generate_answers(model, tokenizer, [row.input_ids for row in ROWS], 8, batch_size=4)

    assert [score.logps for score in scores] == pytest.approx([by_hand(model, row).logps for row in ROWS], rel=1e-5)
    alone = [generate_answers(model, tokenizer, [row.input_ids], 8)[0] for row in ROWS]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_scores_come_in_the_order_given(model) -> None:
    order = random.Random(3).sample(range(len(ROWS)), len(ROWS))
    straight = score_answers(model, ROWS, 0, 4)

    shuffled = score_answers(model, [ROWS[index] for index in order], 0, 4)

    assert [score.logps for score in shuffled] == pytest.approx([straight[index].logps for index in order], abs=2e-4)


def test_scoring_leaves_the_model_in_the_mode_it_was_in(model) -> None:
    model.train()
    score_answers(model, ROWS[:1], 0)
    assert model.training
    model.eval()
    score_answers(model, ROWS[:1], 0)
    assert not model.training


def test_pad_token_does_not_matter(model) -> None:
    first, other = (score_answers(model, ROWS, pad, 8) for pad in (0, 7))

    assert [score.logps for score in first] == pytest.approx([score.logps for score in other], abs=1e-5)


def test_mean_loss_weighs_tokens_and_not_rows() -> None:
    assert mean_loss([AnswerScore(-2.0, 1), AnswerScore(-4.0, 3)]) == pytest.approx(1.5)
