"""Safe Harbor of HIPAA, 45 CFR 164.514(b)(2)(i): what of a finding may stay, and what the report says of each of the 18 identifiers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from scripts.deid.spans import Span

PROFILE = "hipaa-safe-harbor"
# Areas of 20,000 people or fewer by the first three digits of the ZIP code, census of 2000: guidance of the HHS on (b)(2)(i)(B).
SMALL_AREAS = frozenset(
    [
        "036",
        "059",
        "063",
        "102",
        "203",
        "556",
        "692",
        "790",
        "821",
        "823",
        "830",
        "831",
        "878",
        "879",
        "884",
        "890",
        "893",
    ]
)
OLDEST = 89  # an age over it is an identifier, and so is the year of birth that tells it
STATES = frozenset(
    ["alabama", "alaska", "arizona", "arkansas", "california", "colorado", "connecticut", "delaware", "florida", "georgia", "hawaii", "idaho", "illinois", "indiana", "iowa", "kansas", "kentucky", "louisiana", "maine", "maryland", "massachusetts", "michigan", "minnesota", "mississippi", "missouri", "montana", "nebraska", "nevada", "new hampshire", "new jersey", "new mexico", "new york state", "north carolina", "north dakota", "ohio", "oklahoma", "oregon", "pennsylvania", "rhode island", "south carolina", "south dakota", "tennessee", "texas", "utah", "vermont", "virginia", "washington state", "west virginia", "wisconsin", "wyoming"]
)  # fmt: skip
_YEAR = re.compile(r"^(?:19|20)\d\d(?=[-/. ])|(?<=[-/., ])(?:19|20)\d\d$")
_YEARS_ONLY = re.compile(r"(?:(?:18|19|20)\d\d)(?:\s?(?:-|–|to|and|or)\s?(?:18|19|20)\d\d)?")
_BIRTH = re.compile(r"(?i)\b(?:born|b\.|birth\w*|dob|d\.o\.b\.?|bday)\b[^.\n]{0,20}$")
_ZIP = re.compile(r"(\d{3})\d{2}(?:-?\d{4})?")


def within_limits(text: str, spans: Sequence[Span], countries: frozenset[str]) -> list[Span]:
    """Shorten findings to what the rule forbids: years stay, ages up to 89, states, countries, and large ZIP areas."""
    kept = []
    for span in spans:
        surface = text[span.start : span.end]
        if span.entity == "AGE" and all(int(number) <= OLDEST for number in re.findall(r"\d+", surface)):
            continue
        if span.entity == "LOCATION" and surface.casefold().strip(" .,") in STATES | countries:
            continue
        if span.entity == "ZIP_CODE" and (zip_code := _ZIP.fullmatch(surface)) and zip_code[1] not in SMALL_AREAS:
            span = span._replace(start=span.start + 3)
        if span.entity == "DATE_TIME" and not _tells_old_age(text, span):
            if _YEARS_ONLY.fullmatch(surface):
                continue
            span = _without_year(text, span)
        kept.append(span)
    return kept


def _without_year(text: str, span: Span) -> Span:
    """Leave the year outside: 12 March <1984>, <1984>-03-12."""
    year = _YEAR.search(text[span.start : span.end])
    if not year:
        return span
    if year.start() == 0:
        return span._replace(start=span.start + year.end() + 1)
    before = text[span.start : span.start + year.start()].rstrip(" ,./-")
    return span._replace(end=span.start + len(before))


def is_of_birth(text: str, span: Span) -> bool:
    """Say whether words before a date call it one of birth."""
    return _BIRTH.search(text, max(0, span.start - 40), span.start) is not None


def _tells_old_age(text: str, span: Span) -> bool:
    """Say whether a date is one of birth more than 89 years ago, which is an age over 89."""
    years = [int(year) for year in re.findall(r"(?:18|19|20)\d\d", text[span.start : span.end])]
    return is_of_birth(text, span) and any(datetime.now(UTC).year - year > OLDEST for year in years)


# The 18 identifiers: the entities that stand for each, what stays by the rule, and where the search is only partial.
IDENTIFIERS = {
    "A names": (["PERSON"], "", "names of relatives, employers and household members too; names that are words are missed at times"),
    "B places smaller than a state": (["LOCATION", "STREET_ADDRESS", "ZIP_CODE"], "states, countries, three digits of the ZIP code where more than 20,000 people live", "counties and landmarks are found where a model knows them"),
    "C dates but the year, ages over 89": (["DATE_TIME", "AGE"], "years, ages up to 89, durations", "relative dates such as `last Tuesday` are found by the weekday"),
    "D telephone numbers": (["PHONE_NUMBER"], "", ""),
    "E fax numbers": (["PHONE_NUMBER"], "", ""),
    "F e-mail addresses": (["EMAIL_ADDRESS"], "placeholders such as user@example.com", ""),
    "G social security numbers": (["US_SSN"], "", ""),
    "H medical record numbers": (["ID_NUMBER"], "", "found by their label"),
    "I health plan numbers": (["ID_NUMBER", "US_MBI"], "", "found by their label, Medicare's by their form"),
    "J account numbers": (["ID_NUMBER", "CREDIT_CARD", "IBAN_CODE"], "", "found by their label, cards and IBANs by their form"),
    "K certificate and licence numbers": (["ID_NUMBER", "MEDICAL_LICENSE", "US_NPI"], "", "found by their label, NPI and DEA numbers by their check digits"),
    "L vehicle identifiers": (["VEHICLE_ID"], "", "plates are found by their label"),
    "M device identifiers": (["DEVICE_ID", "MAC_ADDRESS"], "", "serial numbers are found by their label"),
    "N URLs": (["URL"], "placeholders such as example.com", ""),
    "O IP addresses": (["IP_ADDRESS"], "127.0.0.1 and the like", ""),
    "P biometric identifiers": ([], "", ""),
    "Q photographs": ([], "", ""),
    "R any other unique code": (["UUID", "HANDLE", "SECRET", "CRYPTO"], "", "what is unique by its story is not judged"),
}  # fmt: skip
