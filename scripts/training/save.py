"""What a training run leaves behind: the adapter folder with manifest and curves, entries in MLflow, a summary."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.common.artifacts import MANIFEST, BaseModelFacts, DatasetFacts, Manifest, RunFacts, SplitFacts
from scripts.common.curves import PANELS, Curves, label, write_curves
from scripts.common.deid_report import report_path
from scripts.common.errors import UserError
from scripts.common.question import freeze_plan
from scripts.common.run import Run
from scripts.common.schema import Config
from scripts.common.stages import COMPARE, TRAINING_STAGES, TrainingStage, planned_stages
from scripts.common.tracking import Tracker
from scripts.model.adapter import merge_initialisation
from scripts.training.start import Start

log = logging.getLogger(__name__)

DECISIVE = ("base_model_id", "base_model_revision", "seed", "quantization", "lora", "data", "performance")


def draw_curves(curves: Curves, path: Path) -> None:
    """Draw training and held-out loss, and for DPO the rewards, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = curves.panels or PANELS[:1]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for key in panel.series:
            if points := curves.series.get(key):
                marker = "o" if key.startswith("eval_") else None
                axis.plot(*zip(*points, strict=True), label=label(key), marker=marker)
                axis.legend()
        axis.set(title=f"{curves.stage.upper()}: {panel.title}", xlabel="optimizer step", ylabel=panel.unit)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def log_inputs(tracker: Tracker, run: Run, datasets: Sequence[DatasetFacts]) -> None:
    """Record config and data before the work starts."""
    tracker.log_params(parameters_of(run.values, run.stage))
    tracker.log_artifact(run.run_dir / "config.resolved.yaml")
    for entry in datasets:
        if report_path(entry.path).is_file():
            tracker.log_artifact(report_path(entry.path), "deid")
        tracker.log_dataset(entry.path, entry.sha256, "train", entry.train or 0)
        tracker.log_dataset(entry.path, entry.sha256, "validation", entry.validation or 0)


def parameters_of(values: Config, stage: str) -> dict[str, Any]:
    """Return what decides this stage's result: its own section and what all training stages share."""
    tree = values.model_dump(mode="json", include={*DECISIVE, stage})
    return flatten({**tree, stage: {key: value for key, value in tree[stage].items() if key != "output_dir"}})


def run_name(values: Config, stage: str) -> str:
    """Name a run so that a list tells it from others: method, what it turns on, seed and data.

    A list shows the first twenty characters or so; data are what runs have most in common.
    """
    section = getattr(values, stage)
    paths = [section.dataset_path] if isinstance(section.dataset_path, str) else section.dataset_path or []
    data = "+".join(Path(getattr(each, "path", str(each))).stem for each in paths)
    loss, beta = getattr(section, "loss_type", None), getattr(section, "beta", None)
    usual = loss is None or loss == type(section).model_fields["loss_type"].default
    how = [*([] if usual else [str(loss)]), f"lr {section.learning_rate:g}" if beta is None else f"beta {beta:g}"]
    return " ".join([TRAINING_STAGES[stage].title, *how, f"seed {values.seed} · {data}"])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def save_adapter(
    run: Run,
    start: Start,
    datasets: Sequence[DatasetFacts],
    trainer: Any,
    weights: dict[str, Any],
    metrics: dict[str, Any],
    tracker: Tracker,
) -> None:
    """Write adapter, tokenizer, curves and manifest, put them in place of the old folder, and tell the tracker."""
    part = run.empty_folder()
    model = trainer.accelerator.unwrap_model(trainer.model)
    initialisation = merge_initialisation(model, run.run_dir)
    if initialisation:
        weights = weights | initial_weights(run.run_dir / "initial_adapter")
    # save_embedding_layers would ask the Hub whether the vocabulary was resized, and lose the run when that fails.
    adapter = model.peft_config["default"]
    adapter.target_modules = sorted(adapter.target_modules)  # of a set, the same training would write another file
    model.save_pretrained(
        part,
        state_dict=weights,
        selected_adapters=["default"],
        save_embedding_layers=False,
        **initialisation,
    )
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    check_saved(part / "adapter_model.safetensors", trained, weights)
    (part / "README.md").unlink(missing_ok=True)  # PEFT's stub of a card says nothing true
    trainer.processing_class.save_pretrained(part)
    before = metrics["held_out_loss_before"]
    at_start = [] if before is None else [{"step": 0, "eval_loss": before}]
    values = run.values
    curves = Curves.of(at_start + trainer.state.log_history, run.stage, values.seed)
    write_curves(part, curves)
    draw_curves(curves, part / "curves.png")
    manifest = run.publish(
        part,
        Manifest(
            stage=run.stage,
            base_model=BaseModelFacts(
                id=values.base_model_id, revision=values.base_model_revision, fingerprint=start.fingerprint
            ),
            **start.chat.facts(),
            parent=start.parent,
            datasets=list(datasets),
            split=SplitFacts.of(values.data),
            plan=start.plan if start.parent else freeze_plan(values),
            config=values.model_dump(mode="json"),
            mlflow=RunFacts(run_id=tracker.run_id),
            metrics=metrics,
        ),
    )
    shutil.rmtree(run.run_dir / "checkpoints", ignore_errors=True)
    tracker.summarise({key: value for key, value in metrics.items() if isinstance(value, int | float)})
    if before is not None:  # a metric too, by whose last value runs are sorted: tags sort as text
        tracker.log_metrics({"summary/held_out_loss": before}, 0)
        tracker.log_metrics({"summary/held_out_loss": metrics["held_out_loss"]}, metrics["steps"])
    tracker.set_tag("artifact_sha256", manifest.sha256)
    tracker.log_artifact(run.output_dir / "curves.png")
    tracker.log_artifact(run.output_dir / MANIFEST)
    if values.tracking.log_adapter:
        registered = re.sub(r"[/:]", "-", f"{values.tracking.experiment}-{run.stage}")
        tags = {"artifact_sha256": manifest.sha256, "base_model_id": values.base_model_id, "seed": str(values.seed)}
        name = re.sub(r"[/:.%\"' ]+", "-", run_name(values, run.stage).replace("· ", ""))
        tracker.log_model(run.output_dir, name, registered, "LoRA adapter", tags)


