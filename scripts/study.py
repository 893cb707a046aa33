"""Train over several seeds and variants, choose a variant on the validation side, and report on the test side.

Runs the training stages and the comparison as a user would, each in a process of its own; writes the adapters, a log of
each run, the comparison and study.json to `study.output_dir`, and an MLflow run above those of the stages. Stopped or
killed at any moment, the same command continues. Needs requirements.txt.

    python -m scripts.study --config configs/demo.yaml --seeds 3 --vary dpo.beta=0.05,0.1,0.5
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import (
    MANIFEST,
    RunFacts,
    read_manifest,
    repair_interrupted_publish,
    run_dir_of,
    sha256_json,
    wait_until_free,
    write_manifest,
)
from scripts.common.config import add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.run import Run, open_run
from scripts.common.schema import Config, check_arm_name
from scripts.common.stages import DPO, SFT
from scripts.model.find import find_local_model
from scripts.studies.plan import Member, Variant, as_flags, as_list, find_variants, parse_vary, plan_members, seeds_of
from scripts.studies.record import RECORD, Ranked, Record, Result, find_record
from scripts.studies.runs import Progress, last_lines, run_stage, time_left

if TYPE_CHECKING:
    from scripts.common.tracking import Tracker

log = logging.getLogger(__name__)

COMPARE = "eval.compare"
VALIDATION, COMPARISON = "validation", "comparison"  # folders: what ranks the variants, and the report


@dataclass
class Study:
    """A study at work: what every step of it needs."""

    run: Run
    record: Record
    members: list[Member]
    left: list[Member]  # not finished when this run began
    variants: list[Variant]
    flags: list[str]  # the configuration, as each stage is given it
    progress: Progress
    missing: dict[str, str] = field(default_factory=dict)  # why a run left no adapter

    @property
    def folder(self) -> Path:
        """Return the folder of the study."""
        return self.run.output_dir

    def start(self, script: str, folder: Path, arguments: Sequence[str]) -> str | None:
        """Run a stage; return what it said last where it failed, otherwise None."""
        log_file, continued = folder.with_name(f"{folder.name}.log"), run_dir_of(folder).exists()
        self.progress.begin(str(folder.relative_to(self.folder)))
        tracking = as_flags({"tracking.parent_run_id": self.record.mlflow_run_id})
        code = run_stage(script, [*self.flags, *arguments, *tracking], log_file, self.progress.tick)
        self.progress.end(measured=not code and not (continued and script != COMPARE))
        self.record.save(self.folder)
        return f"exit code {code}\n{last_lines(log_file)}\n    (all of it: {log_file})" if code else None


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--seeds", metavar="N|A,B,…", help="how many seeds, counted from `seed`, or which (default: study.seeds)"
    )
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=A,B,…",
        help="train every value of a key, as in dpo.beta=0.05,0.1; several span a grid; values are JSON, else plain text",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="allow a grid of more than 12 variants")
    parser.add_argument(
        "--dry-run", action="store_true", help="check config and data, list the runs, and say what they can show"
    )
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Plan the runs, do those that are missing, rank the variants, compare the chosen one, and say where to look."""
    arguments = build_parser().parse_args(argv)
    overrides = [*arguments.overrides, "eval.models=null"]  # a study names what it compares itself
    config = load_config(arguments.config, overrides)
    if arguments.seeds is not None:
        config = load_config(
            arguments.config, [*overrides, f"study.seeds={as_list(arguments.seeds)}"], origin="--seeds"
        )
    variants = find_variants(arguments.config, overrides, parse_vary(arguments.vary), many=arguments.yes)
    check_can_end(config.values, variants)
    with open_run("study", config, "study.output_dir", grows=True, dry=arguments.dry_run) as run:
        members = plan_members(variants, seeds_of(config.values), run.output_dir)
        record = find_record(run.output_dir, config.values, variants)
        if run.dry:
            from eval.planning import show_smallest_gaps

            show_plan(run.output_dir, members, variants, record)
            show_smallest_gaps(config, seeds=len(seeds_of(config.values)))
            return 0

        from scripts.common.tracking import tracked_run

        flags = ["--config", arguments.config, *(part for item in overrides for part in ("--set", item))]
        name = f"study of {len(variants)} variants · {len(seeds_of(config.values))} seeds"
        with tracked_run(config, "study", name=name, earlier=record.mlflow_run_id, resume=True) as tracker:
            record.mlflow_run_id = tracker.run_id
            record.save(run.output_dir)
            (run.output_dir / MANIFEST).unlink(missing_ok=True)  # until this run ends the folder is not finished
            left = [member for member in members if not is_finished(member)]
            kinds = [*(member.stage.name for member in left), *comparisons_of(variants)]
            progress = Progress(record.seconds, kinds, total=len(kinds) + len(members) - len(left))
            study = Study(run, record, members, left, variants, flags, progress)
            with study.progress.shown():
                train(study)
                result = rank(study)
                compare_chosen(study, result)
            publish(study, result, tracker)
    log.info("%s", summary(study, result))
    return 1 if study.missing else 0


