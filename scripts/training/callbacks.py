"""What happens during training: progress bar, tracking, rotation of checkpoints, a request to stop."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sized
from typing import Any

import torch
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from scripts.common.distributed import all_reduce_max, is_main_process
from scripts.common.machine import empty_heap
from scripts.common.schema import Training
from scripts.common.signals import StopSignal
from scripts.common.tracking import Tracker

log = logging.getLogger(__name__)

FILE_INTERVAL = 10  # seconds between two lines of the bar where nobody watches it: a log keeps every one


def training_callbacks(section: Training, arguments: Any) -> list[TrainerCallback]:
    """Return the rotation of checkpoints, and early stopping where it was asked for and can work."""
    callbacks: list[TrainerCallback] = [KeepNewest(arguments)]
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
        self.evaluating: Any = None
        self.tokens = 0.0
        self.first_step_at = 0.0
        self.first_tokens = 0.0
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index:  # other dropout than in the first process
            torch.manual_seed(args.seed + args.process_index)
        if is_main_process():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else FILE_INTERVAL,
            )  # fmt: skip

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches: Any = kwargs.get("eval_dataloader")
        if self.evaluating is None and is_main_process():
            total = len(batches) if isinstance(batches, Sized) else None
            self.evaluating = tqdm(total=total, desc="held-out loss", unit="batch", leave=False, disable=None)
        if self.evaluating is not None:
            self.evaluating.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluating is not None:
            self.evaluating.close()
            self.evaluating = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        empty_heap()  # an epoch begins with its longest batch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        self.stop.exit_code = int(
            all_reduce_max(self.stop.exit_code)
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
        totals = {key: numbers.pop(key) for key in list(numbers) if key.startswith("train_")}  # of the whole run
        if totals:
            self.tracker.summarise(totals)
        self.tracker.log_metrics({metric_name(key): value for key, value in numbers.items()}, state.global_step)
        if control.should_save:
            self.tracker.deliver()
        if self.bar is not None and "loss" in numbers:
            self.bar.set_postfix_str(
                f"loss {numbers['loss']:.3f}, {self.tokens_per_second:.0f} tokens/s", refresh=sys.stderr.isatty()
            )
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
    """Name a trainer's number for MLflow's curves: train/… or validation/…."""
    return f"validation/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
