"""What --model_path names: adapters with their base, merged, GGUF and plain model folders, proved whole before loading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.common.artifacts import MANIFEST, Manifest, read_manifest
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError
from scripts.common.lineage import check_split
from scripts.common.paths import portable_path
from scripts.common.schema import Data
from scripts.common.stages import ADAPTER_STAGES, BASE, SFT, TRAINING_STAGES
from scripts.dataset.chat_format import ChatFormat


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: its name, its folder, and for an artifact its manifest."""

    label: str
    folder: Path
    manifest: Manifest | None = None
    is_adapter: bool = False


def find_candidates(paths: Sequence[str]) -> list[Candidate]:
    """Find every model, and call an artifact by its stage where that says which one it is.

    Raises: UserError when a folder is missing, unfinished or changed, or when two adapters have different bases.
    """
    candidates = [_resolve(path) for path in dict.fromkeys(paths)]
    adapters = [(each.folder, each.manifest.base_model) for each in candidates if each.is_adapter and each.manifest]
    for folder, base in adapters[1:]:
        first_folder, first_base = adapters[0]
        if base.fingerprint != first_base.fingerprint:
            raise UserError(
                f"{folder}: was made on another base ({base.id}) than {first_folder} ({first_base.id}). "
                "Evaluate them in calls of their own."
            )
    times = Counter(candidate.label for candidate in candidates)
    return [each if times[each.label] == 1 else replace(each, label=portable_path(each.folder)) for each in candidates]


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
        manifest = read_manifest(folder, stages=ADAPTER_STAGES)
        return Candidate(manifest.stage, folder, manifest, is_adapter=True)
    if (folder / MANIFEST).is_file():
        return Candidate("merged", folder, read_manifest(folder, stages=("merged",)))
    return Candidate(folder.resolve().name, folder)


def find_base(group: Sequence[Candidate], config: LoadedConfig) -> tuple[str, str | None, Path]:
    """Return id, revision and folder of what a group loads: a model folder, the adapters' base, or the configured one."""
    from scripts.model.find import find_model, gguf_file

    alone = group[0]
    if not alone.is_adapter and alone.label != BASE:
        folder = alone.folder if gguf_file(alone.folder) else find_model(str(alone.folder))
        return portable_path(folder), None, folder
    base = next((each.manifest.base_model for each in group if each.manifest), None)
    name = base.id if base else config.values.base_model_id
    revision = base.revision if base else config.values.base_model_revision
    return name, revision, find_model(name, revision)


def formats_of(group: Sequence[Candidate], tokenizer: Any, data: Data) -> dict[str, ChatFormat]:
    """Return how each model reads prompts: as it was trained to, and a base as the adapters beside it."""
    first = next((each.manifest for each in group if each.manifest), None)
    return {
        each.label: ChatFormat.of(tokenizer, manifest) if manifest else ChatFormat.of_base(tokenizer, data)
        for each in group
        for manifest in [each.manifest or first]
    }


def unseen_by(candidates: Sequence[Candidate], config: LoadedConfig) -> list[str]:
    """Return the stages on whose held-out records these candidates can be measured.

    Raises: UserError when one was trained with another split and so may have seen them.
    """
    stages = {SFT.name}
    for candidate in candidates:
        if candidate.manifest:
            check_split(candidate.folder, candidate.manifest, config.values.data)
            stages |= _lineage(candidate.manifest.stage)
    return [name for name in TRAINING_STAGES if name in stages]


def _lineage(stage: str) -> set[str]:
    """Return a stage with those before it; a merged model may be of any."""
    if stage not in TRAINING_STAGES:
        return set(TRAINING_STAGES)
    earlier = TRAINING_STAGES[stage].continues
    return {stage} | (_lineage(earlier) if earlier else set())
