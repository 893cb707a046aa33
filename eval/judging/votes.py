"""Which of two answers is better: the questions, the file of votes, and what the votes say together.

A vote is one line of JSON: `{"comparison", "sample", "by", "judge", "models": [first shown, second shown], "choice", "created"}`.
It is not a training record: it may be a tie, an endpoint votes twice on each question, and the prompts are the held-out ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.statistics import SIGNIFICANT, crossed, holm
from scripts.common.artifacts import private, sha256_json
from scripts.common.errors import UserError

if TYPE_CHECKING:
    from eval.report import Sample

log = logging.getLogger(__name__)

CHOICES = ("first", "second", "tie")
BY = ("endpoint", "human", "html")


@dataclass(frozen=True)
class Question:
    """One prompt and the different answers of two models to it."""

    sample: int  # its line in samples.jsonl, from 1
    prompt: str
    answers: dict[str, str]
    shown_first: str  # to a person, who is asked once


@dataclass(frozen=True)
class Contest:
    """All questions about two models, in the random but fixed order in which they are asked."""

    models: tuple[str, str]
    criteria: str
    comparison: str
    questions: tuple[Question, ...]
    same: int

    def second(self, first: str) -> str:
        """Return the other model."""
        return self.models[1] if first == self.models[0] else self.models[0]


def pair_up(samples: Sequence[Sample], models: tuple[str, str], criteria: str) -> Contest:
    """Ask about every prompt to which two models answer differently.

    The order is random, so that a person who stops early has judged a fair selection (samples.jsonl begins with the most
    changed ones); it and the positions follow from the texts, so that they are the same in each run.
    """
    texts = [[sample.prompt, *(sample.answers[model] or "" for model in models)] for sample in samples]
    comparison = sha256_json({"models": models, "criteria": criteria, "texts": texts})
    asked: list[tuple[bytes, Question]] = []
    for number, (prompt, *answers) in enumerate(texts, 1):
        if answers[0].strip() != answers[1].strip():
            draw = hashlib.sha256(f"{comparison} {number}".encode()).digest()
            both = dict(zip(models, answers, strict=True))
            asked.append((draw[1:], Question(number, prompt, both, models[draw[0] % 2])))
    questions = tuple(question for _, question in sorted(asked, key=lambda entry: entry[0]))
    return Contest(models, criteria, comparison, questions, len(texts) - len(questions))


@dataclass(frozen=True)
class Vote:
    """What one judge said of one question in one order."""

    comparison: str
    sample: int
    by: str
    judge: str
    models: tuple[str, str]
    choice: str
    created: str

    @property
    def winner(self) -> str | None:
        """Name the preferred model; None is a tie."""
        return None if self.choice == "tie" else self.models[CHOICES.index(self.choice)]

    @property
    def asked(self) -> tuple[str, str, str, int, str]:
        """Say who was asked what, in which order: a later vote on it replaces an earlier one."""
        return self.comparison, self.by, self.judge, self.sample, self.models[0]


class VotesFile:
    """A file to which votes are appended one by one; each is on the disk before the next question."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.votes: dict[tuple[str, str, str, int, str], Vote] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            log.warning("%s: the last line was cut off by an interruption; its question is asked again", path)
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
            vote = _parse_vote(line, f"{path}:{number}")
            self.votes[vote.asked] = vote

    def add(self, contest: Contest, sample: int, by: str, judge: str, first: str, choice: str) -> None:
        """Write a vote, unless it repeats the last one."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        vote = Vote(contest.comparison, sample, by, judge, (first, contest.second(first)), choice, created)
        known = self.votes.get(vote.asked)
        if known and known.choice == choice:
            return
        with open(self.path, "a", encoding="utf-8", newline="\n", opener=private) as file:
            file.write(json.dumps(asdict(vote), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.votes[vote.asked] = vote

    def missing(self, contest: Contest, by: str, judge: str, both_orders: bool) -> list[tuple[Question, str]]:
        """Return the questions that a judge has not answered yet, each with the model to show first."""
        questions = [
            (question, first)
            for question in contest.questions
            for first in (contest.models if both_orders else (question.shown_first,))
        ]
        asked = ((contest.comparison, by, judge, question.sample, first) for question, first in questions)
        return [entry for entry, key in zip(questions, asked, strict=True) if key not in self.votes]


def _parse_vote(line: str, where: str) -> Vote:
    try:
        entry = json.loads(line)
        vote = Vote(**{**entry, "models": tuple(entry["models"])})
        if vote.choice in CHOICES and vote.by in BY and len(vote.models) == 2 and isinstance(vote.sample, int):
            return vote
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{where}: not a vote of this project. Fix or remove the line; the other votes stay.")


def describe_votes(contests: Sequence[Contest], votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Return one row per judge and pair of models, p-values corrected for the number of rows."""
    rows = []
    for contest in contests:
        mine = [vote for vote in votes if vote.comparison == contest.comparison]
        for by, judge in dict.fromkeys((vote.by, vote.judge) for vote in mine):
            row = _describe_judge(contest, by, judge, [v for v in mine if (v.by, v.judge) == (by, judge)])
            rows += [row] if row else []
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row |= {"p_adjusted": adjusted, "shown": adjusted < SIGNIFICANT}
        row["text"] = _in_words(row)
    return rows


