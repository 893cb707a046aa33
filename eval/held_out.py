"""What no stage has trained on: the test side of the datasets, on which every model is measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.common.artifacts import Manifest, sha256_json
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError, listing
from scripts.common.lineage import HeldOutSide
from scripts.common.pairs_manifest import are_made_pairs
from scripts.common.paths import portable_path
from scripts.common.schema import Data
from scripts.common.stages import TRAINING_STAGES, planned_stages
from scripts.dataset.chat_format import ChatFormat, UnfitRow
from scripts.dataset.records import PARSERS, Feedback, Message, Preference, Record, load_datasets, load_rest_of_chain
from scripts.dataset.rendering import render_and_check
from scripts.dataset.split import IF_MOST, NearDuplicate, cluster_of, describe_near_duplicates, sort_by_side

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt that every model answers, and the answer that the data give to it."""

    source: str
    prompt: tuple[Message, ...]
    target: str
    cluster: str = ""

    @property
    def text(self) -> str:
        """Return what a user wrote or the record's own system message says, without earlier answers."""
        return "\n".join(message["content"] for message in self.prompt if message["role"] != "assistant")


@dataclass(frozen=True)
class HeldOut:
    """The records that no stage has trained on, and the files they come from: sha256 by path, for each stage."""

    records: tuple[Record | Preference, ...]
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    near_duplicates: tuple[NearDuplicate, ...] = ()  # left out, because a model may have learnt their like
    settings: Data | None = None  # of the configuration that reads them
    side: HeldOutSide = "test"

    def describe_left_out(self) -> list[str]:
        """Say which near-duplicates are left out, if any."""
        near = self.near_duplicates
        return [describe_near_duplicates(near, {self.side: len(self.records)})] if near else []

    @property
    def pairs(self) -> list[Preference]:
        """Return those that compare two answers."""
        return [record for record in self.records if isinstance(record, Preference)]

    def questions(self, most: int | None, seed: int = 0) -> list[Question]:
        """Return every different prompt once, or a random sample of `most` that the seed fixes, in the order of the data.

        A prompt is drawn by its own hash, so other records change little about which ones are in the sample.
        """
        found: dict[tuple[tuple[str, str], ...], Question] = {}
        for record in self.records:
            key = tuple((message["role"], message["content"]) for message in record.prompt)
            found.setdefault(key, Question(record.source, record.prompt, record.answer, cluster_of(record)))
        drawn = set(sorted(found, key=lambda key: sha256_json([seed, key]))[:most])
        return [question for key, question in found.items() if key in drawn]


def read_held_out(config: LoadedConfig, stages: Collection[str], side: HeldOutSide = "test") -> HeldOut:
    """Read one side of the datasets that these stages train on, without near-duplicates of what any stage learns from.

    Without the configured system message: each model reads the one that it was trained with.
    Raises: UserError when nothing is left.
    """
    values = config.values
    data = values.data.model_copy(update={"system_prompt": None})
    asked = [stage for stage in TRAINING_STAGES.values() if stage.name in stages]
    files = {
        stage.name: load_datasets(
            getattr(values, stage.name).dataset_path, PARSERS[stage.records], data, f"{stage.name}.dataset_path"
        )
        for stage in [stage for stage in asked if stage in planned_stages(values)] or asked
    }
    several = [file for of_stage in files.values() for file in of_stage]
    split = sort_by_side(several, data, load_rest_of_chain(values, stages))
    records = split.test if side == "test" else split.validation
    # An answer that was not liked is no target.
    records = tuple(record for record in records if not isinstance(record, Feedback) or record.liked)
    near = tuple(each for each in split.near_duplicates if each.side == side)
    earlier = {stage.continues for stage in TRAINING_STAGES.values() if stage.name in stages and stage.continues}
    if not records and not near and earlier - set(stages):  # pairs of make_pairs are made of training prompts only
        return read_held_out(config, [*stages, *earlier], side)
    if not records:
        head, ratio = f"data.{side}_ratio", getattr(data, f"{side}_ratio")
        if near:
            head = (
                f"{head}: each of its {len(near)} records is close to one of another side, so nothing can be compared"
            )
            raise UserError(listing(head, map(str, near), IF_MOST))
        raise UserError(
            f"{head}: {ratio:g} puts no record on the {side} side, so nothing can be compared. Raise it and train again."
        )
    hashes = {stage: {portable_path(file.path): file.sha256 for file in of_stage} for stage, of_stage in files.items()}
    return HeldOut(records, hashes, near, values.data, side)


