"""Ask on the terminal, or take the default and show it."""

from __future__ import annotations

import sys
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
    say(f"  {coloured('note:', YELLOW, sys.stdout)} {text}")


def head(text: str) -> None:
    """Write the first line of a paragraph."""
    say(f"\n{coloured(text, BOLD, sys.stdout)}")


def say(text: str) -> None:
    """Write a line to the terminal."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
