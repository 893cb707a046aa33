"""What DPO adds to training: our token ids in TRL's trainer, the step-0 proof, and the watch over degeneration."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import TrainerCallback
from trl import DPOTrainer

from scripts.common.errors import UserError
from scripts.common.fast_path import GroupedByLength, speed_up
from scripts.common.generation import Health, generate_answers, health
from scripts.common.modeling import adapter_kept, switched_to, whole_weights
from scripts.common.processes import added_up, collected, even_rounds, place
from scripts.common.reference_logps import KeptLogps, Logps
from scripts.common.rendering import IGNORED, Rendered, RenderedPair
from scripts.common.runtime import is_main_process
from scripts.common.scoring import mean_kl
from scripts.common.shared_prompts import SharedPrompts

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}
WATCHED_PROMPTS = 8
WATCHED_TOKENS = 128
# A run degenerates when its answers cross one of these lines, seen from where it started.
REPETITION_RISE, EOS_FALL, LENGTH_GROWTH = 0.15, 0.25, 1.6
CHOSEN_FALL_NATS = 0.5  # per token of the chosen answers
LENGTH_BIAS = 0.65


class PreferenceTrainer(GroupedByLength, DPOTrainer):
    """TRL's DPOTrainer on ids rendered by this project, with an explicit reference model."""

    def __init__(
        self, *args: Any, group_by_length: bool, reference: str, kept_logps: KeptLogps, fast_path: bool, **kwargs: Any
    ) -> None:
        self.group_by_length, self.reference, self.fast_path = group_by_length, reference, fast_path
        self.kept_logps = kept_logps
        self.control: Any
        self.prompts: SharedPrompts | None = None
        self.sped_up = False
        with adapter_kept(kwargs["model"]):
            super().__init__(*args, **kwargs)
        self._choose_reference()

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens of a pair: of one row with both answers, or of the longer of two rows."""
        answers = len(row["chosen_ids"]), len(row["rejected_ids"])
        return len(row["prompt_ids"]) + (sum if self.prompts and self.prompts.possible else max)(answers)

    def _longest_first(self, pairs: Any) -> list[int]:
        """Return row numbers so that pairs pad each other little and too little memory shows at once."""
        lengths = [self.row_length(pair) for pair in pairs]
        return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def prompts_shared(self, inputs: Any) -> AbstractContextManager[None]:
        """Take every forward pass within for one of pairs, whose prompts are computed once where that is possible."""
        if not self.fast_path:
            return nullcontext()
        if self.prompts is None:
            self.prompts = SharedPrompts(self.model, inputs)
        return self.prompts.at_work()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss."""
        with self.prompts_shared(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Return the reference's log-probabilities of both sides."""
        with self.prompts_shared(inputs):
            return super().compute_ref_log_probs(model, inputs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # the ids are ours already

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's own hands the numbers over in a temporary folder that only one process knows.
        self._choose_reference()
        pairs = [[pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]] for pair in dataset]
        logps = self.kept_logps.of(
            self.reference_weights(), pairs, lambda: self._ask_reference(dataset, name, batch_size)
        )
        for side, column in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            dataset = dataset.add_column(column, [pair[side] for pair in logps])
        return dataset

    def _ask_reference(self, dataset: Any, name: str, batch_size: int) -> Logps:
        self.model.eval()
        found: list[tuple[int, float, float]] = []
        rounds = list(even_rounds(self._longest_first(dataset), batch_size))
        for indices, _ in tqdm(rounds, f"reference, {name} pairs", disable=not is_main_process()):
            batch = self._prepare_inputs(self.data_collator([dataset[index] for index in indices]))
            chosen, rejected = self.compute_ref_log_probs(self.model, batch)
            found += zip(indices, chosen.tolist(), rejected.tolist(), strict=True)
        logps = {index: (chosen, rejected) for index, chosen, rejected in collected(found)}
        return [logps[index] for index in range(len(dataset))]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the means over all held-out pairs; TRL averages batches of unequal size."""
        pairs, totals = self.eval_dataset, defaultdict[str, float](float)
        self.model.eval()
        for indices, count in even_rounds(self._longest_first(pairs), self.args.eval_batch_size):
            self._metrics["eval"].clear()
            batch = self.data_collator([pairs[index] for index in indices])
            loss = float(self.prediction_step(self.model, batch, prediction_loss_only=True)[0])
            (loss,) = added_up([loss / place()[1]])
            for name, value in {"loss": [loss], **self._metrics["eval"]}.items():
                totals[name] += value[-1] * count / len(pairs)
        self._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in totals.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _choose_reference(self) -> None:
        # TRL copies the starting adapter to "ref"; without the copy its reference is the base.
        if self.reference == "base" and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        if self.fast_path and not self.sped_up:  # before the reference is first asked: both must compute alike
            speed_up(self.model, keep_weights=False)  # rows of two answers are long
            self.sped_up = True

    @property
    def reference_adapter(self) -> str | None:
        """Name the adapter of the reference model; None is the bare base."""
        return "ref" if "ref" in self.model.peft_config else None

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """Copy the reference adapter, to prove later that it never moved."""
        return whole_weights(self.model, "ref")


def prove_start(trainer: PreferenceTrainer, pairs: int = 4) -> dict[str, float]:
    """Prove on one batch, dropout off, that policy and reference are what the run says.

    Where the reference is a copy of the starting policy, every margin must be 0 and the sigmoid loss ln 2.
    Raises: UserError when they differ.
    """
    rows = [trainer.train_dataset[index] for index in range(min(pairs, len(trainer.train_dataset)))]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    model, was_training = trainer.model, trainer.model.training
    model.eval()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    with torch.no_grad(), trainer.prompts_shared(batch):
        scored = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        policy = scored.log_probs.sum(1).chunk(2)
        reference = trainer.compute_ref_log_probs(model, batch)
    model.train(was_training)
    margins = trainer.beta * ((policy[0] - reference[0]) - (policy[1] - reference[1])).float()
    margin, loss = float(margins.abs().max()), float(-functional.logsigmoid(margins).mean())
    tolerance = TOLERANCE[model.get_base_model().dtype]
    if not math.isfinite(margin + loss):
        raise UserError(
            f"step 0: policy or reference gives no finite probabilities (largest margin {margin}, loss {loss}), as when weights "
            "are far too large. Train the adapter of dpo.init_from again, or choose another base model. Nothing was trained."
        )
    if trainer.reference_adapter is None and "sft" not in trainer.reference:
        log.info("step 0: the reference is the base; the policy's largest margin against it is %.4f", margin)
    elif margin > tolerance or abs(loss - math.log(2)) > tolerance:
        raise UserError(
            f"step 0: policy and reference should be the same model, but their largest margin is {margin:.6f} and the loss "
            f"{loss:.6f} (wanted 0 and ln 2 = {math.log(2):.6f}, within {tolerance}). Nothing was trained."
        )
    else:
        log.info("step 0: reference equals the starting policy (largest margin %.2g, loss %.6f = ln 2)", margin, loss)
    return {"step0_margin": margin, "step0_loss": loss}


def check_trainable_names(model: Any) -> None:
    """Prove that exactly the policy's adapter trains."""
    wrong = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and ".default." not in name
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} weights outside the policy's adapter would train, the first is {wrong[0]}. Nothing was trained."
        )


