"""Tell base models apart by what they compute, not by what they are called."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError

# Config entries that say how a copy was stored or called, not what the model computes.
UNIMPORTANT = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "pad_token_id",
}

SAMPLES_PER_TENSOR = 16


def base_fingerprint(folder: Path) -> str:
    """Identify a base by its configuration and sampled weights, independent of folder, id and float type.

    Samples are rounded to bf16, so that an fp32 and a bf16 copy of one model are the same base.

    Raises: UserError when a file cannot be read whole, such as after a copy that was cut off.
    """
    from safetensors import SafetensorError

    try:
        return _fingerprint(folder)
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder}: its config.json or a *.safetensors is damaged or cut off ({error}). Remove the folder and download the model again."
        ) from None


def _fingerprint(folder: Path) -> str:
    import torch
    from safetensors import safe_open

    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in described.items() if k not in UNIMPORTANT}, sort_keys=True).encode()
    )
    owner: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            owner.update(dict.fromkeys(tensors.keys(), file))
    for file in sorted(set(owner.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(name for name, where in owner.items() if where == file):
                shape = tensors.get_slice(name).get_shape()
                digest.update(f"{name}{shape}".encode())
                digest.update(_samples(tensors, name, shape).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensors: Any, name: str, shape: list[int]) -> Any:
    """Read a few values spread over a tensor without reading all of it."""
    rows = shape[0] if shape else 1
    picked = sorted({(rows * step) // SAMPLES_PER_TENSOR for step in range(SAMPLES_PER_TENSOR)})
    import torch

    if not shape:
        return tensors.get_tensor(name).reshape(1)
    part = tensors.get_slice(name)
    values = [part[row : row + 1].reshape(-1) for row in picked]
    return torch.cat([value[:: max(1, math.ceil(len(value) / SAMPLES_PER_TENSOR))] for value in values])
