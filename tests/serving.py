"""Adapters and servers for the serving tests: tiny, real, and with weights that change the answers."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from eval.benchmarks.serving import save_random_adapter
from scripts.common.schema import Lora
from tests.conftest import ROOT


def save_adapter(
    folder: Path, base: Path, stage: str = "sft", seed: int = 1, scale: float = 0.4, parent: dict | None = None, **lora
) -> Path:
    """Save an adapter with random weights: a fresh LoRA has B = 0, which would hide every mix-up."""
    return save_random_adapter(folder, base, stage, Lora(**{"r": 4, "alpha": 8, **lora}), seed, scale, parent)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(config: Path, *arguments: str, stderr: Any = None, **environment: str) -> Iterator[Running]:
    """Start the server as a user would and wait until it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "serve.fastapi_server:app", "--port", str(port), *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr or log,
            env={**os.environ, "LLM_CONFIG": str(config), **environment},
        )  # fmt: skip
        server = Running(process, f"http://127.0.0.1:{port}", port, log)
        try:
            server.wait_until_ready()
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=30)


@dataclass
class Running:
    """A server process under test."""

    process: subprocess.Popen
    url: str
    port: int
    log: Any

    def wait_until_ready(self, seconds: float = 120) -> None:
        """Return once /health/ready answers 200; fail with the server's log when it ends instead."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended:\n{self.log_text()}"
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log_text()}")

    def log_text(self) -> str:
        """Return what the server has written so far."""
        self.log.seek(0)
        return self.log.read()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Send one request."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{| )", line))
