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
from scripts.common.machine import Machine
from scripts.common.run import Run
from scripts.training.start import Start

log = logging.getLogger(__name__)

# What decides a result; a run may resume with another tracking store, number of threads or version of a package, which
# round otherwise at most.
DECIDING_SECTIONS = ("base_model_id", "base_model_revision", "seed", "quantization", "lora", "data")
# And what decides its batches and its arithmetic. On a CPU the fast path takes a pair as one row, so pairs sort otherwise.
DECIDING_PERFORMANCE = ("device", "dtype", "group_by_length", "fast_path")
DTYPE_NAMES = {2: "bf16", 4: "fp32"}  # by bytes
HASHES = ("config", "data", "base", "parent")


@dataclass
class Resumption:
    """Where a run starts: from which checkpoint, in which MLflow run, with what measured before."""

    checkpoint: str | None = None
    mlflow_run_id: str | None = None
    loss_before: float | None = None


def identity_of(run: Run, machine: Machine, start: Start, datasets: Sequence[DatasetFacts]) -> dict[str, Any]:
    """Return what decides a run's result, part by part, so that a difference can be named."""
    config = run.values.model_dump(mode="json")
    chosen = {"device": machine.device, "dtype": DTYPE_NAMES[machine.dtype.itemsize]}
    return _identity(run.stage, config, datasets, start.fingerprint, start.parent, chosen)


def _identity(
    stage: str, config: dict[str, Any], datasets: Sequence[DatasetFacts], fingerprint: str, parent: Parent | None,
    chosen: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """`chosen` is what `auto` stands for on a machine."""
    decisive = {key: config[key] for key in DECIDING_SECTIONS} | {stage: config[stage]}
    performance = {key: value for key, value in config.get("performance", {}).items() if key in DECIDING_PERFORMANCE}
    return {
        "config": sha256_json(decisive),
        "data": sha256_json([entry.sha256 for entry in datasets]),
        "base": fingerprint,
        "parent": sha256_json(parent and parent.model_dump()),
        "performance": {key: chosen[key] if value == "auto" else value for key, value in performance.items()},
        "settings": decisive,
    }


def is_finished(run: Run, machine: Machine, start: Start, datasets: Sequence[DatasetFacts]) -> bool:
    """Tell whether the output folder came from the very same run, so that nothing is left to resume."""
    wanted = identity_of(run, machine, start, datasets)
    if not broadcast_from_rank_0(lambda: _came_from(run, wanted)):
        return False
    log.info("%s is finished already; nothing to resume", run.output_dir)
    return True


def _came_from(run: Run, wanted: dict[str, Any]) -> bool:
    if not (run.output_dir / MANIFEST).is_file():
        return False
    done = read_manifest(run.output_dir, stages=(run.stage,))
    chosen = {key: wanted["performance"][key] for key in ("device", "dtype")}  # a manifest knows `auto` only
    return not _changes(
        _identity(run.stage, done.config, done.datasets, done.base_model.fingerprint, done.parent, chosen), wanted
    )


def _changes(before: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Say in what an earlier run was another one; what it did not note yet, as earlier versions, cannot differ."""
    changes: list[str] = []
    for part in HASHES:
        if before[part] != wanted[part]:
            if part == "config" and "settings" in before:  # keys that are new since then do not make it another run
                changes += differences(before["settings"], wanted["settings"])
            else:
                changes.append(f"{part}: was {before[part][:16]}…, is {wanted[part][:16]}…")
    return changes + differences(before.get("performance", {}), wanted["performance"], "performance.")


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Name the keys of the earlier settings that have another value now, by their dotted names."""
    changes: list[str] = []
    for key, old in before.items():
        new, name = now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(dict.fromkeys(new) | old, new, f"{name}.")
        elif old != new:
            changes.append(f"{name}: was {_shown(old)}, is {_shown(new)}")
    return changes


def _shown(value: Any) -> str:
    return value[:80] if isinstance(value, str) else json.dumps(value, ensure_ascii=False)[:80]


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


def find_resumption(run_dir: Path, wanted: dict[str, Any], resume: bool, processes: int = 1) -> Resumption:
    """Decide where to start; a fresh start clears what an interrupted run left.

    Raises: UserError when asked to resume a run whose data, config or base has changed.
    """
    state_file, checkpoints = run_dir / "state.json", run_dir / "checkpoints"
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else None
    last = last_whole_checkpoint(checkpoints)
    if not (resume and state):  # what an earlier run moved out of its base is not what this one moves
        shutil.rmtree(run_dir / "initial_adapter", ignore_errors=True)
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
    changed = _changes(state["identity"], wanted)
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
    run_dir: Path,
    wanted: dict[str, Any],
    mlflow_run_id: str | None,
    loss_before: float | None,
    processes: int = 1,
    template_date: str | None = None,
) -> None:
    """Note what a later --resume needs to know."""
    state = {
        "identity": wanted,
        "mlflow_run_id": mlflow_run_id,
        "loss_before": loss_before,
        "processes": processes,
        "template_date": template_date,
    }
    write_text_durably(run_dir / "state.json", json.dumps(state, indent=1) + "\n")
