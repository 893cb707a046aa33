"""The course of a training run: start or resume, track, train, prove, save, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.common import finishing, resuming, training
from scripts.common.memory import available_memory_gib
from scripts.common.modeling import whole_weights
from scripts.common.processes import decided_by_first, place
from scripts.common.records import DatasetFile
from scripts.common.runtime import choose_machine, is_main_process
from scripts.common.stage import Origin, Stage
from scripts.common.tracking import tracked_run

log = logging.getLogger(__name__)


def train_and_finish(
    stage: Stage,
    origin: Origin,
    datasets: list[dict[str, Any]],
    build_trainer: Callable[[], Any],
    *,
    before_training: Callable[[Any, Any], dict[str, Any]] = lambda trainer, tracker: {},
    after_training: Callable[[Any], dict[str, Any]] = lambda trainer: {},
    next_command: str,
) -> None:
    """Train from wherever the run stands, prove that it did something, save it and report."""
    assert stage.run_dir is not None
    config, section = stage.config, stage.section
    identity = resuming.identity(
        stage.name, config.values.model_dump(mode="json"), datasets, origin.fingerprint, origin.parent
    )
    output_dir, run_dir, processes = section.output_dir, stage.run_dir, place()[1]
    if stage.resume and decided_by_first(lambda: resuming.is_finished(output_dir, stage.name, identity)):
        log.info("%s is finished already; nothing to resume", section.output_dir)
        return
    resumption = decided_by_first(lambda: resuming.find_resumption(run_dir, identity, stage.resume, processes))
    with tracked_run(
        config, stage.name, parent_run_id=origin.parent_run_id, earlier=resumption.mlflow_run_id, resume=stage.resume
    ) as tracker:
        finishing.log_inputs(tracker, config, stage.run_dir, datasets)
        trainer = build_trainer()
        for callback in training.training_callbacks(section, trainer.args, tracker, stage.stop):
            trainer.add_callback(callback)
        parameters = training.trainable_parameters(trainer.model)
        started, first_weights = time.monotonic(), training.snapshot(parameters)
        facts = before_training(trainer, tracker)
        before = resumption.loss_before
        if before is None and trainer.eval_dataset is not None:
            before = trainer.evaluate()["eval_loss"]
        stage.stop.deferred = True  # from here on a request to stop waits for the end of a step and its checkpoint
        if is_main_process():
            resuming.write_state(run_dir, identity, tracker.run_id, before, processes)
        progress = training.train(trainer, resumption, stage.stop)
        weights = whole_weights(trainer.model, "default")
        training.check_changed(first_weights, weights)
        facts |= after_training(trainer)
        metrics = finishing.summary_metrics(trainer, progress, time.monotonic() - started, before) | facts
        finishing.finish(
            trainer,
            weights,
            tracker,
            run_dir,
            output_dir,
            stage.name,
            finishing.manifest_facts(config, origin, datasets, tracker.run_id, metrics),
        )
    finishing.print_summary(stage.name.upper(), section.output_dir, config, metrics, next_command)


def show_plan(
    stage: Stage,
    base_folder: Path,
    files: Sequence[DatasetFile],
    rows: Sequence[Any],
) -> None:
    """Print what a dry run can know: data, lengths, steps, machine and memory."""
    machine = choose_machine(stage.config.values)
    plan = training.plan_training(stage.config.values, stage.section, base_folder, machine, rows)
    ordered = sorted(len(row.input_ids) for row in rows)
    log.info("datasets: %s", ", ".join(f"{file.path} (weight {file.weight})" for file in files))
    log.info("tokens per sequence: median %d, longest %d; none would be cut", ordered[len(ordered) // 2], ordered[-1])
    log.info("%d optimizer steps", training.total_steps(stage.section, len(rows), machine.processes))
    log.info("%s", "; ".join(machine.reasons + plan.reasons))
    log.info("memory: %s of %.1f GiB free", plan.estimate, available_memory_gib(machine.device))
