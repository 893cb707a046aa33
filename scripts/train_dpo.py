"""Refine the SFT adapter with preference pairs: DPO against a frozen copy of that adapter.

Reads the pairs of `dpo.dataset_path` and the adapter `dpo.init_from`; writes the adapter folder `dpo.output_dir`, one
adapter for the plain base, and an MLflow run below that of the SFT adapter. Needs requirements.txt.

    python -m scripts.train_dpo --config configs/config.yaml
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

from scripts.common.errors import UserError, entry_point
from scripts.common.records import Split, parse_preference
from scripts.common.runtime import Machine, seed_everything
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


def check_choices(stage: Stage) -> None:
    """Refuse what the section leaves open or contradicts, before anything is loaded."""
    dpo = stage.config.values.dpo
    if dpo.beta is None:
        raise UserError("dpo.beta: missing; it has no default because it decides the result. 0.1 is the usual start.")
    if dpo.init_from is None and dpo.reference == "sft":
        raise UserError(
            "dpo.reference: found sft, but dpo.init_from is null, so there is no SFT adapter. Set reference: base."
        )


def find_origin(stage: Stage) -> Origin:
    """Find the base and prove that the adapter to go on with was made on it."""
    from scripts.common.artifacts import parent_entry
    from scripts.common.modeling import base_fingerprint, check_adapter_fits, find_model, load_tokenizer

    values = stage.config.values
    base_folder = find_model(values.base_model_id, values.base_model_revision)
    tokenizer = load_tokenizer(base_folder)
    if values.dpo.init_from is None:
        return Origin(base_folder, tokenizer, base_fingerprint(base_folder))
    manifest = check_adapter_fits(values.dpo.init_from, base_folder, tokenizer)
    parent = parent_entry(values.dpo.init_from, manifest)
    fingerprint = manifest["base_model"]["fingerprint"]
    return Origin(base_folder, tokenizer, fingerprint, parent, manifest["mlflow"]["run_id"])


def render(stage: Stage, tokenizer: Any, split: Split) -> tuple[list[Any], list[Any]]:
    """Turn the pairs into token ids."""
    from scripts.common.rendering import render_pair

    return render_split(stage, split, lambda pair: render_pair(tokenizer, pair), lambda row: len(row.input_ids))


def load_policy(stage: Stage, machine: Machine, origin: Origin) -> Any:
    """Load the base with the adapter that trains; the reference will share the base's weights."""
    from scripts.common.modeling import add_lora, load_adapter, load_base

    values = stage.config.values
    base = load_base(origin.base_folder, values, machine)
    if values.dpo.init_from is None:
        return add_lora(base, values.lora, values.base_model_id)
    # TRL expects the name "default", and trains nothing unless the adapter is loaded as trainable.
    policy = load_adapter(base, values.dpo.init_from, trainable=True, name="default")
    if not any(bool(value.any()) for name, value in policy.named_parameters() if "lora_B" in name):
        raise UserError(
            f"{values.dpo.init_from}: its adapter is untrained (all B matrices are zero). Run train_sft first."
        )
    return policy


