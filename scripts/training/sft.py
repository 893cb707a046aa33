"""What SFT adds to TRL's trainer: batches of similar length, and a held-out loss that no batch size changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl import SFTTrainer

from scripts.common.distributed import all_reduce_sum, shard
from scripts.dataset.rendering import Rendered
from scripts.model.adapter import adapter_kept
from scripts.model.scoring import score_answers
from scripts.training.batching import GroupedByLength


class AnswerLossTrainer(GroupedByLength, SFTTrainer):
    """TRL's SFTTrainer with batches of similar length and a held-out loss that no batch size changes."""

    def __init__(
        self, *args: Any, group_by_length: bool, held_out: Sequence[Rendered], answer_tokens: float, **kwargs: Any
    ) -> None:
        """Take, beside TRL's arguments, the mean number of answer tokens per training record."""
        self.group_by_length, self.held_out, self.answer_tokens = group_by_length, held_out, answer_tokens
        self.control: Any
        self.router_aux_loss_coef: Any
        with adapter_kept(kwargs["model"]):
            super().__init__(*args, **kwargs)
        # Some models say that their own loss takes no number of tokens (Gemma 4). TRL's loss is another one, and takes it.
        self.model_accepts_loss_kwargs = True

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens of a row."""
        return len(row["input_ids"])

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss; the gradient of a batch of similar length is weighted by its number of answer tokens.

        TRL divides by that number. Random batches hold about the same, but a batch of short records would count each of
        its tokens for more than those of a long one, and the held-out loss, which is per token, would end higher.
        """
        if not self.group_by_length or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counted = self.args.world_size if self.args.average_tokens_across_devices else 1
        records = self.args.train_batch_size * self.args.gradient_accumulation_steps * counted
        weight = num_items_in_batch / (records * self.answer_tokens)
        # The loss of a mixture's routers is no sum over answer tokens, so its gradient keeps the size that TRL gives it.
        coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, self.router_aux_loss_coef / weight
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.router_aux_loss_coef = coefficient
        loss, *outputs = found if return_outputs else (found,)
        # What is logged stays the mean of the batch, the routers' part aside.
        weighted = loss.detach() + (loss - loss.detach()) * weight
        return (weighted, *outputs) if return_outputs else weighted

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss per answer token over all held-out records; TRL averages batches of unequal size."""
        rows, counted = shard(self.held_out)
        scores = score_answers(self.model, rows, self.processing_class.pad_token_id, self.args.eval_batch_size)[
            :counted
        ]
        logps, tokens = all_reduce_sum([sum(score.logps for score in scores), sum(score.tokens for score in scores)])
        metrics = {f"{metric_key_prefix}_loss": -logps / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
