"""What --model_path names: adapters with their base, merged, GGUF and plain model folders, proved whole before loading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.common.artifacts import MANIFEST, portable_path, read_manifest
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError

BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: its name, its folder, and for an artifact its manifest."""

    label: str
    folder: Path
    manifest: dict[str, Any] | None = None
    is_adapter: bool = False


def find_candidates(paths: Sequence[str]) -> list[Candidate]:
    """Resolve every path, and call an artifact by its stage where that says which one it is.

    Raises: UserError when a folder is missing, unfinished or changed, or when two adapters have different bases.
    """
    found = [_resolve(path) for path in dict.fromkeys(paths)]
    adapters = [(each.folder, each.manifest["base_model"]) for each in found if each.is_adapter and each.manifest]
    for folder, base in adapters[1:]:
        if base["fingerprint"] != adapters[0][1]["fingerprint"]:
            raise UserError(
                f"{folder}: was made on another base ({base['id']}) than {adapters[0][0]} ({adapters[0][1]['id']}). "
                "Evaluate them in calls of their own."
            )
    times = Counter(candidate.label for candidate in found)
    return [each if times[each.label] == 1 else replace(each, label=portable_path(each.folder)) for each in found]


def _resolve(path: str) -> Candidate:
    folder = Path(path)
    if path == BASE:
        return Candidate(BASE, folder)
    if not folder.is_dir():
        raise UserError(
            f"--model_path {path}: no such folder. Run the stage that writes it first (python -m scripts.train_sft, "
            f"then python -m scripts.train_dpo), correct the path, or write `{BASE}` for the base model."
        )
    is_model = (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
    if not is_model or (folder / "adapter_config.json").is_file():
        manifest = read_manifest(folder, stages=("sft", "dpo"))
        return Candidate(manifest["stage"], folder, manifest, is_adapter=True)
    if (folder / MANIFEST).is_file():
        return Candidate("merged", folder, read_manifest(folder, stages=("merged",)))
    return Candidate(folder.resolve().name, folder)


def find_base(group: Sequence[Candidate], config: LoadedConfig) -> tuple[dict[str, Any], Path]:
    """Return id, revision and folder of what a group loads: a model folder, the adapters' base, or the configured one."""
    from scripts.common.modeling import find_model, gguf_file

    alone = group[0]
    if not alone.is_adapter and alone.label != BASE:
        folder = alone.folder if gguf_file(alone.folder) else find_model(str(alone.folder))
        return {"id": portable_path(folder), "revision": None}, folder
    found = next((each.manifest["base_model"] for each in group if each.manifest), None)
    base = found or {"id": config.values.base_model_id, "revision": config.values.base_model_revision}
    return {"id": base["id"], "revision": base["revision"]}, find_model(base["id"], base["revision"])


def unseen_by(candidates: Sequence[Candidate], config: LoadedConfig) -> list[str]:
    """Return the stages on whose held-out records these candidates can be measured.

    Raises: UserError when one was trained with another split and so may have seen them.
    """
    data, stages = config.values.data, ["sft"]
    for candidate in candidates:
        if candidate.manifest is None:
            continue
        split = candidate.manifest["split"]
        if split != {"seed": data.split_seed, "ratio": data.validation_ratio}:
            raise UserError(
                f"{candidate.folder}: was trained with the split {split}, but the configuration holds out by seed "
                f"{data.split_seed} and ratio {data.validation_ratio}, so it may have seen these prompts. "
                "Give the configuration it was trained with (--config)."
            )
        if candidate.manifest["stage"] != "sft":
            stages = ["sft", "dpo"]
    return stages
