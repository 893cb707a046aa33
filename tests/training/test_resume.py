"""A run resumes from its newest whole checkpoint, and only as the run it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.training.resume import last_whole_checkpoint


@pytest.mark.parametrize("written", [None, '{"global_st'])
def test_checkpoint_that_was_cut_off_is_never_resumed_from(tmp_path: Path, written: str | None) -> None:
    for step in (8, 16, 104):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    state = tmp_path / "checkpoint-104/trainer_state.json"
    state.unlink() if written is None else state.write_text(written)

    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")
    assert not (tmp_path / "checkpoint-104").exists()
    assert last_whole_checkpoint(tmp_path / "nothing") is None
