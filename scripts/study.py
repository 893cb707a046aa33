"""Train over several seeds and variants, choose a variant on the validation side, and report on the test side.

Runs SFT, what `study.arms` trains from it and the comparison as a user would, each in a process of its own; writes the
adapters, a log of each run, the comparison and study.json to `study.output_dir`, and an MLflow run above those of the
stages. Stopped or killed at any moment, the same command continues. Needs requirements.txt.

    python -m scripts.study --config configs/demo.yaml --seeds 3 --vary dpo.beta=0.05,0.1,0.5
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    sha256_file,
    sha256_json,
    wait_until_free,
    write_manifest,
)
from scripts.common.config import add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.pairs_manifest import pairs_manifest_path, read_pairs_manifest
from scripts.common.question import default_question
from scripts.common.run import Run, open_run
from scripts.common.schema import Config, check_arm_name
from scripts.common.stages import BASE, COMPARE, SFT, TRAINING_STAGES
from scripts.model.find import find_local_model
from scripts.studies.plan import (
    Member,
    PairsMember,
    RunOfStudy,
    Variant,
    arms_of,
    as_flags,
    as_list,
    as_overrides,
    find_variants,
    parse_vary,
    plan_members,
    seeds_of,
)
from scripts.studies.record import RECORD, Ranked, Record, Result, find_record
from scripts.studies.runs import Progress, last_lines, run_stage, time_left

if TYPE_CHECKING:
    from scripts.common.tracking import Tracker

log = logging.getLogger(__name__)

VALIDATION, COMPARISON = "validation", "comparison"  # folders: what ranks the variants, and the report


@dataclass
class Study:
    """A study at work: what every step of it needs."""

    run: Run
    record: Record
    members: list[RunOfStudy]
    left: list[RunOfStudy]  # not finished when this run began
    several: bool  # whether an arm has variants, of which the best has to be found
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
    if config.values.study.arms and not config.values.eval.plan.question:  # each run writes down what was asked
        question = default_question([SFT.name, *config.values.study.arms])
        overrides += as_overrides({"eval.plan.question": question})
        config = load_config(arguments.config, overrides)
    if arguments.seeds is not None:
        config = load_config(
            arguments.config, [*overrides, f"study.seeds={as_list(arguments.seeds)}"], origin="--seeds"
        )
    variants = find_variants(arguments.config, overrides, parse_vary(arguments.vary), many=arguments.yes)
    check_can_end(config.values, variants)
    several = len(variants) > 1
    with open_run("study", config, "study.output_dir", grows=True, dry=arguments.dry_run) as run:
        members = plan_members(variants, seeds_of(config.values), run.output_dir)
        record = find_record(run.output_dir, config.values, variants)
        if run.dry:
            from eval.planning import show_smallest_gaps

            show_plan(run.output_dir, members, config.values, several, record)
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
            kinds = [*(member.kind for member in left), *comparisons(several)]
            progress = Progress(record.seconds, kinds, total=len(kinds) + len(members) - len(left))
            study = Study(run, record, members, left, several, flags, progress)
            with study.progress.shown():
                train(study)
                result, chosen = rank(study)
                compare_chosen(study, result, chosen)
            publish(study, result, tracker)
    log.info("%s", summary(study, result, chosen))
    return 1 if study.missing else 0


def check_can_end(values: Config, variants: Sequence[Variant]) -> None:
    """Refuse at once what would show only after hours.

    Raises: UserError naming the key.
    """
    from eval.labelling import check_labeller

    arms, own = arms_of(values), values.sft.output_dir
    for stage in dict.fromkeys(arm.stage for arm in arms):
        init_from = getattr(values, stage.name).init_from
        if init_from is not None and os.path.abspath(init_from) != os.path.abspath(own):
            raise UserError(
                f"{stage.name}.init_from: found {init_from}, but in a study {stage.title} continues the SFT adapter of its own "
                f"seed. Set it to the value of sft.output_dir ({own}), or to null to start from the base."
            )
    named = [BASE, SFT.name, *(arm.name for arm in arms)]
    if not {*(values.eval.plan.question or [])} <= {*named}:
        asked = ", ".join(values.eval.plan.question or [])
        raise UserError(f"eval.plan.question: found {asked}, but this study compares {', '.join(named)}.")
    if len(variants) > 1 and not values.data.validation_ratio:
        raise UserError(
            "data.validation_ratio: found 0, but variants are ranked on the validation side. Set a ratio, or drop --vary."
        )
    find_local_model(values.base_model_id, values.base_model_revision)
    if not values.data.test_ratio:
        raise UserError("data.test_ratio: found 0, but a study reports on the test side. Set a ratio, such as 0.2.")
    for by in dict.fromkeys(arm.by for arm in arms if arm.by):
        check_labeller(values, by)


def is_finished(run: RunOfStudy) -> bool:
    """Tell whether a run has left its adapter or pairs, made of the adapter and the pairs that are there now."""
    if not all(map(is_finished, run.needs)):
        return False
    if isinstance(run, PairsMember):
        made = read_pairs_manifest(run.path)
        whole = made is not None and run.path.is_file() and sha256_file(run.path) == made.sha256
        return made is not None and whole and made.parent.sha256 == read_manifest(run.parent.path, verify=False).sha256
    repair_interrupted_publish(run.path)
    if not (run.path / MANIFEST).is_file():
        return False
    manifest = read_manifest(run.path, stages=(run.stage.name,), verify=False)
    if run.pairs and [source.sha256 for source in manifest.datasets] != [sha256_file(run.pairs.path)]:
        return False
    continued = manifest.parent and manifest.parent.sha256
    return run.parent is None or continued == read_manifest(run.parent.path, verify=False).sha256


def comparisons(several: bool) -> list[str]:
    """Name the comparisons of a study in their order."""
    return [VALIDATION, COMPARISON] if several else [COMPARISON]


def show_plan(folder: Path, members: Sequence[RunOfStudy], values: Config, several: bool, record: Record) -> None:
    """List the runs, which of them are finished, and how long the others take where that was measured."""
    left = [member.kind for member in members if not is_finished(member)]
    compared = comparisons(several)
    trained = [member for member in members if isinstance(member, Member)]
    pairs = f" and {len(members) - len(trained)} of making pairs" if len(members) > len(trained) else ""
    lines = [
        f"{folder}: {len(trained)} runs of training{pairs}, {len(left)} of them left, and {len(compared)} of comparison: "
        f"{time_left(record.seconds, [*left, *compared])}"
    ]
    for member in members:
        to_do = "to train" if isinstance(member, Member) else "to make"
        lines.append(f"{'finished' if is_finished(member) else to_do:8}  {member.name}")
    if several:
        count = len({(member.arm, member.variant) for member in trained if member.arm != SFT.name})
        lines.append(f"to rank   {count} variants, on the validation side")
    names = [shown_arm(arm.name) for arm in arms_of(values)]
    best = "the best variant" if several and len(names) == 1 else ", ".join(names)
    lines.append(f"to report {best}, its SFT and the base, on the test side")
    log.info("%s", "\n  ".join(lines))


def shown_arm(name: str) -> str:
    """Write an arm as in prose: DPO, but dpo_checks."""
    stage = TRAINING_STAGES.get(name)
    return stage.title if stage else name


def train(study: Study) -> None:
    """Do the runs that are missing; one that fails is named, and the rest continues without it."""
    for member in study.left:
        reason: str | None = None
        failed = next((needed.name for needed in member.needs if needed.name in study.missing), None)
        if failed:
            study.progress.skip()
            reason = f"not {'trained' if isinstance(member, Member) else 'made'}, because {failed} failed"
        else:
            wait_until_free(member.path)
            if is_finished(member):
                study.progress.skip()
            else:
                reason = study.start(member.script, member.path, member.flags)
        if reason:
            study.missing[member.name] = reason
            log.warning("%s: %s", member.name, reason)


@dataclass(frozen=True)
class Candidate:
    """One variant of an arm: what it is called, and its adapters by seed."""

    arm: str
    variant: str
    name: str
    members: dict[int, Member]

    @property
    def first(self) -> Member:
        """Return the member of the first seed."""
        return next(iter(self.members.values()))


def find_candidates(study: Study) -> list[Candidate]:
    """Return the variants of all arms with the adapters that are finished, arm by arm; one without any takes no part."""
    arms = [arm.name for arm in arms_of(study.run.values)]
    found: dict[tuple[str, str], dict[int, Member]] = {}
    for member in study.members:
        if isinstance(member, Member) and member.arm in arms:
            of_variant = found.setdefault((member.arm, member.variant), {})
            if is_finished(member):
                of_variant[member.seed] = member
    return [
        Candidate(arm, variant, variant if len(arms) == 1 else f"{arm} {variant}".strip(), members)
        for (arm, variant), members in sorted(found.items(), key=lambda each: arms.index(each[0][0]))
        if members
    ]


def rank(study: Study) -> tuple[Result, list[Candidate]]:
    """Choose the variant of each arm that is best on the validation side, by the mean of the primary measure over the seeds.

    A variant that failed under every seed takes no part, and a seed only where all others are there.
    Raises: UserError when no seed is whole.
    """
    candidates = find_candidates(study)
    seeds = [seed for seed in seeds_of(study.run.values) if all(seed in each.members for each in candidates)]
    missing = [f"{name}: {reason.splitlines()[0]}" for name, reason in study.missing.items()]
    if not candidates or not seeds:
        raise UserError(
            f"no seed has all its adapters, so there is nothing to compare. See the logs in {study.folder}; the same "
            "command tries the missing runs again."
        )
    ranked = [Ranked(name=each.name, arm=each.arm, settings=each.first.varied) for each in candidates]
    result = Result(seeds=seeds, missing=missing, variants=ranked, chosen="")
    of_arms = {each.arm: [one for one in candidates if one.arm == each.arm] for each in candidates}
    figures: dict[str, float] = {}
    best: Callable[..., Candidate] = max
    if study.several:
        varied = [each for each in candidates if len(of_arms[each.arm]) > 1] or candidates
        names = {each.name: arm_name(each.name, number) for number, each in enumerate(varied, 1)}
        arms = {names[each.name]: [each.members[seed].path for seed in seeds] for each in varied}
        settings = {"eval.plan.question": None} | made_data(study, varied)
        report = compare(study, VALIDATION, arms, settings, ["--side", "validation"])
        result.measure = report["question"]["measures"][0]
        metric = next(metric for metric in report["metrics"] if metric["name"] == result.measure)
        result.title, result.unit = metric["title"], metric["unit"]
        figures = {name: metric["models"][arm]["value"] for name, arm in names.items()}
        for one in ranked:
            one.value = figures.get(one.name)
        best = max if metric["better"] == "higher" else min
    # of equal ones the first
    chosen = [best(several, key=lambda each: figures.get(each.name, 0.0)) for several in of_arms.values()]
    result.chosen = ", ".join(each.name for each in chosen)
    return result, chosen


def made_data(study: Study, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return the data of stages that train on made pairs alone: the configured file has nothing to do with this study."""
    own = {arm.stage for arm in arms_of(study.run.values) if not arm.by}
    members = [each.first for each in candidates if each.first.stage not in own and each.first.pairs]
    return {f"{each.stage.name}.dataset_path": str(each.pairs.path) for each in members if each.pairs}


