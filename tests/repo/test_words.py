"""The ten worst words stay out of code, messages and documents."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What to write instead.
WORDS = {
    r"mend(s|ed|ing)?": "fix",
    r"(go|goes|going|gone|went) on(?! (?:the|a|to)\b)": "continue",
    r"anew": "again",
    r"what(so)?ever": "any, all that, or a sentence of its own",
    r"case aside": "ignoring case",
    r"(is|are|was|were|be|been) told(?! apart)": "is reported, or: the message says",
    r"added up over": "summed, or all_reduce",
    r"shall": "must, should or will",
    r"thereof|therein|thereupon": "of it, in it, then",
    r"hitherto|heretofore": "so far",
}
READ = {".py", ".md", ".yaml", ".yml", ".html", ".js", ".css", ".toml", ".cfg", ".sh"}
NAMED = {"Makefile", "Dockerfile"}


def own_files() -> list[Path]:
    """Name the texts of the project; outside a git checkout there are none to tell from a user's own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [
        path
        for path in paths
        if (path.suffix in READ or path.name in NAMED) and path.is_file() and path != Path(__file__)
    ]


def bad_words(text: str) -> list[tuple[int, str, str]]:
    """Return line, word and what to write instead; an underscore parts words like a space."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        spaced = line.replace("_", " ")
        for word, better in WORDS.items():
            found += [(number, match.group(), better) for match in re.finditer(rf"\b({word})\b", spaced, re.IGNORECASE)]
    return found


@pytest.mark.parametrize(
    "text", ["# mended", "whatever it is", "test_is_told", "Words, case aside.", "it goes on", "anew"]
)
def test_a_bad_word_is_seen(text: str) -> None:
    ((number, _, _),) = bad_words(text)

    assert number == 1


@pytest.mark.parametrize("text", ["recommended", "it goes on the CPU", "a commendable amendment", "newcomer", "retold"])
def test_other_words_are_not(text: str) -> None:
    assert bad_words(text) == []


def test_the_worst_words_stay_out() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: `{word}`: write {better}"
        for path in own_files()
        for number, word, better in bad_words(path.read_text(encoding="utf-8"))
    ]

    assert not found, "\n" + "\n".join(found)
