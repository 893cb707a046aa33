"""Start a server as a user would, wait until it answers, and end it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from scripts.common.errors import UserError
from scripts.common.paths import ROOT

START_SECONDS = 120


@contextmanager
def started(application: str, config: Path) -> Iterator[tuple[str, psutil.Process, float]]:
    """Start one of our servers and yield its address, process and the seconds until it was ready."""
    command = ["-m", "uvicorn", application, "--log-level", "warning", "--port"]
    with listening(application, command, "/health/ready", LLM_CONFIG=str(config)) as server:
        yield server


@contextmanager
def listening(
    name: str, command: Sequence[str], ready: str, **variables: str
) -> Iterator[tuple[str, psutil.Process, float]]:
    """Start Python with these arguments and a port behind them, and yield the same once the path `ready` answers 200."""
    begin = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *command, str(port)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "PYTHONPATH": paths, **variables}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, stdout=log)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{url}{ready}").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() - begin > START_SECONDS:
                    log.seek(0)
                    raise UserError(f"{name} did not start:\n{log.read()[-2000:]}")
                time.sleep(0.05)
            yield url, psutil.Process(process.pid), time.monotonic() - begin
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # the plain server ends its current answer first
                process.kill()
                process.wait()
