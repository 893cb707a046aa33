"""Trainers as the scripts build them, short of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import train_dpo, train_sft
from scripts.common.config import LoadedConfig, load_config
from scripts.common.machine import choose_machine
from scripts.common.run import Run
from scripts.common.schema import Config
from scripts.common.signals import StopSignal
from scripts.dataset.records import parse_preference, parse_record
from scripts.training.data import read_data, render_rows
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
    if stage == "sft":
        data = read_data(run, parse_record, None)
        start = find_start(run, data.records)
        rows = render_rows(run, start, data.split)
        return train_sft.build_trainer(run, machine, start, *rows)
    data = read_data(run, parse_preference, None)
    start = find_start(run, data.records, run.values.dpo.init_from)
    pairs = render_rows(run, start, data.split)
    return train_dpo.build_trainer(run, machine, start, *pairs)
