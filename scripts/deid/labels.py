"""What the name of a field or the head of a column says about its values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from scripts.deid.languages import labels
from scripts.deid.spans import Span

FIELD_ENTITIES = {
    "PERSON": r"(?:full|first|last|middle|maiden|given|family|patient|customer|client|user|contact|employee)?name|surname",
    "EMAIL_ADDRESS": r"e?mail(?:address)?",
    "PHONE_NUMBER": r"(?:tele|cell|mobile|home|work)?phone(?:number|no)?|tel|mobile|fax(?:number)?",
    "US_SSN": r"ssn|socialsecurity(?:number|no)?",
    "STREET_ADDRESS": r"(?:street|home|billing|shipping|mailing|postal)?address|street",
    "ZIP_CODE": r"zip(?:code)?|post(?:al)?code",
    "DATE_TIME": r"dob|birthda(?:y|te)|dateofbirth|birthdate",
    "AGE": r"age",
    "ID_NUMBER": r"mrn|(?:account|acct|policy|passport|member|licen[cs]e|patient)(?:number|no|id)",
    "CREDIT_CARD": r"(?:credit)?card(?:number|no)",
    "HANDLE": r"username|handle|login",
    "SECRET": r"password|passwd|secret|api_?key|token",
    "IP_ADDRESS": r"ip(?:address)?",
}
_PATTERNS = {entity: re.compile(pattern) for entity, pattern in FIELD_ENTITIES.items()}
# The same in other languages, by the kinds of languages.yaml.
_KINDS = {
    "name": "PERSON",
    "phone": "PHONE_NUMBER",
    "address": "STREET_ADDRESS",
    "date": "DATE_TIME",
    "id": "ID_NUMBER",
}
# Heads of columns that stand above people; a field of a record with such a name may hold anything.
_PEOPLE = re.compile(
    r"owner|(?:card|account)?holder|prescriber|driver|guest|patient|customer|client|employee|tenant|landlord|applicant|assignee|manager|author|contact|recipient|sender"
    r"|passenger|student|pupil|teacher|parent|guardian|witness|insured|claimant|beneficiary|doctor|physician|nurse|agent|buyer|seller|spouse|reviewer|attendee"
)
_CHECKED = {"IBAN_CODE": "iban", "CREDIT_CARD": "card|creditcard|pan", "UK_NHS": "nhs(?:number|no)?", "US_NPI": "npi", "MEDICAL_LICENSE": "dea",
            "VEHICLE_ID": "vin|plate|registration", "DEVICE_ID": "imei|serial(?:number|no)?", "ID_NUMBER": "routing(?:number)?|aba|tfn|sin|(?:tax|national|student|employee|member|customer|patient)id"}  # fmt: skip
_RULE = re.compile(r"[\s|:=-]+")


def entity_of_label(name: str, entities: Sequence[str]) -> str | None:
    """Return the entity that the name of a field promises for its whole value."""
    plain = re.sub(r"[\W_]", "", name.casefold())
    named = [entity for entity, pattern in _PATTERNS.items() if pattern.fullmatch(plain)]
    named += [entity for kind, entity in _KINDS.items() if plain in labels(kind)]
    return next((entity for entity in named if entity in entities), None)


def find_cells(text: str, entities: Sequence[str]) -> list[Span]:
    """Return the cells of a table in a text (CSV or Markdown) whose column has a head that names an entity."""
    lines = [match.span() for match in re.finditer(r"[^\n]+", text)]
    if not 2 <= len(lines) <= 2000:
        return []
    for separator in "|,;\t":
        rows = [list(_cells(text, *line, separator)) for line in lines]
        width = len(rows[0])
        if width >= 2 and all(len(row) == width for row in rows[: max(2, len(rows) - 1)]):
            heads = [_entity_of_head(text[start:end], entities) for start, end in rows[0]]
            return [
                Span(start, end, entity, 0.7)
                for row in rows[1:]
                if len(row) == width
                for entity, (start, end) in zip(heads, row, strict=True)
                if entity and _fits(entity, text[start:end])
            ]
    return []


def _cells(text: str, start: int, end: int, separator: str) -> Iterator[tuple[int, int]]:
    if separator == "|" and text[start:end].strip()[:1] == "|":
        start, end = (
            text.index("|", start) + 1,
            text.rindex("|", start, end) if text[start:end].rstrip().endswith("|") else end,
        )
    for match in re.finditer(rf"[^{re.escape(separator)}]*(?:{re.escape(separator)}|$)", text[start : max(start, end)]):
        if match[0] or match.start() == 0 or text[start + match.start() - 1] == separator:
            stop = start + match.end() - match[0].endswith(separator)
            inner = text[start + match.start() : stop]
            yield (
                start + match.start() + len(inner) - len(inner.lstrip(" \"'*")),
                stop - (len(inner) - len(inner.rstrip(" \"'*\r"))),
            )


def _entity_of_head(head: str, entities: Sequence[str]) -> str | None:
    plain = re.sub(r"[\W_]", "", head.casefold())
    for entity, pattern in _CHECKED.items():
        if entity in entities and re.fullmatch(pattern, plain):
            return entity
    if "PERSON" in entities and (_PEOPLE.fullmatch(plain) or plain in labels("parties")):
        return "PERSON"
    return entity_of_label(head, entities)


def _fits(entity: str, cell: str) -> bool:
    """Say whether a cell can hold what its column promises: a name begins with a capital, a number holds digits."""
    if len(cell) < 2 or _RULE.fullmatch(cell) or "<" in cell:
        return False
    return cell[0].isupper() and len(cell) <= 60 if entity == "PERSON" else any(c.isdigit() or c in "@." for c in cell)
