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
    locked_run_dir,
    parent_entry,
    portable_path,
    publish,
    read_manifest,
    sha256_file,
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
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run every task on every model; returns the results and what the manifest says of base and data."""
    from eval.lmeval_models import active, load_candidates
    from eval.lmeval_results import current_sha256
    from scripts.common.modeling import load_tokenizer

    machine = choose_machine(config.values)
    apply_machine(machine)
    log.info("%s; %d threads", "; ".join(machine.reasons), machine.threads)
    stages = unseen_by(candidates, config) if DOMAIN in arguments.task else []
    on_base = [candidate for candidate in candidates if candidate.is_adapter or candidate.label == BASE]
    groups = [on_base] if on_base else []
    groups += [[candidate] for candidate in candidates if candidate not in on_base]
    results: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    finished, started = 0, time.monotonic()
    for group in groups:
        base, folder = find_base(group, config)
        tokenizer = load_tokenizer(folder)
        plans, manager = build_plans(arguments.task, config, stages, tokenizer)
        model, effects = load_candidates(group, folder, tokenizer, config.values, machine)
        facts = {**base_facts(group, base, folder, tokenizer), "datasets": [plan.data for plan in plans if plan.data]}
        for candidate in group:
            location = folder if candidate.label == BASE else candidate.folder
            about = {
                "model": portable_path(location),
                "label": candidate.label,
                "sha256": current_sha256(location),
                "largest_logit_change": effects.get(candidate.label),
            }
            for plan in plans:
                total = len(candidates) * len(plans)
                each = (time.monotonic() - started) / 60 / max(finished, 1)
                left = f", about {each * (total - finished):.0f} min left" if finished else ""
                log.info("%s on %s (%d of %d%s)", candidate.label, plan.name, finished + 1, total, left)
                with active(model, candidate):
                    results += run_task(model, tokenizer, plan, manager, about, arguments.limit, config, machine)
                finished += 1
        del model
    return results, facts


def base_facts(group: Sequence[Candidate], base: dict[str, Any], folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Identify what the models of a group rest on, as every manifest does."""
    from scripts.common.modeling import base_fingerprint, gguf_file
    from scripts.common.rendering import template_sha256, tokenizer_sha256

    made_on = next((candidate.manifest["base_model"] for candidate in group if candidate.manifest), None)
    if made_on is None:
        gguf = gguf_file(folder)
        made_on = {**base, "fingerprint": sha256_file(folder / gguf) if gguf else base_fingerprint(folder)}
    return {
        "base_model": made_on,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": template_sha256(tokenizer),
    }


def run_task(
    model: Any, tokenizer: Any, plan: Plan, manager: Any, about: dict[str, Any], limit: int | None,
    config: LoadedConfig, machine: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run one task on the active model, and keep with the result every setting that it depends on."""
    from lm_eval import simple_evaluate

    from eval.lmeval_models import wrap
    from eval.lmeval_results import collect
    from scripts.common.rendering import template_sha256, tokenizer_sha256

    lmeval, quantization = config.values.lmeval, config.values.quantization
    results = simple_evaluate(
        model=wrap(model, tokenizer, lmeval.batch_size, plan.ids),
        tasks=[plan.spec if isinstance(plan.spec, str) else dict(plan.spec)],
        task_manager=manager,
        limit=limit,
        apply_chat_template=lmeval.apply_chat_template and plan.ids is None,
        bootstrap_iters=1000,
        log_samples=True,
    )
    template = "none"
    if lmeval.apply_chat_template or plan.ids is not None:
        template = f"the model's, {template_sha256(tokenizer)[:12]}"
    if plan.ids is not None:
        template += f"; token ids as trained, tokenizer {tokenizer_sha256(tokenizer)[:12]}"
    settings = {
        "chat_template": template,
        "limit": limit,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "quantization": "4-bit" if quantization.load_in_4bit else "8-bit" if quantization.load_in_8bit else "none",
        "device": machine.device,
        "batch_size": lmeval.batch_size,
        "lm_eval": version("lm-eval"),
    }
    return collect(results, plan.titles, settings=settings, **about)


def finish(
    entries: list[dict[str, Any]], facts: dict[str, Any], candidates: Sequence[Candidate], config: LoadedConfig,
    run_dir: Path, tracker: Any,
) -> str:  # fmt: skip
    """Compare with what is there from earlier calls, write all of it as one folder, and tell the tracker."""
    from eval.lmeval_results import arrange, compare_entries, read_earlier, table, write_results

    output_dir = Path(config.values.lmeval.output_dir)
    earlier, warnings = read_earlier(output_dir, [(entry["task"], entry["model"]) for entry in entries])
    everything = arrange(earlier + entries)
    metrics, unlike = compare_entries(everything)
    for warning in (warnings := warnings + unlike):
        log.warning("%s", warning)
    part = run_dir / "finished"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_results(part, everything, metrics, warnings)
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
        parent=parent_entry(last.folder, last.manifest) if last and last.manifest else None,
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
            entries, facts = evaluate(candidates, arguments, config)
            shown = finish(entries, facts, candidates, config, run_dir, tracker)
    log.info("± standard error; [95 %% interval of the paired difference]; * shown after correction\n%s", shown)
    log.info("report  %s", Path(output_dir) / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
