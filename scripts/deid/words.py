"""The lists of words in words.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

WORD_LISTS = Path(__file__).with_name("words.yaml")


@cache
def words(name: str) -> frozenset[str]:
    """Return one list, by its key."""
    text: str = _lists()[name]
    return frozenset(part.strip() for part in (text.split(",") if "," in text else text.split()))


@cache
def _lists() -> dict[str, str]:
    return dict(yaml.safe_load(WORD_LISTS.read_text(encoding="utf-8")))
