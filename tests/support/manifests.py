"""Manifests with every fact in them, of which a test names only those it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.common.artifacts import MANIFEST, SPLIT_KEY_VERSION, Manifest, write_manifest


def split_facts(**changes: Any) -> dict[str, Any]:
    """Describe the split of tests/support/chain.py, or another one, as a manifest holds it."""
    facts = {"seed": 0, "validation_ratio": 0.15, "test_ratio": 0.2, "key_version": SPLIT_KEY_VERSION}
    return {**facts, "group_field": None, **changes}


FACTS: dict[str, Any] = {
    "base_model": {"id": "model", "revision": None, "fingerprint": "f"},
    "tokenizer_sha256": "t",
    "chat_template_sha256": "c",
    "datasets": [],
    "split": split_facts(),
    "config": {},
    "mlflow": {"run_id": None},
    "metrics": {},
}


def complete_manifest(stage: str = "sft", **facts: Any) -> Manifest:
    """Make a manifest; facts that are not given say nothing in particular."""
    return Manifest.model_validate({"stage": stage, **FACTS, **facts})


def finish_folder(folder: Path, stage: str = "sft", **facts: Any) -> Manifest:
    """Write such a manifest into a folder, with the hashes of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_manifest(folder, complete_manifest(stage, **facts))


def change_manifest(folder: Path, **content: Any) -> None:
    """Overwrite top-level keys of a manifest as they stand in its file, right or wrong."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **content}), encoding="utf-8")
