"""What an artifact was made from, and whether its training has left aside what a configuration holds out."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from scripts.common.artifacts import SPLIT_KEY_VERSION, Manifest, SplitFacts, read_manifest
from scripts.common.errors import UserError
from scripts.common.paths import resolve
from scripts.common.schema import Data
from scripts.common.stages import SFT, TRAINING_STAGES


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


HeldOutSide = Literal["validation", "test"]


def keeps_apart(split: SplitFacts, data: Data, sides: Collection[HeldOutSide]) -> bool:
    """Tell whether a model of this split has not trained on what the configuration has on these sides.

    A side that is larger than the configuration asks for holds all of it: sides grow at one end only.
    """
    wanted = SplitFacts.of(data)
    ratios = {f"{side}_ratio" for side in sides}
    if not any(getattr(wanted, ratio) for ratio in ratios):
        return True
    same = all(getattr(split, fact) == getattr(wanted, fact) for fact in ("seed", "key_version", "group_field"))
    return same and all(getattr(wanted, ratio) <= getattr(split, ratio) for ratio in ratios)


def check_split(
    folder: str | Path,
    manifest: Manifest,
    data: Data,
    key: str | None = None,
    *,
    sides: tuple[HeldOutSide, ...] = ("test",),
) -> None:
    """Refuse a model that may know the prompts of these sides, because it or what it continues had another split.

    `key` of the configuration names the folder. Raises: UserError naming both splits and what to do.
    """
    for where, made in ((folder, manifest), *ancestors(manifest)):
        split = made.split
        if keeps_apart(split, data, sides):
            continue
        line = f"{f'{key}: ' if key else ''}{folder}: {'' if made is manifest else f'continues {where}, which '}"
        again = commands_to_train(made.stage)
        if split.key_version < SPLIT_KEY_VERSION:
            raise UserError(
                f"{line}was trained by an earlier version, whose split had no test side, so it may have seen the prompts "
                f"that are held out now. Train again: {again}. It can still be served and exported."
            )
        wanted = SplitFacts.of(data)
        raise UserError(
            f"{line}was trained with another split ({split}) than the configuration's ({wanted}), so it may have seen "
            f"the prompts that are held out now. {_setting_to_match(split, wanted)}rain again: {again}."
        )


def _setting_to_match(split: SplitFacts, wanted: SplitFacts) -> str:
    """Begin a sentence with the keys of `data` that would lead to a split, where there are such."""
    keys = {
        "seed": "split_seed",
        "validation_ratio": "validation_ratio",
        "test_ratio": "test_ratio",
        "group_field": "group_field",
    }
    changes = [
        f"data.{key}: {json.dumps(getattr(split, fact))}"
        for fact, key in keys.items()
        if getattr(split, fact) != getattr(wanted, fact)
    ]
    return f"Set {' and '.join(changes)}, or t" if split.key_version == wanted.key_version else "T"


def commands_to_train(stage: str) -> str:
    """Say how to make an adapter again, with those it continues; a merged model may be of any stage."""
    chain = [stage if stage in TRAINING_STAGES else SFT.name]
    while earlier := TRAINING_STAGES[chain[0]].continues:
        chain.insert(0, earlier)
    return ", then ".join(f"`python -m {TRAINING_STAGES[name].script}`" for name in chain)
