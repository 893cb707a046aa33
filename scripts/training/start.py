"""What a training run starts from: its flags, machine, base, tokenizer, and the adapter of the stage before."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.common.artifacts import Parent
from scripts.common.config import add_config_arguments
from scripts.common.distributed import join_process_group
from scripts.common.machine import Machine, apply_machine, check_launch, choose_machine
from scripts.common.run import Run

log = logging.getLogger(__name__)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every training script has."""
    add_config_arguments(parser)
    parser.add_argument(
        "--require-deid-report",
        nargs="?",
        const="",
        metavar="FILE",
        help="refuse data without a de-identification report (default: the one beside the data); see deid.required",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="check config and data and show what would be trained")


@dataclass(frozen=True)
class Start:
    """A base with its tokenizer, and the adapter that training continues, where there is one."""

    base_folder: Path
    tokenizer: Any
    fingerprint: str
    parent: Parent | None = None
    parent_run_id: str | None = None


def settle_machine(run: Run) -> Machine:
    """Choose device, dtype and threads, and say why; unless nothing will be trained, apply them and join the group."""
    machine = choose_machine(run.values)
    if not run.dry:
        check_launch(run.values, machine)
        apply_machine(machine)
        join_process_group(machine.device)
        log.info("%s; %d threads", "; ".join(machine.reasons), machine.threads)
    return machine


def find_start(run: Run, init_from: str | None = None) -> Start:
    """Find the base, and prove that the adapter to continue was made on it, or that a fresh one can be put on it."""
    from scripts.model.adapter import adapted_modules, check_adapter_fits
    from scripts.model.base import load_tokenizer
    from scripts.model.find import find_model
    from scripts.model.fingerprint import base_fingerprint
    from scripts.model.targets import targets_of_folder

    base_folder = find_model(run.values.base_model_id, run.values.base_model_revision)
    tokenizer = load_tokenizer(base_folder)
    if init_from is None:
        log.info("%s", targets_of_folder(base_folder, run.values.lora.target_modules))
        return Start(base_folder, tokenizer, base_fingerprint(base_folder))
    manifest = check_adapter_fits(init_from, base_folder, tokenizer)
    log.info("%s", targets_of_folder(base_folder, adapted_modules(init_from)))
    return Start(
        base_folder, tokenizer, manifest.base_model.fingerprint, manifest.as_parent(init_from), manifest.mlflow.run_id
    )
