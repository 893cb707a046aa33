"""Real tokenizers of families that many people use, which `make tokenizers` fetches."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.model.base import load_tokenizer
from tests.conftest import ROOT

REAL_TOKENIZERS = ("qwen3", "gemma3", "llama3_1")


def real_tokenizer(name: str) -> Any:
    """Load a tokenizer as a stage does, or skip where it was not fetched."""
    folder = ROOT / "models" / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder.relative_to(ROOT)}: make tokenizers")
    return load_tokenizer(folder)
