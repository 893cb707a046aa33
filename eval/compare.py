"""Say honestly which is better: base, SFT, DPO or any other arms on the same held-out prompts, with intervals and paired tests.

Reads the adapters of `sft.output_dir` and `dpo.output_dir`, or those of `eval.models`, and the held-out side of the
datasets; writes report.html, report.json, samples.jsonl and items.jsonl to `eval.output_dir`, and an MLflow run.
Needs requirements.txt.

    python -m eval.compare --config configs/config.yaml
    python -m eval.compare --config configs/config.yaml --models sft=outputs/sft_adapter mild=outputs/mild,outputs/mild_1
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.arms import (
    Arm,
    add_arm_arguments,
    check_made_on_base,
    find_arms,
    members_of,
    seeds_by_arm,
    stages_of,
)
from eval.checks import check_rules
from eval.figures import SPACE, spoken
from eval.held_out import HeldOut, leave_out_unfit, read_held_out
from eval.looks import Looks, side_of
from scripts.common.artifacts import Manifest, RunFacts
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.lineage import HeldOutSide
from scripts.common.machine import peak_memory_gib
from scripts.common.run import Run, open_run
from scripts.common.schema import Config
from scripts.common.stages import BASE

if TYPE_CHECKING:
    from eval.measuring import Measured, Prepared
    from eval.metrics import Metric
    from eval.report import Report
    from eval.tables import Table
    from eval.verdict import Question
    from scripts.common.tracking import Tracker

log = logging.getLogger(__name__)
TEST: Final = "test"
WIDEST = 44  # characters of a title in the description of a run


@dataclass(frozen=True)
class Comparison:
    """What is compared on what: the arms, the base under them, the held-out items as its token ids, and the question."""

    arms: list[Arm]
    base_folder: Path
    held_out: HeldOut
    prepared: Prepared
    question: Question
    side: HeldOutSide
    notes: list[str]


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME=FOLDER[,FOLDER…]",
        help="what is compared with the base, in place of eval.models; several folders are several seeds of one arm",
    )  # fmt: skip
    parser.add_argument(
        "--side", choices=(TEST, "validation"), default=TEST,
        help="the held-out side to measure on; choose among variants on `validation` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--note",
        action="append",
        default=[],
        metavar="TEXT",
        dest="notes",
        help="a note for the report; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the models and say what the comparison can show; measure nothing"
    )
    parser.add_argument("--runs", nargs="*", help=argparse.SUPPRESS)
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Find the arms, measure every model, decide and report."""
    arguments = build_parser().parse_args(argv)
    if arguments.runs is not None:
        raise UserError(
            "--runs: no longer exists. `python -m scripts.study` trains and compares several seeds; to compare adapters "
            "that are there, name all seeds of an arm: --models sft=DIR,DIR,… dpo=DIR,DIR,…"
        )
    config = load_config(arguments.config, [*arguments.overrides, *add_arm_arguments(arguments.models)])
    check_rules(config.values.eval.checks)
    with open_run("comparison", config, "eval.output_dir", dry=arguments.dry_run) as run:
        arms = find_arms(config, arguments.side)
        if run.dry:
            return show_dry_run(prepare(config, arms, arguments.side), config.values)
        looks = Looks(run.output_dir)
        comparison = prepare(config, arms, arguments.side, arguments.notes)

        from eval.measuring import measure_arms, measured_references
        from eval.tables import build_tables
        from scripts.common.tracking import tracked_run

        name = f"comparison of {', '.join(arm.name for arm in arms)} · {arguments.side} side"
        with tracked_run(config, "comparison", name=name, parent_run_id=newest(arms).mlflow.run_id) as tracker:
            measured = measure_arms(arms, comparison.base_folder, comparison.prepared)
            references = measured_references(arms, measured)
            tables = build_tables(measured, seeds_by_arm(arms), references, comparison.prepared)
            report = describe(config, comparison, measured, tables, looks)
            publish_report(run, comparison, report, tables, looks, tracker)
    assert report.verdict is not None
    log.info("%s\n  report  %s", report.verdict.text, run.output_dir / "report.html")
    return 0


def told(metric: Metric) -> str:
    """Name a metric for a list of runs: a check by its words, as its number depends on the order in the configuration."""
    return metric.title if re.fullmatch(r"check_\d+", metric.name) else metric.name


