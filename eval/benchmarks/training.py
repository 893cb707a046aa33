"""Measure training side by side: this project, `trl` with its defaults and with its best flags, and any other command.

Every system gets the same records and starts as its user would start it. Each peer runs beside this project: they take turns
step by step, so that a machine whose speed drifts slows both alike. Start and warm-up, which are reported apart, do not
count as speed. Writes training.json, training.md and pictures to --out. Needs requirements.txt.

    python -m eval.benchmarks.training --parts speed growth
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.benchmarks.training_growth import measure_growth
from eval.benchmarks.training_quality import held_out_losses, measure_quality
from eval.benchmarks.training_report import README, markers, pasted, tables, write_pictures
from eval.benchmarks.training_systems import (
    BATCH,
    EPOCHS,
    FLOP,
    LEARNING_RATE,
    SYSTEMS,
    WARM_UP,
    Row,
    Running,
    System,
    Task,
    read_rows,
    side_by_side,
    system_of_user,
    write_rows,
)
from scripts.common.errors import UserError, entry_point
from scripts.common.machine import Machine, apply_machine, choose_machine, hardware, kind_of_processor
from scripts.common.run import set_up_logging
from scripts.common.schema import Config
from scripts.model.memory import parameter_count
from scripts.training.reference_logps import LOGPS_FOLDER

log = logging.getLogger(__name__)

HELD_OUT = 64
FEWEST_STEPS = 4  # of which the first is the warm-up


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["speed", "growth", "quality"], default=["speed"], help="what is measured; what an earlier run left in --out about other parts and peers is kept (default: speed)")  # fmt: skip
    add("--stages", nargs="+", choices=["sft", "dpo"], default=["sft", "dpo"], help="default: both")
    add("--systems", nargs="*", choices=list(SYSTEMS), default=list(SYSTEMS), help="default: all")
    add("--against", action="append", default=[], metavar="NAME=COMMAND", help="another system; {stage}, {model}, {data}, {output}, {batch}, {epochs}, {max_length}, {learning_rate}, {seed} stand for the task")  # fmt: skip
    add("--steps", type=int, default=8, help="optimizer steps of a run (default: %(default)s)")
    add("--rounds", type=int, default=1, help="times each run is repeated, in turns; medians count (default: %(default)s)")  # fmt: skip
    add("--model", default="models/smollm2-135m-instruct", help="base model (default: %(default)s)")
    add("--max-length", type=int, default=512, help="longer records are left out (default: %(default)s)")
    add("--sft-data", default="data/sft/sample_sft.jsonl", metavar="FILE", help="default: %(default)s")
    add("--dpo-data", default="data/dpo/sample_dpo.jsonl", metavar="FILE", help="default: %(default)s")
    add("--time-to-quality", type=float, default=0.75, metavar="SHARE", help="exact match on held-out records of --sft-data that the part `quality` trains for (default: %(default)s)")  # fmt: skip
    add("--quality-minutes", type=float, default=30, help="longest time per system for it (default: %(default)s)")
    add("--out", default="outputs/benchmarks/training", metavar="DIR", help="default: %(default)s")
    add("--paste", nargs="?", const=str(README), metavar="FILE", help="also put the tables into eval/benchmarks/README.md, or FILE, where those of this kind of processor stand")  # fmt: skip
    return parser


def kind_of_machine() -> str:
    """Return the machines whose figures stand together: those with this GPU, or with this kind of processor."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else kind_of_processor()


def matrix_limit(machine: Machine) -> float:
    """Return the FLOP per second of a large matrix product in the type the base weights get."""
    import torch

    size = 8192 if machine.device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=machine.device).to(machine.dtype) for _ in range(2))
    best, end = math.inf, time.monotonic() + 3
    while time.monotonic() < end:
        begin = time.monotonic()
        left @ right
        if machine.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - begin)
    return 2 * size**3 / best


def rows_of(stage: str, steps: int) -> int:
    """Return how many records fill these steps."""
    return steps * BATCH[stage] // EPOCHS[stage]


