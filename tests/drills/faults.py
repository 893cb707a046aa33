"""Run a stage's script in a process of its own, with one fault that strikes at a chosen moment.

The process is forked from one that has only imported the libraries, which saves ten seconds a run. A moment is a number
of audit events of the interpreter (files opened, imports, renames …), so that a draw strikes the same place however slow
the machine is; a short delay on top of it reaches into what libraries write past the interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARIES = [
    "torch", "transformers", "transformers.models.llama.modeling_llama", "trl", "peft", "datasets", "mlflow",
    "scripts.training.session", "scripts.training.dpo", "scripts.training.reference", "eval.measuring", "eval.metrics", "eval.verdict", "scripts.export.parity",
]  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
DAY = 86_400


@dataclass(frozen=True)
class Fault:
    """What strikes, and when: at the event of that number, counting all events or only those that change the folder."""

    action: Callable[[], None] | None = None
    at: int = 0
    while_writing: bool = True
    delay: float = 0.0


@dataclass(frozen=True)
class Done:
    """What became of a run: exit code (negative: the signal), all it said, and the events it went through."""

    code: int | None
    said: str
    events: int
    changes: int


@dataclass
class Running:
    """A stage at work."""

    process: Any
    log: Path

    def result(self, seconds: float = 900) -> Done:
        """Wait for the end."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"did not end in {seconds} s:\n{self.log.read_text()}"
        counted = self.log.with_suffix(".events")
        events, changes = map(int, counted.read_text().split()) if counted.exists() else (0, 0)
        return Done(self.process.exitcode, self.log.read_text(), events, changes)


def start(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    fault: Fault | None = None,
    **environment: str,
) -> Running:
    """Start a script in a folder; what it says goes to the log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    log.with_suffix(".events").unlink(missing_ok=True)
    process = context.Process(target=_run, args=(module, list(arguments), folder, log, fault or Fault(), environment))
    process.start()
    return Running(process, log)


def _run(
    module: str, arguments: list[str], folder: Path, log: Path, fault: Fault, environment: Mapping[str, str]
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    counts = {"events": 0, "changes": 0}

    def watch(event: str, details: tuple) -> None:
        change = is_change(event, details, folder)
        counts["events"] += 1
        counts["changes"] += change
        if fault.at and counts["changes" if fault.while_writing else "events"] == fault.at:
            if fault.while_writing and not change:
                return
            counts["changes" if fault.while_writing else "events"] += 1  # strike once
            strike(fault)

    sys.addaudithook(watch)
    if fault.action and not fault.at:
        fault.action()
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        log.with_suffix(".events").write_text(f"{counts['events']} {counts['changes']}")


def is_change(event: str, details: tuple, folder: Path) -> bool:
    """Tell whether an audit event changes what lies in the folder, which is the working folder."""
    if event == "open":
        path, _, flags = details
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in CHANGES:
        path = details[0]
    else:
        return False
    if not isinstance(path, str | bytes):
        return False
    return Path(os.fsdecode(path)).is_relative_to(folder) or not os.path.isabs(path)


def strike(fault: Fault) -> None:
    """Act now or a little later."""
    assert fault.action is not None
    if not fault.delay:
        fault.action()
        return

    def later() -> None:
        time.sleep(fault.delay)
        assert fault.action is not None
        fault.action()

    threading.Thread(target=later, daemon=True).start()


# --- what can strike; classes, since a fault travels to another process


@dataclass(frozen=True)
class Send:
    """Send the process a signal."""

    number: signal.Signals

    def __call__(self) -> None:
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class TakeMemory:
    """Let the next pass through a model ask for more memory than any machine has; torch's own error follows."""

    def __call__(self) -> None:
        import torch

        torch.nn.Embedding.forward = lambda *_: torch.empty(2**60, dtype=torch.uint8)


@dataclass(frozen=True)
class TurnBackClock:
    """Set the clock back by a day: what is there already then seems to come from tomorrow."""

    folder: Path

    def __call__(self) -> None:
        real = time.time
        time.time = lambda: real() - DAY
        tomorrow = real() + DAY
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # libraries come and go beside us
                os.utime(path, (tomorrow, tomorrow))


_held: list[Any] = []


@dataclass(frozen=True)
class BreakStore:
    """Take the MLflow store away: lock it, fill it with rubbish, or remove it."""

    path: Path
    how: str

    def __call__(self) -> None:
        if self.how == "locked":
            connection = sqlite3.connect(self.path, check_same_thread=False, timeout=60)
            connection.execute("BEGIN EXCLUSIVE")
            _held.append(connection)  # closing it would unlock
        elif self.how == "corrupt":
            self.path.write_bytes(os.urandom(self.path.stat().st_size))
        else:
            self.path.unlink()
