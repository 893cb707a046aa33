"""Draft `eval.checks` from what a person's own answers have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from eval.checks import NUMBER, passes
from scripts.common.schema import Check
from scripts.dataset.records import Preference, Record
from scripts.starting.writing import Draft
from scripts.training.advice import WORDS, language_of

FEWEST_ANSWERS = 8  # below, what they share may be chance
SHARE = 0.9  # of the answers, which makes something a rule of theirs
MOST_VARIANTS = 6  # of a greeting or a sign-off
LONGEST_START = 6  # words of a line that a rule quotes
FEWEST_PER_LABEL = 4
BULLET = r"(?:[-*•–]|\d+[.)])[ \t]"
# Letters of a script, where that tells the language.
SCRIPTS = {
    "Cyrillic letters": "\u0400-\u04ff", "Greek letters": "\u0370-\u03ff", "Arabic letters": "\u0600-\u06ff",
    "Hebrew letters": "\u0590-\u05ff", "Devanagari letters": "\u0900-\u097f", "Thai letters": "\u0e00-\u0e7f",
    "Hangul letters": "\uac00-\ud7af", "Japanese": "\u3040-\u30ff", "Chinese characters": "\u4e00-\u9fff",
}  # fmt: skip


def draft_checks(records: Sequence[Record | Preference], counted: Sequence[Record | Preference]) -> list[Draft]:
    """Return the checks that nearly all of these answers keep, with their pass rate over `counted`.

    Give the training side and all records: the rules then owe nothing to the side on which they will be measured.
    """
    if len(records) < FEWEST_ANSWERS:
        return []
    drafts: dict[str, Draft] = {}
    for keys in _candidates([record.answer.strip() for record in records], [prompt_of(record) for record in records]):
        check = Check(**keys)
        if _kept(check, records) >= SHARE * len(records):
            drafts.setdefault(check.name, Draft(keys, _kept(check, counted), len(counted)))
    return list(drafts.values())


def prompt_of(record: Record | Preference) -> str:
    """Return what a user wrote or a system message says, as the comparison gives it to a check."""
    return "\n".join(message["content"] for message in record.prompt if message["role"] != "assistant")


def _kept(check: Check, records: Sequence[Record | Preference]) -> int:
    return sum(passes(check, record.answer, prompt_of(record), record.answer) for record in records)


def _candidates(answers: Sequence[str], prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    if labels := _labels(answers):
        yield {"name": "one of the known answers", "regex": rf"\A(?:{_either(labels)})\Z"}
        yield {"name": "the right answer", "exact_match": True}
        return
    if sum(answer[:1] in ("{", "[") for answer in answers) >= SHARE * len(answers):
        yield {"name": "valid JSON", "json_parses": True}
        return
    lines = [[line.strip() for line in answer.split("\n") if line.strip()] for answer in answers]
    long = [each for each in lines if len(each) > 1]
    if starts := common_starts([each[0] for each in lines if each]):
        yield {"name": f"begins with {_quoted(starts)}", "regex": rf"\A(?:{_either(starts)})"}
    if len(long) >= SHARE * len(lines):
        yield from _greeting_line([each[0] for each in long])
        yield from _endings(long)
    yield {"name": "one line", "regex": r"\A[^\n]+\Z"}
    yield {"name": "no bullets", "regex": rf"(?m)\A(?!.*^[ \t]*{BULLET})"}
    yield {"name": "bullets", "regex": rf"(?m)^[ \t]*{BULLET}"}
    yield {"name": "no headings or bold text", "regex": r"(?m)\A(?!.*^#{1,6} )(?!.*\*\*)"}
    yield {"name": "no exclamation mark", "must_not_contain": ["!"]}
    yield _length(answers)
    yield from _language(answers)
    if sum(bool(NUMBER.search(answer)) for answer in answers) >= 0.2 * len(answers) and all(map(str.strip, prompts)):
        yield {"name": "no figure that is not in the question", "numbers_from_prompt": True}


def _labels(answers: Sequence[str]) -> list[str]:
    """Return the answers where each is one of a few, as labels are."""
    counts = Counter(answers)
    few = len(counts) > 1 and len(counts) * FEWEST_PER_LABEL <= len(answers)
    return sorted(counts) if few and max(len(answer.split()) for answer in counts) <= LONGEST_START else []


def common_starts(lines: Sequence[str]) -> list[str]:
    """Return the few beginnings that nearly all lines share, each as many words as it can be; empty where there are none."""
    words = [line.split() for line in lines]
    for length in range(LONGEST_START, 0, -1):
        counts = Counter(tuple(each[:length]) for each in words if each)
        common = [start for start, count in counts.most_common(MOST_VARIANTS) if count >= max(2, 0.05 * len(lines))]
        if common and sum(counts[start] for start in common) >= SHARE * len(lines):
            return sorted({_extended(start, words) for start in common})
    return []


def _extended(start: tuple[str, ...], words: Sequence[list[str]]) -> str:
    """Lengthen a beginning by what all lines with it have in common."""
    same = [each for each in words if tuple(each[: len(start)]) == start]
    shared = list(start)
    for column in list(zip(*same, strict=False))[len(start) : LONGEST_START]:
        if len({*column}) > 1:
            break
        shared.append(column[0])
    return " ".join(shared)


def _greeting_line(first: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Ask for a first line that ends as nearly all do: a greeting with its comma, a title with its colon."""
    (end, count), *_ = Counter(line[-1] for line in first).most_common(1)
    if count >= SHARE * len(first) and end in ",:!;" and sorted(map(len, first))[len(first) // 2] <= 80:
        yield {"name": f"a first line that ends with “{end}”", "regex": rf"\A[^\n]*{re.escape(end)}[ \t]*\n"}


def _endings(lines: Sequence[list[str]]) -> Iterator[dict[str, Any]]:
    """Ask for the sign-off: what the last line, or the one before it, begins with."""
    if ends := common_starts([each[-1] for each in lines]):
        yield {"name": f"the last line begins with {_quoted(ends)}", "regex": rf"\n[ \t]*(?:{_either(ends)})[^\n]*\Z"}
    several = [each[-2] for each in lines if len(each) > 2]
    if len(several) >= SHARE * len(lines) and (ends := common_starts(several)):
        yield {
            "name": f"the line before the last begins with {_quoted(ends)}",
            "regex": rf"\n[ \t]*(?:{_either(ends)})[^\n]*\n\s*[^\n]+\Z",
        }


def _either(texts: Sequence[str]) -> str:
    """Write alternatives of a regular expression; re.escape would also mark spaces and hyphens, which people will read."""
    return "|".join(re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", text) for text in texts)


def _quoted(starts: Sequence[str]) -> str:
    """Quote the beginnings, the first of many."""
    shown = " or ".join(f"“{start}”" for start in starts[:3])
    return shown + (" and the like" if len(starts) > 3 else "")


def _length(answers: Sequence[str]) -> dict[str, Any]:
    """Ask for a length between those of one answer in twenty and nineteen, with a tenth to spare."""
    lengths = sorted(len(answer.split()) for answer in answers)
    at = len(lengths) // 20
    low, high = int(lengths[at] * 0.9), max(int(lengths[-1 - at] * 1.1 + 0.999), 1)
    return {"name": f"{low} to {high} words", "min_words": low, "max_words": high}


def _language(answers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Ask for the language of the answers: by its script, or by two of its commonest words."""
    found = Counter(language for answer in answers if (language := language_of(answer)))
    if found.total() < 0.5 * len(answers):
        return
    (language, count), *_ = found.most_common(1)
    if count < SHARE * found.total():
        return
    if letters := SCRIPTS.get(language):
        yield {"name": f"in {language}", "regex": f"[{letters}].*[{letters}]"}
    elif words := WORDS.get(language):
        either = "|".join(words.split())
        yield {"name": f"in {language}", "regex": rf"(?i)\b({either})\b.*\b(?!\1\b)(?:{either})\b"}
