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
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.checks import check_rules
from eval.held_out import HeldOut, describe_changes, read_held_out
from eval.lmeval.candidates import Candidate, find_base, find_candidates, formats_of, unseen_by
from eval.lmeval.tasks import DOMAIN, Plan, build_plans, check_names
from scripts.common.artifacts import (
    FORMAT_FACTS,
    BaseModelFacts,
    DatasetFacts,
    Manifest,
    RunFacts,
    SplitFacts,
    sha256_file,
    sha256_json,
)
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.machine import Machine, apply_machine, choose_machine, peak_memory_gib
from scripts.common.paths import portable_path
from scripts.common.run import Run, open_run
from scripts.common.stages import BASE

if TYPE_CHECKING:
    from eval.lmeval.results import Entry
    from eval.metrics import Metric
    from scripts.common.tracking import Tracker
    from scripts.dataset.chat_format import ChatFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Basis:
    """What the models of a call rest on, and the data of their tasks."""

    base_model: BaseModelFacts
    tokenizer_sha256: str
    chat_template_sha256: str
    datasets: list[DatasetFacts]


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


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Find the models, run every task on each, compare and report."""
    arguments = build_parser().parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit: found {arguments.limit}, wanted at least 1; leave it out for whole tasks.")
    check_names(arguments.task)
    config = load_config(arguments.config, arguments.overrides)
    check_rules(config.values.eval.checks)
    with open_run("eval", config, "lmeval.output_dir", extends="eval") as run:
        candidates = find_candidates(arguments.model_path)

        from eval.lmeval.results import table
        from scripts.common.tracking import tracked_run

        parents = [candidate.manifest.mlflow.run_id for candidate in candidates if candidate.manifest]
        name = f"lm-eval {', '.join(arguments.task)} · {', '.join(Path(path).name for path in arguments.model_path)}"
        with tracked_run(config, "eval", name=name, parent_run_id=parents[-1] if parents else None) as tracker:
            entries, basis = evaluate(candidates, arguments.task, arguments.limit, config)
            metrics = publish_results(run, entries, basis, candidates, tracker)
    log.info(
        "± standard error; [95 %% interval of the paired difference]; * shown after correction\n%s", table(metrics)
    )
    log.info("report  %s", run.output_dir / "report.html")
    return 0


def evaluate(
    candidates: Sequence[Candidate], tasks: Sequence[str], limit: int | None, config: LoadedConfig
) -> tuple[list[Entry], Basis]:
    """Run every task on every model, one base in memory at a time.

    Returns: the results, and what the models of the last base rest on.
    """
    machine = choose_machine(config.values)
    apply_machine(machine)
    log.info("%s; %d threads", "; ".join(machine.reasons), machine.threads)
    held_out = read_held_out(config, unseen_by(candidates, config)) if DOMAIN in tasks else None
    for note in held_out.describe_left_out() if held_out else []:
        log.warning("%s", note)
    clock = Clock(len(candidates))
    entries: list[Entry] = []
    for group in group_by_base(candidates):
        results, basis = evaluate_group(group, tasks, held_out, limit, config, machine, clock)
        entries += results
    return entries, basis


def group_by_base(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Yield the candidates that are loaded together: the base with its adapters, then each model of its own."""
    on_base = [candidate for candidate in candidates if candidate.is_adapter or candidate.label == BASE]
    if on_base:
        yield on_base
    for candidate in candidates:
        if candidate not in on_base:
            yield [candidate]


class Clock:
    """Say before each task on each model how long the rest may take."""

    def __init__(self, candidates: int) -> None:
        self.candidates, self.finished, self.started = candidates, 0, time.monotonic()

    def announce(self, candidate: Candidate, plan: Plan, plans: int) -> None:
        """Log what starts now; what was announced before has ended."""
        total = self.candidates * plans
        minutes = (time.monotonic() - self.started) / 60 / max(self.finished, 1) * (total - self.finished)
        left = f", about {minutes:.0f} min left" if self.finished else ""
        self.finished += 1
        log.info("%s on %s (%d of %d%s)", candidate.label, plan.name, self.finished, total, left)