def arm_name(variant: str, number: int) -> str:
    """Return what a variant is called in the comparison: its own name unless that is too long for the head of a column."""
    try:
        return check_arm_name(variant)
    except ValueError:
        return f"variant {number}"


def compare_chosen(study: Study, result: Result, chosen: Sequence[Candidate]) -> None:
    """Report on the test side: the chosen variant of each arm, the SFT adapters that they continue, and the base."""
    question = study.run.values.eval.plan.question or []
    sft: dict[str, list[Path]] = {}
    for each in sorted(
        chosen, key=lambda each: each.arm not in question[:1]
    ):  # asked is about the adapters of this one
        folders = [each.members[seed].sft_folder for seed in result.seeds]
        if folders not in sft.values():
            sft[f"{SFT.name} of {each.arm}" if sft else SFT.name] = folders
    arms = sft | {each.arm: [each.members[seed].path for seed in result.seeds] for each in chosen}
    varied = [each.first.varied for each in chosen]
    settings = {
        key: value
        for one in varied
        for key, value in one.items()
        if all(other.get(key, value) == value for other in varied)
    }
    if not {*question} <= {
        BASE,
        *arms,
    }:  # an arm of it failed under every seed, and the others are still worth a report
        settings["eval.plan.question"] = None
    notes = [part for note in notes_of(study, result, chosen) for part in ("--note", note)]
    compare(study, COMPARISON, arms, settings | made_data(study, chosen), notes)


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


