"""Find a model's folder: local, cached or from the Hub, and refuse what cannot be loaded before work starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.common.errors import UserError, did_you_mean
from scripts.common.paths import ROOT, resolve

DEMO_MODEL = "models/smollm2-135m-instruct"

MODEL_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]

_HUB_ID = re.compile(r"(?!\.|models/)[\w.-]+(/[\w.-]+)?")


def find_model(model_id: str, revision: str | None = None) -> Path:
    """Return the local folder of a model, downloading it from the Hub when it is not here yet.

    Raises: UserError when it is neither a folder, nor cached, nor reachable, or no language model that can be loaded.
    """
    folder = _folder_of(model_id, revision)
    _check_architecture(model_id, folder)
    _check_model(folder)
    return folder


def _folder_of(model_id: str, revision: str | None = None) -> Path:
    local = resolve(model_id)
    folder = local if local.is_dir() else _hub_folder(model_id, revision)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{model_id}: is an adapter, wanted a base or merged model.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{model_id}: the folder holds no config.json, so it is not a model. Correct base_model_id.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{model_id}: the folder holds no *.safetensors; other weight files are never read. Convert it first."
        )
    return folder


def find_local_model(model_id: str, revision: str | None = None) -> Path | None:
    """Return a model's folder when it is on this machine; None stands for a Hub id that would have to be downloaded.

    What it holds is not tried with transformers, whose import takes longer than whoever asks here would wait.

    Raises: UserError when the folder that is meant holds no model.
    """
    if resolve(model_id).is_dir() or model_id == DEMO_MODEL or not _HUB_ID.fullmatch(model_id):
        return _folder_of(model_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _folder_of(snapshot_download(model_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, UserError):  # never asked for, no id, or a download cut off
        return None


def _check_model(folder: Path) -> None:
    """Refuse a folder whose configuration or weight files are not a language model that transformers knows."""
    from safetensors import safe_open
    from transformers import AutoConfig

    with blamed_on(folder / "config.json"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for file in folder.glob("*.safetensors"):
        with blamed_on(file):
            safe_open(file, framework="pt")


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Say of which file a library's refusal speaks."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # they raise a dozen kinds for files that are damaged or not for them
        if "memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path}: cannot be used: {reason}\nCorrect base_model_id, or fetch the model again.") from None


def _check_architecture(model_id: str, folder: Path) -> None:
    """Refuse what only code from the model's own folder could load; such code is never run."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        named = None
    if not isinstance(named, str):
        raise UserError(f"{model_id}: its config.json names no model_type. Download the model again.")
    if named not in KNOWN:
        raise UserError(
            f"{model_id}: its config.json names the architecture {named!r}, which the installed transformers does not have "
            "as a causal model, and code from a model's folder is never run. Use another base model."
        )


def _hub_folder(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if not _HUB_ID.fullmatch(model_id):
        fix = (
            " Run `python -m scripts.get_demo_model` first."
            if model_id == DEMO_MODEL
            else did_you_mean(model_id) or did_you_mean(ROOT / model_id) or " Correct base_model_id."
        )
        raise UserError(f"{model_id}: no such model folder.{fix}")
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=MODEL_FILES))
    except Exception as error:  # network, cache and access problems come as a dozen kinds
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        raise UserError(
            f"base_model_id: {model_id} is not in the local cache and "
            + ("HF_HUB_OFFLINE=1 forbids the Hub" if offline else f"the Hub did not give it ({type(error).__name__})")
            + f".\nWithout a model hub use the demo model: `python -m scripts.get_demo_model`, then base_model_id: {DEMO_MODEL}."
            + (
                ""
                if offline
                else "\nIf it is cached, HF_HUB_OFFLINE=1 (or offline: true) uses the cache without asking the Hub."
            )
        ) from None


def gguf_file(folder: Path) -> str | None:
    """Return the name of the GGUF file that a folder holds instead of safetensors."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise UserError(f"{folder}: holds {len(files)} GGUF files ({', '.join(files)}). Keep one per folder.")
    return files[0]
