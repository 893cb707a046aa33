"""What KTO adds to the frozen reference and TRL's trainer: batches with mismatched answers, and weights for uneven labels."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from trl import KTOTrainer

from scripts.common.distributed import all_reduce_sum
from scripts.common.errors import UserError
from scripts.common.schema import Kto
from scripts.dataset.rendering import RenderedFeedback
from scripts.training.batching import SimilarLengthSampler
from scripts.training.reference import Evaluated, FrozenReference, Starting

log = logging.getLogger(__name__)

FEW = 10  # thumbs of one label
# What the two labels should weigh in sum, up against down (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8).
BALANCED = (1.0, 4 / 3)


class FeedbackTrainer(FrozenReference, KTOTrainer):
    """TRL's KTOTrainer on ids rendered by this project, with an explicit reference model.

    Each epoch sees the batches of `in_batches` in the same order: a row's mismatched answer is of its own batch, as TRL
    wants it, and what the reference says of it is asked once.
    """

    stage = "kto"
    reference_columns = ("ref_logps", "ref_KL_logps")
    reward_name = "reward"
    loss_at_start = ("1 - sigmoid(0)", 0.5)  # equation 7 of the paper; the KL term is 0, too
    remedy = "Lower kto.learning_rate or raise kto.beta."

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens of a row: with its own answer or with the mismatched one."""
        return len(row["prompt_ids"]) + max(len(row["completion_ids"]), len(row["KL_completion_ids"]))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss."""
        return super().compute_loss(model, self.with_reference(inputs), *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Return the reference's logps of each prompt with its own answer and with the mismatched one."""
        own, mismatched = super().compute_ref_log_probs(model, inputs)
        return own, torch.zeros_like(
            own
        ) if mismatched is None else mismatched  # a loss without a KL term asks for none

    def starting(self, row: dict[str, Any]) -> Starting:
        """Return the reward of either answer, whichever is farther from 0, and the loss without its weight."""
        batch = self.with_reference(self._prepare_inputs(self.data_collator([row])))
        loss = float(self.compute_loss(self.model, batch))
        rewards = [self._metrics["eval"]["rewards/chosen" if row["label"] else "rewards/rejected"][-1]]
        if self.calculate_KL:
            rewards.append(self.beta * float(self._compute_kl_logps(self.model, batch) - batch["ref_KL_logps"]))
        weight = self.desirable_weight if row["label"] else self.undesirable_weight
        return Starting(max(rewards, key=abs), loss / weight)

    def means(self, batches: Sequence[Evaluated]) -> dict[str, float]:
        """Return the means over all held-out records, or over those of the label that a metric is about."""
        totals, weights = defaultdict[str, float](float), defaultdict[str, float](float)
        for batch, rows, numbers in batches:
            liked = float(batch["label"].sum())
            if rows != len(batch["label"]):  # the other ranks have other rows
                (liked,) = all_reduce_sum([liked])
            counts = {"chosen": liked, "rejected": rows - liked}
            for name, value in numbers.items():
                weight = counts.get(name.rpartition("/")[2], rows)
                totals[name] += value * weight
                weights[name] += weight
        means = {name: totals[name] / weights[name] for name in totals}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


def in_batches(
    rows: Sequence[RenderedFeedback], batch_size: int, seed: int, *, by_length: bool
) -> list[dict[str, Any]]:
    """Order rows into the batches that are trained, and give each prompt the answer of another row of its batch.

    KTO estimates how far the policy has moved from its reference on such mismatched pairs. An answer is cut where it would
    make the longest sequence longer; it is never trained.
    """
    lengths = [len(row.input_ids) for row in rows]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    if by_length and rows:  # without data.validation_ratio nothing is held out
        order = list(SimilarLengthSampler(lengths, batch_size, seed))
    ordered, found = [rows[index] for index in order], list[dict[str, Any]]()
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        others = mismatched(batch) if len(batch) > 1 else [ordered[start - 1]]
        for row, other in zip(batch, others, strict=True):
            room = max(lengths) - len(row.prompt_ids)
            found.append(
                {
                    "prompt_ids": row.prompt_ids,
                    "completion_ids": row.answer_ids,
                    "KL_completion_ids": other.answer_ids[:room],
                    "label": row.liked,
                }
            )
    return found


def mismatched(batch: Sequence[RenderedFeedback]) -> list[RenderedFeedback]:
    """Rotate a batch, as TRL does, by as little as gives every prompt the answer to another one, where that is possible."""
    turns = [[*batch[-by:], *batch[:-by]] for by in range(1, len(batch))]
    pairs = ((turn, zip(batch, turn, strict=True)) for turn in turns)
    return next((turn for turn, both in pairs if all(a.prompt_ids != b.prompt_ids for a, b in both)), turns[0])


def balance(section: Kto, rows: Sequence[RenderedFeedback]) -> dict[str, float]:
    """Return how many records have a thumb up and down, and how much each of them weighs.

    `auto` gives both labels the same weight in sum: the rarer one is weighed up, or the one whose weight is not set.
    Raises: UserError when all thumbs point the same way.
    """
    up = sum(row.liked for row in rows)
    down = len(rows) - up
    if not (up and down):
        seen, lacking = ("up", "down") if up else ("down", "up")
        other = " To teach liked answers alone, give them to scripts.train_sft without their label." if up else ""
        raise UserError(
            f"kto.dataset_path: all {len(rows)} training records have a thumb {seen}, but KTO learns from the difference. Add "
            f"records with a thumb {lacking}.{other}"
        )
    given = section.desirable_weight, section.undesirable_weight
    if given[0] == "auto":
        desirable = max(1.0, down / up) if given[1] == "auto" else given[1] * down / up
    else:
        desirable = given[0]
    undesirable = desirable * up / down if given[1] == "auto" else given[1]
    log.info("%d thumbs up weigh %.3g each, %d thumbs down %.3g", up, desirable, down, undesirable)
    if min(up, down) < FEW:
        log.warning("only %d records have a thumb %s: what few answers have in common by chance is learnt, too", *min((up, "up"), (down, "down")))  # fmt: skip
    ratio = desirable * up / (undesirable * down)
    if not BALANCED[0] * 0.99 <= ratio <= BALANCED[1] * 1.01:
        log.warning(
            "thumbs up weigh %.2f times as much as thumbs down in sum; KTO's paper recommends 1 to 4/3. See kto.desirable_weight",
            ratio,
        )
    return {"thumbs_up": up, "thumbs_down": down, "desirable_weight": desirable, "undesirable_weight": undesirable}
