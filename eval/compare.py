"""Say honestly which is better: base, SFT and DPO on the same held-out prompts, with intervals and paired tests.

Reads the adapters of `sft.output_dir` and `dpo.output_dir` and the held-out side of both datasets; writes
report.html, report.json and samples.jsonl to `eval.output_dir`, and an MLflow run. Needs requirements.txt.

    python -m eval.compare --config configs/config.yaml
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.checks import check_rules
from eval.held_out import describe_changes, leave_out_unfit, read_held_out
from scripts.common.artifacts import FORMAT_FACTS, Manifest, RunFacts, read_manifest
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.lineage import ancestors, check_split
from scripts.common.machine import apply_machine, choose_machine, peak_memory_gib
from scripts.common.paths import portable_path
from scripts.common.run import Run, open_run
from scripts.common.stages import BASE, SFT, TRAINING_STAGES
from scripts.dataset.split import describe_near_duplicates

if TYPE_CHECKING:
    from eval.measuring import Measured, Prepared
    from eval.metrics import Metric, Runs
    from eval.report import Report, Sample
    from scripts.common.tracking import Tracker
    from scripts.dataset.chat_format import ChatFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """A finished adapter, named after the stage that trained it."""

    name: str
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Comparison:
    """What is compared on what: the adapters, the base under them, and the held-out items as its token ids."""

    config: LoadedConfig
    adapters: list[Adapter]
    base_folder: Path
    prepared: Prepared
    notes: list[str]


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders with the adapter pairs of other seeds (DIR/sft_adapter, DIR/dpo_adapter)",
    )
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Find the adapters, measure every model, decide and report."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_rules(config.values.eval.checks)
    with open_run("comparison", config, "eval.output_dir") as run:
        adapters = find_adapters(config)
        runs = [find_run(Path(folder), adapters, config) for folder in arguments.runs]

        from scripts.common.tracking import tracked_run

        with tracked_run(config, "comparison", parent_run_id=adapters[-1].manifest.mlflow.run_id) as tracker:
            comparison = prepare(config, adapters, runs)
            measured = measure(comparison, adapters)
            metrics = describe_metrics(comparison, adapters, measured)
            spread = measure_runs(comparison, runs, metrics)
            report = describe(comparison, measured, metrics, spread)
            publish_report(run, report, adapters, tracker)
    assert report.verdict is not None
    log.info("%s\n  report  %s", report.verdict.text, run.output_dir / "report.html")
    return 0


def find_adapters(config: LoadedConfig) -> list[Adapter]:
    """Return each adapter that is there, in the order of training.

    Raises: UserError when there is none, or when one was trained with another split and so may know these prompts.
    """
    adapters = []
    for stage in TRAINING_STAGES.values():
        folder = Path(getattr(config.values, stage.name).output_dir)
        if not folder.is_dir():
            log.warning("%s: no adapter there, so %s is left out of the comparison", folder, stage.name)
            continue
        adapters.append(find_adapter(stage.name, folder, config))
    if not adapters:
        raise UserError(f"there is no adapter to compare. Run `python -m {SFT.script}` with this configuration first.")
    return adapters


def find_adapter(name: str, folder: Path, config: LoadedConfig) -> Adapter:
    """Return a whole adapter of this stage that has not seen what is held out."""
    manifest = read_manifest(folder, stages=(name,))
    check_split(folder, manifest, config.values.data)
    return Adapter(name, folder, manifest)


def find_run(run: Path, adapters: Sequence[Adapter], config: LoadedConfig) -> list[Adapter]:
    """Return the adapters of another seed, checked as the first ones are."""
    return [find_adapter(adapter.name, run / f"{adapter.name}_adapter", config) for adapter in adapters]


def prepare(config: LoadedConfig, adapters: list[Adapter], runs: Sequence[Sequence[Adapter]] = ()) -> Comparison:
    """Find the base, read what was held out, turn it into token ids, and say what of the lineage is not as it should be."""
    from eval.measuring import Prepared
    from scripts.dataset.chat_format import ChatFormat
    from scripts.model.adapter import check_adapter_fits
    from scripts.model.base import load_tokenizer
    from scripts.model.find import find_model
    from scripts.model.shape import position_table

    held_out = read_held_out(config, [adapter.name for adapter in adapters])
    base_folder = find_model(config.values.base_model_id, config.values.base_model_revision)
    chat = ChatFormat.of(load_tokenizer(base_folder), adapters[0].manifest)
    notes = [describe_near_duplicates(held_out.near_duplicates)] if held_out.near_duplicates else []
    for group in (adapters, *runs):
        for adapter in group:
            check_adapter_fits(adapter.folder, base_folder, chat.tokenizer)
            notes += describe_changes(adapter.folder, adapter.manifest, held_out)
        notes += describe_references(group)
    for note in notes:
        log.warning("%s", note)
    held_out = leave_out_unfit(held_out, chat, position_table(base_folder), config.values.data)
    prepared = Prepared(chat.tokenizer, held_out, config.values)
    log.info("%d held-out prompts and %d pairs", len(prepared.questions), len(prepared.pairs))
    return Comparison(config, adapters, base_folder, prepared, notes)


def describe_references(adapters: Sequence[Adapter]) -> list[str]:
    """Say which adapters continue another one than stands beside them, and what follows from that."""
    from eval.metrics import reference_of

    manifests = {adapter.name: adapter.manifest for adapter in adapters}
    notes = []
    for name, folder in ((adapter.name, adapter.folder) for adapter in adapters):
        parent = manifests[name].parent
        if parent is None or any(other.sha256 == parent.sha256 for other in manifests.values()):
            continue
        beside = [
            f"{other.name} is {other.folder} ({other.manifest.sha256[:12]}…)"
            for other in adapters
            if other.name != name
        ]
        note = f"{folder}: {name} continues {parent.path} ({parent.sha256[:12]}…), which is not compared here"
        note += f": {', '.join(beside)}. What differs between them is not {name.upper()} alone." if beside else "."
        if reference_of(manifests[name], manifests) is None:
            note += f" {name} was trained against that adapter, so its implicit reward is left out."
        _, original = next(ancestors(manifests[name]), (None, None))
        if original is None:
            note += (
                " That adapter is not there any more, so nothing can say whether it has seen these prompts. "
                f"Train {name} again to be sure."
            )
        elif original.stage != name:
            note += f" To compare with it, --set {original.stage}.output_dir={parent.path}."
        notes.append(note)
    return notes


def measure(comparison: Comparison, adapters: Sequence[Adapter]) -> dict[str, Measured]:
    """Measure the base and these adapters; the model is in memory only until this returns."""
    from eval.measuring import measure_models

    prepared = comparison.prepared
    model, chats = load_models(comparison.config, adapters, comparison.base_folder, prepared.tokenizer)
    return measure_models(model, {BASE: None, **{adapter.name: adapter.name for adapter in adapters}}, prepared, chats)


def load_models(
    config: LoadedConfig, adapters: Sequence[Adapter], base_folder: Path, tokenizer: Any
) -> tuple[Any, dict[str, ChatFormat]]:
    """Load the base once with every adapter beside the others; `prepare` has proven that they fit.

    Returns: the model, and how each arm reads prompts: as it was trained to, and the base as the first adapter.
    """
    from scripts.dataset.chat_format import ChatFormat
    from scripts.model.adapter import load_adapter
    from scripts.model.base import load_base

    machine = choose_machine(config.values)
    apply_machine(machine)
    chats = {adapter.name: ChatFormat.of(tokenizer, adapter.manifest) for adapter in adapters}
    model = load_base(base_folder, config.values, machine)
    for adapter in adapters:
        model = load_adapter(model, adapter.folder, name=adapter.name)
    if config.values.performance.fast_path:
        from scripts.speed.speed_up import speed_up

        speed_up(model)
    return model.eval(), {BASE: next(iter(chats.values())), **chats}


def describe_metrics(
    comparison: Comparison, adapters: Sequence[Adapter], measured: dict[str, Measured]
) -> list[Metric]:
    """Turn what was measured into metrics."""
    from eval.metrics import build_metrics

    manifests = {adapter.name: adapter.manifest for adapter in adapters}
    return build_metrics(measured, comparison.prepared, manifests)


def measure_runs(comparison: Comparison, runs: Sequence[Sequence[Adapter]], metrics: list[Metric]) -> Runs | None:
    """Measure the adapters of other seeds too, one run after the other, and return what varies between seeds."""
    from eval.metrics import spread_over_seeds

    if not runs:
        return None
    per_run, seeds = [metrics], [seed_of(comparison.adapters[0].manifest)]
    for adapters in runs:
        log.info("measuring the adapters of %s", adapters[0].folder.parent)
        per_run.append(describe_metrics(comparison, adapters, measure(comparison, adapters)))
        seeds.append(seed_of(adapters[0].manifest))
    return spread_over_seeds(per_run, seeds)


def seed_of(manifest: Manifest) -> int:
    """Return the seed an adapter was trained with."""
    return int(manifest.config["seed"])


def describe(comparison: Comparison, measured: dict[str, Measured], metrics: list[Metric], runs: Runs | None) -> Report:
    """Decide, and put everything that the report shows together."""
    from eval.lmeval.results import find_benchmarks
    from eval.measuring import ORIGINS
    from eval.report import Report, picture_uri
    from eval.verdict import decide

    models, adapters = list(measured), comparison.adapters
    verdict, notes = decide(metrics, models, runs)
    benchmarks, left_out = find_benchmarks(
        Path(comparison.config.values.lmeval.output_dir), [adapter.folder for adapter in adapters]
    )
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        title=f"{' · '.join(models)} on {comparison.base_folder.name}",
        verdict=verdict,
        models=models,
        metrics=metrics,
        health={
            name: {**vars(result.health), **{f"kl_to_{other}": result.kl.get(other) for other in ORIGINS}}
            for name, result in measured.items()
        },
        training={adapter.name: adapter.manifest.metrics for adapter in adapters},
        curves={adapter.name: picture_uri(adapter.folder / "curves.png") for adapter in adapters},
        lineage=describe_lineage(adapters),
        samples=describe_samples(comparison.prepared, measured),
        benchmarks=benchmarks,
        runs=runs,
        notes=notes + comparison.notes + describe_formats(adapters) + ([left_out] if left_out else []),
    )


def describe_formats(adapters: Sequence[Adapter]) -> list[str]:
    """Say in what the arms read the same prompt differently."""
    first, *others = adapters
    notes = []
    for other in others:
        pairs = {fact: (getattr(first.manifest, fact), getattr(other.manifest, fact)) for fact in FORMAT_FACTS}
        unlike = [f"{fact}: {one!r} and {two!r}" for fact, (one, two) in pairs.items() if one != two]
        if unlike:
            notes.append(
                f"{first.name} and {other.name} read the same prompt differently, each as it was trained to "
                f"({'; '.join(unlike)}). The base reads it as {first.name} does."
            )
    return notes


def describe_lineage(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Say which data, configuration, seed and hashes made each column."""
    from eval.metrics import reference_of

    manifests = {adapter.name: adapter.manifest for adapter in adapters}
    lineage: dict[str, Any] = {BASE: adapters[0].manifest.base_model.model_dump()}
    for adapter in adapters:
        manifest = adapter.manifest
        lineage[adapter.name] = {
            "path": portable_path(adapter.folder),
            "sha256": manifest.sha256,
            "reference": reference_of(manifest, manifests),
            "seed": manifest.config["seed"],
            "mlflow_run_id": manifest.mlflow.run_id,
            **manifest.model_dump(include={"created", "base_model", "parent", "datasets", "split", "git", "packages"}),
        }
    return lineage


