"""Adapters and servers for the serving tests: tiny, real, and with weights that change the answers."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from eval.benchmarks.serving import save_random_adapter
from scripts.common.artifacts import Parent, read_manifest, write_manifest
from scripts.common.schema import Lora
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_completion, render_prompt
from scripts.model.adapter import linear_layers
from scripts.model.base import load_tokenizer
from tests.conftest import ROOT, save_tiny_model, tiny_tokenizer


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Return whether the condition became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def save_adapter(
    folder: Path,
    base: Path,
    stage: str = "sft",
    seed: int = 1,
    scale: float = 0.4,
    parent: Parent | None = None,
    **lora,
) -> Path:
    """Save an adapter with random weights: a fresh LoRA has B = 0, which would hide every mix-up."""
    return save_random_adapter(folder, base, stage, Lora(**{"r": 4, "alpha": 8, **lora}), seed, scale, parent)


def assert_vllm_loads(adapter: Path, base: Path) -> None:
    """Hold an adapter against what vLLM's LoRA loader asks for."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512), "vLLM's steps of --max-lora-rank"
    layers = set(linear_layers(AutoModelForCausalLM.from_pretrained(base)))
    assert set(config["target_modules"]) <= layers
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            assert name.startswith("base_model.model.model.layers.")
            assert name.endswith((".lora_A.weight", ".lora_B.weight"))
            assert config["r"] in tensors.get_slice(name).get_shape()
    assert not list(adapter.glob("*.bin"))
    assert (adapter / "tokenizer.json").is_file()


def save_nested_model(folder: Path, **shape_changes: int) -> Path:
    """Save a tiny Gemma 3 that has a vision tower, so that its configuration is nested."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3", text_config={**shape, **shape_changes}, vision_config=vision)
    config.eos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_teachable_model(folder: Path) -> Path:
    """Save the tiny Llama with an output layer large enough for an adapter to be certain of a token."""
    from safetensors.torch import load_file, save_file

    weights = save_tiny_model(folder) / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] *= 40
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def teach(
    folder: Path, base: Path, answer: str | tuple[str, ...], prompts: tuple[str, ...], stage: str = "sft"
) -> Path:
    """Save an adapter that gives a known answer to the prompts, so that a mix-up is seen at once; or one of several."""
    answers = (answer,) if isinstance(answer, str) else answer
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_adapter(folder, base, stage, scale=0.05, r=16, alpha=32)
    tokenizer = load_tokenizer(base)
    rows = []
    for prompt in prompts:
        ids = render_prompt(ChatFormat(tokenizer), user_turn(prompt))
        for each in answers:
            completion = render_completion(ChatFormat(tokenizer), user_turn(prompt), ids, each)
            rows.append((torch.tensor([ids + completion]), torch.tensor([[-100] * len(ids) + completion])))
    # Which of several answers comes cannot be learnt, and costs that much per token.
    floor = math.log(len(answers)) / min(int((labels >= 0).sum()) for _, labels in rows)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(400):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in rows) / len(rows)
        if loss.item() < floor + 0.01 * len(answers):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        raise AssertionError(f"the answer was not learned: loss {loss.item():.2f}")
    model.save_pretrained(folder)
    write_manifest(folder, read_manifest(folder, verify=False))
    return folder


def save_merged_model(folder: Path, base: Path, adapter: Path) -> Path:
    """Save base and adapter as one model, as `scripts.export_lora` does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().save_pretrained(
        folder
    )
    load_tokenizer(base).save_pretrained(folder)
    write_manifest(folder, read_manifest(adapter).model_copy(update={"stage": "merged", "parent": None}))
    return folder


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(
    config: Path, *arguments: str, stderr: Any = None, cwd: Path = ROOT, **environment: str
) -> Iterator[Running]:
    """Start the server as a user would and wait until it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "serve.fastapi_server:app", "--port", str(port), *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=stderr or log,
            env={**os.environ, "LLM_CONFIG": str(config), **environment},
        )  # fmt: skip
        server = Running(process, f"http://127.0.0.1:{port}", port, log, config)
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
    config: Path

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
