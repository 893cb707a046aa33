"""What is exported: an adapter, the base it was made on, and the form in which the result is saved."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from scripts.common.artifacts import Manifest, read_manifest
from scripts.common.run import Run
from scripts.common.schema import Quantization
from scripts.common.stages import ADAPTER_STAGES
from scripts.dataset.chat_format import ChatFormat
from scripts.export.gguf_file import check_supported
from scripts.export.merging import check_vocabulary, stored_dtype
from scripts.model.adapter import check_adapter_fits
from scripts.model.base import load_tokenizer
from scripts.model.find import find_model


@dataclass(frozen=True)
class Parts:
    """What is exported, and in which form."""

    adapter: Path
    manifest: Manifest  # of the adapter
    base_id: str
    revision: str | None
    base_folder: Path
    config: Any  # of the base, as transformers reads it
    chat: ChatFormat
    form: str  # safetensors, gguf, or the adapter itself
    dtype: str

    @property
    def gguf(self) -> bool:
        return self.form == "gguf"

    @property
    def merges(self) -> bool:
        return self.form != "adapter"

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    @property
    def quantization(self) -> Quantization:
        """Return how the base was quantised when the adapter was trained."""
        return Quantization(**self.manifest.config["quantization"])

    @property
    def trained_in_bits(self) -> int:
        """Return the bits of the base's weights when the adapter was trained; 0 where they were not quantised."""
        return 4 if self.quantization.load_in_4bit else 8 if self.quantization.load_in_8bit else 0


def find_parts(run: Run, arguments: argparse.Namespace) -> Parts:
    """Find adapter and base, and prove that they belong together."""
    adapter = Path(run.values.dpo.output_dir if arguments.adapter is None else arguments.adapter)
    made_on = read_manifest(adapter, stages=ADAPTER_STAGES, verify=False).base_model
    base_id = arguments.base_model or made_on.id
    revision = made_on.revision if base_id == made_on.id else None
    base_folder = find_model(base_id, revision)
    tokenizer = load_tokenizer(base_folder)
    manifest = check_adapter_fits(adapter, base_folder, tokenizer)
    check_vocabulary(base_folder, tokenizer)
    config = AutoConfig.from_pretrained(base_folder, trust_remote_code=False)
    form, gguf = arguments.format, arguments.format == "gguf"
    if gguf:
        check_supported(config, tokenizer)
    dtype = arguments.dtype or ("auto" if gguf else run.values.export.dtype)
    if form == "adapter":
        dtype = "fp32"
    elif dtype == "auto":
        dtype = "f16" if gguf else stored_dtype(base_folder)
    chat = ChatFormat.of(tokenizer, manifest)
    return Parts(adapter, manifest, base_id, revision, base_folder, config, chat, form, dtype)
