"""What SFT and DPO share while they train: the memory plan, trainer arguments, progress, and proofs of the adapter."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from scripts.common.compiling import choose_compilation
from scripts.common.errors import Interrupted, UserError
from scripts.common.fast_path import GroupedByLength
from scripts.common.memory import SAFETY_RATIO, MemoryEstimate, available_memory_gib, estimate_memory
from scripts.common.modeling import adapter_kept
from scripts.common.processes import added_up, decided_by_first, largest, own_share
from scripts.common.rendering import Rendered, RenderedPair
from scripts.common.resuming import Resumption
from scripts.common.runtime import Machine, StopSignal, empty_heap, is_main_process
from scripts.common.schema import Config, Training
from scripts.common.scoring import score_answers
from scripts.common.stage import Stage
from scripts.common.tracking import Tracker

log = logging.getLogger(__name__)

EVALUATIONS_PER_RUN = 4
LOGGED_POINTS = 200


def total_steps(section: Training, rows: int, world_size: int) -> int:
    """Count the optimizer steps of a run."""
    limit = section.trainer.get("max_steps")
    if isinstance(limit, int) and limit > 0:  # transformers takes -1 for no limit
        return limit
    batches = math.ceil(rows / (section.per_device_train_batch_size * world_size))
    return max(1, math.ceil(math.ceil(batches / section.gradient_accumulation_steps) * section.num_train_epochs))


@dataclass(frozen=True)
class Plan:
    """How a run uses memory and time, and why."""

    estimate: MemoryEstimate
    checkpointing: bool
    compiled: bool
    reasons: tuple[str, ...]

    def settle(self, machine: Machine) -> None:
        """Say what was decided; refuse a run that cannot fit, and name the settings that would make it fit."""
        log.info("%s", "; ".join(self.reasons))
        free = decided_by_first(lambda: available_memory_gib(machine.device))
        if self.estimate.total > free:
            raise UserError(
                f"this run needs {self.estimate}, but only {free:.1f} GiB are free. Lower per_device_train_batch_size "
                "(and raise gradient_accumulation_steps by as much), lower max_length, set performance.gradient_checkpointing: "
                "true or quantization.load_in_4bit: true, or choose a smaller base model."
            )


def plan_training(
    config: Config,
    section: Training,
    base_folder: Path,
    machine: Machine,
    rows: Sequence[Rendered | RenderedPair],
) -> Plan:
    """Estimate memory for the largest batch; decide on gradient checkpointing and on compiling."""
    batch, sequences_per_row = section.per_device_train_batch_size, 1
    pairs = isinstance(rows[0], RenderedPair)
    if pairs:
        if machine.device == "cpu" and config.performance.fast_path:  # shared_prompts.py
            rows = [row.in_one_row() if isinstance(row, RenderedPair) else row for row in rows]
        else:
            sequences_per_row = 2
    largest = sorted(rows, key=lambda row: len(row.input_ids))[-batch:]
    seen = total_steps(section, len(rows), machine.processes) * batch * section.gradient_accumulation_steps
    mean_tokens = sum(len(row.input_ids) for row in rows) / len(rows)
    compiled, why = choose_compilation(config, machine, base_folder, seen * sequences_per_row * mean_tokens)
    answers = sum(row.trained_tokens for row in largest)

    def estimate(checkpointing: bool) -> MemoryEstimate:
        return estimate_memory(
            base_folder, config, sequences=batch * sequences_per_row, longest=len(largest[-1].input_ids),
            answer_tokens=answers, bytes_per_value=machine.dtype.itemsize, cpu=machine.device == "cpu",
            checkpointing=checkpointing, compiled=compiled, keep_weights=not (compiled and pairs),  # as preferences.py asks for
        )  # fmt: skip

    wanted = config.performance.gradient_checkpointing
    free = decided_by_first(lambda: available_memory_gib(machine.device))
    if wanted == "auto":
        checkpointing = estimate(False).total > SAFETY_RATIO * free
        reason = f"gradient checkpointing {'on' if checkpointing else 'off'}: {estimate(False).total:.1f} GiB needed without it, {free:.1f} free"
    else:
        checkpointing, reason = wanted, f"gradient checkpointing {'on' if wanted else 'off'}: asked for"
    return Plan(estimate(checkpointing), checkpointing, compiled, (reason, why))


class AnswerLossTrainer(GroupedByLength, SFTTrainer):
    """TRL's SFTTrainer with batches of similar length and a held-out loss that no batch size changes."""

    def __init__(
        self, *args: Any, group_by_length: bool, held_out: Sequence[Rendered], answer_tokens: float, **kwargs: Any
    ) -> None:
        """Take, beside TRL's arguments, the mean number of answer tokens per training record."""
        self.group_by_length, self.held_out, self.answer_tokens = group_by_length, held_out, answer_tokens
        self.control: Any
        with adapter_kept(kwargs["model"]):
            super().__init__(*args, **kwargs)

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
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.group_by_length or num_items_in_batch is None:
            return found
        counted = self.args.world_size if self.args.average_tokens_across_devices else 1
        records = self.args.train_batch_size * self.args.gradient_accumulation_steps * counted
        loss, *outputs = found if return_outputs else (found,)
        # What is logged stays the mean of the batch.
        weighted = loss.detach() + (loss - loss.detach()) * (num_items_in_batch / (records * self.answer_tokens))
        return (weighted, *outputs) if return_outputs else weighted

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss per answer token over all held-out records; TRL averages batches of unequal size."""
        rows, counted = own_share(self.held_out)
        scores = score_answers(self.model, rows, self.processing_class.pad_token_id, self.args.eval_batch_size)[
            :counted
        ]
        logps, tokens = added_up([sum(score.logps for score in scores), sum(score.tokens for score in scores)])
        metrics = {f"{metric_key_prefix}_loss": -logps / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer_arguments(
    stage: Stage, machine: Machine, *, steps: int, validation: bool, checkpointing: bool
) -> dict[str, Any]:
    """Build what SFTConfig and DPOConfig have in common; the user's `trainer` block comes last and wins."""
    assert stage.run_dir is not None
    section = stage.section
    interval = max(1, steps // EVALUATIONS_PER_RUN)
    arguments: dict[str, Any] = {
        "output_dir": str(stage.run_dir / "checkpoints"),
        "num_train_epochs": section.num_train_epochs,
        "learning_rate": section.learning_rate,
        "per_device_train_batch_size": section.per_device_train_batch_size,
        "per_device_eval_batch_size": section.per_device_train_batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "max_length": section.max_length,
        "seed": stage.config.values.seed,
        "use_cpu": machine.device == "cpu",
        # The weights themselves are bf16 and the fast path brings adapters to the dtype of their input. Autocast on top
        # makes a GPU's step a third longer, and on a CPU costs several times more than it saves.
        "bf16": machine.device == "cuda"
        and machine.dtype == torch.bfloat16
        and not stage.config.values.performance.fast_path,
        "activation_checkpointing": checkpointing,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": max(1, steps // LOGGED_POINTS),
        "eval_strategy": "steps" if validation else "no",
        "eval_steps": interval,
        "save_strategy": "steps",
        "save_steps": interval,
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": machine.device == "cuda",
        "ddp_find_unused_parameters": False,
        **section.trainer,
    }
    same_rhythm = arguments["eval_strategy"] == arguments["save_strategy"] != "no" and (
        arguments["eval_strategy"] == "epoch" or arguments["save_steps"] % arguments["eval_steps"] == 0
    )
    arguments["load_best_model_at_end"] = validation and same_rhythm
    if arguments["load_best_model_at_end"]:
        arguments.update(metric_for_best_model="eval_loss", greater_is_better=False)
    elif validation:
        log.info("evaluation and saving do not go together, so the last checkpoint is kept instead of the best")
    return arguments


def make_arguments(kind: Any, stage: Stage, **arguments: Any) -> Any:
    """Build TRL's own arguments, which check themselves only here."""
    try:
        return kind(**arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(
            f"{stage.name}.trainer: TRL refuses these settings: {' '.join(str(error).split())[:300]}\n"
            f"Given were: {', '.join(stage.section.trainer) or 'none'}."
        ) from None


def training_callbacks(section: Training, arguments: Any, tracker: Tracker, stop: StopSignal) -> list[TrainerCallback]:
    """Return progress with tracking, the rotation of checkpoints, and early stopping where it was asked for and can work."""
    callbacks: list[TrainerCallback] = [ProgressAndTracking(tracker, stop), KeepNewest(arguments)]
    if section.early_stopping_patience and arguments.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(section.early_stopping_patience))
    elif section.early_stopping_patience:
        log.warning("early_stopping_patience has no effect without held-out records evaluated in the rhythm of saving")
    return callbacks


class ProgressAndTracking(TrainerCallback):
    """Show one bar with ETA and tokens/s, send every number to the tracker, and heed a request to stop."""

    def __init__(self, tracker: Tracker, stop: StopSignal) -> None:
        self.tracker, self.stop = tracker, stop
        self.bar: Any = None
        self.tokens = 0.0
        self.first_step_at = 0.0
        self.first_tokens = 0.0
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index:  # other dropout than in the first process
            torch.manual_seed(args.seed + args.process_index)
        if is_main_process():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        empty_heap()  # an epoch begins with its longest batch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        self.stop.exit_code = int(
            largest(self.stop.exit_code)
        )  # processes that stop at different steps would wait for ever
        if self.stop.exit_code:
            control.should_save = control.should_training_stop = True
        if control.should_save:  # a resumed run does not log again what lies before its checkpoint
            self.tracker.deliver()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        numbers.pop("total_flos", None)  # not counted
        self._measure_speed(numbers)
        if not is_main_process():
            return
        self.tracker.log_metrics({metric_name(key): value for key, value in numbers.items()}, state.global_step)
        if control.should_save:
            self.tracker.deliver()
        if self.bar is not None and "loss" in numbers:
            self.bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {self.tokens_per_second:.0f} tokens/s")
        if "eval_loss" in numbers:
            tqdm.write(f"         step {state.global_step}: held-out loss {numbers['eval_loss']:.4f}")

    def _measure_speed(self, numbers: dict[str, float]) -> None:
        if "num_tokens" not in numbers:
            return
        now, self.tokens = time.monotonic(), numbers["num_tokens"]
        if not self.first_step_at:  # the first step also warms up
            self.first_step_at, self.first_tokens = now, self.tokens
        elif now > self.first_step_at:
            self.tokens_per_second = (self.tokens - self.first_tokens) / (now - self.first_step_at)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.deferred = False
        if self.bar is not None:
            self.bar.close()


