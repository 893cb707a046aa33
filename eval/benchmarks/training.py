"""Measure training side by side: this project, `trl` with its defaults and with its best flags, and any other command.

Every system gets the same records and starts as its user would start it, the systems in turn. Its speed is the difference
of two runs of different length, so start and warm-up, which are reported apart, do not count. Writes training.json,
training.md and pictures to --out. Needs requirements.txt.

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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.benchmarks.training_growth import measure_growth
from eval.benchmarks.training_quality import held_out_losses, measure_quality
from eval.benchmarks.training_report import README, pasted, tables, write_pictures
from eval.benchmarks.training_systems import (
    BATCH,
    EPOCHS,
    LEARNING_RATE,
    SYSTEMS,
    Row,
    System,
    Task,
    read_rows,
    run_to_the_end,
    system_of_user,
    write_rows,
)
from scripts.common.errors import UserError, entry_point
from scripts.common.memory import parameter_count
from scripts.common.runtime import Machine, apply_machine, choose_machine, hardware, set_up_logging
from scripts.common.schema import Config

log = logging.getLogger(__name__)

HELD_OUT = 64
# Least work per weight and token: forward and the gradient of the activations; DPO also asks the reference once per pair.
FLOP = {"sft": 4.0, "dpo": 4.0 + 2.0 / EPOCHS["dpo"]}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["speed", "growth", "quality"], default=["speed"], help="what is measured; other parts of an earlier --out are kept (default: speed)")  # fmt: skip
    add("--stages", nargs="+", choices=["sft", "dpo"], default=["sft", "dpo"], help="default: both")
    add("--systems", nargs="*", choices=list(SYSTEMS), default=list(SYSTEMS), help="default: all")
    add("--against", action="append", default=[], metavar="NAME=COMMAND", help="another system; {stage}, {model}, {data}, {output}, {batch}, {epochs}, {max_length}, {learning_rate} stand for the task")  # fmt: skip
    add("--steps", nargs=2, type=int, default=[1, 3], metavar=("FEW", "MANY"), help="optimizer steps of the two runs (default: 1 3)")  # fmt: skip
    add("--rounds", type=int, default=1, help="times each run is repeated; medians count (default: %(default)s)")
    add("--model", default="models/smollm2-135m-instruct", help="base model (default: %(default)s)")
    add("--max-length", type=int, default=512, help="longer records are left out (default: %(default)s)")
    add("--sft-data", default="data/sft/sample_sft.jsonl", metavar="FILE", help="default: %(default)s")
    add("--dpo-data", default="data/dpo/sample_dpo.jsonl", metavar="FILE", help="default: %(default)s")
    add("--time-to-quality", type=float, default=0.75, metavar="SHARE", help="exact match on held-out records of --sft-data that the part `quality` trains for (default: %(default)s)")  # fmt: skip
    add("--quality-minutes", type=float, default=30, help="longest time per system for it (default: %(default)s)")
    add("--out", default="outputs/benchmarks/training", metavar="DIR", help="default: %(default)s")
    add("--paste", nargs="?", const=str(README), metavar="FILE", help="also put the tables into eval/benchmarks/README.md, or FILE")  # fmt: skip
    return parser


@dataclass
class Timed:
    """What the runs of one system took, by their number of steps."""

    system: System
    seconds: dict[int, list[float]] = field(default_factory=dict)
    peak_gib: float = 0.0
    adapter: Path | None = None


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


def steps_of(system: System, few: int, many: int) -> tuple[int, int]:
    """Return the lengths of a system's two runs; `many` is one of them for all, so that equal samples can be compared."""
    return (few, many) if system.factor == 1 else (many, many * system.factor)


def rows_of(stage: str, steps: int) -> int:
    """Return how many records fill these steps."""
    return steps * BATCH[stage] // EPOCHS[stage]


def time_systems(stage: str, systems: Sequence[System], rows: list[Row], arguments: argparse.Namespace, model: Path, work: Path) -> list[Timed]:  # fmt: skip
    """Run every system twice per round, in turn."""
    few, many = arguments.steps
    found = [Timed(system) for system in systems]
    for repeat in range(arguments.rounds):
        for which in (0, 1):
            for timed in found:
                steps = steps_of(timed.system, few, many)[which]
                data = write_rows(rows[: rows_of(stage, steps)], work / "data" / f"{stage}-{steps}")
                output = work / timed.system.folder / f"{stage}-{steps}-{repeat}"
                task = Task(stage, model, data, output, BATCH[stage], EPOCHS[stage], arguments.max_length, LEARNING_RATE[stage])  # fmt: skip
                log.info("%s, %s: %d steps", stage, timed.system.name, steps)
                seconds, peak = run_to_the_end(timed.system, task, work)
                log.info("    %.1f s, %.1f GiB", seconds, peak)
                timed.seconds.setdefault(steps, []).append(seconds)
                timed.peak_gib = max(timed.peak_gib, peak)
                if steps == many:
                    timed.adapter = output
    return found