def check_can_end(values: Config, variants: Sequence[Variant]) -> None:
    """Refuse at once what would show only after hours.

    Raises: UserError naming the key.
    """
    init_from, own = values.dpo.init_from, values.sft.output_dir
    if init_from is not None and os.path.abspath(init_from) != os.path.abspath(own):
        raise UserError(
            f"dpo.init_from: found {init_from}, but in a study DPO continues the SFT adapter of its own seed. "
            f"Set it to the value of sft.output_dir ({own}), or to null to start from the base."
        )
    if len(variants) > 1 and not values.data.validation_ratio:
        raise UserError(
            "data.validation_ratio: found 0, but variants are ranked on the validation side. Set a ratio, or drop --vary."
        )
    find_local_model(values.base_model_id, values.base_model_revision)
    if not values.data.test_ratio:
        raise UserError("data.test_ratio: found 0, but a study reports on the test side. Set a ratio, such as 0.2.")


def is_finished(member: Member) -> bool:
    """Tell whether a run has left its adapter, and for DPO whether it continues the SFT adapter that is there now."""
    repair_interrupted_publish(member.folder)
    if not (member.folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(member.folder, stages=(member.stage.name,), verify=False)
    if member.parent is None:
        return True
    continued = manifest.parent and manifest.parent.sha256
    return is_finished(member.parent) and continued == read_manifest(member.parent.folder, verify=False).sha256


def comparisons_of(variants: Sequence[Variant]) -> list[str]:
    """Name the comparisons of a study in their order."""
    return [VALIDATION, COMPARISON] if len(variants) > 1 else [COMPARISON]


def show_plan(folder: Path, members: Sequence[Member], variants: Sequence[Variant], record: Record) -> None:
    """List the runs, which of them are finished, and how long the others take where that was measured."""
    left = [member.stage.name for member in members if not is_finished(member)]
    comparisons = comparisons_of(variants)
    lines = [
        f"{folder}: {len(members)} runs of training, {len(left)} of them left, and {len(comparisons)} of comparison: "
        f"{time_left(record.seconds, [*left, *comparisons])}"
    ]
    for member in members:
        lines.append(f"{'finished' if is_finished(member) else 'to train'}  {member.name}")
    if len(variants) > 1:
        lines.append(f"to rank   {len(variants)} variants, on the validation side")
    best = "the best variant" if len(variants) > 1 else "DPO"
    lines.append(f"to report {best}, its SFT and the base, on the test side")
    log.info("%s", "\n  ".join(lines))


def train(study: Study) -> None:
    """Do the training runs that are missing; one that fails is named, and the rest continues without it."""
    for member in study.left:
        reason: str | None = None
        if member.parent and member.parent.name in study.missing:
            study.progress.skip()
            reason = f"not trained, because {member.parent.name} failed"
        else:
            wait_until_free(member.folder)
            if is_finished(member):
                study.progress.skip()
            else:
                flags = [*as_flags(member.settings), "--resume"]
                reason = study.start(member.stage.script, member.folder, flags)
        if reason:
            study.missing[member.name] = reason
            log.warning("%s: %s", member.name, reason)


def rank(study: Study) -> Result:
    """Choose the variant that is best on the validation side, by the mean of the primary measure over the whole seeds.

    A variant that failed under every seed takes no part, and a seed only where all others are there.
    Raises: UserError when no seed is whole.
    """
    finished = {member.name for member in study.members if is_finished(member)}
    trained = {(m.variant, m.seed): m for m in study.members if m.stage is DPO and m.name in finished}
    variants = [v for v in study.variants if any(name == v.name for name, _ in trained)]
    seeds = [seed for seed in seeds_of(study.run.values) if all((v.name, seed) in trained for v in variants)]
    missing = [f"{name}: {reason.splitlines()[0]}" for name, reason in study.missing.items()]
    if not variants or not seeds:
        raise UserError(
            f"no seed has all its adapters, so there is nothing to compare. See the logs in {study.folder}; the same "
            "command tries the missing runs again."
        )
    result = Result(
        seeds=seeds, missing=missing, variants=[Ranked(name=v.name, settings=v.settings) for v in variants],
        chosen=variants[0].name,
    )  # fmt: skip
    if len(study.variants) == 1:
        return result
    names = {v.name: arm_name(v.name, number) for number, v in enumerate(variants, 1)}
    arms = {names[v.name]: [trained[v.name, seed].folder for seed in seeds] for v in variants}
    report = compare(study, VALIDATION, arms, {"eval.plan.question": None}, ["--side", "validation"])
    result.measure = report["question"]["measures"][0]
    metric = next(metric for metric in report["metrics"] if metric["name"] == result.measure)
    result.title, result.unit = metric["title"], metric["unit"]
    figures = {name: metric["models"][arm]["value"] for name, arm in names.items()}
    for ranked in result.variants:
        ranked.value = figures[ranked.name]
    best = max if metric["better"] == "higher" else min
    result.chosen = best((v.name for v in variants), key=figures.__getitem__)  # of equal ones the first
    return result


def arm_name(variant: str, number: int) -> str:
    """Return what a variant is called in the comparison: its own name unless that is too long for the head of a column."""
    try:
        return check_arm_name(variant)
    except ValueError:
        return f"variant {number}"


def compare_chosen(study: Study, result: Result) -> None:
    """Report on the test side: the chosen variant, the SFT adapters that it continues, and the base."""
    chosen = [m for m in study.members if m.variant == result.chosen and m.stage is DPO and m.seed in result.seeds]
    settings = next(variant.settings for variant in study.variants if variant.name == result.chosen)
    arms = {SFT.name: [member.sft_folder for member in chosen], DPO.name: [member.folder for member in chosen]}
    notes = [part for note in notes_of(study, result) for part in ("--note", note)]
    compare(study, COMPARISON, arms, settings, notes)


def compare(
    study: Study, name: str, arms: Mapping[str, Sequence[Path]], settings: Mapping[str, Any], flags: Sequence[str]
) -> dict[str, Any]:
    """Compare arms of one adapter per seed, unless that was done already; return the report."""
    folder = study.folder / name
    hashes = {arm: [read_manifest(one, verify=False).sha256 for one in folders] for arm, folders in arms.items()}
    made_of = sha256_json([hashes, study.run.values.eval.model_dump(mode="json"), dict(settings), list(flags)])
    wait_until_free(folder)
    repair_interrupted_publish(folder)
    if study.record.compared.get(name) == made_of and (folder / MANIFEST).is_file():
        study.progress.skip()
    else:
        models = {arm: [str(one) for one in folders] for arm, folders in arms.items()}
        given = as_flags({**settings, "eval.models": models, "eval.output_dir": str(folder)})
        if reason := study.start(COMPARE, folder, [*given, *flags]):
            raise UserError(f"{name}: {COMPARE} failed: {reason}\nThe adapters are kept; the same command continues.")
        study.record.compared[name] = made_of
        study.record.save(study.folder)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def notes_of(study: Study, result: Result) -> Iterator[str]:
    """Say in the report how the variant was chosen, and which runs are missing."""
    if result.measure:
        table = ", ".join(f"{ranked.name} {shown(ranked.value, result.unit)}" for ranked in result.variants)
        yield (
            f"DPO is the variant {result.chosen}, the best of {len(result.variants)} on the validation side by {result.title!r} "
            f"(mean over {len(result.seeds)} seeds): {table}."
        )
    elif result.chosen:
        yield f"DPO is the variant {result.chosen}."
    if result.missing:
        yield f"Missing in this study: {'; '.join(result.missing)}. Only whole seeds are compared: {', '.join(map(str, result.seeds))}."


def shown(value: float | None, unit: str | None) -> str:
    """Write a figure in its unit."""
    if value is None:
        return "not measured"
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3f} {unit}"


