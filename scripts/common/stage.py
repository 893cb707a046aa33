"""What a training stage is, and the steps SFT and DPO take alike before anything heavy is loaded."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.common.artifacts import check_replaceable, locked_run_dir, run_dir_of, write_text_durably
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.deid_report import check_deid_report
from scripts.common.errors import UserError, listing
from scripts.common.processes import join_processes, leave_processes
from scripts.common.records import (
    DatasetFile,
    Parser,
    Split,
    count_duplicates,
    load_datasets,
    shared_answers,
    split_records,
    write_rejects,
)
from scripts.common.runtime import (
    Machine,
    StopSignal,
    apply_machine,
    check_launch,
    choose_machine,
    is_main_process,
    prepare_environment,
    set_up_logging,
    trapped_signals,
)
from scripts.common.schema import Training

log = logging.getLogger(__name__)


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags both training scripts have."""
    add_config_arguments(parser)
    parser.add_argument(
        "--require-deid-report",
        nargs="?",
        const="",
        metavar="FILE",
        help="refuse data without a de-identification report (default: the one beside the data); see deid.required",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="check config and data and show what would be trained")


@dataclass
class Stage:
    """One training run: its name, its section of the configuration, and what it needs to start."""

    name: str
    config: LoadedConfig
    section: Training
    run_dir: Path | None
    stop: StopSignal
    resume: bool = False
    deid_report: str | None = None

    @property
    def skip_bad_rows(self) -> bool:
        return self.config.values.data.on_bad_row == "skip"


def run_stage(
    name: str, arguments: argparse.Namespace, steps: Callable[[Stage], None], dry_run: Callable[[Stage], None]
) -> int:
    """Load the configuration, then take the stage's steps under a lock, or only show what they would be."""
    config = load_config(arguments.config, arguments.overrides)
    section = getattr(config.values, name)
    prepare_environment(config.values)
    if arguments.dry_run:
        set_up_logging()
        dry_run(Stage(name, config, section, None, StopSignal(), deid_report=arguments.require_deid_report))
        return 0
    check_replaceable(section.output_dir, name, f"{name}.output_dir")
    with trapped_signals() as stop, ExitStack() as held:
        run_dir = run_dir_of(section.output_dir)
        if is_main_process():  # of several processes one holds the folder and writes
            held.enter_context(locked_run_dir(section.output_dir))
            write_text_durably(run_dir / "config.resolved.yaml", config.to_yaml())
        set_up_logging(run_dir / "log.txt" if is_main_process() else None)
        steps(Stage(name, config, section, run_dir, stop, arguments.resume, arguments.require_deid_report))
        leave_processes()
    return 0


def read_data(stage: Stage, parse: Parser) -> tuple[list[DatasetFile], Split]:
    """Read, check and split the records, and say what stands out in them."""
    values = stage.config.values
    files = load_datasets(stage.section.dataset_path, parse, values.data, f"{stage.name}.dataset_path")
    if values.deid.required or stage.deid_report is not None:
        for file in files:
            check_deid_report(file.path, file.sha256, stage.deid_report or None)
    split = split_records(files, values.data, values.seed)
    records = [record for file in files for record in file.records]
    log.info("%d records: %d to train on, %d held out", len(records), len(split.train), len(split.validation))
    if stage.run_dir and is_main_process() and (rejected := write_rejects(stage.run_dir / "rejects.jsonl", files)):
        log.warning("%d bad rows set aside in %s", rejected, stage.run_dir / "rejects.jsonl")
    if duplicates := count_duplicates(records):
        log.warning("%d records repeat an earlier one word for word and weigh that much more", duplicates)
    if shared := shared_answers(split):
        log.warning("%d of %d held-out answers also occur in training", shared, len(split.validation))
    if not split.validation:
        log.warning("no record is held out, so nothing will tell whether training helped; see data.validation_ratio")
    return files, split


def render_split(
    stage: Stage, split: Split, render: Callable[[Any], Any], length: Callable[[Any], int]
) -> tuple[list[Any], list[Any]]:
    """Turn both sides into token ids; a record that does not fit is refused or set aside, never cut."""
    limit, too_long = stage.section.max_length, []
    sides: list[list[Any]] = []
    for records in (split.train, split.validation):
        rendered = [(record, render(record)) for record in records]
        too_long += [(record, length(row)) for record, row in rendered if length(row) > limit]
        sides.append([row for _, row in rendered if length(row) <= limit])
    if too_long:
        problems = [f"{record.source}: {tokens} tokens" for record, tokens in too_long]
        head = f"{len(too_long)} records are longer than {stage.name}.max_length ({limit}), so the end of their answers would be cut"
        mend = f"Raise {stage.name}.max_length to {max(tokens for _, tokens in too_long)}, shorten them, or set data.on_bad_row: skip."
        if not stage.skip_bad_rows:
            raise UserError(listing(head, problems, mend))
        log.warning("%s", listing(head, problems, "They are left out."))
    if not sides[0]:
        raise UserError(f"{stage.name}.max_length: no training record fits into {limit} tokens. Raise it.")
    return sides[0], sides[1]


def settle_machine(stage: Stage) -> Machine:
    """Choose and apply device, dtype and threads, say why, and join the other processes of the run."""
    machine = choose_machine(stage.config.values)
    check_launch(stage.config.values, machine)
    apply_machine(machine)
    join_processes(machine)
    log.info("%s; %d threads", "; ".join(machine.reasons), machine.threads)
    return machine


@dataclass(frozen=True)
class Origin:
    """What a run starts from: the base, its tokenizer, and for DPO the adapter it goes on with."""

    base_folder: Path
    tokenizer: Any
    fingerprint: str
    parent: dict[str, Any] | None = None
    parent_run_id: str | None = None
