"""The file of votes on samples: one line for each prompt that a person was shown several answers to.

`{"adapter": sha256 of the one that answered, "prompt": text or messages, "samples": [text, …], "outcome": …}`, and by its outcome

- `best`: `"best"`, `"worst"` or both, as numbers of samples from 0
- `own`: `"own"`, an answer of the person's own that is better than every sample
- `tie`, `all_bad`, `undone`: nothing more; they make no pair

A later line on the same samples replaces an earlier one, so that a vote is undone by another line. `"group"` holds the
value of `data.group_field` where the data have one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scripts.common.artifacts import sha256_json
from scripts.common.errors import UserError, did_you_mean, listing
from scripts.common.schema import Config
from scripts.dataset.columns import RowError
from scripts.dataset.files import BadRow, read_rows
from scripts.dataset.records import Message, Preference, group_of, takes_turns
from scripts.dataset.split import side_of
from scripts.pairs.choosing import Candidate, Labelled, Option

Outcome = Literal["best", "own", "tie", "all_bad", "undone"]


class Vote(BaseModel):
    """What one person said of the samples of one prompt."""

    model_config = ConfigDict(strict=True, frozen=True)

    adapter: str
    prompt: str | list[Message]
    samples: list[str] = Field(min_length=1)
    outcome: Outcome
    best: int | None = None
    worst: int | None = None
    own: str | None = None
    group: str | int | float | None = None
    created: str | None = None

    @model_validator(mode="after")
    def _says_what_its_outcome_needs(self) -> Vote:
        complete = all(message.get("content", "").strip() for message in self.messages)
        if not complete or not takes_turns([message.get("role", "") for message in self.messages], last="user"):
            raise ValueError(
                "prompt: wanted a text, or messages [system,] user, assistant, … ending with user, none empty"
            )
        named = [number for number in (self.best, self.worst) if number is not None]
        if any(not 0 <= number < len(self.samples) for number in named) or (named and self.best == self.worst):
            raise ValueError(f"best and worst: wanted two different numbers from 0 to {len(self.samples) - 1}")
        if bool(named) != (self.outcome == "best"):
            raise ValueError("best, worst: wanted with the outcome `best`, and with no other")
        if bool(self.own and self.own.strip()) != (self.outcome == "own"):
            raise ValueError("own: wanted a text with the outcome `own`, and with no other")
        return self

    @property
    def messages(self) -> list[Message]:
        """Return the prompt as a conversation."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def asked(self) -> str:
        """Identify what was shown; a later vote on it replaces an earlier one."""
        return sha256_json([self.adapter, self.messages, sorted(self.samples)])

    def candidates(self) -> list[Candidate]:
        """Return what is preferred to what: the best to the worst first, then the best to others, and others to the worst."""
        options = [Option(text, number) for number, text in enumerate(self.samples)]
        if self.outcome == "own":
            pairs = [(Option(self.own or ""), other) for other in options]
        else:
            best, worst = ([] if number is None else [options[number]] for number in (self.best, self.worst))
            others = [option for option in options if option not in (*best, *worst)]
            pairs = [*product(best, worst), *product(best, others), *product(others, worst)]
        told_apart = [
            (a, b) for a, b in pairs if a.text.strip() != b.text.strip() and a.text.strip() and b.text.strip()
        ]
        return [Candidate(a, b, "person") for a, b in told_apart]


def read_votes(path: Path, adapter: str, folder: str, key: str = "--votes") -> list[tuple[str, Vote]]:
    """Read the votes on the answers of one adapter, by its sha256, each with its place; only the last on each question.

    `key` is what named the file.
    Raises: UserError when a line is no vote, when votes are on another adapter's answers, or when there is none.
    """
    if not path.is_file():
        raise UserError(f"{key} {path}: no such file.{did_you_mean(path)}")
    bad: list[str] = []
    votes: dict[str, tuple[str, Vote]] = {}
    others: Counter[str] = Counter()
    for where, row in read_rows(path):
        if isinstance(row, BadRow):
            bad.append(str(row))
            continue
        if {"chosen", "rejected"} <= row.keys():
            raise UserError(
                f"{where}: found pairs, wanted votes on samples. Pairs need no stage of their own: --set dpo.dataset_path={path}"
            )
        try:
            vote = Vote.model_validate_json(json.dumps(row))
        except ValidationError as error:
            bad.append(f"{where}: {_problem(error)}")
            continue
        if vote.adapter != adapter:
            others[vote.adapter] += 1
            continue
        votes.pop(vote.asked, None)
        votes[vote.asked] = (where, vote)
    if bad:
        raise UserError(
            listing(f"{len(bad)} lines of {path} are no votes", bad, "Correct or remove them; the others stay.")
        )
    if others:
        named = ", ".join(f"{count} of {sha256[:12]}…" for sha256, count in others.most_common())
        fix = "Name the adapter that was asked with --from, and keep a file for each."
        raise UserError(
            f"{key} {path}: holds votes on answers of another adapter ({named}) than {folder} ({adapter[:12]}…). "
            f"{fix if key == '--votes' else 'Name another file: each adapter has its own.'}"
        )
    if not votes:
        raise UserError(f"{key} {path}: the file holds no vote. Vote first, then run this again.")
    return list(votes.values())


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key}: {first['msg'].lower()}" if key else first["msg"].removeprefix("Value error, ")


def label_by_votes(votes: Sequence[tuple[str, Vote]], config: Config, counts: Counter[str]) -> list[Labelled]:
    """Return what people prefer; votes on prompts of the other sides are left out and counted."""
    labelled = []
    for where, vote in votes:
        counts["votes"] += 1
        group = _group_of(vote, config, where)
        prompt = tuple(vote.messages)
        if side_of(Preference(where, prompt, "", "", group), config.data) != "train":
            counts["votes on prompts that are held out"] += 1
            continue
        labelled.append(Labelled(where, prompt, group, None, vote.candidates()))
    return labelled


def _group_of(vote: Vote, config: Config, where: str) -> str | None:
    field = config.data.group_field
    if field is None:
        return None
    try:
        return group_of({field: vote.group}, config.data)
    except RowError as error:
        raise UserError(f"{where}: group: {error.reason}. A vote holds it under `group`.") from None
