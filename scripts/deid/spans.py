"""Spans of personal data in a text: what they are, and how overlapping and ragged findings become clean ones."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """One finding; `end` is exclusive, offsets count characters of the original text."""

    start: int
    end: int
    entity: str
    score: float


# Where findings overlap, the entity that stands first here names the whole.
PRIORITY = (
    "SECRET", "EMAIL_ADDRESS", "CREDIT_CARD", "IBAN_CODE", "US_SSN", "CRYPTO", "IP_ADDRESS", "MAC_ADDRESS", "UUID", "US_ITIN",
    "US_MBI", "US_NPI", "UK_NHS", "MEDICAL_LICENSE", "US_PASSPORT", "VEHICLE_ID", "DEVICE_ID", "ID_NUMBER", "PHONE_NUMBER",
    "URL", "STREET_ADDRESS", "HANDLE", "ZIP_CODE", "PERSON", "DATE_TIME", "AGE", "LOCATION", "ORGANIZATION", "NRP",
)  # fmt: skip
_RANK = {entity: rank for rank, entity in enumerate(PRIORITY)}

# <PERSON>, <PERSON_2>, <PERSON:1f2e…> are our own replacements: never touched again. Only names of entities count, so
# that a user's <DIV_1> is no hiding place.
TAG = re.compile(rf"<(?:{'|'.join(PRIORITY)}|CUSTOM)(?:_\d{{1,6}}|:[0-9a-f]{{16}}|:[\w-]{{20,}}={{0,2}})?>")

_SPECIAL = str.maketrans(dict.fromkeys("‐‑‒–−﹣－", "-") | dict.fromkeys("‘’‛´", "'") | dict.fromkeys("“”„", '"'))
_INVISIBLE = frozenset("\u00ad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff")
ADDRESS_PARTS = frozenset({"STREET_ADDRESS", "LOCATION", "ZIP_CODE", "ORGANIZATION"})
_ADDRESS_TAIL = re.compile(r"(?:[\s,]+(?:[A-Z]{2}\b|nan\b|\d{4,6}(?:-\d{4})?\b|[^\W\d_a-z][\w'’-]+(?=\s*(?:\n|$|,|\d)))){1,4}")


def normalise(text: str) -> tuple[str, Sequence[int]]:
    """Return the text as detection reads it and, for each of its characters, the offset in the original.

    Full-width letters, unusual dashes, quotes and spaces become plain; invisible characters go. One entry more marks
    the end.
    """
    if text.isascii():
        return text, range(len(text) + 1)
    characters: list[str] = []
    offsets: list[int] = []
    for offset, character in enumerate(text):
        if character in _INVISIBLE:
            continue
        plain = unicodedata.normalize("NFKC", character).translate(_SPECIAL) if not character.isascii() else character
        characters.append(plain)
        offsets.extend([offset] * len(plain))
    return "".join(characters), [*offsets, len(text)]


def to_original(span: Span, offsets: Sequence[int]) -> Span:
    """Move a span from the normalised text to the original."""
    return span._replace(start=offsets[span.start], end=offsets[span.end - 1] + 1)


def tidy(text: str, spans: Iterable[Span], protected: Sequence[tuple[int, int]] = ()) -> list[Span]:
    """Snap to whole words, leave out our own tags, and join what overlaps; the result is sorted and disjoint."""
    pieces = [piece for span in spans for piece in _around(_snap(text, span), protected)]
    return union(piece for piece in (_trim(text, piece) for piece in pieces) if piece.start < piece.end)


def union(spans: Iterable[Span]) -> list[Span]:
    """Join overlapping spans; the most telling entity names the whole."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start < joined[-1].end:
            last = joined[-1]
            best = min(last, span, key=lambda one: _RANK.get(one.entity, -1))
            joined[-1] = Span(last.start, max(last.end, span.end), best.entity, max(last.score, span.score))
        else:
            joined.append(span)
    return joined


def _snap(text: str, span: Span) -> Span:
    start, end = span.start, span.end
    while start > 0 and text[start].isalnum() and text[start - 1].isalnum():
        start -= 1
    while end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
        end += 1
    return span._replace(start=start, end=end)


def _trim(text: str, span: Span) -> Span:
    start, end = span.start, span.end
    while start < end and (text[start].isspace() or text[start] in ",;:.!?)]}>\"'"):
        start += 1
    while start < end and (text[end - 1].isspace() or text[end - 1] in ",;:!?([{<\"'"):
        end -= 1
    if not any(character.isalnum() for character in text[start:end]):
        end = start
    return span._replace(start=start, end=end)


def _around(span: Span, protected: Sequence[tuple[int, int]]) -> list[Span]:
    pieces = [span]
    for start, end in protected:
        last = pieces[-1]
        if last.start < end and start < last.end:
            pieces[-1:] = [last._replace(end=start), last._replace(start=end)]
    return [piece for piece in pieces if piece.start < piece.end]


def merge_addresses(text: str, spans: Sequence[Span]) -> list[Span]:
    """Join a street with the places, numbers and countries that follow it into one address."""
    merged: list[Span] = []
    index = 0
    while index < len(spans):
        span = spans[index]
        index += 1
        if span.entity not in ADDRESS_PARTS:
            merged.append(span)
            continue
        block = [span]
        while index < len(spans) and spans[index].entity in ADDRESS_PARTS:
            gap = text[block[-1].end : spans[index].start]
            if len(gap) > 40 or re.search(r"[.!?;:]\s|\b(?:and|or|to|from|with|for|by)\b|<", gap):
                break
            block.append(spans[index])
            index += 1
        if not any(part.entity == "STREET_ADDRESS" for part in block):
            merged += block
            continue
        first = next(n for n, part in enumerate(block) if part.entity == "STREET_ADDRESS")
        merged += [part for part in block[:first] if part.entity == "ORGANIZATION"]
        start = min(part.start for part in block if part not in merged)
        end = block[-1].end
        tail = _ADDRESS_TAIL.match(text, end)
        if tail and (index == len(spans) or tail.end() <= spans[index].start):
            end = tail.end()
        merged.append(Span(start, end, "STREET_ADDRESS", max(part.score for part in block)))
    return merged
