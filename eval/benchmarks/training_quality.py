"""What the trained adapters are worth: held-out loss after equal samples, and the time until answers are exact enough."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.training_systems import (
    BATCH,
    BETA,
    LEARNING_RATE,
    Row,
    Running,
    System,
    Task,
    read_rows,
    write_rows,
)
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config

log = logging.getLogger(__name__)

HELD_OUT = 200  # one standard error is 3 points at 0.75
MAX_NEW_TOKENS = 32
SAVE_STEPS = 50


def held_out_losses(
    stage: str, base: Any, tokenizer: Any, rows: list[Row], adapters: dict[str, Path]
) -> dict[str, float]:
    """Return each adapter's loss on records that no system has seen, and that of the base as `base`."""
    import torch

    from scripts.model.adapter import load_adapter
    from scripts.model.scoring import mean_loss, score_answers

    def log_probs() -> Any:
        sides = [row.rendered.side(ids) for row in rows for ids in (row.rendered.chosen_ids, row.rendered.rejected_ids)]
        scores = torch.tensor([score.logps for score in score_answers(base, sides, tokenizer.pad_token_id)])
        return scores[::2] - scores[1::2]

    reference = log_probs() if stage == "dpo" else None

    def loss() -> float:
        if stage == "sft":
            return mean_loss(score_answers(base, [row.rendered for row in rows], tokenizer.pad_token_id))
        return float(-torch.nn.functional.logsigmoid(BETA * (log_probs() - reference)).mean())

    found = {"base": loss()}
    for name, adapter in adapters.items():
        if not (adapter / "adapter_model.safetensors").is_file():
            log.warning("%s left no adapter in %s, so its loss is unknown", name, adapter)
            continue
        wrapped = load_adapter(base, adapter)  # puts its layers into the base itself, until they are unloaded
        found[name] = loss()
        wrapped.unload()
    return found


def exact_match(model: Any, tokenizer: Any, rows: Sequence[Row], adapter: Path) -> float:
    """Return the share of records that an adapter answers word for word."""
    from scripts.model.adapter import load_adapter
    from scripts.model.generation import generate_answers

    wrapped = load_adapter(model, adapter)
    try:
        prompts = [row.rendered.input_ids[: -row.rendered.trained_tokens] for row in rows]
        answers = generate_answers(wrapped, tokenizer, prompts, MAX_NEW_TOKENS, batch_size=32)
    finally:
        wrapped.unload()
    wanted = [row.fields["completion"][0]["content"].strip() for row in rows]
    hits: list[bool] = [answer.text == text for answer, text in zip(answers, wanted, strict=True)]
    return sum(hits) / len(hits)


def whole_checkpoints(output: Path) -> list[Path]:
    """Return a run's checkpoints that are written to their end, oldest first: TRL's lie in `output`, ours in `output`.run."""
    found = []
    for state in output.parent.glob(f"{output.name}*/**/checkpoint-*/trainer_state.json"):  # the Trainer writes it last
        try:
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (ValueError, FileNotFoundError):
            continue
    return [path for _, path in sorted(found)]


def time_to_quality(
    system: System, task: Task, work: Path, level: float, minutes: float, score: Callable[[Path], float]
) -> dict[str, Any]:
    """Train until a checkpoint reaches the level; while one is scored, training and the clock stand still."""
    seen: list[dict[str, Any]] = []
    scored: set[str] = set()
    with Running(system, task, work) as running:
        alive = True
        while alive and running.seconds < 60 * minutes:
            alive = running.is_running()
            fresh = [path for path in whole_checkpoints(task.output) if path.name not in scored]
            if fresh:
                running.suspend()
                seconds, reached = running.seconds, score(fresh[-1])
                running.resume()
                scored |= {path.name for path in fresh}
                step = int(fresh[-1].name.rpartition("-")[2])
                seen.append({"seconds": seconds, "records": step * task.batch, "exact_match": reached})
                log.info("%s: %.0f s, %d steps: exact match %.3f", system.name, seconds, step, reached)
                if reached >= level:
                    break
        if not alive and (task.output / "adapter_config.json").is_file():
            seen.append({"seconds": running.seconds, "records": None, "exact_match": score(task.output)})
    hit = next((point for point in seen if point["exact_match"] >= level), None)
    return {"system": system.name, "seconds": hit["seconds"] if hit else None, "course": seen}


def measure_quality(arguments: argparse.Namespace, systems: Sequence[System], model: Path, tokenizer: Any, machine: Machine, work: Path) -> dict[str, Any]:  # fmt: skip
    """Let each system train for one epoch at most, until its checkpoints reach the level."""
    from scripts.model.base import load_base

    rows = read_rows("sft", arguments.sft_data, tokenizer, arguments.max_length)
    if len(rows) < 2 * HELD_OUT:
        raise UserError(
            f"--sft-data: found {len(rows)} records, wanted at least {2 * HELD_OUT} for the part `quality`."
        )
    held_out = rows[:HELD_OUT]
    data = write_rows(rows[HELD_OUT:], work / "data" / "quality")
    base = load_base(model, Config(), machine)
    courses = []
    for system in systems:
        output = work / system.folder / "quality"
        task = Task(
            "sft",
            model,
            data,
            output,
            BATCH["sft"],
            1,
            arguments.max_length,
            LEARNING_RATE["sft"],
            save_steps=SAVE_STEPS,
        )

        def score(adapter: Path) -> float:
            return exact_match(base, tokenizer, held_out, adapter)

        courses.append(time_to_quality(system, task, work, arguments.time_to_quality, arguments.quality_minutes, score))
    return {
        "data": str(arguments.sft_data), "level": arguments.time_to_quality, "minutes": arguments.quality_minutes,
        "held_out": HELD_OUT, "save_steps": SAVE_STEPS, "systems": courses,
    }  # fmt: skip
