"""Ask on the terminal, or take the default and show it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.common.colour import BOLD, YELLOW, coloured
from scripts.common.errors import UserError


@dataclass(frozen=True)
class Asker:
    """Somebody to ask; with `assume` nobody is there, and each default is taken and shown."""

    assume: bool

    def ask(self, question: str, default: str) -> str:
        """Return what the user types, or the default where that is nothing."""
        if self.assume:
            say(f"{question} {default}  (assumed: --yes)")
            return default
        sys.stdout.write(f"{question} [{default}] ")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            raise UserError(
                f"{question} There is nobody to ask. Start it on a terminal, or add --yes to assume {default}."
            )
        return line.strip() or default

    def choose(self, question: str, options: Sequence[str], default: str) -> str:
        """Return one of several options, which may be typed in any case."""
        known = {option.strip().casefold(): option for option in options}
        while True:
            answer = self.ask(f"{question} ({', '.join(options)})", default)
            if answer.strip().casefold() in known:
                return known[answer.strip().casefold()]
            say(f"found {answer}, wanted one of {', '.join(options)}")


def note(text: str) -> None:
    """Write a line about what is probably a mistake, or a limit."""
    write(_wrapped(f"  note: {text}").replace("note:", coloured("note:", YELLOW, sys.stdout), 1))


def head(text: str) -> None:
    """Write the first line of a paragraph."""
    write(f"\n{coloured(_wrapped(text), BOLD, sys.stdout)}")


def say(text: str) -> None:
    """Write a text, in as many lines as a terminal needs."""
    write(_wrapped(text))


def write(line: str) -> None:
    """Write a line as it is, such as a command that will be copied."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _wrapped(text: str) -> str:
    """Break a text between words where a terminal would break it within one."""
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or len(text) <= width:
        return text
    indent = " " * (len(text) - len(text.lstrip(" ")))
    lines = textwrap.wrap(text, width, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)