def _describe_judge(contest: Contest, by: str, judge: str, votes: Sequence[Vote]) -> dict[str, Any] | None:
    """Count wins; a judge asked in both orders wins a question for a model only by naming it in both."""
    a, b = contest.models
    verdicts = {(vote.sample, vote.models[0]): vote for vote in votes}
    outcomes: list[int] = []
    counted: list[Vote] = []
    changed, longer, of_unequal_length = 0, 0, 0
    for question in contest.questions:
        given = [verdicts[question.sample, first] for first in (a, b) if (question.sample, first) in verdicts]
        if len(given) < (2 if by == "endpoint" else 1):
            continue
        counted += given
        winners = {vote.winner for vote in given}
        changed += len(winners) > 1
        winner = winners.pop() if len(winners) == 1 else None
        outcomes.append(0 if winner is None else 1 if winner == a else -1)
        lengths = {model: len(answer) for model, answer in question.answers.items()}
        if winner and len(set(lengths.values())) > 1:
            of_unequal_length += 1
            longer += lengths[winner] == max(lengths.values())
    if not outcomes:
        return None
    wins, losses = outcomes.count(1), outcomes.count(-1)
    decided = [vote for vote in counted if vote.winner]
    return {
        "judge": judge,
        "by": by,
        "a": a,
        "b": b,
        "n": len(outcomes),
        "questions": len(contest.questions),
        "same": contest.same,
        "wins": wins,
        "losses": losses,
        "ties": len(outcomes) - wins - losses,
        "value": (1 + (wins - losses) / len(outcomes)) / 2,
        **(_asked_once(outcomes) if by == "endpoint" else any_time(wins, losses, len(outcomes) - wins - losses)),
        "changed_with_order": changed / len(outcomes) if by == "endpoint" else None,
        "first_preferred": sum(v.choice == "first" for v in decided) / len(decided) if decided else None,
        "longer_preferred": longer / of_unequal_length if of_unequal_length else None,
    }


def _asked_once(outcomes: Sequence[int]) -> dict[str, Any]:
    """Test the votes of a judge that is asked everything in one go: the sign test, and the score interval beside it."""
    inference = crossed(np.array([outcomes], float), binary=True)
    interval = inference.difference()
    assert interval.low is not None
    assert interval.high is not None
    return {
        "ci_low": (1 + interval.low) / 2,
        "ci_high": (1 + interval.high) / 2,
        "p_value": inference.p_value,
        "test": "sign test, exact",
        "needed_n": inference.needed_items(),
    }


def any_time(wins: int, losses: int, ties: int, confidence: float = 0.95) -> dict[str, Any]:
    """Test the votes of people, who are counted, looked at, and asked for more: it may be done after every vote.

    Whoever bets on each vote, at odds that are fair if the win rate is m, seldom gets rich: with probability at most 1 / k
    is a stake ever multiplied by k. The p-value is the inverse of what a stake has become at m = 1/2, spread evenly over all
    bets; the interval holds each m at which it has not been multiplied by 1 / (1 - confidence). A tie is half a win.
    Source: Waudby-Smith and Ramdas, Estimating Means of Bounded Random Variables by Betting, JRSS B 86 (2024), arXiv:2010.09686.
    """
    share = (np.arange(4000) + 0.5) / 4000

    def log_capital(m: float) -> float:
        bets = -1 / (1 - m) + share * (1 / m + 1 / (1 - m))
        grown = wins * np.log1p(bets * (1 - m)) + losses * np.log1p(-bets * m) + ties * np.log1p(bets * (0.5 - m))
        highest = float(grown.max())
        return highest + math.log(float(np.exp(grown - highest).mean()))

    def bound(end: float) -> float:
        inside, outside = (wins + ties / 2) / (wins + losses + ties), end
        for _ in range(40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if log_capital(middle) < -math.log(1 - confidence) else (inside, middle)
        return outside

    return {
        "ci_low": bound(0.0) if wins + ties else 0.0,
        "ci_high": bound(1.0) if losses + ties else 1.0,
        "p_value": min(1.0, math.exp(-log_capital(0.5))),
        "test": "by betting, at any time",
        "needed_n": None,
    }


def _in_words(row: dict[str, Any]) -> str:
    a, b = row["a"].upper(), row["b"].upper()
    rate = f"{100 * row['value']:.0f} % ({100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f}), n = {row['n']}"
    if row["shown"]:
        better, worse = (a, b) if row["wins"] > row["losses"] else (b, a)
        return f"{better} is preferred to {worse} by {row['judge']}: win rate of {a} {rate}."
    needed = f" A preference of the size seen would need about {row['needed_n']} prompts." if row["needed_n"] else ""
    return f"Between {a} and {b} no preference of {row['judge']} can be shown: win rate of {a} {rate}.{needed}"
