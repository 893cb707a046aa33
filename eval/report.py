"""The report of a comparison: its facts, and one HTML file of them that opens anywhere, offline, and refers to nothing else."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from eval.metrics import Difference, Estimate, Metric, Runs
from eval.tables import Better
from eval.verdict import Question, Verdict

TEMPLATE = Path(__file__).with_name("report_template.html")
MINUS = "−"
NOTHING = "–"
PNG = "data:image/png;base64,"
CURVES = "curves_"

Segments = list[tuple[bool, str]]


class Sample(BaseModel):
    """One prompt with the answers of all models and the checks that each answer passes."""

    source: str
    prompt: str
    reference: str | None  # the target answer
    answers: dict[str, str | None]
    checks: dict[str, dict[str, bool]]
    changed: float  # share of words that differ between the two models compared


class Benchmarks(BaseModel):
    """What lm-eval measured."""

    metrics: list[Metric]
    warnings: list[str]
    settings: dict[str, dict[str, Any]]  # by task


class Judgement(BaseModel):
    """What judges preferred: a row per judge and pair of models."""

    created: str | None = None
    criteria: str
    votes: str | None = None  # the file of votes
    rows: list[dict[str, Any]]


class Arm(BaseModel):
    """One column of the report: the base, or what one procedure made under one or several seeds."""

    kind: Literal["base", "adapter", "merged"]
    stage: str | None = None
    seeds: list[int] = []
    folders: list[str] = []
    stands: bool = False  # it is compared with each seed of the others as it is, as the base is


class Report(BaseModel):
    """Everything that a report shows. What a run did not measure is empty or null."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: int = Field(1, alias="schema")
    created: str
    title: str
    verdict: Verdict | None = None
    models: list[str]
    arms: dict[str, Arm] = {}
    side: Literal["test", "validation"] = "test"
    question: Question | None = None
    looks: int | None = None  # how often a report was made of this side of these data
    metrics: list[Metric] = []
    health: dict[str, dict[str, float | None]] = {}
    training: dict[str, dict[str, Any]] = {}  # the metrics of each adapter's manifest
    curves: dict[str, str] = {}  # data URIs
    lineage: dict[str, dict[str, Any]] = {}
    samples: list[Sample] = []
    benchmarks: Benchmarks | None = None
    judge: Judgement | None = None
    runs: Runs | None = None
    notes: list[str] = []


def write_report(folder: Path, report: Report) -> None:
    """Write the page, its figures, the answers and the pictures."""
    (folder / "report.html").write_text(render_report(report), encoding="utf-8")
    samples = "".join(json.dumps(sample.model_dump(), ensure_ascii=False) + "\n" for sample in report.samples)
    (folder / "samples.jsonl").write_text(samples, encoding="utf-8")
    figures = report.model_dump(by_alias=True, exclude={"samples", "curves"})
    (folder / "report.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, picture in report.curves.items():
        (folder / f"{CURVES}{name}.png").write_bytes(base64.b64decode(picture.removeprefix(PNG)))


def read_report(folder: Path) -> Report:
    """Read what write_report wrote."""
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    pictures = {name: folder / f"{CURVES}{name}.png" for name in figures["models"]}
    curves = {name: picture_uri(path) for name, path in pictures.items() if path.is_file()}
    return Report(**figures, curves=curves, samples=[json.loads(line) for line in lines])


def picture_uri(path: Path) -> str:
    """Return a PNG as a URI that holds it."""
    return PNG + base64.b64encode(path.read_bytes()).decode()


def render_report(report: Report) -> str:
    """Return the whole page; every text in the report is shown as text, never as markup."""
    for name, picture in report.curves.items():
        if not picture.startswith("data:image/"):
            raise ValueError(f"curves.{name}: found {picture[:40]!r}, wanted a data:image/… URI")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, p_value=p_value, duration=duration)
    environment.globals.update(
        axis=axis, zero_axis=zero_axis, reading=reading, in_group=in_group, marked_answers=marked_answers
    )
    page = environment.get_template(TEMPLATE.name).render(dict(report))
    return page.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in an answer cannot be saved


