"""Turn the facts of a comparison into one HTML file that opens anywhere, offline, and refers to nothing outside itself."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATE = Path(__file__).with_name("report_template.html")
MINUS = "−"
NOTHING = "–"
PNG = "data:image/png;base64,"
CURVES = "curves_"

Segments = list[tuple[bool, str]]


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the page, its figures, the answers and the pictures."""
    (folder / "report.html").write_text(render_report(report), encoding="utf-8")
    samples = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in report["samples"])
    (folder / "samples.jsonl").write_text(samples, encoding="utf-8")
    slim = {key: value for key, value in report.items() if key not in ("samples", "curves")}
    (folder / "report.json").write_text(json.dumps(slim, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, picture in report["curves"].items():
        (folder / f"{CURVES}{name}.png").write_bytes(base64.b64decode(picture.removeprefix(PNG)))


def read_report(folder: Path) -> dict[str, Any]:
    """Read what write_report wrote."""
    samples = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    pictures = {path.stem.removeprefix(CURVES): path.read_bytes() for path in sorted(folder.glob(f"{CURVES}*.png"))}
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    order = [name for name in report["models"] if name in pictures]
    report["curves"] = {name: PNG + base64.b64encode(pictures[name]).decode() for name in order}
    return {**report, "samples": [json.loads(line) for line in samples]}


def render_report(report: dict[str, Any]) -> str:
    """Return the whole page; every text in the report is shown as text, never as markup.

    A metric of unit `share` holds values from 0 to 1 and is shown in percent; any other unit is shown as it is.
    """
    for name, picture in report["curves"].items():
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
    page = environment.get_template(TEMPLATE.name).render(report)
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


def axis(metric: dict[str, Any]) -> tuple[float, float]:
    """Return the ends of the common scale on which a metric's intervals are drawn."""
    if metric["unit"] == "share":
        return 0.0, 1.0
    bounds = _bounds([*metric["models"].values(), *metric["baselines"].values()])
    margin = 0.08 * (max(bounds) - min(bounds)) or 1.0
    return min(bounds) - margin, max(bounds) + margin


def zero_axis(metrics: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Return the ends of a scale with zero in its middle that holds every difference of these metrics."""
    widest = max(map(abs, _bounds(d for metric in metrics for d in metric["differences"]))) * 1.08 or 1.0
    return -widest, widest


def _bounds(estimates: Iterable[dict[str, Any]]) -> list[float]:
    found = [estimate[key] for estimate in estimates for key in ("value", "ci_low", "ci_high")]
    return [value for value in found if value is not None and math.isfinite(value)] or [0.0]


def reading(difference: dict[str, Any], better: str) -> str:
    """Say in words what a difference between two models means."""
    value, needed = difference["value"], difference["needed_n"]
    if value is None:
        return "not measured"
    if difference["shown"]:
        return f"{difference['a']} is {'better' if (value > 0) == (better == 'higher') else 'worse'}"
    if value == difference["ci_low"] == difference["ci_high"] == 0:
        return "no difference at all"
    return "not shown" + (f"; this size would need about {needed:,} items" if needed else "")


def in_group(metrics: list[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    """Return the metrics of one section of the report."""
    return [metric for metric in metrics if metric["group"] == group]


def marked_answers(sample: dict[str, Any], compared: list[str]) -> dict[str, Segments]:
    """Return each model's answer in pieces, those of the two compared models with the words that only they have."""
    answers = {model: [(False, text)] for model, text in sample["answers"].items() if text is not None}
    if len(compared) == 2 and all(model in answers for model in compared):
        first, second = compared
        answers[first], answers[second] = word_differences(sample["answers"][first], sample["answers"][second])
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
