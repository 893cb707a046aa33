"""How long a study takes is said from what was measured and from nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.studies.runs import last_lines, time_left


@pytest.mark.parametrize(
    ("seconds", "left", "spent", "said"),
    [
        ({}, ["sft", "dpo"], 0, "time left not known yet"),
        ({"sft": [100.0, 140.0]}, ["sft"], 0, "about 2 min left"),
        ({"sft": [100.0, 140.0]}, ["sft", "dpo"], 0, "at least 2 min left"),
        ({"sft": [120.0], "dpo": [240.0]}, ["sft", "dpo", "dpo"], 0, "about 10 min left"),
        ({"sft": [120.0], "dpo": [240.0]}, ["sft", "dpo", "dpo"], 60, "about 9 min left"),
        ({"sft": [120.0], "dpo": [240.0]}, ["sft", "dpo", "dpo"], 6000, "about 8 min left"),
        ({"dpo": [240.0]}, ["sft", "dpo"], 6000, "at least 4 min left"),
        ({"sft": [2.0]}, ["sft"], 0, "about 1 min left"),
        ({"sft": [2.0]}, [], 0, "done"),
    ],
)
def test_time_left_rests_on_what_was_measured(seconds: dict, left: list[str], spent: float, said: str) -> None:
    assert time_left(seconds, left, spent) == said


def test_last_lines_are_what_a_reader_of_the_log_would_see(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\n\n 10%|# | 1/9\r 20%|## | 2/9\nerror: f\xc3\xbcr \xff\nthree\nfour\nfive\nsix\n")

    assert last_lines(log).splitlines() == [
        f"    {line}" for line in (" 20%|## | 2/9", "error: für \ufffd", "three", "four", "five", "six")
    ]
