"""The evidence of a run: a report in JSON and HTML beside the output, without any personal data."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from scripts.common.artifacts import GitFacts, git_state, sha256_json
from scripts.common.deid_report import REPORT_SCHEMA
from scripts.common.schema import Deid
from scripts.deid import hipaa
from scripts.deid.replacement import Replacer
from scripts.deid.scrubbing import Outcome

TEMPLATE = "report_template.html"

LIMITS = (
    "This is no guarantee: recognizers miss personal data, names on noisy text most of all. Have people read a sample.",
    "Recall holds for text like the set it was measured on; measure on labelled records of your own with --evaluate.",
    "Whether the remaining text points at somebody (a rare illness, a unique event) is not judged.",
    "Under HIPAA the covered entity must also have no actual knowledge that somebody can be identified.",
    "Under the GDPR data replaced by hash, encrypt or consistent surrogates are pseudonymous, not anonymous.",
    "Of safe fields only what cannot be an id or a label is noticed; fields not named in deid.fields were not searched.",
    "Relative dates, bare years and durations stay, except in the profile strict.",
)


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, populate_by_name=True)


class FileFacts(_Facts):
    """A file by its name, without the folder, and its content."""

    name: str
    sha256: str


class Counts(_Facts):
    """How many records went in, came out, and were held back for which reason."""

    input: int
    output: int
    quarantined: int
    reasons: dict[str, int]


class Identifier(_Facts):
    """One of the 18 identifiers of HIPAA, and what was done about it."""

    identifier: str
    method: str


class Timing(_Facts):
    """What a run took; the speed is that of scrubbing alone, without loading the recognizers."""

    seconds: float
    workers: int
    peak_memory_gib: float
    characters: int
    characters_per_second: int


class Report(_Facts):
    """What was done to a file: the content of <out>.deid_report.json."""

    schema_version: int = Field(REPORT_SCHEMA, alias="schema")
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    input: FileFacts
    output: FileFacts
    counts: Counts
    entities: dict[str, int]
    operators: dict[str, str]
    fields: dict[str, dict[str, int]]
    scores: dict[str, dict[str, int]]
    recognizers: dict[str, Any]
    config: dict[str, Any]
    hipaa: list[Identifier]
    residual_scan: str = "every written record was searched again until nothing new was found"
    evaluation: dict[str, Any] | None
    limits: list[str] = list(LIMITS)
    timing: Timing
    git: GitFacts = Field(default_factory=git_state)

    def as_json(self) -> str:
        """Write the report as a JSON file."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"


class Tally:
    """Counts over all records of a run; holds no text."""

    def __init__(self) -> None:
        self.read = self.written = self.characters = 0
        self.seconds = 0.0
        self.reasons: Counter[str] = Counter()
        self.entities: Counter[str] = Counter()
        self.fields: dict[str, Counter[str]] = {}
        self.scores: dict[str, Counter[str]] = {}

    @property
    def quarantined(self) -> int:
        """Count the records held back."""
        return self.reasons.total()

    def add(self, outcome: Outcome) -> None:
        """Count one record, written or held back."""
        self.read += 1
        if outcome.reason:
            self.reasons[outcome.reason] += 1
            return
        self.written += 1
        self.characters += outcome.characters
        for field, entity, score in outcome.found:
            self.entities[entity] += 1
            self.fields.setdefault(field, Counter())[entity] += 1
            self.scores.setdefault(entity, Counter())[f"{int(min(score, 0.99) * 10) / 10:.1f}"] += 1


def hipaa_table(entities: list[str], replacer: Replacer) -> list[Identifier]:
    """Say for each of the 18 identifiers what was done about it, given the entities that are searched for."""
    table = []
    limits = replacer.settings.profile == hipaa.PROFILE
    for identifier, (wanted, stays, partly) in hipaa.IDENTIFIERS.items():
        done = [name for name in wanted if name in entities and replacer.removes(name)]
        if identifier[0] in "PQ":
            method = "not recognised in text; records with base64 or binary content are held back"
        elif not done:
            method = "not covered"
        else:
            method = "; ".join(f"{name}: {replacer.operator_of(name)}" for name in done)
            missing = [name for name in wanted if name not in done]
            method += f"; not covered: {', '.join(missing)}" if missing else ""
            method += f"; stays: {stays}" if stays and limits else ""
            method += f"; partial: {partly}" if partly else ""
        table.append(Identifier(identifier=identifier, method=method))
    return table


def settings_for_report(settings: Deid) -> dict[str, Any]:
    """Return the configuration, with hashes in place of the lists of words, which may hold names."""
    values = settings.model_dump(mode="json")
    for name in ("allow_list", "deny_list"):
        values[name] = {"count": len(values[name]), "sha256": sha256_json(values[name])}
    return values


def sorted_counts(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Sort counts by both of their names, so that the same data give the same report."""
    return {name: dict(sorted(inner.items())) for name, inner in sorted(counts.items())}


def describe_run(
    settings: Deid,
    replacer: Replacer,
    recognizers: dict[str, Any],
    tally: Tally,
    *,
    source: FileFacts,
    output: FileFacts,
    evaluation: dict[str, Any] | None,
    timing: Timing,
) -> Report:
    """Put together the evidence of a run."""
    return Report(
        input=source,
        output=output,
        counts=Counts(
            input=tally.read,
            output=tally.written,
            quarantined=tally.quarantined,
            reasons=dict(sorted(tally.reasons.items())),
        ),
        entities=dict(sorted(tally.entities.items())),
        operators={name: replacer.operator_of(name) for name in recognizers["entities"]},
        fields=sorted_counts(tally.fields),
        scores=sorted_counts(tally.scores),
        recognizers=recognizers,
        config=settings_for_report(settings),
        hipaa=hipaa_table(recognizers["entities"], replacer),
        evaluation=evaluation,
        timing=timing,
    )


def render_html(report: Report) -> str:
    """Write the report as one page that needs nothing else; every text in it is shown as text, never as markup."""
    return environment().get_template(TEMPLATE).render(report=report, recall=recall_rows(report.evaluation)) + "\n"


def environment() -> Environment:
    """Prepare Jinja for this folder's pages: escaped, and no name without a value."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["number"] = "{:,}".format
    jinja.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    return jinja


def recall_rows(evaluation: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """Write the measured recall of all labels and of each one, with its interval and the number of spans."""
    rows: list[tuple[str, ...]] = []
    if evaluation is None:
        return rows
    for label, recall in [("all", evaluation["recall"]), *evaluation["recall_by_label"].items()]:
        interval = " to ".join(f"{bound:.1%}" for bound in recall["wilson95"] or ()) or "–"
        rows.append((label, f"{recall['share']:.1%}" if recall["total"] else "–", interval, f"{recall['total']:,}"))
    return rows
