"""The report of a comparison: its facts, and one HTML file of them that opens anywhere, offline, and refers to nothing else."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from eval.drawing import axis, draw_curves, zero_axis
from eval.figures import duration, number, p_value
from eval.metrics import Difference, Metric, Runs
from eval.overview import SIGNS, TILES, Overview, Story, decisive, difference, finding, key_pair, tell, title_of
from eval.tables import Better
from eval.verdict import Question, Verdict
from scripts.common.artifacts import sha256_json
from scripts.common.curves import Curves, read_curves

TEMPLATE = Path(__file__).with_name("report_template.html")
PNG = "data:image/png;base64,"
PICTURE = "curves_{}.png"  # of an adapter of an earlier version, which kept no figures
CURVES = "curves.json"
FOLDED_AFTER = 5
LONG = 600  # letters of an answer that cannot be taken in at a glance

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


class Column(BaseModel):
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
    arms: dict[str, Column] = {}
    side: Literal["test", "validation"] = "test"
    question: Question | None = None
    looks: int | None = None  # how often a report was made of this side of these data
    metrics: list[Metric] = []
    health: dict[str, dict[str, float | None]] = {}
    training: dict[str, dict[str, Any]] = {}  # the metrics of each adapter's manifest
    curves: dict[str, list[Curves] | str] = {}  # of each seed; an earlier version has a picture as a data URI
    lineage: dict[str, dict[str, Any]] = {}
    samples: list[Sample] = []
    benchmarks: Benchmarks | None = None
    judge: Judgement | None = None
    runs: Runs | None = None
    notes: list[str] = []


class Example(NamedTuple):
    """One prompt with the answer of the first and of the last model of the story."""

    sample: Sample
    before: str
    after: str


def write_report(folder: Path, report: Report) -> None:
    """Write the page, its figures, the answers and the pictures."""
    (folder / "report.html").write_text(render_report(report), encoding="utf-8", newline="\n")
    lines = [sample.model_dump() for sample in report.samples]
    samples = "".join(json.dumps({**line, "sha256": sha256_json(line)}, ensure_ascii=False) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(samples, encoding="utf-8", newline="\n")
    (folder / "report.json").write_text(figures_of(report), encoding="utf-8", newline="\n")
    drawn = {}
    for name, curves in report.curves.items():
        if isinstance(curves, str):
            (folder / PICTURE.format(name)).write_bytes(base64.b64decode(curves.removeprefix(PNG)))
        else:
            drawn[name] = [each.model_dump() for each in curves]
    if drawn:
        (folder / CURVES).write_text(json.dumps(drawn) + "\n", encoding="utf-8", newline="\n")


def figures_of(report: Report) -> str:
    """Return the content of report.json."""
    figures = report.model_dump(by_alias=True, exclude={"samples", "curves"})
    return json.dumps(figures, indent=1, ensure_ascii=False) + "\n"


def read_report(folder: Path) -> Report:
    """Read what write_report wrote, in this version or an earlier one."""
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    pictures = {name: folder / PICTURE.format(name) for name in figures["models"]}
    curves: dict[str, Any] = {name: picture_uri(path) for name, path in pictures.items() if path.is_file()}
    if (folder / CURVES).is_file():
        curves |= json.loads((folder / CURVES).read_text(encoding="utf-8"))
    return Report(**figures, curves=curves, samples=[json.loads(line) for line in lines])


def shortest_sample(folder: Path) -> dict[str, Any]:
    """Return the line of samples.jsonl with the shortest prompt: one that no result has chosen."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    samples: list[dict[str, Any]] = [json.loads(line) for line in lines if line]
    return min(samples, key=lambda sample: (len(sample["prompt"]), sample["source"]))


def find_curves(adapters: Sequence[Path]) -> list[Curves] | str | None:
    """Return the curves of an arm's adapters, or the picture that an earlier version kept of the first one."""
    found = [curves for folder in adapters if (curves := read_curves(folder))]
    if found:
        return found
    picture = adapters[0] / "curves.png"
    return picture_uri(picture) if picture.is_file() else None


def picture_uri(path: Path) -> str:
    """Return a PNG as a URI that holds it."""
    return PNG + base64.b64encode(path.read_bytes()).decode()


