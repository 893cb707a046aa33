"""Run commands under the double of Windows in tests/windows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

DOUBLE = ROOT / "tests" / "windows"
CTRL_BREAK = 21  # the number that signal.SIGBREAK has on Windows


@contextmanager
def windows() -> Iterator[dict[str, str]]:
    """Yield the environment of processes that share one double of Windows."""
    with tempfile.TemporaryDirectory(prefix="windows-") as processes:
        path = os.pathsep.join([str(DOUBLE), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        yield {**os.environ, "WINDOWS": processes, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_on_windows(
    *arguments: str | Path, cwd: Path = ROOT, timeout: float = 300, text: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user on Windows would, its output in the code page of pipes there."""
    with windows() as there:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd, env=there | environment, input=text, capture_output=True, encoding="utf-8", errors="replace",
            timeout=timeout, check=False,
        )  # fmt: skip
