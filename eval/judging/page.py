"""Ask a person in a browser: a page that names no model and needs no network, and the votes that it saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eval.judging.votes import CHOICES, Contest, VotesFile
from scripts.common.errors import UserError

PAGE = Path(__file__).with_name("page.html")


def write_page(contest: Contest, path: Path) -> None:
    """Write the page that a person opens in a browser; what it quotes cannot become markup."""
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
    path.write_text(PAGE.read_text(encoding="utf-8").replace("{{ data }}", data), encoding="utf-8", newline="\n")


def take_page_votes(contest: Contest, file: VotesFile, paths: Sequence[str]) -> None:
    """Add the votes that pages saved; all files are checked before the first vote is taken."""
    first = {question.sample: question.shown_first for question in contest.questions}
    for sample, judge, choice in [vote for path in paths for vote in read_page_votes(Path(path), contest)]:
        file.add(contest, sample, "html", judge, first[sample], choice)


def read_page_votes(path: Path, contest: Contest) -> list[tuple[int, str, str]]:
    """Read what the voting page saved: (sample, judge, choice) per line.

    Raises: UserError when a line is not a vote or belongs to other answers.
    """
    samples = {question.sample for question in contest.questions}
    votes = []
    try:
        lines = path.read_text(encoding="utf-8").strip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error.__class__.__name__}). Name the file the page saved.") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            comparison, sample, judge, choice = (entry[key] for key in ("comparison", "sample", "judge", "choice"))
            valid = choice in CHOICES and isinstance(sample, int) and judge == str(judge)[:40] and judge.isprintable()
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:
            raise UserError(f"{path}:{number}: not a vote. Name the file that the voting page saved.")
        if comparison != contest.comparison or sample not in samples:
            raise UserError(
                f"{path}:{number}: a vote on another comparison: other answers, models or criteria than the present ones. "
                "Write the page again with --by html and vote there, or return to that comparison."
            )
        votes.append((sample, judge, choice))
    return votes
