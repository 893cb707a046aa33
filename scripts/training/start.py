"""What a training run starts from: its flags, machine, base, chat format, and the adapter of the stage before."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from scripts.common.artifacts import MANIFEST, Manifest, Parent, PlanFacts, read_manifest
from scripts.common.config import add_config_arguments
from scripts.common.distributed import broadcast_from_rank_0, join_process_group
from scripts.common.errors import UserError
from scripts.common.lineage import check_split
from scripts.common.machine import Machine, apply_machine, check_launch, choose_machine
from scripts.common.run import Run
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Preference, Record

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
    """A base with its way to write conversations, and the adapter that training continues, where there is one."""

    base_folder: Path
    chat: ChatFormat
    fingerprint: str
    parent: Parent | None = None
    parent_run_id: str | None = None
    plan: PlanFacts | None = None  # of that adapter

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer


def settle_machine(run: Run) -> Machine:
    """Choose device, dtype and threads, and say why; unless nothing will be trained, apply them and join the group."""
    machine = choose_machine(run.values)
    if not run.dry:
        check_launch(run.values, machine)
        apply_machine(machine)
        join_process_group(machine.device)
        log.info("%s; %d threads", "; ".join(machine.reasons), machine.threads)
    return machine


def find_start(
    run: Run, records: Iterable[Record | Preference] = (), init_from: str | None = None, *, resume: bool = False
) -> Start:
    """Find the base, prove that an adapter fits on it, and decide how conversations are written.

    Raises: UserError when the adapter may have been trained on what this run holds out.
    """
    from scripts.model.adapter import adapted_modules, check_adapter_fits
    from scripts.model.base import load_tokenizer
    from scripts.model.find import find_model
    from scripts.model.fingerprint import base_fingerprint
    from scripts.model.targets import targets_of_folder

    base_folder = find_model(run.values.base_model_id, run.values.base_model_revision)
    tokenizer = load_tokenizer(base_folder)
    parent = check_adapter_fits(init_from, base_folder, tokenizer) if init_from is not None else None
    if init_from is not None and parent:
        check_split(init_from, parent, run.values.data, f"{run.stage}.init_from", sides=("validation", "test"))
    targets = run.values.lora.target_modules if init_from is None else adapted_modules(init_from)
    log.info("%s", targets_of_folder(base_folder, targets))
    chat = choose_format(run, tokenizer, records, parent, resume)
    if init_from is None or parent is None:
        return Start(base_folder, chat, base_fingerprint(base_folder))
    return Start(
        base_folder, chat, parent.base_model.fingerprint, parent.as_parent(init_from), parent.mlflow.run_id, parent.plan
    )


def choose_format(
    run: Run, tokenizer: Any, records: Iterable[Record | Preference], parent: Manifest | None, resume: bool
) -> ChatFormat:
    """Take kwargs and date from the configuration or the adapter that training continues, and look for reasoning.

    Raises: UserError where both name them and differ: what is trained must continue what was trained.
    """
    data = run.values.data
    kwargs, day = data.chat_template_kwargs, data.template_date
    if parent:
        inherited = date.fromisoformat(parent.template_date) if parent.template_date else None
        for key, wanted, made_with in (
            ("chat_template_kwargs", kwargs, parent.chat_template_kwargs), ("template_date", day, inherited),
        ):  # fmt: skip
            if wanted is not None and wanted != made_with:
                raise UserError(
                    f"data.{key}: found {wanted}, but the adapter that training continues was made with {made_with}. "
                    "Remove the key to continue with that, or train the adapter again."
                )
        kwargs, day = parent.chat_template_kwargs, inherited
    chat = ChatFormat(tokenizer, kwargs or {}, day, data.system_prompt)
    chat.check_kwargs("data.chat_template_kwargs")
    if not chat.prints_date():
        day = None
    elif day is None:
        earlier = _date_of_interrupted(run) if resume else None
        day = date.fromisoformat(earlier or broadcast_from_rank_0(lambda: date.today().isoformat()))
        log.info("the chat template prints today's date: %s, here and wherever the adapter is used", day)
    thinking = bool(parent and parent.thinking) or any(
        chat.reasons(answer) for record in records for answer in record.answers
    )
    if thinking:
        log.info("the answers hold reasoning: the model learns to write it, and answers with it")
    return ChatFormat(tokenizer, chat.template_kwargs, day, data.system_prompt, thinking)


def _date_of_interrupted(run: Run) -> str | None:
    """Return the date that the run to resume has printed, from its notes or its finished folder."""
    state = run.run_dir / "state.json"
    if state.is_file():
        found: str | None = json.loads(state.read_text(encoding="utf-8")).get("template_date")
        return found
    if (run.output_dir / MANIFEST).is_file():
        return read_manifest(run.output_dir, verify=False).template_date
    return None
