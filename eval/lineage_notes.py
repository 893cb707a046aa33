"""What a report says about where its arms come from, and what of that is not as a reader would expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.arms import Arm, Member, find_parent, find_references, members_of
from eval.held_out import HeldOut, describe_changes
from scripts.common.artifacts import FORMAT_FACTS, Manifest
from scripts.common.lineage import ancestors
from scripts.common.paths import portable_path
from scripts.common.stages import BASE, TRAINING_STAGES
from scripts.training.save import flatten

# What members of one arm may differ in.
FREE = ("seed", "output_dir", "init_from", "tracking", "eval", "lmeval", "serve", "export", "deid", "study")


def describe_arms(arms: Sequence[Arm], held_out: HeldOut) -> list[str]:
    """Say what of the lineage is not as it should be."""
    notes = []
    for member in members_of(arms):
        notes += describe_changes(member.folder, _as_trained(member), held_out)
    rounded = [arm.name for arm in arms if arm.members[0].int8]
    if rounded:
        notes.append(f"{' and '.join(rounded)}: answers come from int8 weights, as with serve.weights: int8.")
    return notes + describe_references(arms) + describe_procedures(arms) + describe_formats(arms)


def _as_trained(member: Member) -> Manifest:
    """Return the manifest under the stage whose data it names, which that of a merged model does not say."""
    return member.manifest.model_copy(update={"stage": member.stage or member.manifest.stage})


def describe_references(arms: Sequence[Arm]) -> list[str]:
    """Say which models continue another adapter than stands beside them, and what follows from that."""
    references = find_references(arms)
    notes = []
    for member in members_of(arms):
        if member.origin is None:
            notes.append(
                f"{member.folder}: the adapter in this merged model ({member.manifest.parent and member.manifest.parent.path}) "
                "is not there any more, so nothing can say what it was trained from. Its implicit reward is left out."
            )
            continue
        parent = member.origin.parent
        if parent is None or find_parent(member, arms):
            continue
        name, before = member.origin.stage, TRAINING_STAGES[member.origin.stage].continues
        beside = [other for other in members_of(arms) if other.stage == before]
        same_seed = [other for other in beside if other.seed == member.seed] or beside
        listed = ", ".join(f"{m.label} is {m.folder} ({m.manifest.sha256[:12]}…)" for m in same_seed)
        note = f"{member.folder}: {member.label} continues {parent.path} ({parent.sha256[:12]}…), which is not compared here"
        note += f": {listed}. What differs between them is not {name.upper()} alone." if listed else "."
        if references[member.label] is None:
            note += f" {member.label} was trained against that adapter, so its implicit reward is left out."
        _, original = next(ancestors(member.origin), (None, None))
        if original is None:
            note += (
                " That adapter is not there any more, so nothing can say whether it has seen these prompts. "
                f"Train {member.label} again to be sure."
            )
        elif original.stage != name:
            note += f" To compare with it, --set {original.stage}.output_dir={parent.path}."
        notes.append(note)
    return notes


def describe_procedures(arms: Sequence[Arm]) -> list[str]:
    """Say where the members of an arm differ in more than their seed, so that it is not one procedure."""
    notes = []
    for arm in arms:
        settings = [_procedure(member) for member in arm.members]
        keys = dict.fromkeys(key for each in settings for key in each)
        unlike = [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]
        if unlike:
            values = "; ".join(f"{key}: {', '.join(repr(each.get(key)) for each in settings)}" for key in unlike[:3])
            more = f" and {len(unlike) - 3} more keys" if len(unlike) > 3 else ""
            notes.append(
                f"The members of {arm.name} differ in more than their seed ({values}{more}). What scatters between them is "
                "not the seed alone."
            )
    return notes


def _procedure(member: Member) -> Mapping[str, Any]:
    """Return what a member was trained with, without what says where results lie or concerns other stages."""
    made = member.origin or member.manifest
    others = {stage for stage in TRAINING_STAGES if stage != made.stage}
    flat = flatten({name: value for name, value in made.config.items() if name not in others})
    return {key: value for key, value in flat.items() if not {key.split(".")[0], key.split(".")[-1]} & set(FREE)}


def describe_formats(arms: Sequence[Arm]) -> list[str]:
    """Say in what the arms read the same prompt differently."""
    first, *others = members_of(arms)
    notes = []
    for other in others:
        pairs = {fact: (getattr(first.manifest, fact), getattr(other.manifest, fact)) for fact in FORMAT_FACTS}
        unlike = [f"{fact}: {one!r} and {two!r}" for fact, (one, two) in pairs.items() if one != two]
        if unlike:
            notes.append(
                f"{first.label} and {other.label} read the same prompt differently, each as it was trained to "
                f"({'; '.join(unlike)}). The base reads it as {first.label} does."
            )
    return notes


def describe_lineage(arms: Sequence[Arm]) -> dict[str, Any]:
    """Say which data, configuration, seed and hashes made each column."""
    references = find_references(arms)
    lineage: dict[str, Any] = {BASE: arms[0].members[0].manifest.base_model.model_dump()}
    for member in members_of(arms):
        made = member.manifest
        lineage[member.label] = {
            "path": portable_path(member.folder),
            "sha256": made.sha256,
            "reference": references[member.label],
            "seed": member.seed,
            "mlflow_run_id": made.mlflow.run_id,
            **made.model_dump(
                include={"created", "base_model", "parent", "datasets", "split", "plan", "git", "packages"}
            ),
        }
    return lineage