def run_in_turns(stage: str, pair: Sequence[System], rows: list[Row], arguments: argparse.Namespace, model: Path, work: Path) -> list[list[Running]]:  # fmt: skip
    """Run systems side by side, once per round; return the runs of each system."""
    data = write_rows(rows, work / "data" / stage)
    found = []
    for seed in range(arguments.rounds):
        log.info("%s, %s: round %d", stage, " beside ".join(system.name for system in pair), seed + 1)
        tasks = [
            Task(stage, model, data, work / system.folder / f"{stage}-{pair[-1].folder}-{seed}", BATCH[stage], EPOCHS[stage], arguments.max_length, LEARNING_RATE[stage], seed)
            for system in pair
        ]  # fmt: skip
        for system in pair:  # each round asks its reference
            shutil.rmtree(work / system.folder / LOGPS_FOLDER, ignore_errors=True)
        found.append(side_by_side(pair, tasks, work))
        for run in found[-1]:
            log.info("    %s: %.1f s, %.1f GiB", run.system.name, run.seconds, run.peak_bytes / 2**30)
    return [list(runs) for runs in zip(*found, strict=True)]


def extrapolated(moments: Sequence[tuple[float, float]], tokens: Sequence[int] | None) -> float | None:
    """Return what all of it would take at the pace after the first quarter, which warms up; None where no more was seen.

    `tokens` are those of each record in the order of work; without them the records count alike.
    """
    counted = [moment for moment in moments if moment[1] >= WARM_UP]
    if len(counted) < 2:
        return None
    (begin, share), (end, _) = counted[0], counted[-1]
    left = sum(tokens[round(share * len(tokens)) :]) / sum(tokens) if tokens else 1 - share
    return (end - begin) / left


def reference_seconds(run: Running, rows: list[Row]) -> float:
    """Return what a reference pass takes; this project's begins with the longest pairs."""
    longest_first = sorted(rows, key=lambda row: row.length, reverse=True) if run.system.order else []
    found = extrapolated(run.reference, [row.tokens for row in longest_first])
    if found is None:
        return run.reference[-1][0] - run.reference[0][0] if run.reference else 0.0
    return found


def figures(stage: str, run: Running, rows: list[Row], weights: int, limit: float) -> dict[str, float]:
    """Turn the moments of one run's steps into speed, start-up and share of the machine; empty where it showed no steps."""
    order = run.system.order(stage, rows, run.task.seed) if run.system.order else []
    steps = extrapolated(run.steps, [rows[index].tokens for index in order])
    if steps is None:
        log.warning("%s, %s: saw no progress after the warm-up, so its speed is unknown", stage, run.system.name)
        return {}
    samples = len(rows) * EPOCHS[stage]
    whole = sum(row.tokens for row in rows) * EPOCHS[stage]
    training = steps + reference_seconds(run, rows)
    start = run.steps[-1][0] - training
    return {
        "samples_per_second": samples / training,
        "tokens_per_second": whole / training,
        "limit_share": FLOP[stage] * weights * whole / training / limit,
        "start_seconds": start,
        "minutes_for_1000": (start + 1000 * training / samples) / 60,
    }


def summary(stage: str, runs: list[Running], rows: list[Row], losses: dict[str, float], weights: int, limit: float) -> dict[str, Any]:  # fmt: skip
    """Return the medians of one system's rounds, and the loss of each."""
    rounds = [figures(stage, run, rows, weights, limit) for run in runs]
    known = [losses[key] for run in runs if (key := str(run.task.output)) in losses]
    return {
        "system": runs[0].system.name,
        "peak_memory_gib": max(run.peak_bytes for run in runs) / 2**30,
        "losses": known,
        "moments": [run.steps for run in runs],
        "reference_moments": [run.reference for run in runs],
    } | ({key: statistics.median(each[key] for each in rounds) for key in rounds[0]} if all(rounds) else {})


