"""What happens between steps: checkpoints are kept by their step."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from scripts.training.callbacks import KeepNewest


def test_checkpoints_are_kept_by_step_even_when_the_clock_was_turned_back(tmp_path: Path) -> None:
    for step, written in ((2, 2000), (4, 3000), (6, 1000)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (written, written))
    arguments = SimpleNamespace(save_total_limit=2, output_dir=str(tmp_path))

    KeepNewest(arguments).on_save(arguments, SimpleNamespace(best_model_checkpoint=None), None)

    assert arguments.save_total_limit is None, "the Trainer must not delete any by itself"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
