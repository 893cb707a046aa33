"""Answers for a terminal: beside each other where it is wide enough, otherwise below each other."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

NARROWEST = 36  # columns in which sentences still read well
LOG_WIDTH = 96
LOGGED_LINES = 20  # of an answer, as a log keeps it: a model that repeats itself would fill a screen


class Answers:
    """Answers to one question under the names of those who gave them; renders as they stand."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a table with a column for each, or one after the other."""
        if options.max_width // max(len(self.texts), 1) < NARROWEST:
            for name, text in self.texts.items():
                yield Rule(Text(name, style="bold cyan"), align="left", style="cyan")
                yield Text(printable(text).strip() or "…")
            return
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
        for name in self.texts:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*(Text(printable(text).strip() or "…") for text in self.texts.values()))
        yield table


def printable(text: str) -> str:
    """Return a text without the control characters by which a model's answer could steer a terminal."""
    return "".join(each for each in text if each in "\n\t" or unicodedata.category(each) not in ("Cc", "Cf"))


def shown(question: str, texts: Mapping[str, str]) -> str:
    """Return a question with its answers as plain lines, as a log keeps them; no wider than a terminal that is there."""
    width = min(LOG_WIDTH, shutil.get_terminal_size((LOG_WIDTH, 24)).columns)
    texts = {name: _first_lines(text) for name, text in texts.items()}
    console = Console(width=width, force_terminal=False, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(Answers({"asked": question}), Answers(texts))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _first_lines(text: str) -> str:
    lines = text.strip().splitlines()
    if len(lines) <= LOGGED_LINES:
        return text
    return "\n".join([*lines[:LOGGED_LINES], f"… and {len(lines) - LOGGED_LINES} more lines"])
