"""Trainers as the scripts build them, short of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import train_dpo, train_kto, train_sft
from scripts.common.config import LoadedConfig, load_config
from scripts.common.machine import choose_machine
from scripts.common.run import Run
from scripts.common.schema import Config
from scripts.common.signals import StopSignal
from scripts.common.stages import TRAINING_STAGES
from scripts.dataset.records import PARSERS
from scripts.training.data import read_data, render_rows
from scripts.training.kto import balance
from scripts.training.start import find_start


def run_of(stage: str, config: LoadedConfig | Config, run_dir: Path, *, dry: bool = False) -> Run:
    """Make a run that holds no lock and writes nothing by itself."""
    loaded = config if isinstance(config, LoadedConfig) else LoadedConfig(config, {})
    return Run(stage, loaded, run_dir / stage, run_dir, StopSignal(), dry)


def build_trainer(stage: str, config: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Any:
    """Build the trainer of a stage from a configuration file, as its script does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    run = run_of(stage, load_config(config, overrides), run_dir)
    machine = choose_machine(run.values)
    data = read_data(run, PARSERS[TRAINING_STAGES[stage].records], None)
    start = find_start(run, data.records, getattr(run.section, "init_from", None))
    rows = render_rows(run, start, data.split)
    if stage == "kto":
        return train_kto.build_trainer(run, machine, start, *rows, balance(run.values.kto, rows[0]))
    build = train_sft.build_trainer if stage == "sft" else train_dpo.build_trainer
    return build(run, machine, start, *rows)
