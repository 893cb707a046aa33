"""The review sheet: records drawn by chance, before and after, for a person to read and sign. It holds personal data."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from scripts.deid.report import environment

TEMPLATE = "sample_template.html"


class Sample:
    """Up to `size` written records, each as likely as any other, however many there will be (reservoir sampling)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen, self.rng = size, 0, random.Random(seed)
        self.records: list[tuple[str, Any, Any]] = []

    def offer(self, where: str, before: Any, after: Any) -> None:
        """Take a record in, or not."""
        self.seen += 1
        if len(self.records) < self.size:
            self.records.append((where, before, after))
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.records[place] = (where, before, after)


def marked(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Split both texts into pieces, each with whether it differs."""
    words, others = (re.findall(r"<[A-Z_]+(?:[_:][\w=-]+)?>|\w+|\s+|[^\w\s]", text) for text in (before, after))
    old: list[tuple[str, bool]] = []
    new: list[tuple[str, bool]] = []
    for kind, a, b, c, d in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        old.append(("".join(words[a:b]), kind != "equal"))
        new.append(("".join(others[c:d]), kind != "equal"))
    return [piece for piece in old if piece[0]], [piece for piece in new if piece[0]]


def fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """List the values of a record with the path of each, numbers and truth values as JSON writes them."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from fields(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def write_sheet(path: Path, sample: Sample, name: str, sha256: str) -> None:
    """Write the sheet so that its owner alone can read it."""
    records = []
    for where, before, after in sorted(sample.records, key=lambda record: int(re.findall(r"\d+", record[0])[-1])):
        rows = zip(fields(before), fields(after), strict=True)
        shown = [(field, *marked(old, new), old != new) for (field, old), (_, new) in rows]
        records.append({"where": where, "fields": shown, "changed": sum(row[-1] for row in shown)})
    page = environment().get_template(TEMPLATE).render(records=records, name=name, sha256=sha256, total=sample.seen)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(page)
