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
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.errors import entry_point
from scripts.common.records import Record, Split, parse_record
from scripts.common.runtime import Machine, is_main_process, seed_everything
from scripts.common.stage import (
    Origin,
    Stage,
    add_stage_arguments,
    read_data,
    render_split,
    run_stage,
    settle_machine,
)

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_stage_arguments(parser)
    return parser


def render(stage: Stage, tokenizer: Any, split: Split) -> tuple[list[Any], list[Any]]:
    """Turn the records into token ids, proving on each that exactly its answers and their end are trained."""
    from scripts.common.rendering import check_rendered, render_record

    def render_checked(record: Record) -> Any:
        rendered = render_record(tokenizer, record)
        check_rendered(tokenizer, record, rendered)
        return rendered

    return render_split(stage, split, render_checked, lambda row: len(row.input_ids))


def build_trainer(stage: Stage, machine: Machine, origin: Origin, train: list[Any], validation: list[Any]) -> Any:
    """Load the base, add a fresh adapter, and hand TRL our own token ids and labels."""
    from datasets import Dataset
    from trl import SFTConfig

    from scripts.common.compiling import compile_layers
    from scripts.common.fast_path import score_answers_only, speed_up
    from scripts.common.modeling import add_lora, load_base, save_initialisation
    from scripts.common.training import AnswerLossTrainer, make_arguments, plan_training, total_steps, trainer_arguments

    assert stage.run_dir is not None
    values = stage.config.values
    plan = plan_training(values, values.sft, origin.base_folder, machine, train)
    plan.settle(machine)
    seed_everything(values.seed)
    base = load_base(origin.base_folder, values, machine)
    model = add_lora(base, values.lora, values.base_model_id)
    if is_main_process():
        save_initialisation(model, stage.run_dir)
    if values.performance.fast_path:
        score_answers_only(machine.device, plan.compiled)
        speed_up(model)
    if plan.compiled:
        compile_layers(model)
    steps = total_steps(values.sft, len(train), machine.processes)
    arguments = trainer_arguments(
        stage, machine, steps=steps, validation=bool(validation), checkpointing=plan.checkpointing
    )
    train_set, validation_set = (
        Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in side])
        for side in (train, validation)
    )
    return AnswerLossTrainer(
        model=model,
        args=make_arguments(SFTConfig, stage, **arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=train_set,
        eval_dataset=validation_set if validation else None,
        processing_class=origin.tokenizer,
        group_by_length=values.performance.group_by_length,
        held_out=validation,
        answer_tokens=sum(row.trained_tokens for row in train) / len(train),
    )


def run(stage: Stage) -> None:
    """Train, check, save and report."""
    files, split = read_data(stage, parse_record)
    machine = settle_machine(stage)

    from scripts.common.finishing import dataset_entries
    from scripts.common.lifecycle import train_and_finish
    from scripts.common.modeling import base_fingerprint, find_model, load_tokenizer

    values = stage.config.values
    base_folder = find_model(values.base_model_id, values.base_model_revision)
    origin = Origin(base_folder, load_tokenizer(base_folder), base_fingerprint(base_folder))
    train, validation = render(stage, origin.tokenizer, split)
    train_and_finish(
        stage,
        origin,
        dataset_entries(files, split),
        lambda: build_trainer(stage, machine, origin, train, validation),
        next_command=f"python -m scripts.train_dpo {stage.config.flags}",
    )


def show_dry_run(stage: Stage) -> None:
    """Load everything but the weights, and show what a run would do."""
    from scripts.common.lifecycle import show_plan
    from scripts.common.modeling import find_model, load_tokenizer

    files, split = read_data(stage, parse_record)
    base_folder = find_model(stage.config.values.base_model_id, stage.config.values.base_model_revision)
    tokenizer = load_tokenizer(base_folder)
    train, _ = render(stage, tokenizer, split)
    show_plan(stage, base_folder, files, train)
    for row in train[:2]:
        marked = "".join(
            f">>>{tokenizer.decode(ids)}<<<" if trained else tokenizer.decode(ids) for trained, ids in row.runs()
        )
        log.info("--- a training record; what is trained stands between >>> and <<<\n%s", marked)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage."""
    return run_stage("sft", build_parser().parse_args(argv), run, show_dry_run)


if __name__ == "__main__":
    sys.exit(main())
