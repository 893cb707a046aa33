"""Before training: how many steps, how much memory, and which arguments TRL is given."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any

from scripts.common.distributed import broadcast_from_rank_0
from scripts.common.errors import UserError, explain_lack
from scripts.common.machine import Machine
from scripts.common.paths import ROOT
from scripts.common.run import Run
from scripts.common.schema import Config, Training
from scripts.common.stages import TRAINING_STAGES
from scripts.dataset.records import DatasetFile
from scripts.dataset.rendering import Rendered, RenderedPair
from scripts.model.memory import SAFETY_RATIO, MemoryEstimate, available_memory_gib, estimate_memory

log = logging.getLogger(__name__)

EVALUATIONS_PER_RUN = 4  # at most, and so many checkpoints
HELD_OUT_SHARE = 0.05  # of a run's time that scoring held-out records takes
TRAINED_TIMES = 2.5  # as long as scoring a record, training on it takes
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

    steps: int
    estimate: MemoryEstimate
    checkpointing: bool
    compiled: bool
    reasons: tuple[str, ...]

    def check_fits(self, machine: Machine) -> None:
        """Say what was decided; refuse a run that cannot fit, and name the settings that would make it fit."""
        log.info("%s", "; ".join(self.reasons))
        free = broadcast_from_rank_0(lambda: available_memory_gib(machine.device))
        if self.estimate.total > free:
            raise UserError(
                f"this run needs {self.estimate}, but only {free:.1f} GiB are free. Lower per_device_train_batch_size "
                "(and raise gradient_accumulation_steps by as much), lower max_length, set performance.gradient_checkpointing: "
                "true or quantization.load_in_4bit: true, or choose a smaller base model."
            )


def plan_training(
    config: Config, section: Training, base_folder: Path, machine: Machine, rows: Sequence[Rendered | RenderedPair]
) -> Plan:
    """Count the steps, estimate memory for the largest batch, decide on gradient checkpointing and on compiling."""
    batch, sequences_per_row = section.per_device_train_batch_size, rows[0].sequences
    pairs, lean = sequences_per_row > 1, _stands_in_for(config, base_folder)
    if pairs and lean:
        rows, sequences_per_row = [row.in_one_row() for row in rows], 1
    largest = sorted(rows, key=lambda row: len(row.input_ids))[-batch:]
    steps = total_steps(section, len(rows), machine.world_size)
    seen = steps * batch * section.gradient_accumulation_steps
    mean_tokens = sum(len(row.input_ids) for row in rows) / len(rows)
    answers = sum(row.trained_tokens for row in largest)

    def estimate(checkpointing: bool, compiled: bool) -> MemoryEstimate:
        return estimate_memory(
            base_folder, config, sequences=batch * sequences_per_row, longest=len(largest[-1].input_ids),
            answer_tokens=answers, bytes_per_value=machine.dtype.itemsize, cpu=machine.device == "cpu",
            checkpointing=checkpointing, compiled=compiled, keep_weights=not (compiled and pairs),  # as training/dpo.py asks for
            lean=lean,
        )  # fmt: skip

    wanted = config.performance.gradient_checkpointing
    free = broadcast_from_rank_0(lambda: available_memory_gib(machine.device))
    tight = wanted == "auto" and estimate(False, False).total > SAFETY_RATIO * free
    tokens = seen * sequences_per_row * mean_tokens
    compiled, why = _choose_compilation(config, machine, base_folder, lean, tokens, tight)
    if wanted == "auto":
        needed = estimate(False, compiled).total
        checkpointing = needed > SAFETY_RATIO * free
        reason = f"gradient checkpointing {'on' if checkpointing else 'off'}: {needed:.1f} GiB needed without it, {free:.1f} free"
    else:
        checkpointing, reason = wanted, f"gradient checkpointing {'on' if wanted else 'off'}: asked for"
    return Plan(steps, estimate(checkpointing, compiled), checkpointing, compiled, (reason, why))


def _stands_in_for(config: Config, base_folder: Path) -> bool:
    """Tell whether training computes real tokens only (speed/lean_decoder.py)."""
    if not config.performance.fast_path or config.quantization.load_in_8bit:
        return False
    from scripts.speed.speed_up import stands_in_for

    return stands_in_for(base_folder)


def _choose_compilation(
    config: Config, machine: Machine, base_folder: Path, lean: bool, tokens: float, tight: bool
) -> tuple[bool, str]:
    if config.performance.compile is False:
        return False, "layers not compiled: asked for"
    from scripts.speed.speed_up import choose_compilation

    return choose_compilation(config, machine, base_folder, lean, tokens, tight)


def asks_reference_often(section: Training, machine: Machine, plan: Plan, train: int, validation: int) -> bool:
    """Tell whether training and evaluation would ask the reference more often than once per pair; it never changes."""
    per_step = section.per_device_train_batch_size * section.gradient_accumulation_steps * machine.world_size
    return plan.steps * per_step + (EVALUATIONS_PER_RUN + 1) * validation >= train + validation


def show_plan(run: Run, machine: Machine, base_folder: Path, files: Sequence[DatasetFile], rows: Any) -> None:
    """Print what a dry run can know: data, lengths, steps, machine and memory."""
    plan = plan_training(run.values, run.section, base_folder, machine, rows)
    ordered = sorted(len(row.input_ids) for row in rows)
    log.info("datasets: %s", ", ".join(f"{file.path} (weight {file.weight})" for file in files))
    log.info("tokens per sequence: median %d, longest %d; none would be cut", ordered[len(ordered) // 2], ordered[-1])
    log.info("%d optimizer steps", plan.steps)
    log.info("%s", "; ".join(machine.reasons + plan.reasons))
    log.info("memory: %s of %.1f GiB free", plan.estimate, available_memory_gib(machine.device))
    if run.section.trainer:
        import trl

        arguments = trainer_arguments(run, machine, plan, validation=int(run.values.data.validation_ratio > 0))
        with blamed_on_trainer_block(run):
            try_out(make_arguments(getattr(trl, TRAINING_STAGES[run.stage].trl_config), run, **arguments), plan.steps)


def evaluations(section: Training, machine: Machine, steps: int, validation: int) -> int:
    """Return how often a run scores its held-out records while it trains, once of it at the end.

    Together with the pass before the first step that takes about 5 % of a run, where two passes do not take more.
    """
    if section.early_stopping_patience or section.trainer.keys() & {"eval_steps", "eval_strategy"}:
        return EVALUATIONS_PER_RUN
    batch = section.per_device_train_batch_size * section.gradient_accumulation_steps * machine.world_size
    passes = round(HELD_OUT_SHARE * TRAINED_TIMES * steps * batch / max(validation, 1))
    return min(max(passes - 1, 1), EVALUATIONS_PER_RUN)


def trainer_arguments(run: Run, machine: Machine, plan: Plan, *, validation: int) -> dict[str, Any]:
    """Build what TRL's configurations have in common; the user's `trainer` block comes last and wins.

    `validation` is the number of held-out records.
    """
    import torch

    section, values, steps = run.section, run.values, plan.steps
    count = evaluations(section, machine, steps, validation)
    rhythm = max(1, steps // (count if count > 1 else EVALUATIONS_PER_RUN))
    arguments: dict[str, Any] = {
        "output_dir": str(run.run_dir / "checkpoints"),
        "num_train_epochs": section.num_train_epochs,
        "learning_rate": section.learning_rate,
        "per_device_train_batch_size": section.per_device_train_batch_size,
        "per_device_eval_batch_size": section.per_device_train_batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "max_length": section.max_length,
        "seed": values.seed,
        "use_cpu": machine.device == "cpu",
        # The weights themselves are bf16 and the fast path brings adapters to the dtype of their input. Autocast on top
        # makes a GPU's step a third longer, and on a CPU costs several times more than it saves.
        "bf16": machine.device == "cuda" and machine.dtype == torch.bfloat16 and not values.performance.fast_path,
        "activation_checkpointing": plan.checkpointing,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": max(1, steps // LOGGED_POINTS),
        "eval_strategy": "steps" if validation and count > 1 else "no",  # the pass at the end is the session's own
        "eval_steps": rhythm,
        "save_strategy": "steps",
        "save_steps": rhythm,
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": machine.device == "cuda",
        "ddp_find_unused_parameters": False,
        **section.trainer,
    }
    if not validation and (arguments["eval_strategy"] != "no" or arguments.get("eval_on_start")):
        log.warning("%s.trainer: nothing is held out, so nothing is evaluated during training", run.stage)
        arguments.update(eval_strategy="no", eval_on_start=False)
    same_rhythm = arguments["eval_strategy"] == arguments["save_strategy"] != "no" and (
        arguments["eval_strategy"] == "epoch" or arguments["save_steps"] % arguments["eval_steps"] == 0
    )
    arguments["load_best_model_at_end"] = bool(validation) and same_rhythm
    if arguments["load_best_model_at_end"]:
        arguments.update(metric_for_best_model="eval_loss", greater_is_better=False)
    elif validation and count == 1:
        log.info(
            "held-out records are scored before and after training, so the last checkpoint is kept; more passes would take over "
            "%.0f %% of the time (%s.trainer: {eval_steps: …, save_steps: …} asks for them)", 100 * HELD_OUT_SHARE, run.stage,
        )  # fmt: skip
    elif validation:
        log.info("evaluation and saving do not go together, so the last checkpoint is kept instead of the best")
    return arguments


@contextmanager
def blamed_on_trainer_block(run: Run) -> Iterator[None]:
    """Say of `<stage>.trainer` what a library says while it is given those settings.

    Where that block is empty, nobody but this project chose the settings: an error is a bug and stays one. So it is when
    our own code raises, or when memory or disk are lacking, which has a message of its own.
    """
    try:
        yield
    except Exception as error:
        here = str(ROOT / "scripts")
        ours = isinstance(error, UserError) or extract_tb(error.__traceback__)[-1].filename.startswith(here)
        if not run.section.trainer or ours or explain_lack(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{run.stage}.trainer: TRL refuses these settings: {reason}\nFound: {', '.join(run.section.trainer)}. Correct or "
            f"remove them. With --set {run.stage}.trainer={{}} an error that they do not cause shows whole."
        ) from None


def make_arguments(kind: Any, run: Run, **arguments: Any) -> Any:
    """Build TRL's own arguments, which check themselves only here."""
    with blamed_on_trainer_block(run):
        return kind(**arguments)


