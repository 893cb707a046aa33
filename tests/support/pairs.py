"""A tiny model whose samples are a few words each, an adapter on it, and data, for pairs of its own answers."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from scripts.common.artifacts import read_manifest, sha256_file
from scripts.common.pairs_manifest import PairsManifest, read_pairs_manifest
from scripts.model.tiny import save_tiny_talker
from tests.conftest import write_jsonl
from tests.support.chain import write_chain
from tests.support.manifests import change_manifest, split_facts
from tests.support.serving import save_adapter

WORDS = ("the", "team", "is", "it", "on", "to", "next", "week", "done")
CHECKS = [{"name": "names the team", "must_contain": ["team"]}, {"name": "short", "max_words": 3}]


def rows(count: int = 40) -> list[dict]:
    """Return records with answers of a few words, in ten groups."""
    return [
        {"instruction": f"task {number}", "output": f"the team is on it {number}", "customer": f"customer {number % 10}"}
        for number in range(count)
    ]  # fmt: skip


def write_pairs_chain(folder: Path, **changes: dict) -> Path:
    """Save model, data and configuration; return the configuration."""
    if not (folder / "model").is_dir():
        save_tiny_talker(folder / "model", WORDS)
    sections = {"pairs": {"max_new_tokens": 24, "batch_size": 4}, "eval": {"checks": CHECKS}, **changes}
    config = write_chain(folder, **sections)
    write_jsonl(folder / "sft.jsonl", rows())
    return config


def write_pairs_project(folder: Path, **changes: dict) -> Path:
    """Do so, and save an adapter that says it was trained on the data."""
    config = write_pairs_chain(folder, **changes)
    add_adapter(folder, config)
    return config


def add_adapter(folder: Path, config: Path, name: str = "sft_adapter", seed: int = 1, **facts: object) -> Path:
    """Save an adapter with random weights that was made under this configuration."""
    adapter = save_adapter(folder / "out" / name, folder / "model", scale=0.02, seed=seed)
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    split = split_facts(group_field=tree["data"].get("group_field"))
    data = [{"path": str(folder / "sft.jsonl"), "sha256": sha256_file(folder / "sft.jsonl")}]
    change_manifest(adapter, **{"split": split, "datasets": data, **facts})
    return adapter


def read_pairs(path: Path) -> list[dict]:
    """Read the rows of a file of pairs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest_of(path: Path) -> PairsManifest:
    """Read the manifest of a file of pairs."""
    made = read_pairs_manifest(path)
    assert made is not None
    return made


def vote(folder: Path, prompt: str, **facts: object) -> dict:
    """Return a vote on four samples of the adapter; the first is best unless something else is said."""
    samples = ["the team is on it", "next week", "to to to the on", "is it done"]
    said = facts if "outcome" in facts else {"outcome": "best", "best": 0, **facts}
    sha256 = read_manifest(folder / "out/sft_adapter").sha256
    return {"adapter": sha256, "prompt": prompt, "samples": samples, **said}