def check_saved(file: Path, trained: Iterable[str], weights: dict[str, Any]) -> None:
    """Prove that an adapter's file holds every tensor that trained, in its shape and with its values.

    Raises: UserError naming the first that it does not hold.
    """
    import torch
    from safetensors.torch import load_file

    saved = load_file(file)
    for name in trained:
        key = name.replace(".default", "")
        if "lora_magnitude_vector" in key:
            key = key.removesuffix(".weight")
        found, value = saved.get(key), weights.get(name)
        if found is not None and value is not None:
            # What moves a part of the base into the adapter (PiSSA, OLoRA) is saved with its start behind it: at rank 2r.
            rank = 0 if "lora_A" in key else 1
            doubled = tuple(size * (2 if axis == rank else 1) for axis, size in enumerate(value.shape))
            if found.shape in (value.shape, doubled) and torch.equal(found[tuple(map(slice, value.shape))], value):
                continue
        what = "is missing" if found is None else "differs from it"
        raise UserError(
            f"{file}: {key} was trained, but what was saved {what}. Nothing was put into place; the checkpoints are kept. "
            "Adapt other modules (lora.target_modules)."
        )


def initial_weights(folder: Path) -> dict[str, Any]:
    """Return a starting adapter under the names by which PEFT looks for it among the weights it is given to save."""
    from safetensors.torch import load_file

    found = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.").replace(".weight", f".{folder.name}.weight"): value
        for name, value in found.items()
    }


def next_stage(run: Run) -> str | None:
    """Name the stage that continues this adapter with data of this configuration, else the comparison where it can be run."""
    values = run.values
    planned = [
        stage for stage in planned_stages(values) if stage.continues == run.stage and not is_sample(values, stage)
    ]
    return planned[0].script if planned else COMPARE if values.data.test_ratio else None


def is_sample(values: Config, stage: TrainingStage) -> bool:
    """Tell whether a stage's data is the sample that comes with the project, while SFT's is one's own."""
    shipped = Config()
    own = values.sft.dataset_path != shipped.sft.dataset_path
    return own and getattr(values, stage.name).dataset_path == getattr(shipped, stage.name).dataset_path


def print_summary(run: Run, metrics: dict[str, Any]) -> None:
    """Say in a few lines what came out, where it is and what to do next."""
    stage = TRAINING_STAGES[run.stage]
    before, after = metrics["held_out_loss_before"], metrics["held_out_loss"]
    store = run.values.tracking.mlflow_tracking_uri
    runs = f"open {store}" if store.startswith("http") else f'mlflow ui --port 5000 --backend-store-uri "{store}"'
    lines = [
        f"{stage.title} is done",
        "held-out loss  " + ("nothing was held out" if after is None else f"{before:.4f} → {after:.4f}"),
        f"speed          {metrics['tokens_per_second']:.0f} tokens/s, {metrics['steps']} steps, {metrics['train_seconds']:.0f} s",
        f"peak memory    {metrics['peak_memory_gib']:.1f} GiB",
        f"adapter        {run.output_dir}",
        f"MLflow         {runs}",
        "               (its pages begin with GenAI; choose Model training at the top left)",
        f'talk to it     python -m serve.ask "…" {run.config.flags}',
    ]
    if following := next_stage(run):
        lines.append(f"next           python -m {following} {run.config.flags}")
    log.info("%s", "\n  ".join(lines))
