"""How the cost of this project's SFT grows with model size, sequence length, batch and dataset size."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.benchmarks.training_systems import FLOP, LEARNING_RATE, SYSTEMS, Task, our_command, run_to_the_end
from scripts.common.artifacts import read_manifest
from scripts.model.memory import parameter_count

log = logging.getLogger(__name__)

STEPS = 12  # of which the first only warms up
LAYERS, HEAD = 8, 64


@dataclass(frozen=True)
class Point:
    """One run: a Llama with random weights of this width, on made-up records of this length."""

    width: int = 512
    length: int = 256
    batch: int = 4
    records: int = 100


AXES = {
    "model size": [Point(width=width) for width in (256, 512, 768)],
    "sequence length": [Point(length=length) for length in (128, 256, 512, 1024)],
    "batch": [Point(batch=batch) for batch in (2, 4, 8)],
    "dataset size": [Point(records=records) for records in (100, 1000, 10_000)],
}


def save_shape(width: int, folder: Path) -> Path:
    """Save a model with random weights and the proportions of a Llama."""
    from scripts.model.tiny import save_tiny_model

    if not folder.is_dir():
        save_tiny_model(
            folder, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS, head_dim=HEAD,
            num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD // 2 or 1, max_position_embeddings=4096,
        )  # fmt: skip
    return folder


def write_made_up_records(point: Point, path: Path, tokenizer: Any) -> None:
    """Write records of one length, half prompt and half answer, without white space a template would strip."""
    word = " the"
    per_word = len(tokenizer.encode(10 * word, add_special_tokens=False)) / 10
    half = word * round(point.length / 2 / per_word)
    with path.open("w", encoding="utf-8") as file:
        for number in range(point.records):
            file.write(json.dumps({"instruction": f"{number}{half}", "output": half.strip()}) + "\n")


def measure_point(point: Point, work: Path, limit: float) -> dict[str, float]:
    """Train a few steps and read from the manifest what they took; `limit`: what the machine can do, in FLOP per second."""
    from scripts.model.base import load_tokenizer

    model = save_shape(point.width, work / f"width-{point.width}")
    folder = work / "-".join(map(str, vars(point).values()))
    folder.mkdir(parents=True, exist_ok=True)
    write_made_up_records(point, folder / "train.jsonl", load_tokenizer(model))
    task = Task("sft", model, folder / "train.jsonl", work / folder.name / "adapter", point.batch, 1, 2 * point.length + 64, LEARNING_RATE["sft"])  # fmt: skip
    command = our_command(task, **{"trainer.max_steps": STEPS, "trainer.save_strategy": "no"})
    seconds, peak = run_to_the_end(replace(SYSTEMS["ours"], name=f"growth {folder.name}"), task, work, command)
    metrics = read_manifest(task.output, verify=False).metrics
    per_step, parameters = metrics["train_tokens"] / metrics["steps"], parameter_count(model)
    return {
        **vars(point),
        "parameters": parameters,
        "limit_share": FLOP["sft"] * parameters * metrics["tokens_per_second"] / limit,
        "tokens_per_record": per_step / point.batch,
        "seconds_per_step": per_step / metrics["tokens_per_second"],
        "seconds_of_the_whole_run": seconds,
        "peak_memory_gib": peak,
    }


def measure_growth(work: Path, rounds: int, limit: Callable[[], float]) -> dict[str, list[dict[str, float]]]:
    """Measure every point of every axis once per round, each after the limit as it is then; return the medians."""
    found: dict[Point, list[dict[str, float]]] = {point: [] for axis in AXES.values() for point in axis}
    for number in range(1, rounds + 1):
        for point, of_point in found.items():
            log.info("growth, round %d of %d: %s", number, rounds, point)
            of_point.append(measure_point(point, work / f"growth-{number}", limit()))
    return {name: [medians(found[point]) for point in axis] for name, axis in AXES.items()}


def medians(of_rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: statistics.median(each[key] for each in of_rounds) for key in of_rounds[0]}


# What stands on each axis, its unit, and which cost is drawn.
DRAWN = {
    "model size": ("parameters", "parameters", "seconds_per_step"),
    "sequence length": ("tokens_per_record", "tokens per record", "seconds_per_step"),
    "batch": ("batch", "records per batch", "seconds_per_step"),
    "dataset size": ("records", "records in the file", "seconds_of_the_whole_run"),
}


def draw_growth(growth: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw time and memory over each axis, both axes from zero so that a line through the origin means proportional."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(growth), figsize=(4.5 * len(growth), 3.6), squeeze=False, layout="constrained"
    )
    for left, (name, points) in zip(axes[0], growth.items(), strict=True):
        key, unit, cost = DRAWN[name]
        right = left.twinx()
        x = [point[key] for point in points]
        left.plot(x, [point[cost] for point in points], "o-", color="tab:blue")
        right.plot(x, [point["peak_memory_gib"] for point in points], "s--", color="tab:orange")
        left.set(title=name, xlabel=unit, xlim=(0, None), ylim=(0, None))
        left.set_ylabel(cost.replace("_", " "), color="tab:blue")
        right.set(ylim=(0, None))
        right.set_ylabel("peak memory in GiB", color="tab:orange")
        left.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def growth_table(growth: dict[str, list[dict[str, float]]]) -> list[str]:
    """Render the points as rows."""
    rows = [
        "| growing | to | seconds per step | of the limit | whole run, s | peak memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, points in growth.items():
        key, unit, _ = DRAWN[name]
        rows += [
            f"| {name} | {point[key]:,.0f} {unit} | {point['seconds_per_step']:.2f} | {point['limit_share']:.0%} "
            f"| {point['seconds_of_the_whole_run']:.0f} | {point['peak_memory_gib']:.1f} |"
            for point in points
        ]
    return rows
