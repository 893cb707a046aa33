"""Fold an adapter into its full-precision base and save what comes out; one model in memory at a time."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Quantization
from scripts.dataset.chat_format import stop_token_ids
from scripts.model.adapter import load_adapter
from scripts.model.base import load_base
from scripts.model.memory import parameter_count
from scripts.model.shape import ModelShape

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES_PER_VALUE = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "f16": 2.0, "q8_0": 1.07}
SHARD_SIZE = "4GB"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def stored_dtype(base_folder: Path) -> str:
    """Return the type the base is stored in, by our names."""
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{stored}"), "fp32")


def check_space(base_folder: Path, run_dir: Path, dtype: str) -> None:
    """Refuse before the work starts when the result cannot fit on the disk."""
    wanted = parameter_count(base_folder) * BYTES_PER_VALUE[dtype] * 1.02 + 64 * 2**20
    free = shutil.disk_usage(run_dir).free
    if free < wanted:
        raise UserError(
            f"{run_dir}: the merged model takes {wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free. "
            "Free some space or choose another --out_dir."
        )


def check_vocabulary(base_folder: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that can write ids the base has no embedding for."""
    rows = ModelShape.of_folder(base_folder).vocab
    if len(tokenizer) > rows:
        raise UserError(
            f"{base_folder}: its tokenizer has {len(tokenizer)} tokens and its config.json says vocab_size {rows}. "
            "Download the base again: tokenizer and weights are not of the same model."
        )


def load_as_trained(base_folder: Path, adapter: Path, config: LoadedConfig, quantization: Quantization) -> Any:
    """Load base + adapter with the base quantised as it was in training."""
    values = config.values.model_copy(update={"quantization": quantization})
    machine = Machine("cpu", torch.float32, torch.get_num_threads(), 1, ())
    return load_adapter(load_base(base_folder, values, machine), adapter).eval()


def merge(model: Any) -> Any:
    """Add the adapter to the base's weights in place, and return the plain model."""
    merged = model.merge_and_unload(progressbar=False)
    left = [name for name, _ in merged.named_parameters() if "lora_" in name or "modules_to_save" in name]
    if left:
        raise UserError(f"PEFT left {len(left)} adapter tensors unmerged, the first is {left[0]}. Serve it unmerged.")
    return merged


def save_merged(model: Any, tokenizer: Any, dtype: str, folder: Path) -> None:
    """Write weights, tokenizer with its chat template, and how to generate, with all stops of base and template."""
    model.to(DTYPES[dtype])
    model.generation_config.eos_token_id = sorted(stop_token_ids(tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    except SafetensorError as error:  # it hides the errno of a full disk
        raise UserError(f"cannot write {folder}: {error}. Free some space or choose another --out_dir.") from None
    tokenizer.save_pretrained(folder)


def copy_licence(base_folder: Path, folder: Path) -> None:
    """Put the base's licence, which must travel with its weights, beside them."""
    for pattern in LICENCE_FILES:
        for file in base_folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
