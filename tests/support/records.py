"""Rows, and what reading them gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Data
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Record, load_datasets, parse_record
from scripts.dataset.rendering import Rendered, render_record

PLAIN = Data()


KEY = "sft.dataset_path"


def load(path: Path, data: Data = PLAIN) -> list[Record]:
    """Read one file."""
    return list(load_datasets(str(path), parse_record, data, KEY)[0].records)


def refusal(path: Path, data: Data = PLAIN) -> str:
    """Return the message that the user sees."""
    with pytest.raises(UserError) as caught:
        load(path, data)
    return str(caught.value)


def talk(*contents: str) -> list[dict[str, str]]:
    """Make alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def instruction(number: int, **more: str) -> dict[str, str]:
    """Make a good row."""
    return {"instruction": f"question {number}", "output": f"answer {number}", **more}


def one_row(tokenizer: Any, record: Record) -> Rendered:
    """Render a record whose answers share a row."""
    [row] = render_record(ChatFormat(tokenizer), record)
    return row