def notes_of(study: Study, result: Result, chosen: Sequence[Candidate]) -> Iterator[str]:
    """Say in the report what the arms were trained on, how their variants were chosen, and which runs are missing."""
    for each in chosen:
        if each.first.pairs:
            made = [member.pairs.path for member in each.members.values() if member.pairs]
            counts = [len(facts.pairs) for facts in map(read_pairs_manifest, made) if facts]
            yield (
                f"{each.arm} is {each.first.stage.title} on pairs of the answers that each seed's SFT adapter gave to training "
                f"prompts, preferred by {each.first.pairs.by}: {', '.join(map(str, counts))} pairs."
            )
        rivals = [one for one in result.variants if one.arm == each.arm and one.value is not None]
        if rivals:
            table = ", ".join(f"{ranked.name} {shown(ranked.value, result.unit)}" for ranked in rivals)
            yield (
                f"{shown_arm(each.arm)} is the variant {each.variant}, the best of {len(rivals)} on the validation side by "
                f"{result.title!r} (mean over {len(result.seeds)} seeds): {table}."
            )
        elif each.variant:
            yield f"{shown_arm(each.arm)} is the variant {each.variant}."
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
    files = [study.folder / RECORD]
    for member in filter(is_finished, study.members):
        files.append(member.path / MANIFEST if isinstance(member, Member) else pairs_manifest_path(member.path))
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
        ranked = [f"- {r.name}: {shown(r.value, result.unit)}" for r in result.variants if r.value is not None]
        title = f"Validation side, {result.title} (mean over the seeds). Chosen: {result.chosen}."
        tracker.describe("\n".join([title, "", *ranked]))
    tracker.set_tag("chosen", result.chosen)
    tracker.log_artifact(study.folder / RECORD)


def summary(study: Study, result: Result, chosen: Sequence[Candidate]) -> str:
    """Say what was found, what is missing, and where to look."""
    lines = [f"the study is done: {len(result.seeds)} seeds ({', '.join(map(str, result.seeds))})"]
    if result.measure:
        lines.append(f"validation side, {result.title} (mean over the seeds)")
        ranking = [ranked for ranked in result.variants if ranked.value is not None]
        width = max(len(ranked.name) for ranked in ranking)
        for ranked in ranking:
            mark = "  chosen" if ranked.name in {each.name for each in chosen} else ""
            lines.append(f"  {ranked.name:{width}}  {shown(ranked.value, result.unit)}{mark}")
    lines += [f"missing   {reason}" for reason in result.missing]
    lines.append(f"report    {study.folder / COMPARISON / 'report.html'}")
    lines.append(f"runs      {study.folder / RECORD}; MLflow run {study.record.mlflow_run_id}")
    return "\n  ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
