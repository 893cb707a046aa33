"""Teach a base model a style from instruction records: LoRA adapter, loss on the answers only.

Reads the records of `sft.dataset_path`; writes the adapter folder `sft.output_dir` and an MLflow run.
Needs requirements.txt (4/8-bit loading: requirements.gpu.txt).

    python -m scripts.train_sft --config configs/config.yaml
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
from scripts.dataset.records import parse_record
from scripts.dataset.rendering import Rendered
from scripts.training.data import read_data, render_rows
from scripts.training.start import Start, add_training_arguments, find_start, settle_machine

if TYPE_CHECKING:
    from scripts.training.sft import AnswerLossTrainer

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Train, prove that it did something, save and report."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_decided(config, "sft")
    with open_run("sft", config, "sft.output_dir", dry=arguments.dry_run) as run:
        data = read_data(run, parse_record, arguments.require_deid_report)
        machine = settle_machine(run)
        start = find_start(run, data.records, resume=arguments.resume)
        train, validation = render_rows(run, start, data.split)
        if run.dry:
            return show_dry_run(run, machine, start, data.files, train)

        from scripts.training.resume import is_finished
        from scripts.training.session import training_session

        if arguments.resume and is_finished(run, machine, start, data.facts):
            return 0
        with training_session(run, machine, start, data.facts, resume=arguments.resume) as session:
            trainer = build_trainer(run, machine, start, train, validation)
            del train  # the trainer has it as a table
            session.train(trainer)
            session.save(trainer, {}, data.split.validation)
    return 0


def build_trainer(
    run: Run, machine: Machine, start: Start, train: list[Rendered], validation: list[Rendered]
) -> AnswerLossTrainer:
    """Load the base, add a fresh adapter, and hand TRL our own token ids and labels."""
    from datasets import Dataset
    from trl import SFTConfig

    from scripts.model.adapter import add_lora, save_initialisation
    from scripts.model.base import load_base
    from scripts.training.dropout import dropout_of
    from scripts.training.plan import (
        blamed_on_trainer_block,
        make_arguments,
        plan_training,
        settle_trainer,
        trainer_arguments,
    )
    from scripts.training.sft import AnswerLossTrainer

    values = run.values
    plan = plan_training(values, run.section, start.base_folder, machine, train)
    plan.check_fits(machine)
    seed_everything(values.seed)
    base = load_base(start.base_folder, values, machine)
    if own := dropout_of(base):
        log.info("the base's own dropout is on, as in TRL: %s", ", ".join(f"{k} {v:g}" for k, v in own.items()))
    model = add_lora(base, values.lora, values.base_model_id)
    save_initialisation(model, run.run_dir)
    if values.performance.fast_path:
        from scripts.speed.speed_up import speed_up, speed_up_training

        speed_up(model)
        speed_up_training(model, machine.device, plan.compiled)
    arguments = trainer_arguments(run, machine, plan, validation=len(validation))
    train_set, validation_set = (
        Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in side])
        for side in (train, validation)
    )
    with blamed_on_trainer_block(run):
        trainer = AnswerLossTrainer(
            model=model,
            args=make_arguments(SFTConfig, run, **arguments, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=train_set,
            eval_dataset=validation_set if validation else None,
            processing_class=start.tokenizer,
            group_by_length=values.performance.group_by_length,
            held_out=validation,
            answer_tokens=sum(row.trained_tokens for row in train) / len(train),
        )
        settle_trainer(trainer, plan.steps)
    return trainer


def show_dry_run(run: Run, machine: Machine, start: Start, files: Sequence[Any], train: list[Rendered]) -> int:
    """Show what a run would do, and two records with what is trained marked."""
    from eval.planning import show_smallest_gaps
    from scripts.training.plan import show_plan

    show_plan(run, machine, start.base_folder, files, train)
    show_smallest_gaps(run.config)
    for row in train[:2]:
        marked = "".join(
            f">>>{start.tokenizer.decode(ids)}<<<" if trained else start.tokenizer.decode(ids)
            for trained, ids in row.runs()
        )
        log.info("--- a training record; what is trained stands between >>> and <<<\n%s", marked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
