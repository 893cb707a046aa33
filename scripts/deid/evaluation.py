"""Measure the recognizers against labelled texts: what is covered whole, what leaks, what is flagged without need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
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


def evaluate(rows: Iterable[tuple[dict[str, Any], list[Span] | None]]) -> dict[str, Any]:
    """Compare found with labelled spans; a record that was held back (None) neither leaks nor counts for recall.

    A labelled span counts as found when each of its letters and digits is covered, under any entity name.
    """
    covered_whole, labelled, right, flagged = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    records = held_back = leaking = plain = plain_flagged = 0
    for row, spans in rows:
        records += 1
        if spans is None:
            held_back += 1
            continue
        text, gold = row["text"], [span for span in row["spans"] if span["label"] not in NOT_PERSONAL]
        covered = {position for span in spans for position in range(span.start, span.end)}
        personal = {position for span in row["spans"] for position in range(span["start"], span["end"])}
        leaks = False
        for span in gold:
            whole = all(at in covered for at in range(span["start"], span["end"]) if text[at].isalnum())
            labelled[span["label"]] += 1
            covered_whole[span["label"]] += whole
            leaks = leaks or not whole
        leaking += leaks
        for found in spans:
            flagged[found.entity] += 1
            right[found.entity] += any(position in personal for position in range(found.start, found.end))
        others = [at for at, character in enumerate(text) if character.isalnum() and at not in personal]
        plain += len(others)
        plain_flagged += sum(at in covered for at in others)
    return {
        "records": records,
        "held_back": held_back,
        "recall": share(covered_whole.total(), labelled.total()),
        "recall_by_label": {label: share(covered_whole[label], labelled[label]) for label in sorted(labelled)},
        "precision": share(right.total(), flagged.total()),
        "precision_by_entity": {entity: share(right[entity], flagged[entity]) for entity in sorted(flagged)},
        "leaking_records": share(leaking, records - held_back),
        "flagged_characters_without_personal_data": share(plain_flagged, plain),
    }