class KeepNewest(TrainerCallback):
    """Keep the newest checkpoints by their step; the Trainer goes by file times, which a clock turned back upsets."""

    def __init__(self, arguments: Any) -> None:
        self.limit, arguments.save_total_limit = arguments.save_total_limit, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_main_process():
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint)


def metric_name(key: str) -> str:
    """Name a trainer's number for MLflow: train/… or validation/… for curves, summary/… for the means of a whole run."""
    if key.startswith("eval_"):
        return f"validation/{key.removeprefix('eval_')}"
    return f"summary/{key}" if key.startswith("train_") else f"train/{key}"


def train(trainer: Any, resumption: Resumption, stop: StopSignal) -> ProgressAndTracking:
    """Train to the end or to an orderly stop, with our progress bar in place of the library's."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resumption.checkpoint)
    if stop.exit_code:
        log.warning("stopped at step %d; --resume goes on from there", trainer.state.global_step)
        raise Interrupted(stop.exit_code)
    return next(
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressAndTracking)
    )


def trainable_parameters(model: Any) -> dict[str, Any]:
    """Return the weights that train.

    Raises: UserError when nothing trains, which TRL would not notice.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UserError(
            "no weight of this adapter is trainable, so training would change nothing. Check the lora section."
        )
    return found


def snapshot(parameters: dict[str, Any]) -> dict[str, Any]:
    """Copy weights to compare with later."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def check_changed(before: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Prove that training moved the adapter and left it finite."""
    moved = sum(not torch.equal(before[name], parameter.detach().cpu()) for name, parameter in parameters.items())
    if not moved:
        raise UserError(
            "not one adapter weight changed in training; the result would equal its starting point. Raise the learning rate or the number of steps (the first step of a warm-up moves nothing)."
        )
    broken = [name for name, parameter in parameters.items() if not torch.isfinite(parameter).all()]
    if broken:
        raise UserError(f"training diverged: {len(broken)} adapter tensors are not finite. Lower the learning rate.")
