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

from scripts.common.artifacts import write_manifest
from scripts.common.modeling import add_lora, base_fingerprint, load_tokenizer
from scripts.common.rendering import template_sha256, tokenizer_sha256
from scripts.common.schema import Lora
from tests.conftest import ROOT


def save_adapter(
    folder: Path, base: Path, stage: str = "sft", seed: int = 1, scale: float = 0.4, parent: dict | None = None, **lora
) -> Path:
    """Save an adapter with random weights: a fresh LoRA has B = 0, which would hide every mix-up."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    wrapped = add_lora(AutoModelForCausalLM.from_pretrained(base), Lora(**{"r": 4, "alpha": 8, **lora}), str(base))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, scale)
    wrapped.save_pretrained(folder)
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(folder)
    write_manifest(
        folder, stage,
        base_model={"id": str(base), "revision": None, "fingerprint": base_fingerprint(base)},
        tokenizer_sha256=tokenizer_sha256(tokenizer), chat_template_sha256=template_sha256(tokenizer),
        parent=parent, datasets=[], split={"seed": 0, "ratio": 0.1}, config={"dpo": {"beta": 0.2}},
        mlflow={"run_id": None}, metrics={},
    )  # fmt: skip
    return folder


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
