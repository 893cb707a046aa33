"""What happens between steps: checkpoints are kept by their step, and progress is shown."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.common.signals import StopSignal
from scripts.common.tracking import Tracker
from scripts.training.callbacks import KeepNewest, ProgressAndTracking


def test_checkpoints_are_kept_by_step_even_when_the_clock_was_turned_back(tmp_path: Path) -> None:
    for step, written in ((2, 2000), (4, 3000), (6, 1000)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (written, written))
    arguments = SimpleNamespace(save_total_limit=2, output_dir=str(tmp_path))

    KeepNewest(arguments).on_save(arguments, SimpleNamespace(best_model_checkpoint=None), None)

    assert arguments.save_total_limit is None, "the Trainer must not delete any by itself"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_log_that_nobody_watches_keeps_few_lines_of_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressAndTracking(Tracker(), StopSignal())
    state, control = SimpleNamespace(global_step=0, max_steps=200), SimpleNamespace(should_save=False)

    progress.on_train_begin(SimpleNamespace(process_index=0), state, control)
    for state.global_step in range(1, 201):
        progress.on_step_end(None, state, control)
        progress.on_log(None, state, control, {"loss": 1 / state.global_step})
    progress.on_train_end(None, state, control)

    shown = capsys.readouterr().err.split("\r")
    assert "200/200" in shown[-1]
    assert "loss 0.005" in shown[-1]
    assert len(shown) < 10
