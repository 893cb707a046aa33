"""Let a judge say which of two answers is better, blind: an OpenAI-compatible endpoint, or a person.

Reads the comparison in `eval.output_dir`; each vote goes at once to <eval.output_dir>.votes.jsonl, so the same command goes
on after an interruption. Puts win rate, interval and test into the report. Needs requirements.txt.

    python -m eval.judge --config configs/config.yaml --by human
    python -m eval.judge --config configs/config.yaml --by endpoint --set eval.judge.base_url=http://127.0.0.1:8080/v1 --set eval.judge.model=NAME
    python -m eval.judge --config configs/config.yaml --by html
    python -m eval.judge --config configs/config.yaml --votes votes.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.artifacts import locked_run_dir, portable_path, publish, read_manifest, update_manifest
from scripts.common.config import LoadedConfig, add_config_arguments, load_config
from scripts.common.errors import Interrupted, UserError, entry_point
from scripts.common.runtime import prepare_environment, set_up_logging, trapped_signals

if TYPE_CHECKING:
    from eval.votes import Contest, Question, VotesFile

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("judge_page.html")
TERMINAL = "the person at the terminal"
UNREADABLE = 8  # replies in a row without a single verdict end a run before it costs more
KEYS = {"a": "first", "b": "second", "t": "tie"}


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


def choose_contest(config: LoadedConfig, report: dict[str, Any]) -> Contest:
    """Pair the answers of the two models that shall be judged."""
    from eval.votes import pair_up

    settings = config.values.eval.judge
    wanted = settings.models or report["verdict"]["compared"]
    a, b = sorted(wanted, key=lambda name: -report["models"].index(name) if name in report["models"] else 1)
    if not {a, b} <= set(report["models"]) or a == b:
        raise UserError(f"eval.judge.models: found {', '.join(wanted)}, wanted two of {', '.join(report['models'])}.")
    contest = pair_up(report["samples"], (a, b), settings.criteria)
    if not contest.questions:
        raise UserError(f"{a} and {b} give the same answer to all {contest.same} prompts: there is nothing to judge.")
    return contest


def ask_endpoint(config: LoadedConfig, contest: Contest, file: VotesFile) -> None:
    """Ask about each pair in both orders; every reply is kept, also of a run that is stopped."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from tqdm import tqdm

    from eval.endpoint import Endpoint, messages, read_choice

    lock, tokens, read = threading.Lock(), 0, 0
    unreadable: list[str] = []
    with Endpoint(config.values) as endpoint:

        def ask(question: Question, first: str) -> None:
            nonlocal tokens, read
            if endpoint.stop.is_set():
                return
            reply, used = endpoint.ask(contest, question, first)
            choice = read_choice(reply)
            with lock:
                tokens += used
                if choice is None:
                    unreadable.append(reply[:80])
                    return
                read += 1
                file.add(contest, question.sample, "endpoint", endpoint.name, first, choice)

        missing = file.missing(contest, "endpoint", endpoint.name, both_orders=True)
        letters = sum(len(m["content"]) for question, first in missing for m in messages(contest, question, first))
        log.info("%s: %d questions, about %d tokens to read", endpoint.name, len(missing), letters // 4)
        with ThreadPoolExecutor(config.values.eval.judge.concurrent_requests) as pool:
            waiting = [pool.submit(ask, question, first) for question, first in missing]
            try:
                for done in tqdm(as_completed(waiting), total=len(waiting), unit="question", dynamic_ncols=True):
                    done.result()
                    if len(unreadable) >= UNREADABLE and not read:
                        raise UserError(
                            f"{endpoint.name}: none of the first {len(unreadable)} replies was A, B or TIE; the last begins "
                            f"{unreadable[-1]!r}. Use a stronger model, or raise eval.judge.max_tokens for one that thinks first."
                        )
            except BaseException:
                endpoint.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if tokens:
        log.info("%s counted %d tokens", endpoint.name, tokens)
    if unreadable:
        log.warning(
            "%d replies were not A, B or TIE, such as %r; their prompts are not counted. Run again to ask anew.",
            len(unreadable), unreadable[-1],
        )  # fmt: skip


def ask_at_terminal(contest: Contest, file: VotesFile) -> None:
    """Show one pair after the other and take a letter; q or the end of input stops."""
    missing = file.missing(contest, "human", TERMINAL, both_orders=False)
    total = len(contest.questions)
    sys.stdout.write(f"{contest.criteria}\n")
    for place, (question, first) in enumerate(missing, total - len(missing) + 1):
        texts = {"REQUEST": question.prompt, "ANSWER A": question.answers[first]}
        texts["ANSWER B"] = question.answers[contest.second(first)]
        sys.stdout.write(f"\n{place} of {total}\n")
        sys.stdout.writelines(f"\n{title}\n{quoted(text)}\n" for title, text in texts.items())
        letter = ""
        while letter not in (*KEYS, "q"):
            try:
                letter = input("\nWhich is better: a, b, t for a tie, q to stop? ").strip().lower()
            except EOFError:
                letter = "q"
        if letter == "q":
            log.info("stopped; the same command goes on with question %d", place)
            return
        file.add(contest, question.sample, "human", TERMINAL, first, KEYS[letter])


def quoted(text: str) -> str:
    """Set a text apart, with control characters spelt out: what a model writes must not steer a terminal."""
    lines = (
        "".join(c if c.isprintable() or c in "\t\u200c\u200d" else c.encode("unicode_escape").decode() for c in line)
        for line in text.split("\n")
    )
    return "\n".join(f"  | {line}" for line in lines)


def write_page(contest: Contest, path: Path) -> None:
    """Write the page that a person opens in a browser; it names no model and needs no network."""
    questions = [
        {
            "sample": question.sample,
            "prompt": question.prompt,
            "answers": [question.answers[question.shown_first], question.answers[contest.second(question.shown_first)]],
        }
        for question in contest.questions
    ]
    facts = {"comparison": contest.comparison, "criteria": contest.criteria, "questions": questions}
    data = json.dumps(facts).replace("<", "\\u003c")  # no answer can end the element it stands in
    path.write_text(PAGE.read_text(encoding="utf-8").replace("{{ data }}", data), encoding="utf-8")


def take_page_votes(contest: Contest, file: VotesFile, paths: Sequence[str]) -> None:
    """Add the votes that pages saved; all files are checked before the first vote is taken."""
    from eval.votes import read_page_votes

    first = {question.sample: question.shown_first for question in contest.questions}
    for sample, judge, choice in [vote for path in paths for vote in read_page_votes(Path(path), contest)]:
        file.add(contest, sample, "html", judge, first[sample], choice)


def publish_votes(config: LoadedConfig, run_dir: Path, report: dict[str, Any], file: VotesFile) -> None:
    """Put what the votes say into the report and the folder in place of the old one."""
    from eval.report import write_report
    from eval.votes import describe_votes, pair_up
    from scripts.common.tracking import tracked_run

    output_dir, criteria = Path(config.values.eval.output_dir), config.values.eval.judge.criteria
    votes = list(file.votes.values())
    contests = [pair_up(report["samples"], (a, b), criteria) for b, a in combinations(report["models"], 2)]
    rows = describe_votes(contests, votes)
    others = sum(vote.comparison not in {contest.comparison for contest in contests} for vote in votes)
    if others:
        log.warning("%s: %d votes are on other answers or criteria and are left out", file.path, others)
    if not rows:
        log.warning("no pair is judged yet, so the report stays as it is")
        return
    created = datetime.now(UTC).isoformat(timespec="seconds")
    report["judge"] = {"created": created, "criteria": criteria, "votes": portable_path(file.path), "rows": rows}
    manifest = read_manifest(output_dir)
    part = run_dir / "judged"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(output_dir, part)
    write_report(part, report)
    update_manifest(part, manifest)
    publish(part, output_dir)
    with tracked_run(config, "judge", parent_run_id=manifest["mlflow"]["run_id"]) as tracker:
        for row in rows:
            name = re.sub(r"[^\w.-]+", "_", f"{row['judge']} {row['a']} over {row['b']}")
            tracker.log_metrics({f"eval/judge/{name}": row["value"]})
        tracker.log_artifact(output_dir)
    for row in rows:
        log.info("%s", row["text"])
    log.info("  report  %s", output_dir / "report.html")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Ask, keep the votes, and bring the report up to date."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    prepare_environment(config.values)
    output_dir = Path(config.values.eval.output_dir)
    with trapped_signals(), locked_run_dir(output_dir) as run_dir:
        set_up_logging(run_dir / "log.txt")
        read_manifest(output_dir, stages=("comparison",))

        from eval.report import read_report
        from eval.votes import VotesFile

        report = read_report(output_dir)
        contest = choose_contest(config, report)
        if arguments.by == "html":
            page = output_dir.with_name(output_dir.name + ".judge.html")
            write_page(contest, page)
            log.info("open %s in a browser, vote, save the votes, then: python -m eval.judge --votes FILE", page)
            return 0
        file = VotesFile(output_dir.with_name(output_dir.name + ".votes.jsonl"))
        try:
            if arguments.by == "endpoint":
                ask_endpoint(config, contest, file)
            elif arguments.by == "human":
                ask_at_terminal(contest, file)
            else:
                take_page_votes(contest, file, arguments.votes)
        except Interrupted:
            log.warning("stopped; %s keeps every vote, and the same command goes on", file.path)
            raise
        publish_votes(config, run_dir, report, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
