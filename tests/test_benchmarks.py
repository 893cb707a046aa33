"""The training benchmark: the whole command on a tiny model, and what its figures mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval.benchmarks import training
from eval.benchmarks.training_systems import Running, System, Task, run_to_the_end
from tests.chain import dpo_rows, sft_rows
from tests.conftest import write_jsonl

SECONDS_PER_RECORD = 0.1
PEER = f"""
import sys, time
held = bytearray(300 * 2**20)
for line in open(sys.argv[1]):
    time.sleep({SECONDS_PER_RECORD})
"""


@pytest.fixture
def peer(tmp_path: Path) -> str:
    """Return a training command whose speed and memory are known: it sleeps over each record."""
    (tmp_path / "peer.py").write_text(PEER, encoding="utf-8")
    return f"sleeper={sys.executable} {tmp_path}/peer.py {{data}} {{output}}"


def measure(tmp_path: Path, tiny_llama: Path, *more: str) -> dict:
    """Run the command on little data and return its JSON."""
    data = {"sft": sft_rows(24), "dpo": dpo_rows(12)}
    files = [f"--{stage}-data={write_jsonl(tmp_path / f'{stage}.jsonl', rows)}" for stage, rows in data.items()]
    command = ["--model", str(tiny_llama), "--steps", "1", "2", "--out", str(tmp_path / "out"), *files, *more]
    assert training.main(command) == 0
    return json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))


def test_whole_command_measures_this_project_beside_a_given_command(
    tmp_path: Path, tiny_llama: Path, peer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{training_markers()}\nafter\n", encoding="utf-8")

    found = measure(tmp_path, tiny_llama, "--stages", "sft", "--systems", "ours", "--against", peer, "--paste", str(readme))  # fmt: skip
    ours, theirs = found["speed"]["sft"]["systems"]

    assert theirs["samples_per_second"] == pytest.approx(1 / SECONDS_PER_RECORD, rel=0.2)
    assert 0.3 <= theirs["peak_memory_gib"] < 0.4
    assert theirs["loss"] is None
    assert (ours["steps"], theirs["steps"]) == ([2, 8], [1, 2])
    assert ours["peak_memory_gib"] > theirs["peak_memory_gib"]
    assert 0 < ours["loss"] < found["speed"]["sft"]["loss_before"], "16 samples teach something"
    text = (tmp_path / "out" / "training.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert readme.read_text(encoding="utf-8").startswith("before\n") and text in readme.read_text(encoding="utf-8")  # noqa: PT018
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5000


def training_markers() -> str:
    """Return the lines between which the tables go."""
    from eval.benchmarks.training_report import END, START

    return f"{START}\nold figures\n{END}"