def evaluate_group(
    group: Sequence[Candidate],
    tasks: Sequence[str],
    held_out: HeldOut | None,
    limit: int | None,
    config: LoadedConfig,
    machine: Machine,
    clock: Clock,
) -> tuple[list[Entry], Basis]:
    """Run every task on models that share a base, which is in memory only until this returns."""
    from eval.lmeval.models import active, load_candidates
    from eval.lmeval.results import current_sha256
    from scripts.model.base import load_tokenizer

    base_id, revision, folder = find_base(group, config)
    chats = formats_of(group, load_tokenizer(folder), config.values.data)
    # Held-out prompts are rendered as each model reads them, which is nearly always in one way.
    by_format = {sha256_json(chat.facts()): chat for chat in chats.values()}
    planned = {key: build_plans(tasks, config, held_out, chat) for key, chat in by_format.items()}
    model, effects = load_candidates(group, folder, chats, config.values, machine)
    entries: list[Entry] = []
    for candidate in group:
        location, made = folder if candidate.label == BASE else candidate.folder, candidate.manifest
        about = {
            "model": portable_path(location),
            "label": candidate.label,
            "sha256": current_sha256(location),
            "stage": made.stage if made else None,
            "parent": made.parent.sha256 if made and made.parent else None,
            "largest_logit_change": effects.get(candidate.label),
        }
        changes = describe_changes(candidate.folder, made, held_out) if made and held_out else []
        chat = chats[candidate.label]
        plans, manager = planned[sha256_json(chat.facts())]
        for plan in plans:
            clock.announce(candidate, plan, len(plans))
            with active(model, candidate):
                notes = changes if plan.ids is not None else []
                entries += run_task(model, chat, plan, manager, about | {"notes": notes}, limit, config, machine)
    return entries, find_basis(group, base_id, revision, folder, chat.tokenizer, plans)


def find_basis(
    group: Sequence[Candidate], base_id: str, revision: str | None, folder: Path, tokenizer: Any, plans: Sequence[Plan]
) -> Basis:
    """Identify what the models of a group rest on, as every manifest does."""
    from scripts.dataset.chat_format import template_sha256, tokenizer_sha256
    from scripts.model.find import gguf_file
    from scripts.model.fingerprint import base_fingerprint

    base_model = next((candidate.manifest.base_model for candidate in group if candidate.manifest), None)
    if base_model is None:
        gguf = gguf_file(folder)
        fingerprint = sha256_file(folder / gguf) if gguf else base_fingerprint(folder)
        base_model = BaseModelFacts(id=base_id, revision=revision, fingerprint=fingerprint)
    return Basis(
        base_model=base_model,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=template_sha256(tokenizer),
        datasets=[plan.data for plan in plans if plan.data],
    )


def run_task(
    model: Any, chat: ChatFormat, plan: Plan, manager: Any, about: dict[str, Any], limit: int | None,
    config: LoadedConfig, machine: Machine,
) -> list[Entry]:  # fmt: skip
    """Run one task on the active model, and keep with the result every setting that it depends on."""
    from lm_eval import simple_evaluate

    from eval.lmeval.models import wrap
    from eval.lmeval.results import collect

    lmeval, quantization = config.values.lmeval, config.values.quantization
    results = simple_evaluate(
        model=wrap(model, chat, lmeval.batch_size, plan.ids),
        tasks=[plan.spec if isinstance(plan.spec, str) else dict(plan.spec)],
        task_manager=manager,
        limit=limit,
        apply_chat_template=lmeval.apply_chat_template and plan.ids is None,
        bootstrap_iters=1000,
        log_samples=True,
    )
    template, facts = "none", chat.facts()
    if lmeval.apply_chat_template or plan.ids is not None:
        template = f"the model's, {facts['chat_template_sha256'][:12]}"
        template += "".join(f"; {name} {facts[name]}" for name in FORMAT_FACTS if facts[name])
    if plan.ids is not None:
        template += f"; token ids as trained, tokenizer {facts['tokenizer_sha256'][:12]}"
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


def publish_results(
    run: Run, entries: list[Entry], basis: Basis, candidates: Sequence[Candidate], tracker: Tracker
) -> list[Metric]:
    """Compare with what is there from earlier calls, write all of it as one folder, and log it."""
    from eval.lmeval.results import arrange, compare_entries, read_earlier, write_results

    earlier, warnings = read_earlier(run.output_dir, [(entry["task"], entry["model"]) for entry in entries])
    everything = arrange(earlier + entries)
    metrics, unlike = compare_entries(everything)
    for warning in (warnings := warnings + unlike):
        log.warning("%s", warning)
    part = run.empty_folder()
    write_results(part, everything, metrics, warnings)
    figures = {
        f"{entry['task']}/{name}" + (f"/{entry['label']}" if len(candidates) > 1 else ""): metric["value"]
        for entry in entries
        for name, metric in entry["metrics"].items()
    }
    last = next((each for each in reversed(candidates) if each.manifest), None)
    manifest = Manifest(
        stage=run.stage,
        base_model=basis.base_model,
        tokenizer_sha256=basis.tokenizer_sha256,
        chat_template_sha256=basis.chat_template_sha256,
        parent=last.manifest.as_parent(last.folder) if last and last.manifest else None,
        datasets=basis.datasets,
        split=SplitFacts.of(run.values.data),
        config=run.values.model_dump(mode="json"),
        mlflow=RunFacts(run_id=tracker.run_id),
        metrics=figures | {"peak_memory_gib": round(peak_memory_gib(), 2)},
    )
    run.publish(part, manifest)
    # As metrics and not as tags: a benchmark is run on one model after the other, and a chart compares the runs.
    tracker.log_metrics({f"eval/{name}": value for name, value in figures.items()})
    tracker.log_params({f"{entry['task']}.{k}": v for entry in entries for k, v in entry["settings"].items()})
    tracker.log_artifact(run.output_dir)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