def leave_out_unfit(held_out: HeldOut, chat: ChatFormat, positions: int | None, data: Data) -> HeldOut:
    """Return the records that a model can read and answer; training set the others aside, too.

    `positions` is the length of a model's table of them. Raises: UserError unless `data.on_bad_row` is `skip`.
    """
    fit: list[Record | Preference] = []
    unfit: list[str] = []
    for record in held_out.records:
        try:
            longest = max(len(row.input_ids) for row in render_and_check(chat, record))
        except UnfitRow as error:
            unfit.append(str(error))
            continue
        if positions and longest > positions:
            unfit.append(f"{record.source}: {longest} tokens, and the base has {positions} positions")
        else:
            fit.append(record)
    if unfit:
        head = f"{len(unfit)} of {len(held_out.records)} held-out records cannot be measured"
        if data.on_bad_row != "skip" or not fit:
            raise UserError(listing(head, unfit, "Change them, or set data.on_bad_row: skip to leave them out."))
        log.warning("%s", listing(head, unfit, "They are left out."))
    return replace(held_out, records=tuple(fit))


def describe_changes(folder: Path, manifest: Manifest, held_out: HeldOut) -> list[str]:
    """Say where a model is compared on other data than it was trained on, or on data that are read otherwise.

    With the same split none of it can have trained on a prompt that is held out: its text alone decides the side. But
    where a file has changed, the held-out prompt may be a trained one in new words.
    """
    return describe_settings(folder, manifest, held_out.settings) + describe_files(folder, manifest, held_out)


def describe_settings(folder: Path, manifest: Manifest, data: Data | None) -> list[str]:
    """Say which settings that change a record or the way it is written are others than those of the training."""
    if data is None:
        return []
    now = data.model_dump(mode="json")
    trained = {
        "system_prompt": manifest.system_prompt,
        "train_on": (manifest.config.get("data") or {}).get("train_on", now["train_on"]),
        "chat_template_kwargs": manifest.chat_template_kwargs,
        "template_date": manifest.template_date,
    }
    inherited = {key for key in ("chat_template_kwargs", "template_date") if now[key] is None}
    return [
        f"{folder}: was trained with data.{key}: {json.dumps(value, ensure_ascii=False)}, but the configuration has "
        f"{json.dumps(now[key], ensure_ascii=False)}. It is measured as it was trained. To change it, train again."
        for key, value in trained.items()
        if key not in inherited and now[key] != value
    ]


def describe_files(folder: Path, manifest: Manifest, held_out: HeldOut) -> list[str]:
    """Say which data files are others than those of the training."""
    compared = held_out.files.get(manifest.stage)
    trained = {source.path: source.sha256 for source in manifest.datasets}
    if not compared or not trained or set(trained.values()) == set(compared.values()) or are_made_pairs(trained):
        return []  # of pairs that make_pairs made none is held out, wherever the others come from
    changed = [path for path in trained if path in compared and trained[path] != compared[path]]
    notes = [
        f"{folder}: {path} has changed since it was trained on ({trained[path][:12]}…, now {compared[path][:12]}…). "
        "Records that were added, removed or answered differently are no harm. But a prompt in new words may be held out "
        "although it was trained on in the old ones: if there are such, train again."
        for path in changed
    ]
    if set(trained) != set(compared):
        key, first = f"{manifest.stage}.dataset_path", next(iter(trained))
        notes.append(
            f"{folder}: was trained on {' and '.join(trained)}, but is compared on {' and '.join(compared)}, which {key} "
            f"names; mean its own data? --set {key}={first}"
        )
    return notes