def describe_samples(prepared: Prepared, measured: dict[str, Measured]) -> list[Sample]:
    """Put the answers of all models side by side, those that differ most between the last two first."""
    from difflib import SequenceMatcher

    from eval.report import Sample

    samples = []
    for index, question in enumerate(prepared.questions):
        answers = {name: result.answers[index].text for name, result in measured.items()}
        before, after = [text.split() for text in answers.values()][-2:]
        asked = "\n\n".join(message["content"] for message in question.prompt if message["role"] != "system")
        samples.append(
            Sample(
                source=portable_path(question.source),
                prompt=asked,
                reference=question.target,
                answers=dict(answers),
                checks={name: result.checks[index] for name, result in measured.items()},
                changed=round(1 - SequenceMatcher(None, before, after, autojunk=False).ratio(), 4),
            )
        )
    return sorted(samples, key=lambda sample: -sample.changed)


def publish_report(run: Run, report: Report, adapters: Sequence[Adapter], tracker: Tracker) -> None:
    """Write the report folder, put it in place of the old one, and log it."""
    from eval.report import write_report

    part = run.empty_folder()
    write_report(part, report)
    newest = adapters[-1].manifest
    outcome = report.verdict.outcome if report.verdict else None
    manifest = Manifest(
        stage=run.stage,
        base_model=newest.base_model,
        tokenizer_sha256=newest.tokenizer_sha256,
        chat_template_sha256=newest.chat_template_sha256,
        parent=newest.as_parent(adapters[-1].folder),
        datasets=newest.datasets,
        split=newest.split,
        config=run.values.model_dump(mode="json"),
        mlflow=RunFacts(run_id=tracker.run_id),
        metrics={"outcome": outcome, "peak_memory_gib": round(peak_memory_gib(), 2)},
    )
    run.publish(part, manifest)
    figures = {f"eval/{m.name}/{name}": each.value for m in report.metrics for name, each in m.models.items()}
    tracker.log_metrics({key: value for key, value in figures.items() if value is not None})
    tracker.log_artifact(run.output_dir)


if __name__ == "__main__":
    sys.exit(main())
