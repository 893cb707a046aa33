"""Colour for what stands out, where a terminal shows it."""

from __future__ import annotations

import logging
import os
from typing import TextIO

YELLOW, RED, BOLD = "33", "31", "1"
LEVELS = {logging.WARNING: YELLOW, logging.ERROR: RED, logging.CRITICAL: RED}


def shows_colour(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal that shows colour, and nobody has asked for none (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return False
    return os.name != "nt" or bool({"WT_SESSION", "ANSICON", "TERM"} & os.environ.keys())


def coloured(text: str, code: str, stream: TextIO) -> str:
    """Return a text with the sequences that colour it on this stream, or as it is."""
    return f"\x1b[{code}m{text}\x1b[0m" if shows_colour(stream) else text


class ColouredFormatter(logging.Formatter):
    """Colour warnings and errors."""

    def __init__(self, layout: str, times: str, stream: TextIO) -> None:
        super().__init__(layout, times)
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one text."""
        line, code = super().format(record), LEVELS.get(record.levelno)
        return coloured(line, code, self.stream) if code else line