def lay_out(report: Report) -> str:
    """Lay out all figures as a block of text as wide as MLflow shows it; it puts no space between columns of a table."""
    rows = [["held out", "n", *report.models]]
    for metric in report.metrics:
        found = [metric.models.get(name) for name in report.models]
        title = re.sub(r" \(.*", "", metric.title) + ("" if metric.unit == "share" else f", {metric.unit}")
        shown = [spoken(each.value if each else None, metric.unit).replace(SPACE, " ") for each in found]
        rows.append([title if len(title) <= WIDEST else f"{title[: WIDEST - 1]}…", str(metric.n), *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for title, *figures in rows:
        right = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
        lines.append("  ".join([title.ljust(widths[0]), *right]))
    return "\n".join(["```", *lines, "```"])


def newest(arms: Sequence[Arm]) -> Manifest:
    """Return the manifest that the report hangs below: that of the last arm."""
    return arms[-1].members[0].manifest


def prepare(config: LoadedConfig, arms: list[Arm], side: HeldOutSide = TEST, notes: Sequence[str] = ()) -> Comparison:
    """Read what is held out, find the base, turn it into token ids, and say what of the lineage is not as it should be."""
    held_out = read_held_out(config, stages_of(arms), side)

    from eval.lineage_notes import describe_arms
    from eval.measuring import Prepared
    from eval.question import choose_question, describe_seeds
    from scripts.dataset.chat_format import ChatFormat
    from scripts.model.base import load_tokenizer
    from scripts.model.find import find_model
    from scripts.model.shape import position_table

    values = config.values
    base_folder = find_model(values.base_model_id, values.base_model_revision)
    tokenizer = load_tokenizer(base_folder)
    check_made_on_base(arms, base_folder, tokenizer)
    lineage = held_out.describe_left_out() + describe_arms(arms, held_out) + describe_seeds(values, arms)
    for note in lineage:
        log.warning("%s", note)
    chat = ChatFormat.of(tokenizer, arms[0].members[0].manifest)
    held_out = leave_out_unfit(held_out, chat, position_table(base_folder), values.data)
    question = choose_question(values, arms, held_out)
    prepared = Prepared(tokenizer, held_out, values)
    log.info("%d held-out prompts and %d pairs", len(prepared.questions), len(prepared.pairs))
    return Comparison(arms, base_folder, held_out, prepared, question, side, [*notes, *lineage])


def show_dry_run(comparison: Comparison, values: Config) -> int:
    """Show what would be compared, the question, and how small a difference would be found."""
    from eval.planning import log_smallest_gaps, plan_lines

    for arm in comparison.arms:
        log.info("%s: %s", arm.name, ", ".join(f"{m.folder} (seed {m.seed})" for m in arm.members))
    question = comparison.question
    planned = "planned before training" if question.planned else "not planned before training"
    measures = " and ".join(question.measures)
    log.info("the question: %s against %s in %s; %s", question.a, question.b, measures, planned)
    asked = [set(arm.seeds) for arm in comparison.arms if arm.name in (question.a, question.b) and not arm.stands]
    shared = set.intersection(*asked) if asked else set()
    log_smallest_gaps(plan_lines(comparison.held_out, values, len(shared) or 1, question))
    return 0


def describe(
    config: LoadedConfig,
    comparison: Comparison,
    measured: Mapping[str, Sequence[Measured]],
    tables: Sequence[Table],
    looks: Looks,
) -> Report:
    """Decide, and put everything that the report shows together."""
    from eval.facts import add_baselines, choose_answers, describe_columns, describe_health, describe_samples
    from eval.lineage_notes import describe_lineage
    from eval.lmeval.results import find_benchmarks
    from eval.metrics import build_metrics
    from eval.report import Report, find_curves
    from eval.verdict import decide

    arms, side, question = comparison.arms, comparison.side, comparison.question
    metrics = build_metrics(tables, question)
    add_baselines(metrics, measured[BASE][0])
    verdict, notes = decide(metrics, question)
    places, shown = choose_answers(arms, question)
    benchmarks, left_out = find_benchmarks(Path(config.values.lmeval.output_dir), [m.folder for m in members_of(arms)])
    curves = {arm.name: find_curves([member.folder for member in arm.members]) for arm in arms}
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        title=f"{' · '.join(measured)} on {comparison.base_folder.name}",
        verdict=verdict,
        models=list(measured),
        arms=describe_columns(arms),
        side=side,
        question=question,
        looks=looks.count(side_of(comparison.held_out, config.values.data)) if side == TEST else None,
        metrics=metrics,
        health={name: describe_health(members) for name, members in measured.items()},
        training={member.label: member.manifest.metrics for member in members_of(arms) if not member.is_merged},
        curves={name: drawn for name, drawn in curves.items() if drawn},
        lineage=describe_lineage(arms),
        samples=describe_samples(comparison.prepared, measured, places, question),
        benchmarks=benchmarks,
        notes=[*notes, *comparison.notes, *shown, *([left_out] if left_out else [])],
    )


def publish_report(
    run: Run, comparison: Comparison, report: Report, tables: Sequence[Table], looks: Looks, tracker: Tracker
) -> None:
    """Write the report folder, put it in place of the old one, and log it."""
    from eval.report import write_report
    from eval.tables import write_items

    part = run.empty_folder()
    write_report(part, report)
    write_items(part, tables)
    made = newest(comparison.arms)
    outcome = report.verdict.outcome if report.verdict else None
    manifest = Manifest(
        stage=run.stage,
        base_model=made.base_model,
        tokenizer_sha256=made.tokenizer_sha256,
        chat_template_sha256=made.chat_template_sha256,
        parent=made.as_parent(comparison.arms[-1].members[0].folder),
        datasets=made.datasets,
        split=made.split,
        plan=made.plan,
        config=run.values.model_dump(mode="json"),
        mlflow=RunFacts(run_id=tracker.run_id),
        metrics={"outcome": outcome, "peak_memory_gib": round(peak_memory_gib(), 2)},
    )
    if comparison.side == TEST:  # before it can be seen
        side = side_of(comparison.held_out, run.values.data)
        looks.add(side, [member.manifest.sha256 for member in members_of(comparison.arms)])
    run.publish(part, manifest)
    primary = [metric for metric in report.metrics if metric.primary]
    figures = {f"{told(metric)}.{name}": each.value for metric in primary for name, each in metric.models.items()}
    tracker.summarise({key: value for key, value in figures.items() if value is not None})
    if report.verdict:
        tracker.describe(f"{report.verdict.text}\n\n{lay_out(report)}")
        tracker.set_tag("outcome", report.verdict.outcome)
    tracker.log_artifact(run.output_dir)


if __name__ == "__main__":
    sys.exit(main())