def render_report(report: Report) -> str:
    """Return the whole page; every text in the report is shown as text, never as markup."""
    for name, picture in report.curves.items():
        if isinstance(picture, str) and not picture.startswith("data:image/"):
            raise ValueError(f"curves.{name}: found {picture[:40]!r}, wanted a data:image/… URI")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        number=number, p_value=p_value, duration=duration, title_of=title_of, spread_of=spread_of
    )
    environment.globals.update(
        axis=axis, zero_axis=zero_axis, reading=reading, in_group=in_group, marked_answers=marked_answers,
        draw_curves=draw_curves, difference=difference, finding=finding,
        signs=SIGNS, folded_after=FOLDED_AFTER, few=TILES,
    )  # fmt: skip
    page = environment.get_template(TEMPLATE.name).render(
        dict(report),
        overview=overview(report),
        example=typical_answer(report),
        decisive=decisive(report.metrics),
        key=key_pair(report.verdict, report.models),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in an answer cannot be saved


def overview(report: Report) -> Overview:
    """Return what the first screen shows of a report."""
    runs = len(report.runs.seeds) if report.runs else None
    return tell(
        Story(
            title=report.title,
            verdict=report.verdict,
            question=report.question,
            models=report.models,
            metrics=report.metrics,
            seeds={
                name: runs or (len(report.arms[name].seeds) if name in report.arms else 1) for name in report.models
            },
            runs=runs,
            merged=[name for name, arm in report.arms.items() if arm.kind == "merged"],
            looks=report.looks,
            side=report.side,
        )
    )


def reading(difference: Difference, better: Better) -> str:
    """Say in words what a difference between two models means."""
    value, needed = difference.value, difference.needed_n
    found = finding(difference, better)
    if found != "undecided":
        return f"{difference.a} is {found.replace('_', ' ')}"
    if value == difference.ci_low == difference.ci_high == 0:
        return "no difference at all"
    return "not shown" + (f"; this size would need about {needed:,} items" if needed else "")


def spread_of(metric: Metric, pair: tuple[str, str]) -> tuple[float, float] | None:
    """Return which share of the uncertainty of a difference comes from the seeds, and which from the items.

    The variance of the mean over both is sd_seeds² / seeds + sd_items² / items.
    """
    found = difference(metric, *pair)
    if found is None or found.sd_seeds is None or found.sd_items is None or found.seeds < 2:
        return None
    seeds, items = found.sd_seeds**2 / found.seeds, found.sd_items**2 / metric.n
    return (seeds / (seeds + items), items / (seeds + items)) if seeds + items else None


def in_group(metrics: list[Metric], group: str) -> list[Metric]:
    """Return the metrics of one section of the report."""
    return [metric for metric in metrics if metric.group == group]


def typical_answer(report: Report) -> Example | None:
    """Choose the prompt that looks most like the average of all: neither the best nor the worst of them.

    Where answers were checked, both answers keep about as many rules as their model does on average. Otherwise it is
    the prompt with the median share of changed words. Short answers are preferred.
    """
    pair = key_pair(report.verdict, report.models)
    if pair is None:
        return None
    after, before = pair[0], report.models[0] if report.models[0] != pair[0] else pair[1]
    samples = [
        sample
        for sample in report.samples
        if sample.answers.get(before) and sample.answers.get(after) and sample.answers[before] != sample.answers[after]
    ]
    if not samples:
        return None
    kept = {id(sample): [passed_share(sample.checks.get(name, {})) for name in (before, after)] for sample in samples}
    averages = [mean(shares) for shares in zip(*kept.values(), strict=True)]
    middle = sorted(sample.changed for sample in samples)[len(samples) // 2]

    def oddity(sample: Sample) -> tuple[float, float, int]:
        letters = sum(len(sample.answers[name] or "") for name in (before, after)) + len(sample.prompt)
        apart = sum(abs(share - average) for share, average in zip(kept[id(sample)], averages, strict=True))
        return round(apart, 2) + letters // LONG, abs(sample.changed - middle), letters

    return Example(min(samples, key=oddity), before, after)


def passed_share(checks: Mapping[str, bool]) -> float:
    """Return the share of checks that an answer passes."""
    return mean(checks.values()) if checks else 0.0


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
