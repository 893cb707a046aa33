"""Score models with lm-eval: adapters on their base, merged and GGUF folders, on its tasks or on your own data.

Reads the folders of --model_path (`base` stands for their base model); writes report.html, results.json and
samples.jsonl to `lmeval.output_dir`, beside what stands there from earlier calls, and an MLflow run.
Needs requirements.txt.

    python eval/run_lmeval.py --model_path outputs/dpo_adapter --task hellaswag --limit 50
    python -m eval.run_lmeval --model_path base outputs/sft_adapter outputs/dpo_adapter --task domain --config configs/demo.yaml

A task is a name that lm-eval knows, a task YAML, `domain` (the held-out records of the configuration), or
`multiple_choice=FILE` and `continuation=FILE` for JSONL with query, choices and gold.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.lmeval_candidates import BASE, Candidate, find_base, find_candidates, unseen_by
from eval.lmeval_tasks import DOMAIN, Plan, build_plans, check_names
from scripts.common.artifacts import (
    artifact_sha256,
    locked_run_dir,
    portable_path,
    publish,
    read_manifest,
    write_manifest,
)
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.runtime import (
    apply_machine,
    choose_machine,
    peak_memory_gib,
    prepare_environment,
    set_up_logging,
    trapped_signals,
)

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--model_path", nargs="+", required=True, metavar="DIR", help="adapter or model folders, or `base`"
    )
    parser.add_argument("--task", nargs="+", required=True, metavar="TASK", help="tasks; see above")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task: for a first look")
    return parser


def evaluate(
    candidates: Sequence[Candidate], arguments: argparse.Namespace, config: LoadedConfig
) -> tuple[list[dict[str, Any]], list[Plan], dict[str, Any]]:
    """Run every task on every model; returns the entries, the tasks, and the facts of the last model's base."""
    from eval.lmeval_models import load_candidates
    from scripts.common.modeling import base_fingerprint, find_model, load_tokenizer
    from scripts.common.rendering import template_sha256, tokenizer_sha256

    machine = choose_machine(config.values)
    apply_machine(machine)
    log.info("%s; %d threads", "; ".join(machine.reasons), machine.threads)
    on_base = [candidate for candidate in candidates if candidate.is_adapter or candidate.label == BASE]
    groups = [(group, None) for group in [on_base] if group]
    groups += [([candidate], candidate.folder) for candidate in candidates if candidate not in on_base]
    stages = unseen_by(candidates, config) if DOMAIN in arguments.task else []
    entries: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    progress = Progress(len(candidates))
    for group, folder in groups:
        base_id, revision = (str(folder), None) if folder else find_base(group, config)
        base_folder = folder or find_model(base_id, revision)
        tokenizer = load_tokenizer(base_folder)
        plans, manager = build_plans(arguments.task, config, stages, tokenizer)
        model, effects = load_candidates(group, base_folder, tokenizer, config.values, machine)
        for candidate in group:
            location = base_folder if candidate.label == BASE else candidate.folder
            about = {
                "model": portable_path(location),
                "label": candidate.label,
                "sha256": artifact_sha256(candidate.manifest) if candidate.manifest else None,
                "largest_logit_change": effects.get(candidate.label),
            }
            for plan in plans:
                progress.tell(candidate.label, plan.name, len(plans))
                entries += run_task(model, candidate, tokenizer, plan, manager, about, arguments.limit, config, machine)
                progress.done()
        del model
        facts = {
            "base_model": {"id": base_id, "revision": revision, "fingerprint": base_fingerprint(base_folder)},
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "chat_template_sha256": template_sha256(tokenizer),
            "datasets": [plan.data for plan in plans if plan.data],
        }
    return entries, plans, facts


