"""An adapter as others get it: the same weights, its base under the name that they know, and no folder of this machine."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from scripts.common.artifacts import Manifest
from scripts.common.paths import resolve
from scripts.common.stages import ADAPTER_STAGES
from scripts.export.parts import Parts

log = logging.getLogger(__name__)

# What decided the training; the rest of a configuration says where things lie and who may ask.
TRAINED_WITH = (
    "base_model_id", "base_model_revision", "seed", "quantization", "lora", "data", "performance", *ADAPTER_STAGES,
)  # fmt: skip
PATHS = ("path", "dataset_path", "output_dir", "init_from", "trainer")  # keys of values that may be or hold paths
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def known_as(base_id: str) -> str:
    """Return a base's id; of one that is a folder here its name alone."""
    return Path(base_id).name if resolve(base_id).is_dir() else base_id


def save_for_others(parts: Parts, folder: Path) -> None:
    """Copy the adapter's files and name its base as others know it."""
    for name in parts.manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(parts.adapter / name, folder / name)
    if resolve(parts.base_id).is_dir():
        log.warning(
            "%s is a folder of this machine; with --base_model ID others find the base by its id", parts.base_id
        )
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": known_as(parts.base_id)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8", newline="\n")


def manifest_for_others(parts: Parts) -> Manifest:
    """Return the adapter's manifest without the folders of this machine."""
    made = parts.manifest
    config = {key: value for key, value in made.config.items() if key in TRAINED_WITH}
    facts = made.model_dump(by_alias=True) | {
        "base_model": made.base_model.model_dump() | {"id": known_as(parts.base_id), "revision": parts.revision},
        "config": config | {"base_model_id": known_as(parts.base_id)},
        "metrics": made.metrics | {"format": parts.form},  # which no trained adapter has
    }
    return Manifest.model_validate(without_folders(facts))


def without_folders(value: Any, *, is_path: bool = False) -> Any:
    """Cut paths that lead out of the checkout to their last part, in nested values; a text that looks like one stays."""
    if isinstance(value, dict):
        return {key: without_folders(each, is_path=is_path or key in PATHS) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each, is_path=is_path) for each in value]
    leads_out = is_path and isinstance(value, str) and (Path(value).is_absolute() or {"..", "~"} & {*Path(value).parts})
    return Path(value).name if leads_out else value


def vllm_command(adapter: Path, base: str, name: str, place: str) -> str | None:
    """Return the command that serves an adapter with vLLM, or None for one that it does not load.

    The rank is the adapter's own: PiSSA and OLoRA are saved with twice the rank they were trained with.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    wanted = max(config["r"], *(config.get("rank_pattern") or {}).values(), 1)
    rank = next((rank for rank in VLLM_RANKS if rank >= wanted), None)
    if rank is None or config.get("use_dora"):
        return None
    module = shlex.quote(f"{name}={place}")
    return f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules {module} --max-lora-rank {rank}"
