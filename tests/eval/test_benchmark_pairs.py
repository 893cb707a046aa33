"""The benchmark of labels: what it shuffles and reverses, and that reversed labels are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.benchmarks import pairs
from eval.checks import passes
from scripts.common.config import load_config

ROWS = [{"prompt": f"p{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]


def test_a_coin_exchanges_about_half_of_the_labels_and_another_seed_others() -> None:
    one, again, other = (pairs.shuffled(ROWS, seed) for seed in ("1 one 0", "1 one 0", "1 other 0"))

    assert one == again != other
    exchanged = [row["chosen"].startswith("no") for row in one]
    assert 10 < sum(exchanged) < 30
    assert all({row["chosen"], row["rejected"]} == {f"yes {n}", f"no {n}"} for n, row in enumerate(one))


def test_held_out_pairs_differ_in_the_rule_and_not_in_length(tmp_path: Path) -> None:
    (rule,) = load_config(pairs.write_project(tmp_path, steps=1)).values.eval.checks
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]

    assert len(rows) == pairs.HELD_OUT * pairs.PROMPTS
    for row in rows:
        assert [passes(rule, row[side], "", None) for side in ("chosen", "rejected")] == [True, False]
        assert len(row["chosen"].split()) == len(row["rejected"].split())


@pytest.mark.slow
def test_reversed_labels_are_found_and_a_finished_study_is_not_made_again(tmp_path: Path, capsys) -> None:
    command = ["--studies", "1", "--out", str(tmp_path)]
    assert pairs.main(command) == 0

    said = capsys.readouterr().out
    assert "labels reversed against right" in said
    assert "Reversed is worse than right" in said
    assert "0 of 1 studies of shuffled labels show a difference" in said
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}
    assert pairs.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")} == made