def run_task(
    model: Any, candidate: Candidate, tokenizer: Any, plan: Plan, manager: Any, about: dict[str, Any],
    limit: int | None, config: LoadedConfig, machine: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run one task on one model, and keep with the result every setting that it depends on."""
    from lm_eval import simple_evaluate

    from eval.lmeval_models import active, wrap
    from eval.lmeval_results import collect
    from scripts.common.rendering import template_sha256, tokenizer_sha256

    settings, quantization = config.values.lmeval, config.values.quantization
    template = f"model's own, {template_sha256(tokenizer)[:12]}"
    if plan.ids is not None:
        template += f", token ids as trained, tokenizer {tokenizer_sha256(tokenizer)[:12]}"
    with active(model, candidate):
        results = simple_evaluate(
            model=wrap(model, tokenizer, settings.batch_size, plan.ids),
            tasks=[plan.spec if isinstance(plan.spec, str) else dict(plan.spec)],
            task_manager=manager,
            limit=limit,
            apply_chat_template=settings.apply_chat_template and plan.ids is None,
            bootstrap_iters=1000,
            log_samples=True,
        )
    recorded = {
        "dtype": str(machine.dtype).removeprefix("torch."),
        "quantization": "4-bit" if quantization.load_in_4bit else "8-bit" if quantization.load_in_8bit else "none",
        "device": machine.device,
        "batch_size": settings.batch_size,
        "chat_template": template if settings.apply_chat_template or plan.ids is not None else "none",
        "limit": limit,
        "lm_eval": version("lm-eval"),
    }
    return collect(results, plan.titles, settings=recorded, **about)


class Progress:
    """Tell which evaluation runs and when the last one will be done, judged by those that are."""

    def __init__(self, models: int) -> None:
        self.models, self.finished, self.started = models, 0, time.monotonic()

    def tell(self, label: str, task: str, tasks: int) -> None:
        """Announce an evaluation; lm-eval shows the progress inside it."""
        total = self.models * tasks
        elapsed = time.monotonic() - self.started
        left = f", about {elapsed / self.finished * (total - self.finished) / 60:.0f} min left" if self.finished else ""
        log.info("%s on %s (%d of %d%s)", label, task, self.finished + 1, total, left)

    def done(self) -> None:
        """Count an evaluation."""
        self.finished += 1


def finish(
    entries: list[dict[str, Any]], facts: dict[str, Any], candidates: Sequence[Candidate], config: LoadedConfig,
    run_dir: Path, tracker: Any,
) -> str:  # fmt: skip
    """Compare with what is there from earlier calls, write all of it as one folder, and tell the tracker."""
    from eval.lmeval_results import compare_entries, read_earlier, table, write_results

    output_dir = Path(config.values.lmeval.output_dir)
    earlier, warnings = read_earlier(output_dir, [(entry["task"], entry["model"]) for entry in entries])
    metrics, unlike = compare_entries(earlier + entries)
    for warning in (warnings := warnings + unlike):
        log.warning("%s", warning)
    part = run_dir / "finished"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_results(part, earlier + entries, metrics, warnings)
    figures = {
        f"{entry['task']}/{name}" + (f"/{entry['label']}" if len(candidates) > 1 else ""): metric["value"]
        for entry in entries
        for name, metric in entry["metrics"].items()
    }
    last = next((candidate for candidate in reversed(candidates) if candidate.manifest), None)
    write_manifest(
        part,
        "eval",
        **facts,
        parent={"path": portable_path(last.folder), "sha256": artifact_sha256(last.manifest)}
        if last and last.manifest
        else None,
        split={"seed": config.values.data.split_seed, "ratio": config.values.data.validation_ratio},
        config=config.values.model_dump(mode="json"),
        mlflow={"run_id": tracker.run_id},
        metrics=figures | {"peak_memory_gib": round(peak_memory_gib(), 2)},
    )
    publish(part, output_dir)
    tracker.log_metrics({f"eval/{name}": value for name, value in figures.items()})
    tracker.log_params({f"{entry['task']}.{k}": v for entry in entries for k, v in entry["settings"].items()})
    tracker.log_artifact(output_dir)
    return table(metrics)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate."""
    from eval.checks import check_rules

    arguments = build_parser().parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit: found {arguments.limit}, wanted at least 1; leave it out for whole tasks.")
    check_names(arguments.task)
    config = load_config(arguments.config, arguments.overrides)
    check_rules(config.values.eval.checks)
    prepare_environment(config.values)
    output_dir = config.values.lmeval.output_dir
    with trapped_signals(), locked_run_dir(output_dir) as run_dir:
        set_up_logging(run_dir / "log.txt")
        if Path(output_dir).exists():
            read_manifest(output_dir, stages=("eval",))  # whatever else lies there is not ours to replace
        candidates = find_candidates(arguments.model_path)

        from scripts.common.tracking import tracked_run

        runs = [candidate.manifest["mlflow"]["run_id"] for candidate in candidates if candidate.manifest]
        with tracked_run(config, "eval", parent_run_id=runs[-1] if runs else None) as tracker:
            entries, _, facts = evaluate(candidates, arguments, config)
            shown = finish(entries, facts, candidates, config, run_dir, tracker)
    log.info("± standard error; [95 %% interval of the paired difference]; * shown after correction\n%s", shown)
    log.info("report  %s", Path(output_dir) / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
