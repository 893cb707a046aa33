"""Colour marks what stands out on a terminal, and is left out everywhere else."""

from __future__ import annotations

import io
import logging

import pytest

from scripts.common.colour import RED, ColouredFormatter, coloured
from tests.conftest import run_python


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_a_terminal_gets_colour_and_a_file_does_not() -> None:
    assert coloured("error", RED, Terminal()) == "\x1b[31merror\x1b[0m"
    assert coloured("error", RED, io.StringIO()) == "error"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colour_gets_none(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert coloured("error", RED, Terminal()) == "error"


def test_warnings_stand_out_and_what_is_as_it_should_be_does_not() -> None:
    layout = ColouredFormatter("%(message)s", "%H", Terminal())

    def line(level: int) -> str:
        return layout.format(logging.LogRecord("scripts", level, "", 0, "text", None, None))

    assert line(logging.INFO) == "text"
    assert line(logging.WARNING) == "\x1b[33mtext\x1b[0m"
    assert line(logging.ERROR) == "\x1b[31mtext\x1b[0m"


def test_a_message_in_a_pipe_is_plain() -> None:
    done = run_python("-m", "scripts.train_sft", "--config", "nope.yaml")
    assert done.stderr.startswith("error: nope.yaml: ")