def publish(study: Study, result: Result, tracker: Tracker) -> None:
    """Write the record and, last, the manifest; tell the tracker."""
    study.record.result = result
    study.record.save(study.folder)
    compared = read_manifest(study.folder / COMPARISON, stages=("comparison",))
    files = [study.folder / RECORD, *(member.folder / MANIFEST for member in study.members if is_finished(member))]
    files += [path for name in study.record.compared for path in (study.folder / name).rglob("*") if path.is_file()]
    facts = {
        "stage": study.run.stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": study.run.values.model_dump(mode="json"),
        "mlflow": RunFacts(run_id=tracker.run_id),
        "metrics": result.model_dump(mode="json"),
    }
    write_manifest(study.folder, compared.model_copy(update=facts), files)
    if result.measure:
        figures = {f"validation/{result.measure}/{r.name}": r.value for r in result.variants if r.value is not None}
        tracker.log_metrics(figures)
    tracker.set_tag("chosen", result.chosen)
    tracker.log_artifact(study.folder / RECORD)


def summary(study: Study, result: Result) -> str:
    """Say what was found, what is missing, and where to look."""
    lines = [f"the study is done: {len(result.seeds)} seeds ({', '.join(map(str, result.seeds))})"]
    if result.measure:
        lines.append(f"validation side, {result.title} (mean over the seeds)")
        width = max(len(ranked.name) for ranked in result.variants)
        for ranked in result.variants:
            mark = "  chosen" if ranked.name == result.chosen else ""
            lines.append(f"  {ranked.name:{width}}  {shown(ranked.value, result.unit)}{mark}")
    lines += [f"missing   {reason}" for reason in result.missing]
    lines.append(f"report    {study.folder / COMPARISON / 'report.html'}")
    lines.append(f"runs      {study.folder / RECORD}; MLflow run {study.record.mlflow_run_id}")
    return "\n  ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
