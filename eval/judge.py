"""Let a judge say which of two answers is better, blind: an OpenAI-compatible endpoint, or a person.

Reads the comparison in `eval.output_dir`; each vote goes at once to <eval.output_dir>.votes.jsonl, so the same command
continues after an interruption. Puts win rate, interval and test into the report. Needs requirements.txt.

    python -m eval.judge --config configs/config.yaml --by human
    python -m eval.judge --config configs/config.yaml --by endpoint --set eval.judge.base_url=http://127.0.0.1:8080/v1 --set eval.judge.model=NAME
    python -m eval.judge --config configs/config.yaml --by html
    python -m eval.judge --config configs/config.yaml --votes votes.jsonl
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import Manifest, read_manifest
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import Interrupted, UserError, entry_point
from scripts.common.paths import portable_path
from scripts.common.run import Run, open_run

if TYPE_CHECKING:
    from eval.judging.votes import Contest, VotesFile
    from eval.report import Report

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--by",
        choices=("endpoint", "human", "html"),
        help="who judges: eval.judge.base_url, you at this terminal, or whoever opens the page that is written",
    )
    source.add_argument("--votes", nargs="+", metavar="FILE", help="read back what the page's button saved")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Ask, keep the votes, and bring the report up to date."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    with open_run("judge", config, "eval.output_dir", extends="comparison") as run:
        manifest = read_manifest(run.output_dir)

        from eval.judging.page import write_page
        from eval.judging.votes import VotesFile
        from eval.report import read_report

        report = read_report(run.output_dir)
        contest = choose_contest(config, report)
        if arguments.by == "html":
            page = beside(run.output_dir, ".judge.html")
            write_page(contest, page)
            log.info("open %s in a browser, vote, save the votes, then: python -m eval.judge --votes FILE", page)
            return 0
        file = VotesFile(beside(run.output_dir, ".votes.jsonl"))
        try:
            collect_votes(arguments, config, contest, file)
        except Interrupted:
            log.warning("stopped; %s keeps every vote, and the same command continues", file.path)
            raise
        publish_votes(run, manifest, report, file)
    return 0


def beside(folder: Path, suffix: str) -> Path:
    """Name a file that stands beside a folder."""
    return folder.with_name(folder.name + suffix)


def choose_contest(config: LoadedConfig, report: Report) -> Contest:
    """Pair the answers of the two models to judge."""
    from eval.judging.votes import pair_up

    settings = config.values.eval.judge
    asked = [report.question.a, report.question.b] if report.question else []
    models = settings.models or asked or (report.verdict.compared if report.verdict else [])
    if not set(models) <= set(report.models) or len(set(models)) != 2:
        raise UserError(f"eval.judge.models: found {', '.join(models)}, wanted two of {', '.join(report.models)}.")
    b, a = sorted(models, key=report.models.index)  # the later one is the candidate
    contest = pair_up(report.samples, (a, b), settings.criteria)
    if not contest.questions:
        raise UserError(f"{a} and {b} give the same answer to all {contest.same} prompts: there is nothing to judge.")
    return contest


def collect_votes(arguments: argparse.Namespace, config: LoadedConfig, contest: Contest, file: VotesFile) -> None:
    """Ask who was chosen, or read the votes that a page saved; each vote is kept at once."""
    if arguments.by == "endpoint":
        from eval.judging.endpoint import ask_endpoint

        ask_endpoint(config.values, contest, file)
    elif arguments.by == "human":
        from eval.judging.terminal import ask_at_terminal

        ask_at_terminal(contest, file)
    else:
        from eval.judging.page import take_page_votes

        take_page_votes(contest, file, arguments.votes)


def publish_votes(run: Run, manifest: Manifest, report: Report, file: VotesFile) -> None:
    """Put what the votes say into the report, and the folder in place of the old one."""
    from eval.judging.votes import describe_votes, pair_up
    from eval.report import Judgement, write_report
    from scripts.common.tracking import tracked_run

    criteria = run.values.eval.judge.criteria
    votes = list(file.votes.values())
    contests = [pair_up(report.samples, (a, b), criteria) for b, a in combinations(report.models, 2)]
    rows = describe_votes(contests, votes)
    others = sum(vote.comparison not in {contest.comparison for contest in contests} for vote in votes)
    if others:
        log.warning("%s: %d votes are on other answers or criteria and are left out", file.path, others)
    if not rows:
        log.warning("no pair is judged yet, so the report stays as it is")
        return
    created = datetime.now(UTC).isoformat(timespec="seconds")
    report.judge = Judgement(created=created, criteria=criteria, votes=portable_path(file.path), rows=rows)
    part = run.empty_folder("judged")
    shutil.copytree(run.output_dir, part, dirs_exist_ok=True)
    write_report(part, report)
    run.publish(part, manifest)
    name = f"judged by {', '.join(sorted({row['judge'] for row in rows}))} · {run.output_dir.name}"
    with tracked_run(run.config, "judge", name=name, parent_run_id=manifest.mlflow.run_id) as tracker:
        tracker.summarise({f"{row['judge']}.{row['a']} over {row['b']}": row["value"] for row in rows})
        tracker.describe("\n\n".join(row["text"] for row in rows))
        tracker.log_artifact(run.output_dir)
    for row in rows:
        log.info("%s", row["text"])
    log.info("  report  %s", run.output_dir / "report.html")


if __name__ == "__main__":
    sys.exit(main())
