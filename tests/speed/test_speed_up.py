"""The door: what is off is not imported, and a run goes its own way where a library changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.chain import write_chain

RUN_BOTH = """
import sys
{before}
from scripts import train_dpo, train_sft
for stage in (train_sft, train_dpo):
    assert stage.main(["--config", sys.argv[1]]) == 0
print("IMPORTED", sorted(name for name in sys.modules if name.startswith("scripts.speed")))
"""

CHANGED_LIBRARIES = """
from transformers.models.llama.modeling_llama import LlamaMLP
from trl.trainer import utils
own = LlamaMLP.forward
LlamaMLP.forward = lambda self, x: own(self, x) * 3
function = utils._ChunkedLogProbFunction
class Changed(function):
    @staticmethod
    def backward(ctx, *gradients):
        grad_hidden, *others = function.backward(ctx, *gradients)
        return grad_hidden * 1.001, *others
utils._ChunkedLogProbFunction = Changed
"""


def run_both(config: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run SFT and DPO in one process of their own; `before` is code that comes first."""
    return subprocess.run(
        [sys.executable, "-c", RUN_BOTH.format(before=before), str(config)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_of_it_is_imported_where_it_is_off(tmp_path: Path) -> None:
    config = write_chain(tmp_path, performance={"fast_path": False, "compile": False})

    done = run_both(config)

    assert done.returncode == 0, done.stderr[-3000:]
    assert "IMPORTED []" in done.stdout


@pytest.mark.slow
def test_libraries_that_changed_make_training_slower_and_the_log_says_so(tmp_path: Path) -> None:
    done = run_both(write_chain(tmp_path), CHANGED_LIBRARIES)

    assert done.returncode == 0, done.stderr[-3000:]
    assert "scripts.speed.speed_up" in done.stdout
    for said in (
        "this model computes otherwise than its family (hidden states ",
        "computing with the model's own, slower forward pass",
        "TRL's LM head gives other numbers (0.001 apart); training with TRL's own, slower head",
    ):
        assert said in done.stderr
