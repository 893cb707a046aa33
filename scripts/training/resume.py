"""Where a training run starts: afresh, from a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.common.artifacts import MANIFEST, DatasetFacts, Parent, read_manifest, sha256_json, write_text_durably
from scripts.common.distributed import broadcast_from_rank_0
from scripts.common.errors import UserError
from scripts.common.run import Run
from scripts.training.start import Start

log = logging.getLogger(__name__)

# What decides a result; a run may resume with another tracking store or another number of threads.
DECIDING_SECTIONS = ("base_model_id", "base_model_revision", "seed", "quantization", "lora", "data")


@dataclass
class Resumption:
    """Where a run starts: from which checkpoint, in which MLflow run, with what measured before."""

    checkpoint: str | None = None
    mlflow_run_id: str | None = None
    loss_before: float | None = None


def identity_of(run: Run, start: Start, datasets: Sequence[DatasetFacts]) -> dict[str, str]:
    """Hash what decides a run's result, part by part, so that a difference can be named."""
    return _identity(run.stage, run.values.model_dump(mode="json"), datasets, start.fingerprint, start.parent)


def _identity(
    stage: str, config: dict[str, Any], datasets: Sequence[DatasetFacts], fingerprint: str, parent: Parent | None
) -> dict[str, str]:
    decisive = {key: config[key] for key in DECIDING_SECTIONS} | {stage: config[stage]}
    return {
        "config": sha256_json(decisive),
        "data": sha256_json([entry.sha256 for entry in datasets]),
        "base": fingerprint,
        "parent": sha256_json(parent and parent.model_dump()),
    }


def is_finished(run: Run, start: Start, datasets: Sequence[DatasetFacts]) -> bool:
    """Tell whether the output folder came from the very same run, so that nothing is left to resume."""
    wanted = identity_of(run, start, datasets)
    if not broadcast_from_rank_0(lambda: _came_from(run, wanted)):
        return False
    log.info("%s is finished already; nothing to resume", run.output_dir)
    return True


def _came_from(run: Run, wanted: dict[str, str]) -> bool:
    if not (run.output_dir / MANIFEST).is_file():
        return False
    done = read_manifest(run.output_dir, stages=(run.stage,))
    return _identity(run.stage, done.config, done.datasets, done.base_model.fingerprint, done.parent) == wanted


def last_whole_checkpoint(checkpoints: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, and remove newer ones that were not."""
    found = {int(folder.name.rpartition("-")[2]): folder for folder in checkpoints.glob("checkpoint-*")}
    for _, folder in sorted(found.items(), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
            return str(folder)
        except (FileNotFoundError, ValueError):
            log.warning("%s was interrupted while it was written and is removed", folder)
            shutil.rmtree(folder)
    return None


def find_resumption(run_dir: Path, wanted: dict[str, str], resume: bool, processes: int = 1) -> Resumption:
    """Decide where to start; a fresh start clears what an interrupted run left.

    Raises: UserError when asked to resume a run whose data, config or base has changed.
    """
    state_file, checkpoints = run_dir / "state.json", run_dir / "checkpoints"
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else None
    last = last_whole_checkpoint(checkpoints)
    if not resume:
        if last:
            log.warning(
                "starting over; an interrupted run had reached %s (--resume continues from it)", Path(last).name
            )
        shutil.rmtree(checkpoints, ignore_errors=True)
        state_file.unlink(missing_ok=True)  # this run's own follows; until then there is nothing to continue
        return Resumption(mlflow_run_id=state and state["mlflow_run_id"])
    if state is None:
        log.warning("--resume: nothing to resume in %s; starting at step 0", run_dir)
        return Resumption()
    changed = [
        f"{part}: was {state['identity'][part][:16]}…, is {value[:16]}…"
        for part, value in wanted.items()
        if state["identity"][part] != value
    ]
    if changed:
        raise UserError(
            f"--resume: this is not the run that was interrupted ({'; '.join(changed)}). "
            "Restore what was changed, or start over without --resume."
        )
    if (before := state.get("processes", 1)) != processes:
        raise UserError(
            f"--resume: the interrupted run had {before} processes, this one has {processes}, so its steps would "
            f"see other batches. Start {before}, or start over without --resume."
        )
    if last is None:
        log.warning("--resume: no checkpoint in %s yet; starting at step 0", checkpoints)
    return Resumption(last, state["mlflow_run_id"], state["loss_before"])


def write_state(
    run_dir: Path, wanted: dict[str, str], mlflow_run_id: str | None, loss_before: float | None, processes: int = 1
) -> None:
    """Note what a later --resume needs to know."""
    state = {
        "identity": wanted,
        "mlflow_run_id": mlflow_run_id,
        "loss_before": loss_before,
        "processes": processes,
    }
    write_text_durably(run_dir / "state.json", json.dumps(state, indent=1) + "\n")