def number(value: float | None, unit: str = "", signed: bool = False) -> str:
    """Write a figure with the digits a reader needs; a share becomes percent, its difference points."""
    if value is None or not math.isfinite(value):
        return NOTHING
    size = 100 * abs(value) if unit == "share" else abs(value)
    if isinstance(value, int) or size >= 1000:
        text = f"{size:,.0f}"
    elif unit == "share" or size >= 10:
        text = f"{size:.1f}"
    else:
        text = f"{size:.3f}" if size == 0 or size >= 0.01 else f"{size:.2g}"
    if not re.search("[1-9]", text):  # what rounds to nothing has no sign
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text


def p_value(value: float | None) -> str:
    """Write a p-value without digits that mean nothing."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """Write a time as a person would say it."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def axis(metric: Metric) -> tuple[float, float]:
    """Return the ends of the common scale on which a metric's intervals are drawn."""
    if metric.unit == "share":
        return 0.0, 1.0
    bounds = _bounds([*metric.models.values(), *metric.baselines.values()])
    margin = 0.08 * (max(bounds) - min(bounds)) or 1.0
    return min(bounds) - margin, max(bounds) + margin


def zero_axis(metrics: Iterable[Metric]) -> tuple[float, float]:
    """Return the ends of a scale with zero in its middle that holds every difference of these metrics."""
    widest = max(map(abs, _bounds(d for metric in metrics for d in metric.differences))) * 1.08 or 1.0
    return -widest, widest


def _bounds(estimates: Iterable[Estimate | Difference]) -> list[float]:
    bounds = [bound for each in estimates for bound in (each.value, each.ci_low, each.ci_high)]
    return [bound for bound in bounds if bound is not None and math.isfinite(bound)] or [0.0]


def reading(difference: Difference, better: Better) -> str:
    """Say in words what a difference between two models means."""
    value, needed = difference.value, difference.needed_n
    if difference.shown:
        return f"{difference.a} is {'better' if (value > 0) == (better == 'higher') else 'worse'}"
    if value == difference.ci_low == difference.ci_high == 0:
        return "no difference at all"
    return "not shown" + (f"; this size would need about {needed:,} items" if needed else "")


def in_group(metrics: list[Metric], group: str) -> list[Metric]:
    """Return the metrics of one section of the report."""
    return [metric for metric in metrics if metric.group == group]


def marked_answers(sample: Sample, compared: list[str]) -> dict[str, Segments]:
    """Return each model's answer in pieces, those of the two compared models with the words that only they have."""
    texts = {model: text for model, text in sample.answers.items() if text is not None}
    answers = {model: [(False, text)] for model, text in texts.items()}
    if len(compared) == 2 and all(model in texts for model in compared):
        first, second = compared
        answers[first], answers[second] = word_differences(texts[first], texts[second])
    return answers


def word_differences(first: str, second: str) -> tuple[Segments, Segments]:
    """Split two texts into pieces and say of each whether only its own text has it; the pieces join to the text."""
    left, right = (re.findall(r"\s*\S+|\s+$", text) for text in (first, second))
    # Without autojunk one answer that repeats a word hundreds of times would take minutes.
    matcher = SequenceMatcher(None, [word.strip() for word in left], [word.strip() for word in right])
    pieces: tuple[Segments, Segments] = ([], [])
    for kind, left_start, left_end, right_start, right_end in matcher.get_opcodes():
        for side, words in ((0, left[left_start:left_end]), (1, right[right_start:right_end])):
            text = "".join(words)
            if text:
                space = text[: len(text) - len(text.lstrip())] if kind != "equal" else ""
                if space:  # the blank before a marked word belongs to neither side
                    pieces[side].append((False, space))
                if text[len(space) :]:
                    pieces[side].append((kind != "equal", text[len(space) :]))
    return pieces