def build_trainer(stage: Stage, machine: Machine, origin: Origin, train: list[Any], validation: list[Any]) -> Any:
    """Hand TRL the policy and our token ids; it keeps a frozen copy of the adapter as reference."""
    from datasets import Dataset
    from trl import DPOConfig

    from scripts.common.compiling import compile_layers
    from scripts.common.fast_path import score_answers_only
    from scripts.common.preferences import PreferenceTrainer
    from scripts.common.reference_logps import LOGPS_FOLDER, KeptLogps
    from scripts.common.training import (
        EVALUATIONS_PER_RUN,
        make_arguments,
        plan_training,
        total_steps,
        trainer_arguments,
    )

    values = stage.config.values
    plan = plan_training(values, values.dpo, origin.base_folder, machine, train)
    plan.settle(machine)
    seed_everything(values.seed)
    policy = load_policy(stage, machine, origin)
    if values.performance.fast_path:
        score_answers_only(machine.device, plan.compiled)
    if plan.compiled:
        compile_layers(policy)
    steps = total_steps(values.dpo, len(train), machine.processes)
    arguments = trainer_arguments(
        stage,
        machine,
        steps=steps,
        validation=bool(validation),
        checkpointing=plan.checkpointing,
    )
    # The reference never changes: ask it once per pair where training and evaluation would ask more often.
    seen = steps * values.dpo.per_device_train_batch_size * values.dpo.gradient_accumulation_steps * machine.processes
    asked = seen + (EVALUATIONS_PER_RUN + 1) * len(validation)
    arguments.setdefault("precompute_ref_log_probs", asked >= len(train) + len(validation))
    mixed = values.dpo.sft_weight > 0
    by_length = [sorted(side, key=lambda pair: len(pair.input_ids)) for side in (train, validation)]
    train_set, validation_set = (Dataset.from_list([vars(pair) for pair in side]) for side in by_length)
    basis = {
        "base": origin.fingerprint, "quantization": values.quantization.model_dump(), "device": machine.device,
        "dtype": str(machine.dtype), "fast_path": values.performance.fast_path,
    }  # fmt: skip
    return PreferenceTrainer(
        model=policy,
        args=make_arguments(
            DPOConfig,
            stage,
            **arguments,
            beta=values.dpo.beta,
            loss_type=[values.dpo.loss_type, "sft"] if mixed else [values.dpo.loss_type],
            loss_weights=[1.0, values.dpo.sft_weight] if mixed else None,
        ),
        train_dataset=train_set,
        eval_dataset=validation_set if validation else None,
        processing_class=origin.tokenizer,
        group_by_length=values.performance.group_by_length,
        reference=values.dpo.reference,
        kept_logps=KeptLogps(Path(values.dpo.output_dir).parent / LOGPS_FOLDER, basis),
        fast_path=values.performance.fast_path,
    )


def run(stage: Stage) -> None:
    """Train against the frozen reference, prove start and end, save and report."""
    check_choices(stage)
    files, split = read_data(stage, parse_preference)
    machine = settle_machine(stage)

    from scripts.common.finishing import dataset_entries
    from scripts.common.lifecycle import train_and_finish
    from scripts.common.preferences import (
        DegenerationWatch,
        check_reference_unchanged,
        check_trainable_names,
        prove_start,
        warn_of_length_bias,
    )

    origin = find_origin(stage)
    train, validation = render(stage, origin.tokenizer, split)
    bias = warn_of_length_bias(train)
    reference: dict[str, Any] = {}
    watches: list[Any] = []

    def before_training(trainer: Any, tracker: Any) -> dict[str, Any]:
        check_trainable_names(trainer.model)
        reference.update(trainer.reference_weights())
        if validation:
            watches.append(
                DegenerationWatch(trainer, tracker, validation, stage.config.values.dpo.stop_on_degeneration)
            )
            trainer.add_callback(watches[0])
        return prove_start(trainer) | bias

    def after_training(trainer: Any) -> dict[str, Any]:
        check_reference_unchanged(trainer, reference)
        return {"answers": watches[0].last} if watches else {}

    train_and_finish(
        stage,
        origin,
        dataset_entries(files, split),
        lambda: build_trainer(stage, machine, origin, train, validation),
        before_training=before_training,
        after_training=after_training,
        next_command=f"python -m eval.compare {stage.config.flags}",
    )


def show_dry_run(stage: Stage) -> None:
    """Load everything but the weights, and show what a run would do."""
    check_choices(stage)
    files, split = read_data(stage, parse_preference)

    from scripts.common.lifecycle import show_plan
    from scripts.common.preferences import warn_of_length_bias

    origin = find_origin(stage)
    train, _ = render(stage, origin.tokenizer, split)
    warn_of_length_bias(train)
    show_plan(stage, origin.base_folder, files, train)
    for pair in train[:2]:
        prompt, chosen, rejected = map(origin.tokenizer.decode, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        log.info("--- a training pair\n%s\n--- chosen >>>%s<<<\n--- rejected >>>%s<<<", prompt, chosen, rejected)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage."""
    return run_stage("dpo", build_parser().parse_args(argv), run, show_dry_run)


if __name__ == "__main__":
    sys.exit(main())