def settle_trainer(trainer: Any, steps: int) -> None:
    """Make sure before any work that a batch, optimizer, schedule and data loader can be made."""
    try_out(trainer.args, steps)
    trainer.data_collator([trainer.train_dataset[0]])
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # they make theirs after they split the weights
        trainer.create_optimizer()


def try_out(arguments: Any, steps: int) -> None:
    """Make optimizer, schedule and data loader from TRL's arguments without a model.

    Raises: the error of the library that a setting does not fit.
    """
    import torch
    from torch.utils.data import DataLoader
    from transformers import Trainer, get_scheduler
    from transformers.integrations.liger import apply_liger_kernel

    model = torch.nn.ParameterList([torch.zeros(1)])
    if arguments.use_liger_kernel:
        apply_liger_kernel(model, arguments.liger_kernel_config)
    of_model = arguments.optim_target_modules is not None or "lomo" in arguments.optim  # wants the real one's modules
    if not of_model:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            kind(model.parameters(), **options)
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD(model.parameters(), lr=arguments.learning_rate),
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    DataLoader(
        [0],  # type: ignore[arg-type]  # as good as a data set
        num_workers=arguments.dataloader_num_workers,
        persistent_workers=arguments.dataloader_persistent_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        multiprocessing_context=arguments.dataloader_multiprocessing_context,
    )
