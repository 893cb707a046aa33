"""Refine the SFT adapter with thumbs up and down on single answers: KTO against a frozen copy of that adapter.

Reads the records of `kto.dataset_path` and the adapter `kto.init_from`; writes the adapter folder `kto.output_dir`, one
adapter for the plain base, and an MLflow run below that of the SFT adapter. Needs requirements.txt.

    python -m scripts.train_kto --config configs/config.yaml --set kto.dataset_path=data/kto/thumbs.jsonl
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.config import check_decided, load_config
from scripts.common.errors import entry_point
from scripts.common.machine import Machine, seed_everything
from scripts.common.run import Run, open_run
from scripts.dataset.records import parse_feedback
from scripts.dataset.rendering import RenderedFeedback
from scripts.training.data import read_data, render_rows
from scripts.training.start import Start, add_training_arguments, find_start, settle_machine

if TYPE_CHECKING:
    from scripts.training.kto import FeedbackTrainer

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Train against the frozen reference, prove start and end, save and report."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_decided(config, "kto")
    with open_run("kto", config, "kto.output_dir", dry=arguments.dry_run) as run:
        data = read_data(run, parse_feedback, arguments.require_deid_report)
        machine = settle_machine(run)
        start = find_start(run, data.records, config.values.kto.init_from, resume=arguments.resume)
        train, validation = render_rows(run, start, data.split)

        from scripts.training.kto import balance

        weights = balance(config.values.kto, train)
        if run.dry:
            return show_dry_run(run, machine, start, data.files, train)

        from scripts.training.degeneration import DegenerationWatch
        from scripts.training.reference import check_trainable_names, prove_start, reference_unchanged
        from scripts.training.resume import is_finished
        from scripts.training.session import training_session

        if arguments.resume and is_finished(run, machine, start, data.facts):
            return 0
        with training_session(run, machine, start, data.facts, resume=arguments.resume) as session:
            trainer = build_trainer(run, machine, start, train, validation, weights)
            del train  # the trainer has it as a table
            check_trainable_names(trainer.model)
            facts = prove_start(trainer) | weights
            trainer.kept_logps.keep()
            watch = DegenerationWatch(trainer, session.tracker, validation, config.values.kto.stop_on_degeneration)
            with reference_unchanged(trainer):
                session.train(trainer)
            session.save(trainer, facts | watch.facts, data.split.validation)
    return 0


def build_trainer(
    run: Run,
    machine: Machine,
    start: Start,
    train: list[RenderedFeedback],
    validation: list[RenderedFeedback],
    weights: dict[str, float],
) -> FeedbackTrainer:
    """Hand TRL the policy and our token ids; it keeps a frozen copy of the adapter as reference."""
    from datasets import Dataset
    from trl import KTOConfig

    from scripts.training.kto import FeedbackTrainer, in_batches
    from scripts.training.plan import (
        asks_reference_often,
        blamed_on_trainer_block,
        make_arguments,
        plan_training,
        settle_trainer,
        trainer_arguments,
    )
    from scripts.training.reference import choose_reference, load_policy

    values, kto = run.values, run.values.kto
    plan = plan_training(values, run.section, start.base_folder, machine, train)
    plan.check_fits(machine)
    seed_everything(values.seed)
    policy = load_policy(run, machine, start)
    if values.performance.fast_path:
        from scripts.speed.speed_up import speed_up_training

        speed_up_training(policy, machine.device, plan.compiled)
    arguments = trainer_arguments(run, machine, plan, validation=len(validation))
    arguments.setdefault(
        "precompute_ref_log_probs", asks_reference_often(kto, machine, plan, len(train), len(validation))
    )
    by_length = values.performance.group_by_length
    train_set, validation_set = (
        Dataset.from_list(in_batches(side, kto.per_device_train_batch_size, values.seed, by_length=by_length))
        for side in (train, validation)
    )
    with blamed_on_trainer_block(run):
        trainer = FeedbackTrainer(
            model=policy,
            args=make_arguments(
                KTOConfig,
                run,
                **arguments,
                beta=kto.beta,
                loss_type=kto.loss_type,
                desirable_weight=weights["desirable_weight"],
                undesirable_weight=weights["undesirable_weight"],
            ),
            train_dataset=train_set,
            eval_dataset=validation_set if validation else None,
            processing_class=start.tokenizer,
            group_by_length=False,  # the rows are in their batches already
            **choose_reference(run, machine, start, policy, arguments),
            fast_path=values.performance.fast_path,
        )
        settle_trainer(trainer, plan.steps)
    return trainer


def show_dry_run(run: Run, machine: Machine, start: Start, files: Sequence[Any], train: list[RenderedFeedback]) -> int:
    """Show what a run would do, and a record of each label as it would be trained."""
    from eval.planning import show_smallest_gaps
    from scripts.training.plan import show_plan

    show_plan(run, machine, start.base_folder, files, train)
    show_smallest_gaps(run.config)
    for row in (next(row for row in train if row.liked), next(row for row in train if not row.liked)):
        prompt, answer = map(start.tokenizer.decode, (row.prompt_ids, row.answer_ids))
        log.info("--- a training record\n%s\n--- thumb %s >>>%s<<<", prompt, "up" if row.liked else "down", answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
