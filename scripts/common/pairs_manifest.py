"""The manifest beside a file of preference pairs: which adapter answered, who preferred, and which data they descend from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scripts.common.artifacts import BaseModelFacts, GitFacts, Parent, SplitFacts, git_state, package_versions
from scripts.common.errors import UserError
from scripts.common.paths import resolve

SCHEMA = 1


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, populate_by_name=True)


class SourceFacts(_Facts):
    """Data that the pairs descend from; null where no de-identification report vouches for it."""

    path: str
    sha256: str
    deid_report: dict[str, Any] | None


class PairFacts(_Facts):
    """One line of the file. Samples are numbered from 0; null is an answer that the user wrote."""

    source: str
    seed: int | None  # of the prompt's samples; null where a file of votes brought them
    chosen: int | None
    rejected: int | None
    labeller: str


class PairsManifest(_Facts):
    """What a finished file of pairs says about itself; `pairs` has an entry for each line."""

    schema_version: int = Field(SCHEMA, alias="schema")
    stage: Literal["pairs"] = "pairs"
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    sha256: str
    by: str
    base_model: BaseModelFacts
    parent: Parent
    seed: int
    split: SplitFacts
    descends_from: list[SourceFacts]
    counts: dict[str, int]
    pairs: list[PairFacts]
    config: dict[str, Any]
    packages: dict[str, str] = Field(default_factory=package_versions)
    git: GitFacts = Field(default_factory=git_state)

    def as_json(self) -> str:
        """Write it as it stands in its file: one pair a line, so that it can be read beside the pairs."""
        content = self.model_dump(mode="json", by_alias=True)
        pairs = content.pop("pairs")
        head = json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n".join(f"  {json.dumps(pair, ensure_ascii=False)}" for pair in pairs)
        return f'{head},\n "pairs": [\n{lines}\n ]\n}}\n'


def pairs_manifest_path(pairs: str | Path) -> Path:
    """Return where the manifest of a file of pairs lies: beside it."""
    path = Path(pairs)
    return path.with_name(path.name + ".manifest.json")


def read_pairs_manifest(pairs: str | Path) -> PairsManifest | None:
    """Return the manifest of a file of pairs; None where there is none, so that the pairs came from elsewhere.

    Whether the file is still the one that was written is for the caller to compare.
    """
    path = pairs_manifest_path(pairs)
    if not path.is_file():
        return None
    try:
        return PairsManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "content"
        raise UserError(
            f"{path}: {key}: {first['msg'].lower()}. Restore the file, or make the pairs again: python -m scripts.make_pairs"
        ) from None


def are_made_pairs(paths: Iterable[str]) -> bool:
    """Tell whether all these files were written by make_pairs, which samples training prompts only."""
    return all(read_pairs_manifest(resolve(path)) is not None for path in paths)
