"""The table of the drills: filled by what was tried, and written to README.md beside this file."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

README = Path(__file__).with_name("README.md")
HEAD = """# Fault drills

What was done to the real scripts on a tiny model, how often, and how often anything was lost: a finished artifact that was
no longer whole, half an artifact read as a whole one, a next run that did not come to its end, or a traceback for a user.
Written by `make drill`, never by hand; a drill run alone renews its own rows.

| fault | stage | times tried | lost | what came of it |
|---|---|---|---|---|
"""


class Table:
    """Count what was tried and what was lost, by fault and stage."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[int, int, str]] = {}

    def add(self, fault: str, stage: str, outcomes: list[str], lost: list[str]) -> None:
        """Enter one drill; `outcomes` has a word for each time that nothing was lost."""
        counted = sorted({word: outcomes.count(word) for word in outcomes}.items(), key=lambda item: -item[1])
        what = ", ".join(f"{word} ({count})" if len(counted) > 1 else word for word, count in counted)
        self.rows[fault, stage] = (len(outcomes) + len(lost), len(lost), what)
        self.write()  # at once: a drill that is cut off keeps what it has found

    def write(self) -> None:
        """Renew the rows that were tried, keep the others."""
        kept = {}
        if README.exists():
            for line in README.read_text(encoding="utf-8").splitlines():
                if found := re.fullmatch(r"\| ([^|]+) \| ([^|]+) \| (\d+) \| (\d+) \| ([^|]*) \|", line):
                    fault, stage, tried, lost, what = found.groups()
                    kept[fault, stage] = (int(tried), int(lost), what)
        rows = sorted((kept | self.rows).items())
        lines = [f"| {fault} | {stage} | {n} | {lost} | {what} |" for (fault, stage), (n, lost, what) in rows]
        total, lost = sum(row[0] for _, row in rows), sum(row[1] for _, row in rows)
        lines += ["", f"{total} faults in all, {lost} with a loss.", "", describe_machine(), ""]
        README.write_text(HEAD + "\n".join(lines), encoding="utf-8")


def describe_machine() -> str:
    """Say where and when this was measured, and how to do it again."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (
        f"Last run on {cores} cores of {model}, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}, "
        f"commit {commit.strip() or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}: `make drill`"
    )


@pytest.fixture(scope="session")
def table() -> Table:
    """Return the table."""
    return Table()
