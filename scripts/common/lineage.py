"""What an artifact was made from, and whether its training has left aside what a configuration holds out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scripts.common.artifacts import Manifest, SplitFacts, read_manifest
from scripts.common.errors import UserError
from scripts.common.paths import resolve
from scripts.common.schema import Data


def ancestors(manifest: Manifest) -> Iterator[tuple[Path, Manifest]]:
    """Yield the artifacts that one was made from, nearest first, as far as they still lie where they lay then."""
    seen: set[str] = set()  # a manifest can name itself
    while manifest.parent and manifest.parent.sha256 not in seen:
        seen.add(manifest.parent.sha256)
        folder = resolve(manifest.parent.path)
        try:
            found = read_manifest(folder, verify=False)
        except UserError:  # it was moved or removed
            return
        if found.sha256 != manifest.parent.sha256:  # another one was made in its place
            return
        yield folder, found
        manifest = found


def holds_out_all(split: SplitFacts, data: Data) -> bool:
    """Tell whether a split holds out every prompt that the configuration holds out: a lower ratio takes a part of them."""
    return data.validation_ratio == 0 or (split.seed == data.split_seed and data.validation_ratio <= split.ratio)


def check_split(folder: str | Path, manifest: Manifest, data: Data, key: str | None = None) -> None:
    """Refuse a model that may know the held-out prompts, because it or what it continues was trained with another split.

    `key` of the configuration names the folder. Raises: UserError naming both splits.
    """
    for where, made in ((folder, manifest), *ancestors(manifest)):
        split = made.split
        if not holds_out_all(split, data):
            raise UserError(
                f"{f'{key}: ' if key else ''}{folder}: {'' if made is manifest else f'continues {where}, which '}"
                f"was trained with the split of seed {split.seed} and ratio {split.ratio}, but the configuration holds "
                f"out by seed {data.split_seed} and ratio {data.validation_ratio}, so it may have seen these prompts. "
                f"Set data.split_seed: {split.seed} and data.validation_ratio: {split.ratio}, or train it again."
            )
