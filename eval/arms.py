"""Arms: what is compared with the base. Each is one adapter or merged model, or several that differ in their seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from scripts.common.artifacts import Manifest, read_manifest
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError
from scripts.common.lineage import HeldOutSide, ancestors, check_split
from scripts.common.schema import check_arm_name
from scripts.common.stages import BASE, MODEL_STAGES, SFT, TRAINING_STAGES, planned_stages

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Member:
    """One model of an arm."""

    label: str  # the name of its arm, with its seed where there are several
    folder: Path
    manifest: Manifest
    origin: Manifest | None  # of the adapter that was trained; of a merged model, that in it while it is still there
    int8: bool = False  # answers from int8 weights

    @property
    def is_merged(self) -> bool:
        """Tell whether this is a whole model and not an adapter of the base."""
        return self.manifest.stage == "merged"

    @property
    def stage(self) -> str | None:
        """Return the stage that trained it; None where nothing says so."""
        return self.origin.stage if self.origin else None

    @property
    def seed(self) -> int:
        """Return the seed it was trained with."""
        return int((self.origin or self.manifest).config["seed"])

    @property
    def parent(self) -> str | None:
        """Return the sha256 of the adapter that its training continued."""
        return self.origin.parent.sha256 if self.origin and self.origin.parent else None


@dataclass(frozen=True, eq=False)
class Arm:
    """What one procedure made, under one or several seeds.

    An arm that `stands` is compared with each seed of the others as it is, because all of them continue it.
    """

    name: str
    members: tuple[Member, ...]
    stands: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of its members, in their order."""
        return tuple(member.seed for member in self.members)

    def member_of(self, seed: int | None) -> Member:
        """Return the member of a seed, or the first one."""
        return next((member for member in self.members if member.seed == seed), self.members[0])


def add_arm_arguments(models: Sequence[str]) -> list[str]:
    """Return `--models name=folder …` as an override of eval.models; commas separate the folders of several seeds.

    Raises: UserError where one is not of that form, has no good name, or has the name of another.
    """
    found: dict[str, str | list[str]] = {}
    for text in models:
        name, equals, folders = text.partition("=")
        if not equals or not all(folder.strip() for folder in folders.split(",")):
            raise UserError(f"--models {text}: wanted name=folder, or name=folder,folder,… for several seeds.")
        if name.casefold() in {other.casefold() for other in found}:
            raise UserError(f"--models {text}: two arms are called {name}. Give each its own name.")
        try:
            check_arm_name(name)
        except ValueError as error:
            raise UserError(f"--models {text}: found the name {name!r}; wanted {error}.") from None
        found[name] = folders.split(",") if "," in folders else folders
    return [f"eval.models={json.dumps(found)}"] if found else []


def find_arms(config: LoadedConfig, side: HeldOutSide = "test") -> list[Arm]:
    """Return what `eval.models` names, or else each adapter of this configuration that is there, in the order of training.

    Raises: UserError when there is none, or one is not finished, or may have been trained on this side of the split, or
    when the members of arms cannot be compared.
    """
    if config.values.eval.models:
        named = config.values.eval.models.items()
        arms = [
            _find_arm(name, [given] if isinstance(given, str) else given, config, side, f"eval.models.{name}")
            for name, given in named
        ]
    else:
        arms = []
        for stage in TRAINING_STAGES.values():
            folder = getattr(config.values, stage.name).output_dir
            if Path(folder).is_dir():
                arms.append(_find_arm(stage.name, [folder], config, side, f"{stage.name}.output_dir", (stage.name,)))
            elif stage in planned_stages(config.values):
                log.warning("%s: no adapter there, so %s is left out of the comparison", folder, stage.name)
        if not arms:
            raise UserError(
                f"there is no adapter to compare. Run `python -m {SFT.script}` with this configuration first, or name "
                "others: --models name=folder"
            )
    unknown = set(config.values.eval.int8) - {arm.name for arm in arms}
    if unknown:
        raise UserError(
            f"eval.int8: no arm is called {', '.join(sorted(unknown))}; there are {', '.join(arm.name for arm in arms)}. "
            "Name the folder in eval.models once more, as in `sft_int8: outputs/sft_adapter`."
        )
    arms = [Arm(arm.name, arm.members, _is_continued_by_all(arm, arms)) for arm in arms]
    for one, other in combinations(arms, 2):
        _check_seeds_are_shared(one, other)
    return arms


