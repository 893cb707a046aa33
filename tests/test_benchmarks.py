"""The training benchmark: the whole command on a tiny model, and what its figures mean."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from eval.benchmarks import training
from eval.benchmarks.training_growth import Point, draw_growth, growth_table, measure_point
from eval.benchmarks.training_quality import whole_checkpoints
from eval.benchmarks.training_report import END, START
from eval.benchmarks.training_systems import EPOCHS, SYSTEMS, Row, Running, System, Task, run_to_the_end, system_of_user
from tests.chain import dpo_rows, sft_rows
from tests.conftest import write_jsonl

PEER = """
import sys, time
held = bytearray(300 * 2**20)
for line in open(sys.argv[1]):
    time.sleep(0.1)
"""
TASK = Task("sft", Path("base"), Path("data/train.jsonl"), Path("out/adapter"), 8, 1, 512, 2e-4)


@pytest.fixture
def peer(tmp_path: Path) -> str:
    """Return a training command that holds 300 MiB and sleeps over each record."""
    (tmp_path / "peer.py").write_text(PEER, encoding="utf-8")
    return f"sleeper={sys.executable} {tmp_path}/peer.py {{data}} {{output}}"


def measure(tmp_path: Path, model: Path, *more: str) -> dict:
    """Run the command on little data and return its JSON."""
    data = {"sft": sft_rows(160), "dpo": dpo_rows(48)}
    files = [f"--{stage}-data={write_jsonl(tmp_path / f'{stage}.jsonl', rows)}" for stage, rows in data.items()]
    command = ["--model", str(model), "--steps", "1", "2", "--out", str(tmp_path / "out"), *files, *more]
    assert training.main(command) == 0
    return json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))


@pytest.mark.drill
def test_whole_command_measures_this_project_beside_a_given_command(
    tmp_path: Path, tiny_llama: Path, peer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold figures\n{END}\nafter\n", encoding="utf-8")

    found = measure(tmp_path, tiny_llama, "--stages", "sft", "--systems", "ours", "--against", peer, "--paste", str(readme))  # fmt: skip
    ours, theirs = found["speed"]["sft"]["systems"]

    assert (ours["steps"], theirs["steps"]) == ([2, 16], [1, 2])
    assert theirs["seconds"][0] >= 0.8
    assert theirs["seconds"][1] >= 1.6, "it was given the 16 records of two steps"
    assert 0.3 <= theirs["peak_memory_gib"] < 0.4
    assert ours["peak_memory_gib"] > theirs["peak_memory_gib"]
    assert theirs["loss"] is None, "it left no adapter"
    assert ours["loss"] != found["speed"]["sft"]["loss_before"]
    text = (tmp_path / "out" / "training.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "| sleeper | " in text
    assert readme.read_text(encoding="utf-8") == f"before\n{START}\n{text}{END}\nafter\n"
    assert (tmp_path / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "work").exists()


def test_speed_is_the_difference_of_both_runs_and_the_rest_is_start(tiny_llama: Path) -> None:
    rows = [Row({}, None, tokens=100 if number < 16 else 50) for number in range(64)]
    timed = training.Timed(SYSTEMS["ours"], {2: [14.0, 13.0, 20.0], 8: [26.0]}, peak_gib=1.0)

    found = training.figures("sft", timed, rows, {"this project": 2.5}, tiny_llama, limit=1e9)

    assert found["samples_per_second"] == pytest.approx(48 / 12)
    assert found["tokens_per_second"] == pytest.approx(48 * 50 / 12)
    assert found["start_seconds"] == pytest.approx(14 - 16 / 4)
    assert found["minutes_for_1000"] == pytest.approx((10 + 1000 / 4) / 60)
    weights = training.parameter_count(tiny_llama)
    assert found["limit_share"] == pytest.approx(4 * weights * 200 / 1e9)
    assert found["loss"] == 2.5


def test_two_epochs_of_pairs_count_twice(tiny_llama: Path) -> None:
    rows = [Row({}, None, tokens=100) for _ in range(64)]
    timed = training.Timed(SYSTEMS["trl"], {1: [10.0], 3: [20.0]})

    found = training.figures("dpo", timed, rows, {}, tiny_llama, limit=1e9)

    assert EPOCHS["dpo"] == 2
    assert found["samples_per_second"] == pytest.approx((3 - 1) * 4 / 10)
    assert found["tokens_per_second"] == pytest.approx((3 - 1) * 4 * 100 / 10)


def test_difference_within_the_noise_gives_no_figure(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    timed = training.Timed(SYSTEMS["trl"], {1: [10.0], 3: [9.9]})

    found = training.figures("sft", timed, [Row({}, None, 1)] * 64, {}, tiny_llama, limit=1e9)

    assert "samples_per_second" not in found
    assert "raise --steps" in caplog.text


def test_command_of_the_user_gets_the_values_of_the_task() -> None:
    system = system_of_user("mine=train {stage} --data={data} -b {batch} 'two words' {unknown}")

    assert system.name == "mine"
    assert system.command(TASK) == ["train", "sft", "--data=data/train.jsonl", "-b", "8", "two words", "{unknown}"]


@pytest.mark.parametrize("command", [
    ("--against", "train {data}"),
    ("--against", "mine=train"),
    ("--steps", "2", "2"),
    ("--systems",),
    ("--paste", "README.md"),
    ("--systems", "ours", "--steps", "1", "1000", "--stages", "sft"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_at_once(
    tmp_path: Path, tiny_llama: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["--model", str(tiny_llama), "--out", str(tmp_path), *command]) == 2
    assert f"error: {'--sft-data' if '1000' in command else command[0]}" in capsys.readouterr().err


def test_command_that_fails_is_shown_with_the_end_of_its_output(tmp_path: Path) -> None:
    system = System("broken", lambda task: [sys.executable, "-c", "raise SystemExit('no such layer')"])
    with pytest.raises(training.UserError, match=r"broken ended with exit code 1(.|\n)*no such layer"):
        run_to_the_end(system, replace(TASK, output=tmp_path / "a"), tmp_path)


def test_clock_and_command_stand_still_during_a_pause_and_nothing_outlives_it(tmp_path: Path) -> None:
    counter = f"import time\nwhile True:\n open(r'{tmp_path}/ticks', 'a').write('.'); time.sleep(0.01)"
    system = System("counter", lambda task: [sys.executable, "-c", counter])

    def ticks() -> int:
        return (tmp_path / "ticks").stat().st_size

    def watch() -> int:
        before = ticks()
        time.sleep(0.5)
        return ticks() - before

    with Running(system, replace(TASK, output=tmp_path / "a"), tmp_path) as running:
        while not (tmp_path / "ticks").exists():
            assert running.goes_on()
        begin, seconds = time.monotonic(), running.seconds
        moved = running.pause(watch)
        counted, passed = running.seconds - seconds, time.monotonic() - begin
    assert moved <= 1
    assert counted <= passed - 0.5
    assert watch() == 0


def test_checkpoint_still_being_written_is_not_scored_nor_one_of_another_run(tmp_path: Path) -> None:
    ours, theirs = "quality.run/checkpoints/checkpoint-", "quality/checkpoint-"
    for name, state in ((f"{ours}10", "10}"), (f"{theirs}9", "9}"), (f"{ours}20", ""), ("sft-3-0/checkpoint-3", "3}")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": ' + state, encoding="utf-8")
    (tmp_path / f"{ours}30").mkdir()

    assert [path.name for path in whole_checkpoints(tmp_path / "quality")] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.drill
def test_every_system_and_every_part_works_on_a_tiny_model(tmp_path: Path, tiny_llama: Path) -> None:
    found = measure(tmp_path, tiny_llama)
    for stage, count in (("sft", 3), ("dpo", 2)):
        part = found["speed"][stage]
        assert len(part["systems"]) == count
        assert all(system["loss"] != part["loss_before"] for system in part["systems"])

    point = measure_point(Point(width=64, length=40, batch=2, records=20), tmp_path / "growth")
    assert point["tokens_per_record"] == pytest.approx(40, rel=0.5)
    draw_growth({"batch": [point]}, tmp_path / "growth.png")
    assert "| batch | 2 records per batch | " in growth_table({"batch": [point]})[2]

    rows = [{"prompt": f"say red {number}", "completion": "red"} for number in range(900)]
    data = write_jsonl(tmp_path / "red.jsonl", rows)
    assert training.main(["--model", str(tiny_llama), "--parts", "quality", "--systems", "ours", "--time-to-quality", "0.9", "--sft-data", str(data), "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    both = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert both["speed"] == found["speed"], "what was measured before is kept"
    assert len(both["quality"]["systems"][0]["course"]) >= 1
