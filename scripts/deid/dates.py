"""Dates and ages that keep some of their meaning: moved by the same days throughout a record, or made coarse."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

# How dates are written; the first that fits is used. A number over 12 tells day and month apart, else the month stands first
# with slashes and the day with dots and dashes.
_FORMATS = (
    "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d", "%Y/%m/%d", "%m/%d/%Y", "%d/%m/%Y", "%m/%d/%y", "%d/%m/%y",
    "%d.%m.%Y", "%d.%m.%y", "%d-%m-%Y", "%m-%d-%Y", "%d-%b-%Y", "%d %b %Y", "%d %B %Y", "%d %B, %Y", "%b %d, %Y", "%B %d, %Y", "%b %d %Y", "%B %d %Y",
)  # fmt: skip
_WITHOUT_YEAR = ("%d %B", "%d %b", "%B %d", "%b %d", "%m/%d", "%d.%m.")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|\bof (?=[A-Z])|(?<=[a-z])\.(?= )")
_LEAP_YEAR = 2024  # stands for the year of a date that names none
BAND = 10
OLDEST = 89


def shift_date(written: str, days: int) -> str | None:
    """Move a date by some days and write it as it was written; None when it cannot be read."""
    if (read := _read(written)) is None:
        return None
    date, form, plain = read
    try:
        moved = (date + timedelta(days=days)).strftime(form)
    except OverflowError:
        return None
    return moved if re.search(r"\b0\d", plain) else re.sub(r"\b0(?=\d)", "", moved)


def read_date(written: str) -> str | None:
    """Return a day, the same for all ways to write it; None for what is no whole date."""
    read = _read(written)
    return read[0].strftime("%Y-%m-%d") if read and read[1] in _FORMATS and "%H" not in read[1] else None


def _read(written: str) -> tuple[datetime, str, str] | None:
    plain = _ORDINAL.sub("", " ".join(written.split()))
    for form in (*_FORMATS, *_WITHOUT_YEAR):
        whole = form in _FORMATS
        try:
            return (
                datetime.strptime(*((plain, form) if whole else (f"{plain} {_LEAP_YEAR}", f"{form} %Y"))),
                form,
                plain,
            )
        except ValueError:
            continue
    return None


def coarse_date(written: str) -> str | None:
    """Return the year of a date; None when it names none."""
    year = re.search(r"(?<!\d)(?:19|20)\d\d(?!\d)", written)
    return year[0] if year else None


def coarse_age(written: str) -> str:
    """Write each age as a band of ten years; ages over 89 as 90+."""

    def band(match: re.Match[str]) -> str:
        age = int(match[0])
        low = age // BAND * BAND
        return f"{OLDEST + 1}+" if age > OLDEST else f"{low}-{low + BAND - 1}"

    return re.sub(r"\d+", band, written)
