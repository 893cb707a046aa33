"""What the tests of this folder share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.common.schema import Lora
from scripts.dataset.chat_format import template_sha256, tokenizer_sha256
from scripts.model.adapter import add_lora
from scripts.model.base import load_tokenizer
from scripts.model.fingerprint import base_fingerprint
from tests.support.manifests import finish_folder
from tests.support.models import load, take_steps


@pytest.fixture(scope="module")
def trained_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter that changes the tiny Llama's answers, with a valid manifest."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters") / "trained"
    model, tokenizer = add_lora(load(tiny_llama), Lora(r=4), str(tiny_llama)), load_tokenizer(tiny_llama)
    take_steps(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    finish_folder(
        folder,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=template_sha256(tokenizer),
        base_model={"id": str(tiny_llama), "revision": None, "fingerprint": base_fingerprint(tiny_llama)},
    )
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a folder, to be spoilt."""

    def copy(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy
