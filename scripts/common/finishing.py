"""How a training run ends: the adapter folder with manifest and curves, the tracker's last entries, the summary."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.common.artifacts import MANIFEST, artifact_sha256, portable_path, publish, write_manifest
from scripts.common.config import LoadedConfig
from scripts.common.deid_report import report_path
from scripts.common.modeling import merge_initialisation
from scripts.common.processes import largest, place
from scripts.common.records import DatasetFile, Split
from scripts.common.rendering import template_sha256, tokenizer_sha256
from scripts.common.runtime import is_main_process, peak_memory_gib
from scripts.common.stage import Origin
from scripts.common.tracking import Tracker
from scripts.common.training import ProgressAndTracking

log = logging.getLogger(__name__)


def dataset_entries(files: Sequence[DatasetFile], split: Split) -> list[dict[str, Any]]:
    """Describe the data for the manifest."""

    def count(records: Sequence[Any], file: DatasetFile) -> int:
        own = {record.source for record in file.records}
        return sum(record.source in own for record in records)

    return [
        {
            "path": portable_path(file.path),
            "sha256": file.sha256,
            "train": count(split.train, file),
            "validation": count(split.validation, file),
        }
        for file in files
    ]


def manifest_facts(
    config: LoadedConfig, origin: Origin, datasets: list[dict[str, Any]], run_id: str | None, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Collect what a manifest says beside the hashes of the files."""
    values = config.values
    return {
        "base_model": {
            "id": values.base_model_id,
            "revision": values.base_model_revision,
            "fingerprint": origin.fingerprint,
        },
        "tokenizer_sha256": tokenizer_sha256(origin.tokenizer),
        "chat_template_sha256": template_sha256(origin.tokenizer),
        "parent": origin.parent,
        "datasets": datasets,
        "split": {"seed": values.data.split_seed, "ratio": values.data.validation_ratio},
        "config": values.model_dump(mode="json"),
        "mlflow": {"run_id": run_id},
        "metrics": metrics,
    }


def draw_curves(history: list[dict[str, Any]], path: Path, stage: str) -> None:
    """Draw training and held-out loss, and for DPO the rewards, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, str, tuple[str, ...]]] = [("loss", "loss in nats", ("loss", "eval_loss"))]
    if any("rewards/margins" in entry for entry in history):
        panels.append(("rewards", "implicit reward", ("rewards/chosen", "rewards/rejected", "eval_rewards/margins")))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, unit, keys) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                label = key.replace("eval_", "held-out ") if key.startswith("eval_") else f"training {key}"
                axis.plot(*zip(*points, strict=True), label=label, marker="o" if key.startswith("eval_") else None)
        axis.set(title=f"{stage.upper()}: {title}", xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def log_inputs(tracker: Tracker, config: LoadedConfig, run_dir: Path, datasets: list[dict[str, Any]]) -> None:
    """Record config and data before the work starts."""
    tracker.log_params(flatten(config.values.model_dump(mode="json")))
    tracker.log_artifact(run_dir / "config.resolved.yaml")
    for entry in datasets:
        if report_path(entry["path"]).is_file():
            tracker.log_artifact(report_path(entry["path"]), "deid")
        for side in ("train", "validation"):
            tracker.log_dataset(entry["path"], entry["sha256"], side, entry[side])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def finish(
    trainer: Any,
    weights: dict[str, Any],
    tracker: Tracker,
    run_dir: Path,
    output_dir: str,
    stage: str,
    facts: dict[str, Any],
) -> None:
    """Write adapter, tokenizer, curves and manifest, put them in place of the old folder, and tell the tracker."""
    if not is_main_process():
        return
    part = run_dir / "finished"
    shutil.rmtree(part, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    # save_embedding_layers would ask the Hub whether the vocabulary was resized, and lose the run when that fails.
    model.save_pretrained(
        part,
        state_dict=weights,
        selected_adapters=["default"],
        save_embedding_layers=False,
        **merge_initialisation(model, run_dir),
    )
    (part / "README.md").unlink(missing_ok=True)  # PEFT's stub of a card says nothing true
    trainer.processing_class.save_pretrained(part)
    before = facts["metrics"]["held_out_loss_before"]
    start = [] if before is None else [{"step": 0, "eval_loss": before}]
    draw_curves(start + trainer.state.log_history, part / "curves.png", stage)
    manifest = write_manifest(part, stage, **facts)
    publish(part, output_dir)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    folder = Path(output_dir)
    tracker.log_metrics(
        {f"summary/{key}": value for key, value in facts["metrics"].items() if isinstance(value, int | float)}
    )
    tracker.set_tag("artifact_sha256", artifact_sha256(manifest))
    tracker.log_artifact(folder / "curves.png")
    tracker.log_artifact(folder / MANIFEST)
    if facts["config"]["tracking"]["log_adapter"]:
        tracker.log_artifact(folder, "adapter")


def summary_metrics(
    trainer: Any, progress: ProgressAndTracking, seconds: float, before: float | None
) -> dict[str, Any]:
    """Return the figures of a finished run that both stages report."""
    after = trainer.state.best_metric if trainer.args.load_best_model_at_end else None
    if after is None and before is not None:
        after = trainer.evaluate()["eval_loss"]
    return {
        "held_out_loss_before": before,
        "held_out_loss": after,
        "steps": trainer.state.global_step,
        "train_tokens": int(progress.tokens),
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "train_seconds": round(seconds, 1),
        "peak_memory_gib": round(largest(peak_memory_gib()), 2),  # of the process that holds most
        "processes": place()[1],
    }


def print_summary(
    stage: str, output_dir: str, config: LoadedConfig, metrics: dict[str, Any], next_command: str
) -> None:
    """Tell in a few lines what came out, where it is and what to do next."""
    before, after = metrics["held_out_loss_before"], metrics["held_out_loss"]
    store = config.values.tracking.mlflow_tracking_uri
    runs = f"open {store}" if store.startswith("http") else f'mlflow ui --port 5000 --backend-store-uri "{store}"'
    lines = [
        f"{stage} is done",
        "held-out loss  " + ("nothing was held out" if after is None else f"{before:.4f} → {after:.4f}"),
        f"speed          {metrics['tokens_per_second']:.0f} tokens/s, {metrics['steps']} steps, {metrics['train_seconds']:.0f} s",
        f"peak memory    {metrics['peak_memory_gib']:.1f} GiB",
        f"adapter        {output_dir}",
        f"MLflow         {runs}",
        f"next           {next_command}",
    ]
    log.info("%s", "\n  ".join(lines))
