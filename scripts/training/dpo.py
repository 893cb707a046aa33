"""What DPO adds to the frozen reference and TRL's trainer: pairs whose prompts are computed once, and a warning of length."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from trl import DPOTrainer

from scripts.dataset.rendering import RenderedPair
from scripts.training.reference import Evaluated, FrozenReference, Starting

if TYPE_CHECKING:
    from scripts.speed.speed_up import SharedPrompts

log = logging.getLogger(__name__)

LENGTH_BIAS = 0.65  # share of pairs in which one side is the longer one


def dpo_margins(
    policy: tuple[torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor], beta: float
) -> torch.Tensor:
    """Return the implicit reward of the chosen answer minus that of the rejected one (Rafailov et al. 2023, equation 7).

    Policy and reference come as summed logps of the chosen and of the rejected answers, each of shape (B,).
    """
    return beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))


class PreferenceTrainer(FrozenReference, DPOTrainer):
    """TRL's DPOTrainer on ids rendered by this project, with an explicit reference model."""

    stage = "dpo"
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    reward_name = "margin"
    loss_at_start = ("ln 2", math.log(2))
    remedy = "Lower dpo.learning_rate, raise beta or sft_weight."

    prompts: SharedPrompts | None = None

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens of a pair: with its prompt once, or of the longer of two padded rows."""
        answers = len(row["chosen_ids"]), len(row["rejected_ids"])
        once = self.real_tokens_only or (self.prompts and self.prompts.possible)
        return len(row["prompt_ids"]) + (sum if once else max)(answers)

    def prompts_shared(self, inputs: Any) -> AbstractContextManager[None]:
        """Take every forward pass within for one of pairs, whose prompts are computed once also where no lean decoder stands in."""
        if not self.fast_path or self.real_tokens_only:
            return nullcontext()
        if self.prompts is None:
            from scripts.speed.speed_up import SharedPrompts

            self.prompts = SharedPrompts(self.model, inputs)
        return self.prompts.at_work()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss."""
        inputs = self.with_reference(inputs)
        with self.prompts_shared(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Return the reference's logps of both answers."""
        with self.prompts_shared(inputs):
            return super().compute_ref_log_probs(model, inputs)

    def starting(self, row: dict[str, Any]) -> Starting:
        """Return the margin of a pair, and the pure loss that follows from it."""
        self.compute_loss(self.model, self._prepare_inputs(self.data_collator([row])))
        margin = self._metrics["eval"]["rewards/margins"][-1]
        return Starting(margin, float(-functional.logsigmoid(torch.tensor(margin))))

    def means(self, batches: Sequence[Evaluated]) -> dict[str, float]:
        """Return the means over all held-out pairs."""
        totals = defaultdict[str, float](float)
        for _, pairs, numbers in batches:
            for name, value in numbers.items():
                totals[name] += value * pairs / len(self.eval_dataset)
        return totals


def length_bias(pairs: Sequence[RenderedPair]) -> dict[str, float]:
    """Say when the better answer is mostly the longer one: DPO would learn length."""
    longer = sum(len(pair.chosen_ids) > len(pair.rejected_ids) for pair in pairs) / len(pairs)
    chosen, rejected = (
        sum(len(ids) for ids in side) / len(pairs)
        for side in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])
    )
    if not 1 - LENGTH_BIAS <= longer <= LENGTH_BIAS:
        log.warning(
            "length bias: chosen is longer in %.0f %% of pairs (%.0f against %.0f tokens on average); DPO may learn length",
            100 * longer, chosen, rejected,
        )  # fmt: skip
    return {"chosen_longer": longer, "chosen_tokens": chosen, "rejected_tokens": rejected}
