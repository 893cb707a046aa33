"""Before training: how many steps a run takes."""

from __future__ import annotations

import pytest

from scripts.common.schema import Sft
from scripts.training.plan import total_steps


@pytest.mark.parametrize(("limit", "steps"), [(-1, 6), (4, 4)])
def test_steps_are_counted_as_the_trainer_takes_them(limit: int, steps: int) -> None:
    section = Sft(trainer={"max_steps": limit}, num_train_epochs=2, per_device_train_batch_size=4)

    assert total_steps(section, rows=10, world_size=1) == steps
