"""What DPO adds to TRL's trainer: an explicit reference model, and the proofs at step 0 and at the end."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from trl import DPOTrainer

from scripts.common.distributed import all_gather, all_reduce_sum, equal_batches, is_main_process, world_size
from scripts.common.errors import UserError
from scripts.dataset.rendering import RenderedPair
from scripts.model.adapter import adapter_kept, whole_weights
from scripts.training.batching import GroupedByLength
from scripts.training.dropout import switch_off_dropout
from scripts.training.reference_logps import KeptLogps, Logps

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL names them
# By which the logps of one token differ between batches of other shapes; over many tokens such differences cancel in part.
ROUNDING_PER_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.25}
LENGTH_BIAS = 0.65  # share of pairs in which one side is the longer one


def dpo_margins(
    policy: tuple[torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor], beta: float
) -> torch.Tensor:
    """Return the implicit reward of the chosen answer minus that of the rejected one (Rafailov et al. 2023, equation 7).

    Policy and reference come as summed logps of the chosen and of the rejected answers, each of shape (B,).
    """
    return beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))


class PreferenceTrainer(GroupedByLength, DPOTrainer):
    """TRL's DPOTrainer on ids rendered by this project, with an explicit reference model."""

    def __init__(
        self,
        *args: Any,
        group_by_length: bool,
        base_is_reference: bool,
        kept_logps: KeptLogps,
        fast_path: bool,
        **kwargs: Any,
    ) -> None:
        """Take, beside TRL's arguments, whether the reference is the bare base instead of a copy of the starting adapter."""
        self.group_by_length, self.base_is_reference, self.fast_path = group_by_length, base_is_reference, fast_path
        self.kept_logps = kept_logps
        self.control: Any
        self.sped_up = self.real_tokens_only = False
        with adapter_kept(kwargs["model"]):
            super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            switch_off_dropout(self.model)
        self._choose_reference()
        self.precompute_ref_logps = True  # TRL's loss reads columns in any case; `with_reference` adds what they lack

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens of a pair: with its prompt once, or of the longer of two padded rows."""
        answers = len(row["chosen_ids"]), len(row["rejected_ids"])
        return len(row["prompt_ids"]) + (sum if self.real_tokens_only else max)(answers)

    def _longest_first(self, pairs: Any) -> list[int]:
        """Return row numbers so that pairs pad each other little and too little memory shows at once."""
        lengths = [self.row_length(pair) for pair in pairs]
        return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss."""
        inputs = self.with_reference(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def with_reference(self, inputs: Any) -> Any:
        """Return a batch with the reference's logps, asking the reference where they were not computed beforehand."""
        if REFERENCE_COLUMNS[0] in inputs:
            return inputs
        logps = self.compute_ref_log_probs(self.model, inputs)
        return {**inputs, **dict(zip(REFERENCE_COLUMNS, logps, strict=True))}

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Return the reference's logps of both sides, in evaluation mode: nothing about a reference is left to chance."""
        training = model.training
        model.eval()
        logps = super().compute_ref_log_probs(model, inputs)
        model.train(training)
        return logps

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # the ids are ours already

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's own hands the numbers over in a temporary folder that only one process knows.
        self._choose_reference()
        pairs = [[pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]] for pair in dataset]
        logps = self.kept_logps.of(
            self.reference_weights(), pairs, lambda: self._ask_reference(dataset, name, batch_size)
        )
        for side, column in enumerate(REFERENCE_COLUMNS):
            dataset = dataset.add_column(column, [pair[side] for pair in logps])
        return dataset

    def _ask_reference(self, dataset: Any, name: str, batch_size: int) -> Logps:
        self.model.eval()
        found: list[tuple[int, float, float]] = []
        rounds = list(equal_batches(self._longest_first(dataset), batch_size))
        for indices, _ in tqdm(rounds, f"reference, {name} pairs", disable=not is_main_process()):
            batch = self._prepare_inputs(self.data_collator([dataset[index] for index in indices]))
            chosen, rejected = self.compute_ref_log_probs(self.model, batch)
            found += zip(indices, chosen.tolist(), rejected.tolist(), strict=True)
        logps = {index: (chosen, rejected) for index, chosen, rejected in all_gather(found)}
        return [logps[index] for index in range(len(dataset))]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the means over all held-out pairs; TRL averages batches of unequal size."""
        pairs, totals = self.eval_dataset, defaultdict[str, float](float)
        self.model.eval()
        for indices, count in equal_batches(self._longest_first(pairs), self.args.eval_batch_size):
            self._metrics["eval"].clear()
            batch = self.data_collator([pairs[index] for index in indices])
            loss = float(self.prediction_step(self.model, batch, prediction_loss_only=True)[0])
            (loss,) = all_reduce_sum([loss / world_size()])
            for name, value in {"loss": [loss], **self._metrics["eval"]}.items():
                totals[name] += value[-1] * count / len(pairs)
        self._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in totals.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _choose_reference(self) -> None:
        # TRL copies the starting adapter to "ref"; without the copy its reference is the base.
        if self.base_is_reference and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        if self.fast_path and not self.sped_up:  # before the reference is first asked: both must compute alike
            from scripts.speed.speed_up import speed_up, stand_in_of

            speed_up(self.model, keep_weights=False)  # pairs are long
            self.sped_up, self.real_tokens_only = True, stand_in_of(self.model) is not None

    @property
    def reference_adapter(self) -> str | None:
        """Name the adapter of the reference model; None is the bare base."""
        return "ref" if "ref" in self.model.peft_config else None

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """Copy the reference adapter, to prove later that it never moved."""
        return whole_weights(self.model, "ref")


def prove_start(trainer: PreferenceTrainer) -> dict[str, float]:
    """Prove that policy and reference are what the run says, on the numbers that training computes, dropout off.

    Where the reference is a copy of the starting policy, every margin must be 0 and the sigmoid loss ln 2. Logps of the
    reference that were computed beforehand must be those it gives now.
    Raises: UserError when they differ.
    """
    sides = [side for side in (trainer.train_dataset, trainer.eval_dataset) if side]
    rows = [side[index] for side in sides for index in sorted({0, len(side) - 1})]  # the shortest and the longest
    used = starting_margins(trainer, rows)
    asked_now = used
    if REFERENCE_COLUMNS[0] in rows[0]:
        bare = [{name: row[name] for name in row if name not in REFERENCE_COLUMNS} for row in rows]
        asked_now = starting_margins(trainer, bare)
    margin, loss = _largest_and_loss(asked_now)
    tolerance = TOLERANCE[trainer.model.get_base_model().dtype]
    if not math.isfinite(margin + loss):
        raise UserError(
            f"step 0: policy or reference gives no finite probabilities (largest margin {margin}, loss {loss}), as when weights "
            "are far too large. Train the adapter of dpo.init_from again, or choose another base model. Nothing was trained."
        )
    if trainer.base_is_reference and trainer.reference_adapter is None:
        log.info("step 0: the reference is the base; the policy's largest margin against it is %.4f", margin)
    elif margin > tolerance or abs(loss - math.log(2)) > tolerance:
        raise UserError(
            f"step 0: policy and reference should be the same model, but their largest margin is {margin:.6f} and the loss "
            f"{loss:.6f} (wanted 0 and ln 2 = {math.log(2):.6f}, within {tolerance}). Nothing was trained."
        )
    else:
        log.info("step 0: reference equals the starting policy (largest margin %.2g, loss %.6f = ln 2)", margin, loss)
    check_columns(trainer, rows, used, asked_now)
    margin, loss = _largest_and_loss(used)
    return {"step0_margin": margin, "step0_loss": loss}


def check_columns(
    trainer: PreferenceTrainer, rows: Sequence[dict[str, Any]], used: Sequence[float], asked_now: Sequence[float]
) -> None:
    """Prove that margins from logps computed beforehand are those of a reference that is asked now, but for rounding."""
    base = trainer.model.get_base_model()
    # An 8-bit base rounds the activations of a batch together.
    rounding = ROUNDING_PER_TOKEN[torch.bfloat16 if getattr(base, "hf_quantizer", None) else base.dtype]
    for row, one, other in zip(rows, used, asked_now, strict=True):
        tokens = len(row["chosen_ids"]) + len(row["rejected_ids"])
        if not abs(one - other) <= trainer.beta * rounding * tokens**0.5:
            raise UserError(
                f"step 0: the logps of the reference that training would use are not those it gives now: a margin of {one:.6f} "
                f"instead of {other:.6f}. Remove the folder {trainer.kept_logps.folder} and start again. Nothing was trained."
            )


def starting_margins(trainer: PreferenceTrainer, rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return the margin of each pair out of the very loss that trains, dropout off."""
    model, metrics = trainer.model, trainer._metrics["eval"]
    was_training = model.training
    model.eval()
    margins = []
    for row in rows:
        with torch.no_grad():
            trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator([row])))
        margins.append(metrics["rewards/margins"][-1])
    metrics.clear()
    model.train(was_training)
    return margins


def _largest_and_loss(margins: Sequence[float]) -> tuple[float, float]:
    found = torch.tensor(margins)
    return float(found.abs().max()), float(-functional.logsigmoid(found).mean())


def check_trainable_names(model: Any) -> None:
    """Prove that exactly the policy's adapter trains."""
    wrong = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and ".default." not in name
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} weights outside the policy's adapter would train, the first is {wrong[0]}. Nothing was trained."
        )


@contextmanager
def reference_unchanged(trainer: PreferenceTrainer) -> Iterator[None]:
    """Prove that the reference model is after training what it was before."""
    before = trainer.reference_weights()
    yield
    moved = [
        name
        for name, value in trainer.reference_weights().items()  # DeepSpeed keeps it in bf16
        if not torch.equal(value, before[name]) and not torch.equal(value, before[name].bfloat16().float())
    ]
    if moved:
        raise UserError(
            f"the reference model changed during training ({moved[0]} and {len(moved) - 1} more); the result is void."
        )


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
