"""A whole chain on a tiny model, run once per test module that asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.conftest import ROOT, save_tiny_model, write_jsonl

COLOURS = ("red", "blue", "green", "gold", "grey")


def sft_rows(count: int = 8) -> list[dict]:
    """Return short instruction records."""
    return [
        {"instruction": f"say {colour} {number}", "input": "", "output": f"{colour} it is, {number}"}
        for number in range(count)
        for colour in COLOURS
    ]


def dpo_rows(count: int = 8) -> list[dict]:
    """Return short preference pairs whose sides are equally long."""
    return [
        {
            "prompt": f"tell {colour} {number}",
            "chosen": f"{colour} it is, {number}",
            "rejected": f"not {colour}, {number}",
        }
        for number in range(count)
        for colour in COLOURS
    ]


def kto_rows(count: int = 8) -> list[dict]:
    """Return short answers, of which two in three are liked."""
    return [
        {
            "prompt": f"rate {colour} {number}",
            "completion": f"{colour} it is, {number}" if (number + place) % 3 else f"not {colour}, {number}",
            "label": bool((number + place) % 3),
        }
        for number in range(count)
        for place, colour in enumerate(COLOURS)
    ]


def write_kto_chain(folder: Path, **changes: dict) -> Path:
    """Write a chain with KTO in it."""
    write_jsonl(folder / "kto.jsonl", kto_rows())
    kto = {
        "dataset_path": str(folder / "kto.jsonl"),
        "output_dir": str(folder / "out/kto_adapter"),
        "init_from": str(folder / "out/sft_adapter"),
        "max_length": 200,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "trainer": {"max_steps": 6},
    }
    return write_chain(folder, kto=kto, **changes)


def write_chain(folder: Path, **changes: dict) -> Path:
    """Save a tiny model, its data and a configuration whose outputs lie in the folder."""
    if not (folder / "model").is_dir():
        save_tiny_model(folder / "model")
    write_jsonl(folder / "sft.jsonl", sft_rows())
    write_jsonl(folder / "dpo.jsonl", dpo_rows())
    common = {"max_length": 200, "per_device_train_batch_size": 4}
    tree: dict = {
        "base_model_id": str(folder / "model"),
        "offline": True,
        "data": {"validation_ratio": 0.15, "test_ratio": 0.2},
        "sft": {
            **common,
            "dataset_path": str(folder / "sft.jsonl"),
            "output_dir": str(folder / "out/sft_adapter"),
            "learning_rate": 5e-3,
            "trainer": {"max_steps": 6},
        },
        "dpo": {
            **common,
            "dataset_path": str(folder / "dpo.jsonl"),
            "output_dir": str(folder / "out/dpo_adapter"),
            "init_from": str(folder / "out/sft_adapter"),
            "beta": 0.1,
            "learning_rate": 2e-3,
            "trainer": {"max_steps": 6},
        },
        "eval": {"output_dir": str(folder / "out/comparison"), "max_new_tokens": 12},
        "performance": {"dtype": "fp32", "threads": 1},
        "tracking": {"mlflow_tracking_uri": f"sqlite:///{folder}/mlflow.db"},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def manifest(folder: Path) -> dict:
    """Read the manifest of a finished folder."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def start_stage(stage: str, config: Path, *more: str) -> subprocess.Popen[str]:
    """Start a script as a user does."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"scripts/{stage}.py"), "--config", str(config), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait until a file appears."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