def _find_arm(
    name: str,
    folders: Sequence[str],
    config: LoadedConfig,
    side: HeldOutSide,
    key: str,
    stages: tuple[str, ...] = MODEL_STAGES,
) -> Arm:
    members: dict[int, Member] = {}
    for folder in folders:
        try:
            manifest = read_manifest(folder, stages=stages)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        check_split(folder, manifest, config.values.data, key, sides=(side,))
        origin = manifest if manifest.stage != "merged" else next((made for _, made in ancestors(manifest)), None)
        member = Member(name, Path(folder), manifest, origin, name in config.values.eval.int8)
        if member.seed in members:
            other = members[member.seed].folder
            raise UserError(
                f"{key}: {other} and {folder} were trained with the same seed, {member.seed}. The members of an arm differ "
                "in their seed; give others a name of their own."
            )
        members[member.seed] = member
    found = list(members.values())
    if len({member.stage for member in found if member.stage}) > 1:
        unlike = ", ".join(f"{member.folder} of {member.stage}" for member in found)
        raise UserError(f"{key}: found adapters of different stages ({unlike}). Give each stage a name of its own.")
    if len(found) > 1:
        found = [replace(member, label=f"{name}, seed {seed}") for seed, member in members.items()]
    return Arm(name, tuple(found))


def _is_continued_by_all(arm: Arm, arms: Sequence[Arm]) -> bool:
    """Tell whether every member of every arm with several seeds was trained from the one member of this arm."""
    several = [other for other in arms if len(other.members) > 1]
    [first, *more] = arm.members
    wanted = {first.manifest.sha256, first.origin.sha256 if first.origin else None}
    return bool(several) and not more and all(member.parent in wanted for other in several for member in other.members)


def _check_seeds_are_shared(one: Arm, other: Arm) -> None:
    if len(one.members) == len(other.members) == 1 or one.stands or other.stands or set(one.seeds) & set(other.seeds):
        return
    seeds = " and ".join(f"{arm.name} has {', '.join(map(str, arm.seeds))}" for arm in (one, other))
    raise UserError(
        f"eval.models: {one.name} and {other.name} have no seed in common ({seeds}), so they cannot be compared seed by "
        "seed. Name the members that were trained with the same seeds."
    )


def members_of(arms: Sequence[Arm]) -> Iterator[Member]:
    """Yield the members of all arms."""
    for arm in arms:
        yield from arm.members


def find_parent(member: Member, arms: Sequence[Arm]) -> Member | None:
    """Return the adapter among these arms that a member's training continued, by its hash."""
    if member.parent is None:
        return None
    usual = (other for other in members_of(arms) if not (other.is_merged or other.int8))
    return next((other for other in usual if other.manifest.sha256 == member.parent), None)


def find_references(arms: Sequence[Arm]) -> dict[str, str | None]:
    """Return by label the model that each member was trained against, BASE or another label; None where it is not here."""
    found: dict[str, str | None] = {}
    for member in members_of(arms):
        if member.origin is None:
            found[member.label] = None
        elif member.parent is None or member.origin.section.get("reference", BASE) == BASE:
            found[member.label] = BASE
        else:
            parent = find_parent(member, arms)
            found[member.label] = parent.label if parent else None
    return found


def stages_of(arms: Sequence[Arm]) -> list[str]:
    """Return the stages whose data these models are measured on; a merged model that says nothing may be of any."""
    found = {member.stage for member in members_of(arms)}
    return [name for name in TRAINING_STAGES if name in found or None in found]


def check_made_on_base(arms: Sequence[Arm], base_folder: Path, tokenizer: Any) -> None:
    """Refuse models of another base, tokenizer or chat template before anything is measured."""
    from scripts.model.adapter import check_made_on, facts_of_base

    facts = facts_of_base(base_folder, tokenizer)
    for member in members_of(arms):
        check_made_on(member.folder, member.manifest, base_folder, facts)


def seeds_by_arm(arms: Sequence[Arm]) -> Mapping[str, tuple[int | None, ...]]:
    """Return each arm's seeds as a table has them: None for what is compared with every seed as it stands."""
    return {BASE: (None,), **{arm.name: (None,) if arm.stands else arm.seeds for arm in arms}}
