"""Ask a person at the terminal which of two answers is better, without naming the models."""

from __future__ import annotations

import logging
import sys

from eval.judging.votes import Contest, VotesFile

log = logging.getLogger(__name__)

TERMINAL = "the person at the terminal"
KEYS = {"a": "first", "b": "second", "t": "tie"}


def ask_at_terminal(contest: Contest, file: VotesFile) -> None:
    """Show one pair after the other and take a letter; q or the end of input stops."""
    missing = file.missing(contest, "human", TERMINAL, both_orders=False)
    total = len(contest.questions)
    sys.stdout.write(f"{contest.criteria}\n")
    for number, (question, first) in enumerate(missing, total - len(missing) + 1):
        texts = {"REQUEST": question.prompt, "ANSWER A": question.answers[first]}
        texts["ANSWER B"] = question.answers[contest.second(first)]
        sys.stdout.write(f"\n{number} of {total}\n")
        sys.stdout.writelines(f"\n{title}\n{quoted(text)}\n" for title, text in texts.items())
        letter = ""
        while letter not in (*KEYS, "q"):
            try:
                letter = input("\nWhich is better: a, b, t for a tie, q to stop? ").strip().lower()
            except EOFError:
                letter = "q"
        if letter == "q":
            log.info("stopped; the same command continues with question %d", number)
            return
        file.add(contest, question.sample, "human", TERMINAL, first, KEYS[letter])


def quoted(text: str) -> str:
    """Set a text apart, with control characters spelt out: what a model writes must not steer a terminal."""
    lines = (
        "".join(c if c.isprintable() or c in "\t\u200c\u200d" else c.encode("unicode_escape").decode() for c in line)
        for line in text.split("\n")
    )
    return "\n".join(f"  | {line}" for line in lines)
