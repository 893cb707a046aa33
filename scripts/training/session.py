"""A training session: from a fresh start or a checkpoint to a saved adapter, under one MLflow run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ProgressCallback
from transformers.trainer_callback import PrinterCallback

from scripts.common.artifacts import DatasetFacts
from scripts.common.distributed import (
    all_reduce_max,
    broadcast_from_rank_0,
    is_main_process,
    sharding_engine,
    world_size,
)
from scripts.common.errors import Interrupted, UserError
from scripts.common.machine import Machine, peak_memory_gib
from scripts.common.run import Run
from scripts.common.tracking import Tracker, tracked_run
from scripts.dataset.records import Preference, Record
from scripts.model.adapter import whole_weights
from scripts.training.callbacks import ProgressAndTracking, training_callbacks
from scripts.training.resume import Resumption, find_resumption, identity_of, write_state
from scripts.training.sample import show_answers
from scripts.training.save import log_inputs, print_summary, run_name, save_adapter
from scripts.training.start import Start

log = logging.getLogger(__name__)


class Session:
    """Train from wherever the run stands, prove that this did something, and save it."""

    def __init__(
        self,
        run: Run,
        start: Start,
        datasets: Sequence[DatasetFacts],
        identity: dict[str, Any],
        resumption: Resumption,
        tracker: Tracker,
    ) -> None:
        self.run, self.start, self.datasets = run, start, list(datasets)
        self.identity, self.resumption, self.tracker = identity, resumption, tracker
        self.weights: dict[str, torch.Tensor] = {}
        self.metrics: dict[str, Any] = {}

    def train(self, trainer: Any) -> None:
        """Train to the end or to an orderly stop, with our progress bar in place of the library's."""
        run, resumption = self.run, self.resumption
        started = time.monotonic()
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        progress = ProgressAndTracking(self.tracker, run.stop)
        for callback in (progress, *training_callbacks(run.section, trainer.args)):
            trainer.add_callback(callback)
        before = snapshot(trainable_parameters(trainer.model))
        loss_before = resumption.loss_before
        if loss_before is None and trainer.eval_dataset is not None:
            loss_before = trainer.evaluate()["eval_loss"]
        run.stop.deferred = True  # from here on a request to stop waits for the end of a step and its checkpoint
        if is_main_process():
            write_state(
                run.run_dir, self.identity, self.tracker.run_id, loss_before, world_size(),
                self.start.chat.facts()["template_date"],
            )  # fmt: skip
        trainer.train(resume_from_checkpoint=resumption.checkpoint)
        if run.stop.exit_code:
            log.warning("stopped at step %d; --resume continues from there", trainer.state.global_step)
            raise Interrupted(run.stop.exit_code)
        self.weights = whole_weights(trainer.model, "default")
        check_changed(before, self.weights)
        self.metrics = {
            "held_out_loss_before": loss_before,
            "held_out_loss": held_out_loss(trainer),
            "steps": trainer.state.global_step,
            "train_tokens": int(progress.tokens),
            "tokens_per_second": round(progress.tokens_per_second, 1),
            "train_seconds": round(time.monotonic() - started, 1),
            "peak_memory_gib": round(all_reduce_max(peak_memory_gib()), 2),  # of the rank that holds most
            "processes": world_size(),
        }

    def save(self, trainer: Any, facts: dict[str, Any], held_out: Sequence[Record | Preference] = ()) -> None:
        """Save adapter, tokenizer, curves and manifest, then show how it answers the first of the records held out.

        `facts` stand beside what every stage measures.
        """
        self.metrics |= facts
        if is_main_process():
            save_adapter(self.run, self.start, self.datasets, trainer, self.weights, self.metrics, self.tracker)
            if not sharding_engine():
                show_answers(trainer, self.run, self.start.chat, held_out)


@contextmanager
def training_session(
    run: Run, machine: Machine, start: Start, datasets: Sequence[DatasetFacts], *, resume: bool
) -> Iterator[Session]:
    """Decide where to start, open the MLflow run, and report when the result is saved."""
    identity = identity_of(run, machine, start, datasets)
    resumption = broadcast_from_rank_0(lambda: find_resumption(run.run_dir, identity, resume, world_size()))
    with tracked_run(
        run.config,
        run.stage,
        name=run_name(run.values, run.stage),
        parent_run_id=start.parent_run_id,
        earlier=resumption.mlflow_run_id,
        resume=resume,
    ) as tracker:
        log_inputs(tracker, run, datasets)
        session = Session(run, start, datasets, identity, resumption, tracker)
        yield session
    print_summary(run, session.metrics)


def held_out_loss(trainer: Any) -> float | None:
    """Return the held-out loss of the weights that are saved; None where nothing was held out."""
    if trainer.eval_dataset is None:
        return None
    best: float | None = trainer.state.best_metric if trainer.args.load_best_model_at_end else None
    return trainer.evaluate()["eval_loss"] if best is None else best


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
