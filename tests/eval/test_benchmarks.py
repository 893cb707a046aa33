"""The training benchmark: the whole command on a tiny model, and what its figures mean."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.benchmarks import llama_server, serving, training
from eval.benchmarks.training_growth import Point, draw_growth, growth_table, measure_point, medians
from eval.benchmarks.training_quality import whole_checkpoints
from eval.benchmarks.training_report import markers
from eval.benchmarks.training_systems import (
    EPOCHS,
    SYSTEMS,
    Row,
    Running,
    System,
    Task,
    our_command,
    run_to_the_end,
    system_of_user,
)
from scripts.common.config import load_config
from tests.conftest import write_jsonl
from tests.support.chain import dpo_rows, sft_rows

PEER = """
import sys, time
held = bytearray(300 * 2**20)
lines = len(open(sys.argv[1]).readlines())
for line in range(lines + 1):
    print(f"\\r{100 * line // lines}%|##  | {line}/{lines} [00:01<00:00, 9 it/s]", end="", flush=True)
    time.sleep(0.05)
"""
TASK = Task("sft", Path("base"), Path("data/train.jsonl"), Path("out/adapter"), 8, 1, 512, 2e-4)


@pytest.fixture
def peer(tmp_path: Path) -> str:
    """Return a training command that holds 300 MiB and sleeps 50 ms over each record."""
    (tmp_path / "peer.py").write_text(PEER, encoding="utf-8")
    return f"sleeper={sys.executable} {tmp_path}/peer.py {{data}} {{output}}"


def measure(tmp_path: Path, model: Path, *more: str) -> dict:
    """Run the command on little data and return its JSON."""
    data = {"sft": sft_rows(160), "dpo": dpo_rows(48)}
    files = [f"--{stage}-data={write_jsonl(tmp_path / f'{stage}.jsonl', rows)}" for stage, rows in data.items()]
    command = ["--model", str(model), "--steps", "4", "--out", str(tmp_path / "out"), *files, *more]
    assert training.main(command) == 0
    return of_this_kind(tmp_path)


def of_this_kind(tmp_path: Path) -> dict:
    """Return what was found on this kind of processor."""
    found = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    return found[training.kind_of_machine()]


@pytest.mark.drill
def test_whole_command_measures_this_project_beside_a_given_command(
    tmp_path: Path, tiny_llama: Path, peer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    start, end = markers(training.kind_of_machine())
    others = "\n".join(markers("another kind"))
    readme.write_text(f"{others}\n{start}\nold figures\n{end}\nafter\n", encoding="utf-8")

    found = measure(tmp_path, tiny_llama, "--stages", "sft", "--systems", "ours", "--against", peer, "--paste", str(readme))  # fmt: skip
    pair = found["speed"]["sft, sleeper"]
    ours, theirs = pair["systems"]

    assert theirs["samples_per_second"] == pytest.approx(20, rel=0.3), "the clock stands still while the other trains"
    shares = [share for _, share in theirs["moments"][0]]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1
    assert [share for _, share in ours["moments"][0]] == [0, 0.25, 0.5, 0.75, 1]
    assert 0.3 <= theirs["peak_memory_gib"] < 0.4
    assert ours["peak_memory_gib"] > theirs["peak_memory_gib"]
    assert theirs["losses"] == [], "it left no adapter"
    assert ours["losses"] != [pair["loss_before"]]
    text = (tmp_path / "out" / "training.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "| sleeper | " in text
    assert readme.read_text(encoding="utf-8") == f"{others}\n{start}\n{text}{end}\nafter\n"
    assert (tmp_path / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "work").exists()


def ran(system: System, stage: str, *steps: tuple[float, float], reference: Sequence[tuple[float, float]] = ()) -> Any:
    """Return what is known of a run whose bar moved at these moments."""
    return SimpleNamespace(system=system, task=replace(TASK, stage=stage, seed=3), steps=steps, reference=reference)


def test_speed_leaves_the_warm_up_out_and_the_rest_is_start() -> None:
    rows = [Row({}, None, tokens=50, length=50) for _ in range(64)]
    run = ran(SYSTEMS["trl"], "sft", (30.0, 0.0), (40.0, 0.125), (42.0, 0.25), (48.0, 1.0))

    found = training.figures("sft", run, rows, weights=1000, limit=1e9)

    assert found["samples_per_second"] == pytest.approx(48 / 6)
    assert found["tokens_per_second"] == pytest.approx(48 * 50 / 6)
    assert found["start_seconds"] == pytest.approx(48 - 64 / 8)
    assert found["minutes_for_1000"] == pytest.approx((40 + 1000 / 8) / 60)
    assert found["limit_share"] == pytest.approx(4 * 1000 * 400 / 1e9)


def test_long_batch_in_the_warm_up_does_not_make_the_rest_look_fast() -> None:
    rows = [Row({}, None, tokens=length, length=length) for length in (10, 400) for _ in range(16)]
    run = ran(SYSTEMS["ours"], "sft", (0.0, 0.0), (9.0, 0.25), (9.0 + 8 * 400 + 16 * 10, 1.0))

    assert training.figures("sft", run, rows, weights=1, limit=1)["tokens_per_second"] == pytest.approx(1)


def test_two_epochs_of_pairs_count_twice_and_the_reference_pass_once() -> None:
    rows = [Row({}, None, tokens=100, length=80) for _ in range(32)]
    run = ran(SYSTEMS["ours"], "dpo", (20.0, 0.0), (30.0, 0.25), (54.0, 1.0), reference=[(10.0, 0.0), (18.0, 1.0)])

    found = training.figures("dpo", run, rows, weights=1, limit=1)

    assert EPOCHS["dpo"] == 2
    assert found["samples_per_second"] == pytest.approx(64 / (64 / 2 + 8))
    assert found["start_seconds"] == pytest.approx(54 - 40)


def test_first_quarter_of_a_reference_pass_is_warm_up_and_its_pairs_are_the_longest() -> None:
    rows = [Row({}, None, tokens=length, length=length) for length in (10, 400) for _ in range(16)]
    reference = [(0.0, 0.0), (100.0, 0.25), (100.0 + 8 * 400 + 16 * 10, 1.0)]

    assert training.reference_seconds(ran(SYSTEMS["ours"], "dpo", reference=reference), rows) == 16 * 400 + 16 * 10


def test_pairs_of_a_reference_pass_whose_order_is_unknown_count_alike() -> None:
    rows = [Row({}, None, tokens=length, length=length) for length in (10, 400) for _ in range(16)]
    reference = [(0.0, 0.0), (100.0, 0.25), (400.0, 1.0)]

    assert training.reference_seconds(ran(SYSTEMS["trl-best"], "dpo", reference=reference), rows) == 400


def test_system_that_shows_no_steps_gets_no_figure(caplog: pytest.LogCaptureFixture) -> None:
    assert training.figures("sft", ran(SYSTEMS["trl"], "sft"), [Row({}, None, 1, 1)] * 8, weights=1, limit=1) == {}
    assert "saw no progress" in caplog.text


def test_command_of_the_user_gets_the_values_of_the_task() -> None:
    system = system_of_user("mine=train {stage} --data={data} -b {batch} 'two words' {unknown}")

    assert system.name == "mine"
    assert system.command(TASK) == ["train", "sft", "--data=data/train.jsonl", "-b", "8", "two words", "{unknown}"]


@pytest.mark.parametrize("stage", EPOCHS)
def test_this_project_trains_on_every_record_that_the_others_get(stage: str) -> None:
    _, _, _, path, *words = our_command(replace(TASK, stage=stage))
    data = load_config(path, words[1::2]).values.data

    assert (data.validation_ratio, data.test_ratio) == (0, 0)


@pytest.mark.parametrize("command", [
    ("--against", "train {data}"),
    ("--against", "mine=train"),
    ("--steps", "3"),
    ("--systems",),
    ("--paste", "README.md"),
    ("--systems", "ours", "--steps", "1000", "--stages", "sft"),
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
            assert running.is_running()
        begin, seconds = time.monotonic(), running.seconds
        running.suspend()
        moved = watch()
        running.resume()
        counted, passed = running.seconds - seconds, time.monotonic() - begin
    assert moved <= 1
    assert counted <= passed - 0.5
    assert watch() == 0


@pytest.mark.parametrize("reference", ["reference, train pairs", "Computing reference log probs for train dataset"])
def test_progress_is_read_off_the_training_bar_and_the_reference_bar_alone(tmp_path: Path, reference: str) -> None:
    bars = [
        "Loading weights: 100%|###| 272/272 [00:00<00:00, 9 it/s]", f"{reference}:   0%|   | 0/12 [00:00<?, ?it/s]",
        f"{reference}: 100%|###| 12/12 [00:09<00:00, 1.2it/s]", "  0%|   | 0/4 [00:00<?, ?step/s]",
        " 50%|##  | 2/4 [00:03<00:03, 1.5s/step, loss 2.286]", "100%|####| 4/4 [00:06<00:00, 1.5s/step]",
    ]  # fmt: skip
    script = f"import time\nfor bar in {bars!r}:\n print(end='\\r' + bar, flush=True); time.sleep(0.4)"
    system = System("bars", lambda task: [sys.executable, "-c", script])

    with Running(system, replace(TASK, output=tmp_path / "a"), tmp_path) as running:
        while running.is_running():
            pass
    assert [share for _, share in running.steps] == [0, 0.5, 1]
    assert [share for _, share in running.reference] == [0, 1]
    assert running.reference[-1][0] - running.reference[0][0] == pytest.approx(0.4, abs=0.2)


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
    assert set(found["speed"]) == {f"{stage}, trl, {flags}" for stage in EPOCHS for flags in ("defaults", "best flags")}
    for pair in found["speed"].values():
        assert all(system["losses"] != [pair["loss_before"]] for system in pair["systems"])
        assert all(system["samples_per_second"] > 0 for system in pair["systems"])

    point = measure_point(Point(width=64, length=40, batch=2, records=20), tmp_path / "growth", limit=1e12)
    assert 0 < point["limit_share"] < 1
    assert point["tokens_per_record"] == pytest.approx(40, rel=0.5)
    draw_growth({"batch": [point]}, tmp_path / "growth.png")
    assert "| batch | 2 records per batch | " in growth_table({"batch": [point]})[2]
    assert medians([{"s": 3.0}, {"s": 9.0}, {"s": 1.0}]) == {"s": 3.0}

    rows = [{"prompt": f"say red {number}", "completion": "red"} for number in range(900)]
    data = write_jsonl(tmp_path / "red.jsonl", rows)
    assert training.main(["--model", str(tiny_llama), "--parts", "quality", "--systems", "ours", "--time-to-quality", "0.9", "--sft-data", str(data), "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    both = of_this_kind(tmp_path)
    assert both["speed"] == found["speed"], "what was measured before is kept"
    assert len(both["quality"]["systems"][0]["course"]) >= 1


def test_llama_cpp_without_its_wheel_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_server, "find_spec", lambda name: None)
    assert serving.main(["--config", "configs/demo.yaml", "--llama-cpp", "q8_0"]) == 2
    assert "--llama-cpp: found no xllamacpp" in capsys.readouterr().err


def test_every_other_server_stands_beside_ours_with_its_ratio() -> None:
    results = {name: {"tokens_per_second": speed, "ttft_seconds": {"p50": 1.0}, "lag": lag} for name, speed, lag in (
        ("engine", 30.0, 0.1), ("plain", 10.0, None), ("llama.cpp", 60.0, None)
    )}  # fmt: skip
    assert serving.table(results).splitlines() == [
        "| | engine | plain | ratio | llama.cpp | ratio |",
        "|---|---|---|---|---|---|",
        "| tokens_per_second  | 30 | 10 | 3.00 | 60 | 0.50 |",
        "| ttft_seconds p50 | 1 | 1 | 1.00 | 1 | 1.00 |",
        "| lag  | 0.1 |  |  |  |  |",
    ]