def enough_rows(stage: str, arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Read what the runs train on, and records that no run sees."""
    rows = read_rows(stage, getattr(arguments, f"{stage}_data"), tokenizer, arguments.max_length)
    needed = rows_of(stage, arguments.steps)
    if len(rows) <= needed:
        raise UserError(
            f"--{stage}-data: found {len(rows)} records of at most {arguments.max_length} tokens, wanted {needed} to train on "
            "and some to hold out. Lower --steps or give more records."
        )
    return rows[:needed], rows[needed : needed + HELD_OUT]


def measure_speed(arguments: argparse.Namespace, systems: list[System], model: Path, tokenizer: Any, machine: Machine, work: Path) -> dict[str, Any]:  # fmt: skip
    """Time the first system beside each of the others in all stages, and score what they learnt."""
    from scripts.model.base import load_base

    taking_part = {stage: [system for system in systems if stage in system.stages] for stage in arguments.stages}
    taking_part = {stage: some for stage, some in taking_part.items() if some}
    rows = {stage: enough_rows(stage, arguments, tokenizer) for stage in taking_part}
    limit, weights = matrix_limit(machine), parameter_count(model)
    found: dict[str, Any] = {}
    for stage, (train, held_out) in rows.items():
        first, *others = taking_part[stage]
        pairs = [[first, other] for other in others] or [[first]]
        measured = [run_in_turns(stage, pair, train, arguments, model, work) for pair in pairs]
        adapters = {str(run.task.output): run.task.output for pair in measured for runs in pair for run in runs}
        losses = held_out_losses(stage, load_base(model, Config(), machine), tokenizer, held_out, adapters)
        for pair, runs_of_each in zip(pairs, measured, strict=True):
            found[f"{stage}, {pair[-1].name}"] = {
                "stage": stage, "matrix_tflops": limit / 1e12, "steps": arguments.steps, "rounds": arguments.rounds,
                "batch": BATCH[stage], "samples": len(train) * EPOCHS[stage],
                "held_out": len(held_out), "loss_before": losses["base"],
                "systems": [summary(stage, runs, train, losses, weights, limit) for runs in runs_of_each],
            }  # fmt: skip
    return found


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for and write what was found."""
    arguments = build_parser().parse_args(argv)
    if arguments.steps < FEWEST_STEPS or arguments.rounds < 1:
        raise UserError(f"--steps {arguments.steps}: wanted at least {FEWEST_STEPS}, and at least one round.")
    systems = [*(SYSTEMS[name] for name in arguments.systems), *map(system_of_user, arguments.against)]
    if not systems:
        raise UserError("--systems: nothing to measure. Name at least one system, or give a command with --against.")
    kind = kind_of_machine()
    if arguments.paste:
        pasted(Path(arguments.paste), "", *markers(kind))  # what is wrong with it is better known before than after
    set_up_logging()

    from mlflow import MlflowClient

    from scripts.model.base import load_tokenizer
    from scripts.model.find import find_model

    model = find_model(arguments.model).resolve()
    machine, tokenizer = choose_machine(Config()), load_tokenizer(model)
    apply_machine(machine)
    out = Path(arguments.out).resolve()
    file, work = out / "training.json", out / "work"
    shutil.rmtree(work, ignore_errors=True)
    store = work / SYSTEMS["ours"].folder / "mlflow.db"
    store.parent.mkdir(parents=True)
    MlflowClient(f"sqlite:///{store}").search_experiments()  # a store is made once in a user's life, and takes seconds
    about = {"hardware": hardware(), "date": datetime.now(UTC).date().isoformat(), "model": model.name}
    of_kinds = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = of_kinds.setdefault(kind, {})
    for part in arguments.parts:
        if part == "speed":
            pairs = measure_speed(arguments, systems, model, tokenizer, machine, work)
            found[part] = found.get(part, {}) | {name: about | pair for name, pair in pairs.items()}
        elif part == "growth":
            found[part] = about | {"axes": measure_growth(work, arguments.rounds, lambda: matrix_limit(machine))}
        else:
            found[part] = about | measure_quality(arguments, systems, model, tokenizer, machine, work)
        file.write_text(json.dumps(of_kinds, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    text = "\n".join(tables(found))
    (out / "training.md").write_text(text + "\n", encoding="utf-8")
    write_pictures(found, out)
    if arguments.paste:
        Path(arguments.paste).write_text(pasted(Path(arguments.paste), text, *markers(kind)), encoding="utf-8")
    sys.stdout.write(text + "\n")
    log.info("written to %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
