"""What `start` shows reads well at any width, and a command is never broken in two."""

from __future__ import annotations

import io
import re
import sys

import pytest

from scripts.starting.asking import head, note, say, write

COMMAND = "python -m scripts.train_sft --config configs/mydata.yaml    # about 1 minute"
TEXT = "  answers that keep all rules: 10 test questions can show a difference of 45 points; with about 34, one of 22"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [30, 47, 200])
def test_texts_are_broken_between_words_and_commands_not_at_all(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    head(TEXT)
    note(TEXT.strip())
    say(TEXT)
    write(COMMAND)

    shown = terminal.getvalue()
    assert "\x1b[33mnote:\x1b[0m answers" in shown
    plain = re.sub(r"\x1b\[\d*m", "", shown)
    *texts, command = plain.splitlines()
    assert command == COMMAND
    assert all(len(line) <= width for line in texts)
    assert " ".join(plain.split()).count(TEXT.strip()) == 3, "nothing is lost, and no word is broken"


def test_a_file_gets_each_text_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")

    note(TEXT.strip())

    assert capsys.readouterr().out == f"  note: {TEXT.strip()}\n"
