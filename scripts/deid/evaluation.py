"""Measure the recognizers against labelled texts: what is covered whole, what leaks, what is flagged without need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.dataset.files import BadRow, read_rows
from scripts.deid.spans import Span

# Job titles and forms of address identify nobody; MISC of the newspaper sets holds works, events and nationalities.
NOT_PERSONAL = frozenset({"TITLE", "PREFIX", "MISC"})


def wilson(hits: int, total: int) -> list[float] | None:
    """Return the 95 % Wilson interval of a share; None without observations."""
    from scipy.stats import binomtest

    if not total:
        return None
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return [round(float(interval.low), 4), round(float(interval.high), 4)]


def share(hits: int, total: int) -> dict[str, Any]:
    """Return a share with its counts and interval."""
    return {
        "hits": hits,
        "total": total,
        "share": round(hits / total, 4) if total else None,
        "wilson95": wilson(hits, total),
    }


def read_gold(path: Path) -> Iterator[dict[str, Any]]:
    """Yield labelled rows {text, spans: [{start, end, label}]}.

    Raises: UserError naming the first row that is not one.
    """
    for where, row in read_rows(path):
        try:
            if isinstance(row, BadRow):
                raise ValueError(row.reason)
            for span in row["spans"]:
                if not 0 <= span["start"] < span["end"] <= len(row["text"]):
                    raise ValueError("a span outside the text")
                str(span["label"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--evaluate {where}: {type(error).__name__}: {error}; wanted text and spans of start, end, label."
            ) from None
        yield row


@dataclass
class Counts:
    """What was counted over some labelled texts."""

    records: int = 0
    held_back: int = 0
    covered: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    leaking: int = 0
    clean: int = 0  # records without labelled spans, and of these the ones with a finding
    touched: int = 0
    plain_numbers: int = 0  # records that hold a number and no labelled one, and of these the ones that lose a number
    losing: int = 0
    others: int = 0  # letters and digits outside labelled spans, and of these the ones that were flagged
    flagged: int = 0

    def add(self, row: dict[str, Any], spans: list[Span] | None) -> None:
        """Count one record; one that was held back neither leaks nor counts for recall."""
        self.records += 1
        text, gold = row["text"], [span for span in row["spans"] if span["label"] not in NOT_PERSONAL]
        if not row["spans"]:
            self.clean += 1
            self.touched += spans is None or bool(spans)
        if spans is None:
            self.held_back += 1
            return
        covered = {position for span in spans for position in range(span.start, span.end)}
        leaks = False
        for span in gold:
            whole = all(at in covered for at in range(span["start"], span["end"]) if text[at].isalnum())
            self.labelled[span["label"]] += 1
            self.covered[span["label"]] += whole
            leaks = leaks or not whole
        self.leaking += leaks
        personal = {at for span in row["spans"] for at in range(span["start"], span["end"])}
        if any(c.isdigit() for c in text) and not any(text[at].isdigit() for at in personal):
            self.plain_numbers += 1
            self.losing += any(text[at].isdigit() for at in covered)
        others = [at for at, character in enumerate(text) if character.isalnum() and at not in personal]
        self.others += len(others)
        self.flagged += sum(at in covered for at in others)

    def shares(self) -> dict[str, Any]:
        """Return the shares of all that was counted."""
        return {
            "records": self.records,
            "held_back": self.held_back,
            "recall": share(self.covered.total(), self.labelled.total()),
            "names": share(self.covered["PERSON"], self.labelled["PERSON"]),
            "leaking_records": share(self.leaking, self.records - self.held_back),
            "touched_clean_records": share(self.touched, self.clean),
            "records_losing_numbers": share(self.losing, self.plain_numbers),
            "flagged_characters_without_personal_data": share(self.flagged, self.others),
        }


def evaluate(rows: Iterable[tuple[dict[str, Any], list[Span] | None]]) -> dict[str, Any]:
    """Compare found with labelled spans, over all and by the `style` of the records where they name one.

    A labelled span counts as found when each of its letters and digits is covered, under any entity name.
    """
    right, flagged = Counter[str](), Counter[str]()
    everything, styles = Counts(), dict[str, Counts]()
    for row, spans in rows:
        everything.add(row, spans)
        if "style" in row:
            styles.setdefault(row["style"], Counts()).add(row, spans)
        if spans is None:
            continue
        personal = {position for span in row["spans"] for position in range(span["start"], span["end"])}
        for found in spans:
            flagged[found.entity] += 1
            right[found.entity] += any(position in personal for position in range(found.start, found.end))
    labels = sorted(everything.labelled)
    return {
        **everything.shares(),
        "recall_by_label": {name: share(everything.covered[name], everything.labelled[name]) for name in labels},
        "by_style": {name: styles[name].shares() for name in sorted(styles)},
        "precision": share(right.total(), flagged.total()),
        "precision_by_entity": {entity: share(right[entity], flagged[entity]) for entity in sorted(flagged)},
    }