def figures(
    stage: str, timed: Timed, rows: list[Row], losses: dict[str, float], model: Path, limit: float
) -> dict[str, Any]:
    """Turn the seconds of two runs into speed, start-up and share of the machine."""
    (short, few), (long, many) = sorted((steps, statistics.median(took)) for steps, took in timed.seconds.items())
    samples = [rows_of(stage, steps) * EPOCHS[stage] for steps in (short, long)]
    tokens = sum(row.tokens for row in rows[rows_of(stage, short) : rows_of(stage, long)]) * EPOCHS[stage]
    found: dict[str, Any] = {
        "system": timed.system.name, "steps": [short, long], "seconds": [few, many], "peak_memory_gib": timed.peak_gib,
        "loss": losses.get(timed.system.name),
    }  # fmt: skip
    if many <= few:
        log.warning(
            "%s, %s: the longer run was not slower, so its speed is unknown; raise --steps", stage, timed.system.name
        )
        return found
    per_sample = (many - few) / (samples[1] - samples[0])
    tokens_per_second = tokens / (many - few)
    start = few - per_sample * samples[0]
    return found | {
        "samples_per_second": 1 / per_sample,
        "tokens_per_second": tokens_per_second,
        "limit_share": FLOP[stage] * parameter_count(model) * tokens_per_second / limit,
        "start_seconds": start,
        "minutes_for_1000": (start + 1000 * per_sample) / 60,
    }


def enough_rows(stage: str, systems: list[System], arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[Row], list[Row]]:  # fmt: skip
    """Read what the longest run trains on, and records that no run sees."""
    rows = read_rows(stage, getattr(arguments, f"{stage}_data"), tokenizer, arguments.max_length)
    needed = max(rows_of(stage, steps) for system in systems for steps in steps_of(system, *arguments.steps))
    if len(rows) <= needed:
        raise UserError(
            f"--{stage}-data: found {len(rows)} records of at most {arguments.max_length} tokens, wanted {needed} to train on "
            "and some to hold out. Lower --steps or give more records."
        )
    return rows[:needed], rows[needed : needed + HELD_OUT]


def measure_speed(arguments: argparse.Namespace, systems: list[System], model: Path, tokenizer: Any, machine: Machine, work: Path) -> dict[str, Any]:  # fmt: skip
    """Time all systems in all stages, and score what they learnt."""
    from scripts.common.modeling import load_base

    taking_part = {stage: [system for system in systems if stage in system.stages] for stage in arguments.stages}
    taking_part = {stage: some for stage, some in taking_part.items() if some}
    rows = {stage: enough_rows(stage, some, arguments, tokenizer) for stage, some in taking_part.items()}
    limit = matrix_limit(machine)
    found: dict[str, Any] = {"matrix_tflops": limit / 1e12, "steps": arguments.steps, "rounds": arguments.rounds}
    for stage, (train, held_out) in rows.items():
        timed = time_systems(stage, taking_part[stage], train, arguments, model, work)
        adapters = {each.system.name: each.adapter for each in timed if each.adapter}
        losses = held_out_losses(stage, load_base(model, Config(), machine), tokenizer, held_out, adapters)
        found[stage] = {
            "batch": BATCH[stage], "samples": rows_of(stage, arguments.steps[1]) * EPOCHS[stage],
            "held_out": len(held_out), "loss_before": losses["base"],
            "systems": [figures(stage, each, train, losses, model, limit) for each in timed],
        }  # fmt: skip
    return found


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for and write what was found."""
    arguments = build_parser().parse_args(argv)
    few, many = arguments.steps
    if not 0 < few < many or arguments.rounds < 1:
        raise UserError(
            f"--steps {few} {many}: wanted two numbers above 0, the larger one last, and at least one round."
        )
    systems = [*(SYSTEMS[name] for name in arguments.systems), *map(system_of_user, arguments.against)]
    if not systems:
        raise UserError("--systems: nothing to measure. Name at least one system, or give a command with --against.")
    if arguments.paste:
        pasted(Path(arguments.paste), "")  # what is wrong with it is better known before than after
    set_up_logging()

    from mlflow import MlflowClient

    from scripts.common.modeling import find_model, load_tokenizer

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
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for part in arguments.parts:
        if part == "speed":
            measured = measure_speed(arguments, systems, model, tokenizer, machine, work)
        elif part == "growth":
            measured = {"axes": measure_growth(work)}
        else:
            measured = measure_quality(arguments, systems, model, tokenizer, machine, work)
        found[part] = about | measured
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    text = "\n".join(tables(found))
    (out / "training.md").write_text(text + "\n", encoding="utf-8")
    write_pictures(found, out)
    if arguments.paste:
        Path(arguments.paste).write_text(pasted(Path(arguments.paste), text), encoding="utf-8")
    sys.stdout.write(text + "\n")
    log.info("written to %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
