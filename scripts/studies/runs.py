"""Start the stages of a study one after the other, each in a process of its own, and say how long they will take."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from scripts.common.errors import Interrupted
from scripts.common.paths import ROOT
from scripts.common.signals import signals_held

log = logging.getLogger(__name__)

LAST_LINES = 6


def run_stage(
    script: str,
    arguments: Sequence[str],
    log_file: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    cwd: Path | None = None,
) -> int:
    """Run a stage with its output in a file or on the terminal, and return its exit code.

    It has a process group of its own: on Ctrl-C a terminal asks every process of a group to stop, and a stage that is
    asked twice stops without a checkpoint. A request to stop is passed to the stage, whose end is waited for.
    """
    file = ROOT / (script.replace(".", "/") + ".py")
    child: subprocess.Popen[bytes] | None = None
    if log_file:
        log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") if log_file else nullcontext() as output:
        try:
            with signals_held():
                child = subprocess.Popen(
                    [sys.executable, str(file), *arguments], cwd=cwd,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True,
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same for Windows
                )  # fmt: skip
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=1)
                tick()
        except BaseException:
            while child and child.poll() is None:
                log.warning(
                    "stopping %s", f"{log_file.stem}; the same command continues from there" if log_file else script
                )
                if os.name == "nt":  # where `terminate` is a kill
                    child.send_signal(getattr(signal, "CTRL_BREAK_EVENT"))  # noqa: B009 (mypy runs elsewhere too)
                else:
                    child.terminate()
                with suppress(Interrupted):  # asked again, so is the stage
                    child.wait()
            raise


def last_lines(log_file: Path) -> str:
    """Return what a stage said last, where a progress bar counts by its last state."""
    text = log_file.read_text(encoding="utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return "\n".join(f"    {line}" for line in [line for line in lines if line][-LAST_LINES:])


@dataclass
class Progress:
    """How far a study is: one bar on a terminal, otherwise a line per run.

    `seconds` holds what runs of each kind have taken; what is left is estimated from nothing else.
    """

    seconds: dict[str, list[float]]
    left: list[str]  # the kinds of the runs that are left, in their order
    total: int
    bar: Any = None
    started: float = 0.0

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Keep the bar on the terminal for the length of the block."""
        self.bar = tqdm(
            total=self.total, initial=self.total - len(self.left), disable=not sys.stderr.isatty(), dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip
        with self.bar, logging_redirect_tqdm([logging.getLogger()]):
            yield self

    def begin(self, name: str) -> None:
        """Say which run starts."""
        self.started = time.monotonic()
        if self.bar.disable:
            place = self.total - len(self.left) + 1
            log.info("[%d/%d] %s (%s)", place, self.total, name, time_left(self.seconds, self.left))
        self.bar.set_description_str(name)
        self.tick()

    def tick(self) -> None:
        """Bring the bar up to date."""
        spent = time.monotonic() - self.started
        self.bar.set_postfix_str(time_left(self.seconds, self.left, spent))

    def end(self, *, measured: bool) -> None:
        """Note that the run ended and, where it was `measured` from start to end, how long it took."""
        if measured:
            self.seconds.setdefault(self.left[0], []).append(round(time.monotonic() - self.started, 1))
        self.skip()

    def skip(self) -> None:
        """Leave out the next run."""
        self.left.pop(0)
        self.bar.update()


def time_left(seconds: dict[str, list[float]], left: Sequence[str], spent: float = 0.0) -> str:
    """Say how long runs of these kinds take, of which the first has run for `spent` seconds already."""
    known = [mean(seconds[kind]) for kind in left if seconds.get(kind)]
    if not known:
        return "time left not known yet" if left else "done"
    first = mean(seconds[left[0]]) if seconds.get(left[0]) else 0.0
    minutes = max(1, round((sum(known) - min(spent, first)) / 60))
    return f"{'about' if len(known) == len(left) else 'at least'} {minutes} min left"  # a kind may never have been measured