def check_reference_unchanged(trainer: PreferenceTrainer, before: dict[str, torch.Tensor]) -> None:
    """Prove that the reference model stayed what it was."""
    moved = [
        name
        for name, value in trainer.reference_weights().items()  # DeepSpeed keeps it in bf16
        if not torch.equal(value, before[name]) and not torch.equal(value, before[name].bfloat16().float())
    ]
    if moved:
        raise UserError(
            f"the reference model changed during training ({moved[0]} and {len(moved) - 1} more); the result is void."
        )


def warn_of_length_bias(pairs: Sequence[RenderedPair]) -> dict[str, float]:
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


class DegenerationWatch(TrainerCallback):
    """Answer fixed held-out prompts at each evaluation and compare with how the run started."""

    def __init__(self, trainer: PreferenceTrainer, tracker: Any, pairs: Sequence[RenderedPair], stop: bool) -> None:
        self.trainer, self.tracker, self.stop = trainer, tracker, stop
        self.pairs = list(pairs[:WATCHED_PROMPTS])
        self.chosen_tokens = sum(len(pair.chosen_ids) for pair in pairs) / max(len(pairs), 1)
        self.start: Health | None = None
        self.start_chosen: float | None = None
        self.last: dict[str, float] = {}
        self.warned: set[str] = set()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Measure, record, warn, and stop where that was asked for."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        answers = generate_answers(model, tokenizer, [pair.prompt_ids for pair in self.pairs], WATCHED_TOKENS)
        now = health(answers)
        own = [
            Rendered(pair.prompt_ids + answer.token_ids, [IGNORED] * len(pair.prompt_ids) + answer.token_ids)
            for pair, answer in zip(self.pairs, answers, strict=True)
            if answer.token_ids
        ]
        reference = self.trainer.reference_adapter
        references = {"reference": lambda: switched_to(model, reference)}
        kl = mean_kl(model, own, tokenizer.pad_token_id, references)["reference"] if own else 0.0
        chosen = (metrics or {}).get("eval_logps/chosen", 0.0) / max(self.chosen_tokens, 1)
        if self.start is None or self.start_chosen is None:
            self.start, self.start_chosen = now, chosen
        self.last = {**vars(now), "kl_to_reference": kl, "chosen_logps_drift": chosen - self.start_chosen}
        self.tracker.log_metrics(
            {f"validation/answers/{key}": value for key, value in self.last.items()}, state.global_step
        )
        signs = [sign for sign in self._signs(now, chosen - self.start_chosen) if sign not in self.warned]
        if signs:
            self.warned.update(signs)
            log.warning(
                "step %d: answers degenerate: %s. Lower dpo.learning_rate, raise beta or sft_weight.",
                state.global_step,
                "; ".join(signs),
            )
            if self.stop:
                log.warning("stopping here (dpo.stop_on_degeneration)")
                control.should_training_stop = True

    def _signs(self, now: Health, drift: float) -> list[str]:
        assert self.start is not None
        signs = {
            f"repetition above {self.start.repetition + REPETITION_RISE:.2f}": now.repetition
            > self.start.repetition + REPETITION_RISE,
            f"fewer than {self.start.eos_rate - EOS_FALL:.0%} of answers end by themselves": now.eos_rate
            < self.start.eos_rate - EOS_FALL,
            f"answers over {LENGTH_GROWTH} times as long as at the start": now.mean_tokens
            > LENGTH_GROWTH * max(self.start.mean_tokens, 1),
            f"chosen answers lost over {CHOSEN_FALL_NATS} nats per token": drift < -CHOSEN_FALL_NATS,
        }
        return [sign for sign, true in signs.items() if true]
